"""Perturbed-attention guidance against diffusers' attention processors, and what it costs."""

import copy

import pytest
import torch
from diffusers import SanaPAGPipeline, SanaTransformer2DModel
from diffusers.pipelines.pag.pag_utils import PAGMixin

from examples import exhaustive
from networks import relative_error
from reference import LIKE_0_6B, LIKE_1_6B
from sana_cli.models.configs import DiTConfig
from sana_cli.models.dit import DiT
from sana_cli.models.fused_dit import FusedDiT, peak_bytes
from sana_cli.system.memory import PeakMemory
from test_controlnet import CHANNELS, fuse, inputs, ours, randomise, run, theirs
from test_fused_dit import flops

BLOCKS = 4


class Perturbed(PAGMixin):
    """A transformer with the attention processors that `SanaPAGPipeline` gives it."""

    def __init__(self, transformer: SanaTransformer2DModel, layers: list[int], guided: bool):
        self.transformer = transformer
        names = [f"transformer_blocks.{layer}" for layer in layers]
        processors = SanaPAGPipeline.__init__.__globals__  # the two that the pipeline imports
        self.set_pag_applied_layers(
            names,
            pag_attn_processors=(
                processors["PAGCFGSanaLinearAttnProcessor2_0"](),
                processors["PAGIdentitySanaLinearAttnProcessor2_0"](),
            ),
        )
        self._set_pag_attn_processor(names, do_classifier_free_guidance=guided)

    def __call__(self, latents, text, mask) -> torch.Tensor:
        """Streams of the texts, and the last one perturbed."""
        text, mask = (torch.cat([rows, rows[-1:]]) for rows in (text, mask))
        return self.transformer(
            latents.expand(len(text), -1, -1, -1),
            encoder_hidden_states=text,
            encoder_attention_mask=mask.long(),
            timestep=torch.full((len(text),), 700),
            return_dict=False,
        )[0]


def networks(layers, guided, width=LIKE_0_6B, **kind) -> tuple[DiT, Perturbed]:
    torch.manual_seed(0)
    config = {"num_layers": BLOCKS, "caption_channels": CHANNELS, **width, **kind}
    reference = randomise(SanaTransformer2DModel(**config))
    dit = DiT(DiTConfig(**config)).eval().requires_grad_(False)
    dit.load_state_dict(reference.state_dict())
    return dit, Perturbed(reference, layers, guided)


def perturb(fused: FusedDiT, latents, text, mask, layers) -> torch.Tensor:
    texts = [fused.encode_text(one[None, keep]) for one, keep in zip(text, mask, strict=True)]
    return fused(latents, fused.time_modulations([700.0])[0], texts, pag_layers=layers)


@pytest.mark.parametrize("row_chunk", [None, 4, 1])
@pytest.mark.parametrize("lengths", [(1, 7), (7,)], ids=["guided", "unguided"])
@pytest.mark.parametrize("layers", [[0], [2], [3], [1, 3]], ids=str)
def test_all_streams_match_diffusers(layers, lengths, row_chunk):
    dit, reference = networks(layers, guided=len(lengths) > 1)
    latents, _, text, mask = inputs(lengths=lengths)
    want = reference(latents, text, mask)
    # Perturbation matters, so the comparison means something.
    assert relative_error(want[-1], want[-2]) > 0.01
    fused = FusedDiT(dit)
    fused.row_chunk = row_chunk
    got = perturb(fused, latents, text, mask, layers)
    assert got.shape == want.shape
    for ours_, theirs_ in zip(got, want, strict=True):
        assert relative_error(ours_, theirs_) < 1e-5


@pytest.mark.parametrize(
    "kind", [{"width": LIKE_1_6B}, {"interpolation_scale": 2.0}], ids=["1.6B", "positions"]
)
def test_other_transformers(kind):
    dit, reference = networks([1], True, **kind)
    latents, _, text, mask = inputs()
    want = reference(latents, text, mask)
    assert relative_error(perturb(FusedDiT(dit), latents, text, mask, (1,)), want) < 1e-5


def test_with_qk_norm_only_the_perturbed_stream_changes():
    """diffusers' processors leave out the norms, in the other streams of that layer too."""
    dit, _ = networks([1], True, qk_norm="rms_norm_across_heads")
    latents, _, text, mask = inputs()
    fused = FusedDiT(dit)
    plain, got = (perturb(fused, latents, text, mask, layers) for layers in ((), (1,)))
    assert torch.equal(got[:2], plain)
    assert relative_error(got[2], got[1]) > 0.01


def test_the_streams_may_run_one_after_the_other():
    dit, reference = networks([2], True)
    latents, _, text, mask = inputs()
    want, fused = reference(latents, text, mask), FusedDiT(dit)
    unconditional = perturb(fused, latents, text[:1], mask[:1], ())
    rest = perturb(fused, latents, text[1:], mask[1:], (2,))
    assert relative_error(torch.cat([unconditional, rest]), want) < 1e-5


@pytest.mark.parametrize(("dtype", "bound"), [(torch.bfloat16, 2e-2), (torch.float16, 2e-3)])
def test_half_precision_differs_by_its_own_rounding(dtype, bound):
    dit, reference = networks([1], True)
    latents, _, text, mask = inputs()
    want = reference(latents, text, mask)
    got = perturb(FusedDiT(dit.to(dtype)), latents.to(dtype), text.to(dtype), mask, (1,))
    assert relative_error(got.float(), want) < bound


@pytest.mark.parametrize("wiring", ["diffusers", "nvlabs"])
@pytest.mark.parametrize("layer", [0, 1, 3])
def test_under_a_controlnet_the_perturbed_stream_gets_the_residuals_of_its_own_text(wiring, layer):
    dit, controlnet = ours(*theirs(), wiring=wiring)
    latents, control, text, mask = inputs()
    whole = run(fuse(dit, controlnet), latents, control, text, mask)
    got = run(fuse(dit, controlnet), latents, control, text, mask, pag_layers=(layer,))
    assert len(got) == 3
    assert relative_error(got[:2], whole) < 1e-6
    chunked = run(fuse(dit, controlnet, 2), latents, control, text, mask, pag_layers=(layer,))
    assert relative_error(chunked, got) < 1e-5
    # With a zero output projection, identity and attention are the same.
    block = dit.transformer_blocks[layer].attn1
    block.to_out[0].weight.zero_()
    same = run(fuse(dit, controlnet), latents, control, text, mask, pag_layers=(layer,))
    assert relative_error(same[2], same[1]) < 1e-6


@pytest.mark.parametrize("layers", [(4,), (-1,), (0, 4)])
def test_a_layer_that_is_not_there_is_refused(layers):
    dit, _ = networks([0], True)
    latents, _, text, mask = inputs()
    with pytest.raises(ValueError, match="of 4 blocks"):
        perturb(FusedDiT(dit), latents, text, mask, layers)


# --- cost --------------------------------------------------------------------------------------


def test_the_third_stream_costs_nothing_before_its_layer():
    dit, _ = networks([0], True)
    width, tokens, fused = dit.config.width, 64, FusedDiT(dit)
    latents, _, text, _ = inputs(8, 8, (1, 7))
    texts = [fused.encode_text(text[:1, :1]), fused.encode_text(text[1:])]
    time = fused.time_modulations([700.0])[0]
    plain = flops(lambda: fused(latents, time, texts))
    x, rows = torch.randn(1, tokens, width), torch.randn(6, width).unbind()
    block, context = fused.blocks[2], texts[-1][2]
    whole = flops(lambda: block(x, rows, [context], (8, 8), None))
    attention = flops(lambda: block._attend(x, *rows[:3], None))
    identity = 2 * 2 * tokens * width**2  # value and output projections
    last = 2 * tokens * width * dit.config.out_channels
    for layer in range(BLOCKS):
        added = flops(lambda i=layer: fused(latents, time, texts, pag_layers=(i,))) - plain
        assert added == (BLOCKS - layer) * whole - attention + identity + last


@pytest.mark.parametrize("row_chunk", [8, *exhaustive(None, 1)])
@pytest.mark.parametrize("lengths", [(1, 300), (300,)], ids=["guided", "unguided"])
def test_the_predicted_peak_includes_the_third_stream(lengths, row_chunk):
    dit, _ = networks([1], True)
    config, size = dit.config, (32, 24)
    weights = sum(p.nbytes for p in dit.parameters())
    fused = FusedDiT(copy.deepcopy(dit))
    fused.row_chunk = row_chunk
    latents, _, text, mask = inputs(*size, lengths)
    with PeakMemory() as memory:
        perturb(fused, latents, text, mask, (1,))
    options = {"row_chunk": row_chunk, "fold": row_chunk is None}
    predicted, without = (
        peak_bytes(config, torch.float32, size, lengths, 2, perturbed=perturbed, **options)
        for perturbed in (True, False)
    )
    assert predicted == pytest.approx(weights + memory.peak, rel=0.1)
    assert predicted > without
