"""Every model of `weights.toml`, built with shapes only, against the classes of diffusers."""

import pytest
import torch
from diffusers import AutoencoderDC, SanaTransformer2DModel
from transformers import Gemma2Config, Gemma2Model

from sana_cli.models.architectures import architecture
from sana_cli.models.dc_ae import DCAE
from sana_cli.models.dit import DiT
from sana_cli.models.gemma import Gemma
from sana_cli.weights.catalogue import known_models

RELEASED = {name: model for name, model in known_models().items() if model.sources}
# The configs as the published repositories and the converter have them; the rest are defaults.
NARROW = {
    "num_attention_heads": 36,
    "num_layers": 28,
    "num_cross_attention_heads": 16,
    "cross_attention_head_dim": 72,
    "cross_attention_dim": 1152,
}
QK_NORM = {"qk_norm": "rms_norm_across_heads"}
SPRINT = QK_NORM | {"guidance_embeds": True}
PUBLISHED = {
    "sana-0.6b": (NARROW, 591_747_872),
    "sana-1.6b": ({}, 1_604_462_752),
    "sana1.5-1.6b": (QK_NORM, 1_604_641_952),
    "sana1.5-4.8b": (QK_NORM | {"num_layers": 60}, 4_721_825_952),
    "sana-sprint-0.6b": (NARROW | SPRINT, 593_501_216),
    "sana-sprint-1.6b": (SPRINT, 1_610_237_472),
}
GRIDS = {512: (16, None), 1024: (32, None), 2048: (64, 1.0), 4096: (128, 2.0)}


def shapes(network: torch.nn.Module) -> dict[str, torch.Size]:
    return {name: tensor.shape for name, tensor in network.state_dict().items()}


def test_all_published_image_models_are_listed():
    assert {model.architecture for model in RELEASED.values()} == set(PUBLISHED)
    assert {model.side for model in RELEASED.values()} == set(GRIDS)
    assert len({model.sources[0].repo for model in RELEASED.values()}) == len(RELEASED)


@pytest.mark.parametrize("name", RELEASED)
def test_the_transformer_has_the_tensors_of_diffusers(name):
    model = RELEASED[name]
    config, parameters = PUBLISHED[model.architecture]
    size, interpolation = GRIDS[model.side]
    ours_config = architecture(model.architecture, model.side).dit
    with torch.device("meta"):
        ours = DiT(ours_config)
        theirs = SanaTransformer2DModel(
            **config, sample_size=size, interpolation_scale=interpolation
        )
    assert shapes(ours) == shapes(theirs)
    assert sum(p.numel() for p in ours.parameters()) == parameters
    assert model.sources[0].bytes == 2 * parameters
    assert (ours_config.sample_size, ours_config.interpolation_scale) == (size, interpolation)
    for key, value in vars(ours_config).items():
        assert theirs.config[key] == value, key


def test_the_shared_autoencoder_has_the_tensors_of_diffusers():
    config = architecture("sana-1.6b", 1024).vae
    with torch.device("meta"):
        ours = DCAE(config)
        theirs = AutoencoderDC(
            encoder_block_types=("ResBlock",) * 3 + ("EfficientViTBlock",) * 3,
            decoder_block_types=("ResBlock",) * 3 + ("EfficientViTBlock",) * 3,
            encoder_layers_per_block=(2, 2, 2, 3, 3, 3),
            upsample_block_type="interpolate",
            downsample_block_type="Conv",
            scaling_factor=0.41407,
        )
    assert shapes(ours) == shapes(theirs)
    assert sum(p.numel() for p in ours.parameters()) == 312_250_275
    for key, value in vars(config).items():
        assert theirs.config[key] == value, key
    assert {model.sources[2].bytes for model in RELEASED.values()} == {4 * 312_250_275}


def test_the_shared_text_encoder_has_the_tensors_of_transformers():
    with torch.device("meta"):
        ours = Gemma(architecture("sana-1.6b", 1024).text)
        theirs = Gemma2Model(Gemma2Config())
    assert shapes(ours) == shapes(theirs)
    assert sum(p.numel() for p in ours.parameters()) == 2_614_341_888
    assert {model.sources[1].bytes for model in RELEASED.values()} == {2 * 2_614_341_888}


def test_every_model_shares_its_text_encoder_and_autoencoder():
    assert len({model.sources[1:] for model in RELEASED.values()}) == 1


@pytest.mark.parametrize(("side", "shift"), [(512, 3.0), (1024, 3.0), (2048, 3.0), (4096, 6.0)])
def test_the_flow_shift_is_that_of_the_published_schedulers(side, shift):
    assert architecture("sana-1.6b", side).flow_shift == shift


def test_sprint_has_its_own_settings_and_no_flow_shift():
    for model in RELEASED.values():
        sprint = model.architecture.startswith("sana-sprint")
        assert (model.solver, model.steps) == (("scm", 2) if sprint else ("flow-dpm", 20))
        assert model.guidance == 4.5
        assert (architecture(model.architecture, model.side).flow_shift is None) == sprint
