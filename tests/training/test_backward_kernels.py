"""Gradients of the Triton kernels against those that autograd takes of the torch lines in float64.

With a GPU the compiled kernels run; without one Triton's interpreter does, on the CPU (conftest).
"""

import math
from collections.abc import Callable
from copy import deepcopy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from examples import exhaustive
from kernel_checks import (
    DEVICE,
    DTYPES,
    MIN_TRITON,
    ON_GPU,
    compiled_cases,
    poison_allocations,
)
from networks import DIT_KINDS, random_dit

pytest.importorskip("triton", minversion=MIN_TRITON)

from sana_cli.kernels import dispatch
from sana_cli.kernels.linear_attention import relu_linear_attention
from sana_cli.kernels.selfcheck import decibels, least
from sana_cli.models.dit import DiT
from training import depthwise_glu_backward_triton
from training.diffusion import build
from training.fused import (
    FusedLinearAttention,
    FusedMixFFN,
    depthwise_glu,
    fuse,
    linear_attention,
)

ROOT = Path(__file__).resolve().parents[2]
Function = Callable[..., Tensor]


@pytest.fixture(
    params=[DTYPES[-1], *exhaustive(*DTYPES[:-1])],
    ids=lambda dtype: str(dtype).removeprefix("torch."),
)
def dtype(request) -> torch.dtype:
    return request.param


@pytest.fixture
def draw(dtype) -> Callable[..., Tensor]:
    generator = torch.Generator().manual_seed(5)

    def normal(*shape: int, size: float = 1.0, dtype: torch.dtype = dtype) -> Tensor:
        return (torch.randn(shape, generator=generator) * size).to(DEVICE, dtype)

    return normal


@pytest.fixture(autouse=True)
def in_triton(monkeypatch):
    """Whatever the device; and what a kernel leaves out shows."""
    monkeypatch.setattr(dispatch, "uses_triton", lambda operation, x, dtype=None: True)
    poison_allocations(monkeypatch)


def with_gradients(function: Function, given: Tensor, *inputs: Tensor) -> list[Tensor]:
    """The result, and the gradients of the inputs where its own is `given`."""
    inputs = tuple(x.detach().clone().requires_grad_() for x in inputs)
    result = function(*inputs)
    return [result.detach(), *torch.autograd.grad(result, inputs, given)]


@pytest.fixture
def check(monkeypatch) -> Callable[..., None]:
    """Near the definition in float64, and the same bits again."""

    def check(fused: Function, definition: Function, given: Tensor, *inputs: Tensor) -> None:
        found, again = (with_gradients(fused, given, *inputs) for _ in range(2))
        with monkeypatch.context() as patch:
            patch.setattr(Tensor, "float", Tensor.double)  # where the definition widens itself
            exact = with_gradients(definition, given.double(), *(x.double() for x in inputs))
        for one, same, true, like in zip(found, again, exact, (given, *inputs), strict=True):
            assert one.dtype == like.dtype
            assert torch.equal(one, same)
            assert decibels(one, true) > least(given.dtype)

    return check


def attention(q: Tensor, k: Tensor, v: Tensor, heads: int) -> Tensor:
    q, k, v = (x.transpose(1, 2).unflatten(1, (heads, -1)) for x in (q, k, v))
    return relu_linear_attention(q, k, v).flatten(1, 2).transpose(1, 2)


def convolved_and_gated(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    y = F.conv2d(x.movedim(-1, 1), weight, bias, padding=1, groups=len(weight))
    value, gate = y.movedim(1, -1).chunk(2, -1)
    return value * F.silu(gate)


@pytest.mark.parametrize(
    ("batch", "tokens", "heads", "head"),
    [(1, 2, 1, 32), (2, 67, 3, 32), (3, 9, 5, 16), (1, 33, 2, 64), (1, 4, 9, 32),
     (1, 515, 1, 32), (1, 1030, 1, 16)],
)  # fmt: skip
def test_tokens_that_attend(draw, check, batch, tokens, heads, head):
    q, k, v, given = (draw(batch, tokens, heads * head) for _ in range(4))
    check(
        lambda *x: linear_attention(*x, heads),
        lambda *x: attention(*x, heads),
        *(given, q, k, v),
    )


@pytest.fixture
def tf32(monkeypatch):
    """The last 13 bits of what tensor cores multiply are dropped, as the interpreter does not."""
    if ON_GPU:
        return
    from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

    def cut(x: Any) -> Any:
        if x.data.dtype != np.float32:
            return x
        return TensorHandle((x.data.view(np.int32) & ~0x1FFF).view(np.float32), x.dtype)

    dot = InterpreterBuilder.create_dot
    monkeypatch.setattr(
        InterpreterBuilder, "create_dot", lambda self, a, b, *rest: dot(self, cut(a), cut(b), *rest)
    )


@pytest.mark.parametrize("mean", [0, 4])
def test_what_queries_learn_survives_tf32_where_values_have_a_mean(mean, tf32):
    """Where their gradient is the small difference of two large terms, in bits of the state."""
    generator = torch.Generator().manual_seed(5)
    q, k, v, given = torch.randn(4, 1, 67, 32, generator=generator).to(DEVICE, torch.float16)
    inputs = q, k, v + mean
    found = with_gradients(lambda *x: linear_attention(*x, 1), given, *inputs)
    exact = with_gradients(
        lambda *x: attention(*x, 1), given.double(), *(x.double() for x in inputs)
    )
    assert decibels(found[1], exact[1]) > 55


def test_a_token_alone_is_its_value_whatever_it_asks(draw, dtype):
    """What is left of the gradients of its query and key is rounding."""
    q, k, v, given = (draw(3, 1, 64) for _ in range(4))
    function = lambda *x: linear_attention(*x, 2)  # noqa: E731
    out, of_q, of_k, of_v = with_gradients(function, given, q, k, v)
    assert decibels(out, v.double()) > least(dtype)
    assert decibels(of_v, given.double()) > least(dtype)
    assert max(of_q.abs().max(), of_k.abs().max()) < 1e-5


def test_a_query_without_features_asks_for_no_gradient(draw):
    q, k, v, given = (draw(1, 5, 32) for _ in range(4))
    q[:, 2] = -q[:, 2].abs()
    with_it = with_gradients(lambda *x: linear_attention(*x, 1), given, q, k, v)
    others = [0, 1, 3, 4]
    without = with_gradients(
        lambda q, k, v: linear_attention(q, k, v, 1)[:, others], given[:, others], q, k, v
    )
    assert not with_it[1][:, 2].any()
    for one, other in zip(with_it[1:], without[1:], strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("lost", [0, 1, 2])
def test_a_nan_in_a_query_key_or_value_is_not_lost(draw, lost):
    inputs = [draw(1, 5, 32) for _ in range(3)]
    inputs[lost][0, 1, 3] = math.nan
    _, of_q, *_ = with_gradients(lambda *x: linear_attention(*x, 1), draw(1, 5, 32), *inputs)
    assert of_q.isnan().any()


@pytest.mark.parametrize(
    ("batch", "height", "width", "channels"),
    [(1, 1, 1, 8), (1, 1, 5, 8), (1, 5, 1, 8), (3, 3, 5, 20), (1, 9, 9, 8), (1, 1, 2, 33)],
)  # fmt: skip
def test_convolved_and_gated_pixels(draw, check, batch, height, width, channels):
    x, given = draw(batch, height, width, 2 * channels), draw(batch, height, width, channels)
    weight, bias = draw(2 * channels, 1, 3, 3, size=1 / 3), draw(2 * channels)
    check(depthwise_glu, convolved_and_gated, given, x, weight, bias)


def test_programs_that_go_from_strip_to_strip(draw, check, monkeypatch):
    """As they do where there are many pictures; the last has fewer strips than the others."""
    monkeypatch.setattr(depthwise_glu_backward_triton, "PROGRAMS", 3)
    x, given = draw(5, 1, 9, 24), draw(5, 1, 9, 12)
    weight, bias = draw(24, 1, 3, 3, size=1 / 3), draw(24)
    check(depthwise_glu, convolved_and_gated, given, x, weight, bias)


def test_narrow_pixels_and_wide_weights(draw, check, dtype):
    """Under autocast: what the weights learn is not rounded to the dtype of pixels."""
    x, given = draw(2, 3, 5, 16), draw(2, 3, 5, 8)
    weight, bias = (draw(16, *rest, dtype=torch.float32) for rest in ((1, 3, 3), ()))
    check(depthwise_glu, convolved_and_gated, given, x, weight, bias)


@pytest.mark.exhaustive
def test_backward_kernels_compile_for_a_gpu_that_is_not_here():
    # `training` is found behind everything installed, as in conftest.
    entry = "import runpy, sys; sys.path.append(sys.argv.pop(1)); "
    entry += "runpy.run_module('training.aot', run_name='__main__', alter_sys=True)"
    compiled = {case.split()[0] for case in compiled_cases("-c", entry, str(ROOT))}
    assert {"query_gradient_kernel", "key_value_gradient_kernel"} <= compiled
    assert {"gate_gradient_kernel", "depthwise_gradient_kernel"} <= compiled


# --- the transformer that training runs -----------------------------------------------------------

NARROW = {"dtype": torch.float16, "enabled": True}
SMALL = {
    "num_layers": 1,
    "num_attention_heads": 2,
    "num_cross_attention_heads": 2,
    "cross_attention_head_dim": 32,
    "cross_attention_dim": 64,
}


def learnt(model: DiT, **autocast: Any) -> dict[str, Tensor]:
    """The velocity, and the gradient of every parameter."""
    generator = torch.Generator().manual_seed(3)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).to(DEVICE)

    latents, noise, text = draw(2, 32, 4, 3), draw(2, 32, 4, 3), draw(2, 4, 16)
    with torch.autocast(DEVICE, **{"enabled": False} | autocast):
        time = torch.tensor([700.0, 40.0], device=DEVICE)
        velocity = model(latents, time, model.project_text(text)).float()
    F.mse_loss(velocity, noise).backward()
    found = {name: p.grad for name, p in model.named_parameters()}
    # What is added to all keys alike changes nothing after a softmax, unless they are normalised.
    kept = {n: g for n, g in found.items() if model.config.qk_norm or "attn2.to_k.bias" not in n}
    return {"velocity": velocity.detach(), **kept}


@pytest.fixture(params=["0.6B", *exhaustive("qk-norm")])
def plain(request) -> DiT:
    return random_dit(**SMALL, **DIT_KINDS[request.param]).requires_grad_(True).to(DEVICE)


def test_a_transformer_learns_the_same_from_its_gradients(plain):
    exact = learnt(deepcopy(plain))
    found = learnt(fuse(plain))
    assert found.keys() == exact.keys()
    for name, value in found.items():
        assert decibels(value, exact[name].double()) > 90, name


def test_under_autocast_it_learns_no_worse(plain):
    """In float16, as the interpreter has no bfloat16. Parameters and their gradients stay wide."""
    exact, rounded = learnt(deepcopy(plain)), learnt(deepcopy(plain), **NARROW)
    found = learnt(fuse(plain), **NARROW)
    for name, value in found.items():
        assert value.dtype == torch.float32
        true = exact[name].double()
        assert decibels(value, true) > decibels(rounded[name], true) - 3, name


def test_without_triton_it_learns_the_same_too(plain, monkeypatch):
    monkeypatch.setattr(dispatch, "uses_triton", lambda operation, x, dtype=None: False)
    exact, found = learnt(deepcopy(plain)), learnt(fuse(plain))
    for name, value in found.items():
        assert decibels(value, exact[name].double()) > 90, name


def test_training_builds_it(plain):
    built = build(plain.config, text_scale=0.01)
    assert type(built.transformer_blocks[0].attn1) is FusedLinearAttention
    assert type(built.transformer_blocks[0].ff) is FusedMixFFN
    assert built.state_dict().keys() == plain.state_dict().keys()
