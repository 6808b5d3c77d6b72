"""ControlNet, plain and fused, against diffusers' `SanaControlNetModel` on random weights."""

import copy
import math

import pytest
import torch
from diffusers import SanaControlNetModel, SanaTransformer2DModel

from examples import exhaustive
from networks import relative_error
from reference import LIKE_0_6B, LIKE_1_6B
from sana_cli.models.configs import ControlNetConfig, DiTConfig
from sana_cli.models.controlnet import ControlNet
from sana_cli.models.dit import DiT
from sana_cli.models.fused_dit import FusedDiT, peak_bytes
from sana_cli.system.memory import PeakMemory
from test_fused_dit import flops

CHANNELS = 16  # of a text state
BRANCH_BLOCKS = 2


def randomise(network: torch.nn.Module) -> torch.nn.Module:
    """Draw norms and tables too, so that no term is hidden by a zero or a one.

    diffusers starts a ControlNet with zeros, by which it would change nothing.
    """
    for name, parameter in network.named_parameters():
        if "norm" in name:
            parameter.data = 1 + 0.3 * torch.randn_like(parameter)
        elif "table" in name or name.endswith("bias"):
            parameter.data = 0.3 * torch.randn_like(parameter)
        elif "controlnet_blocks" in name or "input_block" in name:
            parameter.data = torch.randn_like(parameter) / math.sqrt(parameter.shape[1])
    return network.eval().requires_grad_(False)


def theirs(width: dict = LIKE_0_6B, blocks: int = BRANCH_BLOCKS, **kind):
    """A transformer and a ControlNet of diffusers."""
    torch.manual_seed(0)
    shared = {"caption_channels": CHANNELS, **width}
    branch = {name: value for name, value in kind.items() if name != "qk_norm"}
    dit = SanaTransformer2DModel(num_layers=4, **shared, **kind)
    controlnet = SanaControlNetModel(num_layers=blocks, **shared, **branch)
    return randomise(dit), randomise(controlnet)


def ours(dit, controlnet, **changes) -> tuple[DiT, ControlNet]:
    """Ours, with the configs and weights of diffusers' networks."""
    made = []
    for kind, config, reference in (
        (DiT, DiTConfig, dit),
        (ControlNet, ControlNetConfig, controlnet),
    ):
        fields = {k: v for k, v in reference.config.items() if k in config.__dataclass_fields__}
        if kind is ControlNet:
            fields |= changes
        network = kind(config(**fields)).eval().requires_grad_(False)
        network.load_state_dict(reference.state_dict())
        made.append(network)
    return tuple(made)


def inputs(height: int = 6, width: int = 5, lengths=(1, 7)):
    """Latents, control latents, padded text states and their mask."""
    generator = torch.Generator().manual_seed(1)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator)

    mask = torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]
    return (
        draw(1, 32, height, width),
        draw(1, 32, height, width),
        draw(len(lengths), max(lengths), CHANNELS),
        mask,
    )


def expected(dit, controlnet, latents, control, text, mask, scale) -> torch.Tensor:
    """As `SanaControlNetPipeline` calls the two networks."""
    batch, timestep = len(text), torch.full((len(text),), 700)
    call = {"encoder_hidden_states": text, "timestep": timestep}
    call |= {"encoder_attention_mask": mask.long(), "return_dict": False}
    latents = latents.expand(batch, -1, -1, -1)
    (residuals,) = controlnet(
        latents,
        controlnet_cond=control.expand(batch, -1, -1, -1),
        conditioning_scale=scale,
        **call,
    )
    return dit(latents, controlnet_block_samples=tuple(residuals), **call)[0]


def fuse(dit: DiT, controlnet: ControlNet, row_chunk: int | None = None) -> FusedDiT:
    fused = FusedDiT(copy.deepcopy(dit), copy.deepcopy(controlnet))
    fused.row_chunk = row_chunk
    return fused


def run(fused: FusedDiT, latents, control, text, mask, scale=1.0, **call) -> torch.Tensor:
    texts = [fused.encode_text(one[None, keep]) for one, keep in zip(text, mask, strict=True)]
    time = fused.time_modulations([900.0, 700.0])[1]
    return fused(latents, time, texts, fused.encode_control(control, scale), **call)


@pytest.mark.parametrize("width", [LIKE_0_6B, LIKE_1_6B], ids=["0.6B", "1.6B"])
@pytest.mark.parametrize("scale", [1.0, 0.4])
def test_the_plain_network_matches_diffusers(width, scale):
    pair = theirs(width)
    dit, controlnet = ours(*pair)
    latents, control, text, mask = inputs()
    want = expected(*pair, latents, control, text, mask, scale)
    both = (tensor.expand(2, -1, -1, -1) for tensor in (latents, control))
    got = controlnet(dit, *both, torch.tensor([700, 700]), text, mask, scale)
    assert relative_error(got, want) < 1e-5
    # The control matters, so the comparison means something.
    assert relative_error(expected(*pair, latents, -control, text, mask, scale), want) > 0.01


KINDS = {
    "plain": {},
    "qk-norm in the transformer": {"qk_norm": "rms_norm_across_heads"},
    "positions": {"interpolation_scale": 2.0},
}


@pytest.mark.parametrize("row_chunk", [None, 4, 1])
@pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)
def test_the_fused_network_matches_diffusers_whole_and_in_row_chunks(kind, row_chunk):
    pair = theirs(**kind)
    case = inputs()
    want = expected(*pair, *case, 0.7)
    assert relative_error(run(fuse(*ours(*pair), row_chunk), *case, 0.7), want) < 1e-5


@pytest.mark.parametrize("lengths", [(1,), (7,), (90, 3)], ids=str)
def test_without_guidance_and_with_texts_of_any_length(lengths):
    pair = theirs()
    case = inputs(lengths=lengths)
    assert relative_error(run(fuse(*ours(*pair)), *case), expected(*pair, *case, 1.0)) < 1e-5


def test_as_many_blocks_as_the_transformer_can_take():
    pair = theirs(blocks=3)
    case = inputs()
    assert relative_error(run(fuse(*ours(*pair)), *case), expected(*pair, *case, 1.0)) < 1e-5


@pytest.mark.parametrize("row_chunk", [None, 4])
def test_the_wiring_of_nvlabs(row_chunk):
    """Block 0 of the branch starts from block 0's output, and its result joins right there."""
    dit, controlnet = ours(*theirs(), wiring="nvlabs")
    latents, control, text, mask = inputs()
    both = [tensor.expand(2, -1, -1, -1) for tensor in (latents, control)]
    timestep = torch.tensor([700, 700])
    grid, bias = latents.shape[2:], (~mask)[:, None, None] * -1e4

    # As NVlabs' SanaMSControlNet reads: block i takes x + the skip of control block i - 1.
    modulation, time = dit.time_embed(timestep)
    own_modulation, _ = controlnet.time_embed(timestep)
    caption = dit.project_text(text)
    own_caption = controlnet.caption_norm(controlnet.caption_projection(text))
    x = dit.transformer_blocks[0](dit.patch_embed(both[0]), caption, modulation, bias, grid)
    signal = x + controlnet.input_block(controlnet.patch_embed(both[1]))
    for i in range(1, BRANCH_BLOCKS + 1):
        own = controlnet.transformer_blocks[i - 1]
        signal = own(signal, own_caption, own_modulation, bias, grid)
        x = x + controlnet.controlnet_blocks[i - 1](signal)
        x = dit.transformer_blocks[i](x, caption, modulation, bias, grid)
    for block in dit.transformer_blocks[BRANCH_BLOCKS + 1 :]:
        x = block(x, caption, modulation, bias, grid)
    want = dit.output(x, time, grid)

    assert relative_error(controlnet(dit, *both, timestep, text, mask), want) < 1e-5
    assert (
        relative_error(run(fuse(dit, controlnet, row_chunk), latents, control, text, mask), want)
        < 1e-5
    )
    other = ControlNet(ControlNetConfig(**vars(controlnet.config) | {"wiring": "diffusers"}))
    other.requires_grad_(False).load_state_dict(controlnet.state_dict())
    assert relative_error(run(fuse(dit, other), latents, control, text, mask), want) > 0.01


@pytest.mark.parametrize(("dtype", "bound"), [(torch.bfloat16, 2e-2), (torch.float16, 2e-3)])
def test_half_precision_differs_by_its_own_rounding(dtype, bound):
    dit, controlnet = ours(*theirs())
    latents, control, text, mask = inputs()
    want = run(fuse(dit, controlnet), latents, control, text, mask)
    narrow = [tensor.to(dtype) for tensor in (latents, control, text)]
    got = run(fuse(dit.to(dtype), controlnet.to(dtype)), *narrow, mask)
    assert got.dtype == dtype
    assert relative_error(got.float(), want) < bound


def test_without_a_control_image_it_is_the_transformer_alone():
    dit, controlnet = ours(*theirs())
    latents, _, text, mask = inputs()
    plain, pair = FusedDiT(copy.deepcopy(dit)), fuse(dit, controlnet)
    velocities = []
    for fused in (plain, pair):
        texts = [fused.encode_text(one[None, keep]) for one, keep in zip(text, mask, strict=True)]
        velocities.append(fused(latents, fused.time_modulations([700.0])[0], texts))
    assert torch.equal(*velocities)


# --- cost --------------------------------------------------------------------------------------


@pytest.mark.parametrize(("wiring", "shared"), [("diffusers", 2), ("nvlabs", 1)])
def test_the_first_self_attention_is_computed_once_for_all_texts_in_the_branch_too(wiring, shared):
    dit, controlnet = ours(*theirs(), wiring=wiring)
    fused = fuse(dit, controlnet)
    latents, control, text, _ = inputs(8, 8, (1, 1))
    texts = [fused.encode_text(one[None, :1]) for one in text]
    time, context = fused.time_modulations([700.0])[0], fused.encode_control(control)
    apart = sum(flops(lambda t=t: fused(latents, time, [t], context)) for t in texts)
    saved = apart - flops(lambda: fused(latents, time, texts, context))
    # Per first block: q, k, v, out, and the sums over keys and values and their use.
    width, tokens = dit.config.width, 64
    attention = 4 * 2 * tokens * width**2 + 2 * 2 * tokens * width * 32
    embeddings = (2 if wiring == "diffusers" else 1) * 2 * tokens * 32 * width
    assert saved == pytest.approx(shared * attention + embeddings, rel=0.05)


def test_the_control_image_is_embedded_once_an_image():
    dit, controlnet = ours(*theirs())
    width, tokens = dit.config.width, 64
    fused = fuse(dit, controlnet)
    latents, control, text, _ = inputs(8, 8, (1,))
    texts, time = [fused.encode_text(text[:1])], fused.time_modulations([700.0])[0]
    context = fused.encode_control(control)
    added = flops(lambda: fused(latents, time, texts, context))
    added -= flops(lambda: fused(latents, time, texts))
    block, x = fused.controlnet.blocks[0], torch.randn(1, tokens, width)
    modulation = torch.randn(6, width).unbind()
    of_block = flops(lambda: block(x, modulation, [texts[0][0]], (8, 8), None))
    output = 2 * tokens * width**2
    noisy_latents = 2 * tokens * 32 * width
    assert added == BRANCH_BLOCKS * (of_block + output) + noisy_latents


@pytest.mark.parametrize("row_chunk", [8, *exhaustive(None, 1)])
@pytest.mark.parametrize("wiring", ["diffusers", "nvlabs"])
def test_the_predicted_peak_includes_the_branch(wiring, row_chunk):
    dit, controlnet = ours(*theirs(), wiring=wiring)
    config, branch, size = dit.config, controlnet.config, (32, 24)
    weights = sum(p.nbytes for n in (dit, controlnet) for p in n.parameters())
    fused = fuse(dit, controlnet, row_chunk)
    latents, control, text, mask = inputs(*size, (1, 300))
    with PeakMemory() as memory:
        run(fused, latents, control, text, mask)
    options = {"row_chunk": row_chunk, "fold": row_chunk is None}
    predicted = peak_bytes(config, torch.float32, size, (1, 300), 2, controlnet=branch, **options)
    assert predicted == pytest.approx(weights + memory.peak, rel=0.1)
    assert predicted > 1.1 * peak_bytes(config, torch.float32, size, (1, 300), 2, **options)


# --- configs -----------------------------------------------------------------------------------


def test_the_released_config_has_the_tensors_of_diffusers():
    narrow = {"num_attention_heads": 36, "num_cross_attention_heads": 16}
    narrow |= {"cross_attention_head_dim": 72, "cross_attention_dim": 1152}
    for width in ({}, narrow):
        with torch.device("meta"):
            mine, reference = ControlNet(ControlNetConfig(**width)), SanaControlNetModel(**width)
        shapes = [
            {name: tensor.shape for name, tensor in network.state_dict().items()}
            for network in (mine, reference)
        ]
        assert shapes[0] == shapes[1]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"wiring": "comfy"}, "wiring is 'comfy', not one of diffusers, nvlabs"),
        ({"qk_norm": "rms_norm_across_heads"}, "neither qk_norm nor guidance_embeds"),
        ({"guidance_embeds": True}, "neither qk_norm nor guidance_embeds"),
        ({"wiring": "nvlabs", "interpolation_scale": 1.0}, "interpolation_scale must be null"),
        ({"num_layers": 0}, "num_layers is 0"),
    ],
)
def test_a_config_that_no_controlnet_has_is_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        ControlNetConfig(**changes)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (LIKE_0_6B, "the ControlNet has width 2240, the transformer 288"),
        ({"num_layers": 7}, "the ControlNet has 7 blocks, the transformer only 7"),
        ({"caption_channels": 64}, "caption_channels 2304, the transformer 64"),
        ({"guidance_embeds": True}, "no ControlNet for Sana-Sprint"),
    ],
)
def test_a_controlnet_of_another_transformer_is_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        ControlNetConfig().check_matches(DiTConfig(**changes))
