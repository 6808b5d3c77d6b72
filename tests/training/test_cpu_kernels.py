"""The kernels of a CPU's training step against plain torch in float64, there and back."""

import pytest
import torch
import torch.nn.functional as F

from sana_cli.models.dit import modulate
from training import cpu_kernels

pytestmark = pytest.mark.skipif(
    cpu_kernels.why_not() is not None, reason=f"no CPU kernels: {cpu_kernels.why_not()}"
)
ULP = 2.0**-8  # the largest error of rounding to bfloat16, as a part of the value
SHAPES = [(1, (1, 1)), (2, (5, 3)), (3, (8, 8)), (1, (16, 16))]


def drawn(*shape: int, narrow: bool = True, by: float = 1.0) -> torch.Tensor:
    made = by * torch.randn(shape)
    return (made.bfloat16() if narrow else made).requires_grad_()


def check(kernel, exact, given: list[torch.Tensor]) -> None:
    """Results and gradients: each as a whole within the rounding of what goes in and out."""
    wide = [x.detach().double().requires_grad_() for x in given]
    found, expected = kernel(*given), exact(*wide)
    found, expected = ((x,) if torch.is_tensor(x) else x for x in (found, expected))
    into = [torch.randn_like(x) for x in found]
    found = (*found, *torch.autograd.grad(found, given, into))
    expected = (*expected, *torch.autograd.grad(expected, wide, [x.double() for x in into]))
    assert len(found) == len(expected)
    for i, (a, b) in enumerate(zip(found, expected, strict=True)):
        assert a.shape == b.shape and a.isfinite().all()
        bound = ULP if a.dtype == torch.bfloat16 else ULP / 16  # its sigmoid is as coarse
        assert (a.double() - b).norm() <= bound * b.norm() + 1e-12, i


@pytest.mark.parametrize("batch, grid", SHAPES)
@pytest.mark.parametrize("hidden", [8, 32, 160])
def test_gated_depthwise(batch, grid, hidden):
    torch.manual_seed(0)

    def exact(h, up, weight, bias):
        image = F.silu(h + up).unflatten(1, grid).movedim(-1, 1)
        value, gate = F.conv2d(image, weight, bias, padding=1, groups=2 * hidden).chunk(2, dim=1)
        return (value * F.silu(gate)).movedim(1, -1).flatten(1, 2)

    given = [
        drawn(batch, grid[0] * grid[1], 2 * hidden, by=3.0),
        drawn(2 * hidden, narrow=False),
        drawn(2 * hidden, 1, 3, 3, narrow=False),
        drawn(2 * hidden, narrow=False),
    ]
    check(lambda *x: cpu_kernels.gated_depthwise(*x, grid), exact, given)


def test_gate_bears_any_number():
    """None is so large that the sigmoid becomes NaN."""
    numbers = torch.tensor([-1e30, -1e4, -88.0, 0.0, 88.0, 1e4]).bfloat16()
    h = numbers.repeat(4).view(1, 4, 6).requires_grad_()
    weight = torch.ones(6, 1, 3, 3, requires_grad=True)
    none = torch.zeros(6, requires_grad=True)
    out = cpu_kernels.gated_depthwise(h, none, weight, none, (2, 2))
    assert out.isfinite().all()
    assert all(x.isfinite().all() for x in torch.autograd.grad(out.sum(), (h, weight)))


@pytest.mark.parametrize("batch, grid", SHAPES)
@pytest.mark.parametrize("heads, width", [(2, 32), (7, 32), (3, 16), (1, 48)])
def test_linear_attention(batch, grid, heads, width):
    torch.manual_seed(0)

    def exact(qkv):
        q, k, v = qkv.unflatten(-1, (3, heads, width)).permute(2, 0, 3, 1, 4)
        q, k = F.relu(q), F.relu(k)
        out = q @ (k.mT @ v) / (q @ k.sum(-2)[..., None] + 1e-15)
        return out.transpose(1, 2).flatten(2)

    given = [drawn(batch, grid[0] * grid[1], 3 * heads * width)]
    check(lambda qkv: cpu_kernels.linear_attention(qkv, heads), exact, given)


def test_a_query_without_a_feature_attends_to_nothing():
    qkv = torch.randn(1, 6, 3 * 32).bfloat16()
    qkv[:, :3, :32] = -1
    qkv.requires_grad_()
    out = cpu_kernels.linear_attention(qkv, 1)
    assert not out[:, :3].any() and out[:, 3:].any()
    (gradient,) = torch.autograd.grad(out.sum(), qkv)
    assert gradient.isfinite().all() and not gradient[:, :3, :32].any()


@pytest.mark.parametrize("batch, grid", SHAPES)
@pytest.mark.parametrize("heads, width", [(2, 32), (7, 32), (1, 48)])
@pytest.mark.parametrize("tokens", [1, 9, 40])
def test_cross_attention(batch, grid, heads, width, tokens):
    """With one token of text left in the first picture, and in the next all or some."""
    torch.manual_seed(0)
    mask = torch.rand(batch, tokens) < 0.7
    mask[0], mask[1:, -1] = False, True
    mask[0, tokens // 2] = True

    def exact(q, kv):
        q, k, v = (
            x.unflatten(-1, (heads, width)).transpose(1, 2) for x in (q, *kv.chunk(2, dim=-1))
        )
        scores = (q @ k.mT * width**-0.5).masked_fill(~mask[:, None, None], -torch.inf)
        return (scores.softmax(-1) @ v).transpose(1, 2).flatten(2)

    width_all = heads * width
    given = [drawn(batch, grid[0] * grid[1], width_all), drawn(batch, tokens, 2 * width_all)]
    if tokens == 1:  # one token is all there is: its weight is one, and no gradient goes to q
        found = cpu_kernels.cross_attention(*given, mask, heads)
        assert torch.equal(found, given[1][..., width_all:].expand_as(found))
    else:
        check(lambda *x: cpu_kernels.cross_attention(*x, mask, heads), exact, given)


@pytest.mark.parametrize("batch, grid", SHAPES)
@pytest.mark.parametrize("width", [24, 64, 224])
def test_the_stream(batch, grid, width):
    torch.manual_seed(0)
    x = (torch.randn(batch, grid[0] * grid[1], width) * 3 + 1).requires_grad_()
    y = drawn(*x.shape)
    bias = drawn(width, narrow=False)
    rows = drawn(batch, 3, width, narrow=False)

    def modulated(x, rows):
        shift, scale, _ = rows.unbind(1)
        if x.dtype == torch.float64:
            return modulate(x, shift[:, None], scale[:, None], 1e-6)
        return cpu_kernels.modulated(x, shift, scale, 1e-6)

    def joined(x, y, bias, rows):
        shift, scale, gate = rows.unbind(1)
        if x.dtype == torch.float32:
            return cpu_kernels.joined(x, y, bias, gate, shift, scale, 1e-6)
        x = x + gate[:, None] * (y + bias)
        return x, modulate(x, shift[:, None], scale[:, None], 1e-6)

    def plain(x, y):
        if x.dtype == torch.float32:
            return cpu_kernels.joined(x, y, None)
        return x + y, x + y

    check(modulated, modulated, [x, rows])
    check(joined, joined, [x, y, bias, rows])
    check(plain, plain, [x, y])


@pytest.mark.parametrize("width", [3, 8, 16, 100, 128])
def test_channel_norm(width):
    from sana_cli.models.dc_ae import ChannelRMSNorm

    torch.manual_seed(0)
    image = torch.randn(3, width, 5, 7, dtype=torch.bfloat16)
    image = image.to(memory_format=torch.channels_last).requires_grad_()

    def exact(x, weight, bias):
        norm = ChannelRMSNorm(width).double()
        return torch.func.functional_call(norm, {"weight": weight, "bias": bias}, (x,))

    given = [image, drawn(width, narrow=False), drawn(width, narrow=False)]
    check(lambda *x: cpu_kernels.channel_norm(*x, 1e-5), exact, given)


@pytest.mark.parametrize("grid", [(4, 4), (1, 1), (5, 3)])
def test_the_model_learns_the_same(grid, monkeypatch):
    """Its gradients are no farther from float64 than those of torch's own way in bfloat16."""
    from training.arithmetic import autocast, fast_products
    from training.diffusion import build
    from training.settings import TOY

    torch.manual_seed(0)
    model = build(TOY.transformer, text_scale=1.0)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=parameter.shape[-1] ** -0.5)
    latents, text = torch.randn(4, 32, *grid), torch.randn(4, 9, TOY.text_width)
    mask = torch.arange(9) < torch.tensor([9, 5, 1, 7])[:, None]

    def learnt(dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
        model.to(dtype).zero_grad()
        told = torch.linspace(0, 1000, 4, dtype=dtype), model.project_text(text.to(dtype)), mask
        loss = model(latents.to(dtype), *told).double().square().mean()
        loss.backward()
        parts = [p.grad.flatten() for p in model.parameters()]
        return loss.detach(), torch.cat(parts).double()

    def errors() -> tuple[float, float]:
        with fast_products("cpu"), autocast("cpu"):
            loss, gradient = learnt(torch.float32)
        off = (gradient - exact).norm() / exact.norm()
        return abs(loss / exact_loss - 1).item(), off.item()

    exact_loss, exact = learnt(torch.float64)
    called = []
    real = cpu_kernels.joined
    monkeypatch.setattr(cpu_kernels, "joined", lambda *x: called.append(1) or real(*x))
    fused = errors()
    assert len(called) == 3 * TOY.transformer.num_layers
    monkeypatch.setattr(cpu_kernels, "why_not", lambda: "for a comparison")
    plain = errors()
    assert len(called) == 3 * TOY.transformer.num_layers
    assert fused[0] < 1e-2
    assert fused[1] < max(1.2 * plain[1], 1e-2)


def test_it_says_why_it_is_not_used(monkeypatch):
    cpu_kernels._built.cache_clear()
    monkeypatch.setenv("CXX", "false")
    try:
        assert "false cannot build them" in cpu_kernels.why_not()
    finally:
        cpu_kernels._built.cache_clear()
