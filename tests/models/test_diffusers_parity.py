"""The networks against diffusers' modules, on the same random weights."""

import pytest
import torch
from diffusers import AutoencoderDC, SanaTransformer2DModel

from networks import DC_AE, DC_AE_LITE, SMALL, relative_error
from reference import LIKE_0_6B, LIKE_1_6B, SPRINT, random_pipeline, text_encoder
from sana_cli.kernels.linear_attention import relu_linear_attention
from sana_cli.models.configs import DCAEConfig, DiTConfig
from sana_cli.models.dc_ae import DCAE
from sana_cli.models.dit import DiT, TimestepEmbedder, position_table


def twins(config: dict) -> tuple[DiT, SanaTransformer2DModel]:
    torch.manual_seed(0)
    theirs = SanaTransformer2DModel(**config).eval().requires_grad_(False)
    with torch.device("meta"):
        ours = DiT(DiTConfig(**config))
    ours.load_state_dict(theirs.state_dict(), assign=True)
    return ours.eval().requires_grad_(False), theirs


@pytest.mark.parametrize(
    "kind",
    [
        {},
        {"qk_norm": "rms_norm_across_heads"},
        {"interpolation_scale": 2.0, "sample_size": 64},
        SPRINT,
    ],
    ids=["plain", "qk-norm", "positions", "sprint"],
)
@pytest.mark.parametrize("width", [LIKE_0_6B, LIKE_1_6B], ids=["0.6B", "1.6B"])
def test_transformer(kind, width):
    config = {"num_layers": 2, "caption_channels": 96, **width, **kind}
    ours, theirs = twins(config)
    latents, text = torch.randn(2, 32, 5, 9), torch.randn(2, 7, 96)
    mask = torch.ones(2, 7, dtype=torch.bool)
    mask[0, 1:] = False
    timestep = torch.tensor([817, 817])
    guidance = torch.tensor([0.45, 3.0]) if kind is SPRINT else None
    expected = theirs(latents, text, timestep, guidance, mask.long()).sample
    got = ours(latents, timestep, ours.project_text(text), mask, guidance)
    assert relative_error(got, expected) < 1e-5


@pytest.mark.parametrize("kind", [DC_AE, DC_AE_LITE], ids=["released", "lite"])
@pytest.mark.parametrize(("height", "width"), [(32, 32), (96, 160), (192, 224)])
def test_autoencoder(kind, height, width):
    torch.manual_seed(0)
    theirs = AutoencoderDC(**kind, **SMALL).eval().requires_grad_(False)
    ours = DCAE(DCAEConfig(**kind, **SMALL)).eval().requires_grad_(False)
    ours.load_state_dict(theirs.state_dict())
    image = torch.randn(2, 3, height, width)
    latents = theirs.encode(image).latent
    assert relative_error(ours.encode(image), latents) < 1e-5
    assert relative_error(ours.decode(latents), theirs.decode(latents).sample) < 1e-5


@pytest.mark.exhaustive
def test_transformer_at_the_full_size_of_the_0_6b():
    """One guided step at 512x512 in the released configuration."""
    config = {
        "num_attention_heads": 36,
        "num_layers": 28,
        "num_cross_attention_heads": 16,
        "cross_attention_head_dim": 72,
        "cross_attention_dim": 1152,
        "sample_size": 16,
    }
    ours, theirs = twins(config)
    assert sum(p.numel() for p in ours.parameters()) == 591_747_872
    latents, text = torch.randn(2, 32, 16, 16), torch.randn(2, 30, 2304)
    timestep = torch.tensor([999, 999])
    expected = theirs(latents, text, timestep).sample
    got = ours(latents, timestep, ours.project_text(text))
    assert relative_error(got, expected) < 1e-5


@pytest.mark.exhaustive
def test_decoder_at_the_full_released_size():
    torch.manual_seed(0)
    theirs = AutoencoderDC(**DC_AE).eval().requires_grad_(False)
    with torch.device("meta"):
        ours = DCAE(DCAEConfig(**DC_AE))
    ours.load_state_dict(theirs.state_dict(), assign=True)
    assert sum(p.numel() for p in ours.parameters()) == 312_250_275
    latents = torch.randn(1, 32, 16, 16) / 0.41407
    assert relative_error(ours.decode(latents), theirs.decode(latents).sample) < 1e-5


def test_linear_attention_is_attention_with_a_relu_kernel():
    """The linear form against the quadratic definition, in float64 arithmetic."""
    generator = torch.Generator().manual_seed(0)
    q, k, v = torch.randn(3, 2, 4, 8, 21, dtype=torch.float64, generator=generator).unbind(0)
    q[0, 0, :, 0] = -1  # a query whose features are all zero attends to nothing
    weights = torch.relu(k).transpose(-1, -2) @ torch.relu(q)  # (keys, queries)
    expected = v @ (weights / weights.sum(-2, keepdim=True)).nan_to_num(0)
    torch.testing.assert_close(relu_linear_attention(q, k, v), expected, rtol=1e-4, atol=1e-5)


def test_timestep_features_as_published():
    embedder = TimestepEmbedder(256)
    seen = []
    embedder.linear_1.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0][0]))
    embedder(torch.tensor([999]))
    expected = {0: 0.9996498, 1: 0.9637853, 127: 0.9942431, 128: -0.0264608, 255: 0.1071472}
    for channel, value in expected.items():
        assert seen[0][channel].item() == pytest.approx(value, abs=2e-5)


def test_position_table_as_published():
    table = position_table((64, 64), 2240, 64, 1.0)[0]
    assert table[1, :3].tolist() == pytest.approx([0.8414710, 0.8325457, 0.8235499], abs=1e-6)
    assert table[64, 1120:1123].tolist() == pytest.approx([0.841471, 0.8325457, 0.82355], abs=1e-6)
    assert table.double().sum().item() == pytest.approx(3_507_131.5, rel=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gemma_matches_transformers(tiny_model, dtype):
    from transformers import AutoModel

    folder = tiny_model / "text_encoder"
    theirs = AutoModel.from_pretrained(folder, dtype=dtype, attn_implementation="eager").eval()
    ours = text_encoder(tiny_model, str(dtype).removeprefix("torch.")).model
    ids = torch.randint(4, 300, (2, 40), generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        expected = theirs(ids).last_hidden_state
        got, _ = ours(ids)
    assert got.dtype == dtype
    assert relative_error(got.float(), expected.float()) < (
        1e-6 if dtype is torch.float32 else 1e-2
    )


def test_text_states_do_not_depend_on_padding(tiny_model):
    """The reference runs 300 padded tokens, sana only the real ones."""
    encoder = text_encoder(tiny_model)
    pipe = random_pipeline(sample_size=16)
    theirs, mask, *_ = pipe.encode_prompt("a red circle", False)
    ours = encoder.encode("a red circle")
    torch.testing.assert_close(ours[0], theirs[0][mask[0].bool()], rtol=1e-4, atol=1e-5)
