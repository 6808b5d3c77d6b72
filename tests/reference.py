"""Random pipelines saved by diffusers, and what diffusers draws from them."""

from pathlib import Path

import numpy as np
import torch
from diffusers import (
    AutoencoderDC,
    DiffusionPipeline,
    DPMSolverMultistepScheduler,
    FlowMatchEulerDiscreteScheduler,
    SanaControlNetModel,
    SanaPipeline,
    SanaSprintPipeline,
    SanaTransformer2DModel,
    SCMScheduler,
)
from transformers import AutoTokenizer, Gemma2Config, Gemma2Model

from sana_cli.pipeline.text_cache import TextCache
from sana_cli.weights.layout import folder_parts

ROOT = Path(__file__).resolve().parents[1]
TOKENIZER = ROOT / "sana_cli" / "demo" / "tokenizer"
TEXT_WIDTH = 64

# The released head widths on a fraction of the released heads.
LIKE_0_6B = {
    "num_attention_heads": 9,
    "num_cross_attention_heads": 4,
    "cross_attention_head_dim": 72,
    "cross_attention_dim": 288,
}
LIKE_1_6B = {
    "num_attention_heads": 7,
    "num_cross_attention_heads": 2,
    "cross_attention_head_dim": 112,
    "cross_attention_dim": 224,
}


SPRINT = {"guidance_embeds": True, "qk_norm": "rms_norm_across_heads"}
DC_AE = {
    "encoder_block_types": ("ResBlock",) * 3 + ("EfficientViTBlock",) * 3,
    "decoder_block_types": ("ResBlock",) * 3 + ("EfficientViTBlock",) * 3,
    "encoder_block_out_channels": (4, 4, 8, 32, 32, 32),
    "decoder_block_out_channels": (4, 4, 8, 32, 32, 32),
    "encoder_layers_per_block": (1,) * 6,
    "decoder_layers_per_block": (1,) * 6,
    "upsample_block_type": "interpolate",
    "downsample_block_type": "Conv",
    "scaling_factor": 0.41407,
}
# What DC-AE-Lite changes: a decoder without attention, and no stage at the full resolution.
LITE = {
    "decoder_block_types": ("ResBlock",) * 6,
    "decoder_layers_per_block": (0, 1, 2, 1, 1, 1),
    "decoder_qkv_multiscales": ((),) * 6,
    "upsample_block_type": "pixel_shuffle",
    "decoder_conv_act_fn": "silu",
}


def random_controlnet(num_layers: int) -> SanaControlNetModel:
    """A ControlNet of the widths LIKE_0_6B that has an effect."""
    torch.manual_seed(1)
    controlnet = SanaControlNetModel(
        num_layers=num_layers, caption_channels=TEXT_WIDTH, **LIKE_0_6B
    )
    for parameter in controlnet.parameters():  # the maps out of it begin at zero there
        parameter.data += 0.05 * torch.randn_like(parameter)
    return controlnet


def random_pipeline(
    seed: int = 0, shift: float = 3.0, vae: dict | None = None, **dit
) -> SanaPipeline | SanaSprintPipeline:
    """Sana in miniature with random weights, or Sana-Sprint where guidance is embedded.

    `dit` and `vae` override the configs.
    """
    torch.manual_seed(seed)
    tokenizer = AutoTokenizer.from_pretrained(TOKENIZER)
    text_encoder = Gemma2Model(
        Gemma2Config(
            vocab_size=len(tokenizer),
            hidden_size=TEXT_WIDTH,
            intermediate_size=96,
            num_hidden_layers=3,
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=16,
            query_pre_attn_scalar=16,
        )
    )
    for name, parameter in text_encoder.named_parameters():
        # Norms start at zero weights there; random ones make the test see them.
        parameter.data = torch.randn_like(parameter) * (0.2 if "norm" in name else 0.1)
    transformer = SanaTransformer2DModel(
        **({"num_layers": 2, "caption_channels": TEXT_WIDTH, **LIKE_0_6B} | dit)
    )
    autoencoder = AutoencoderDC(**(DC_AE | (vae or {})))
    _spread(autoencoder)
    parts = tokenizer, text_encoder.eval(), autoencoder, transformer
    if transformer.config.guidance_embeds:
        return SanaSprintPipeline(*parts, SCMScheduler())
    scheduler = DPMSolverMultistepScheduler(
        flow_shift=shift, use_flow_sigmas=True, prediction_type="flow_prediction"
    )
    return SanaPipeline(*parts, scheduler)


def _spread(autoencoder: AutoencoderDC) -> None:
    """Scale the decoder's last layer so that pictures use the whole range, as trained ones do."""
    last = autoencoder.decoder.conv_out
    conv = getattr(last, "conv", last)  # of DC-AE-Lite an upsampling one
    with torch.no_grad():
        image = autoencoder.decode(torch.randn(1, 32, 4, 4) / 0.41407).sample
        conv.weight *= 0.6 / image.std()
        conv.bias.zero_()


def text_encoder(folder: Path, precision: str = "float32", cache: TextCache | None = None):
    """Our text encoder of a model's folder, on the CPU."""
    from sana_cli.pipeline.text_encoder import TextEncoder

    return TextEncoder(folder_parts(folder), precision, "cpu", cache)


def draw(pipe: DiffusionPipeline, *, seeds: list[int], **call) -> list[np.ndarray]:
    """What diffusers draws for these seeds, one call each as a user would."""
    pipe.set_progress_bar_config(disable=True)
    solver = call.pop("solver", "flow-dpm")
    if solver == "flow-euler":
        shift = pipe.scheduler.config.flow_shift
        pipe.scheduler = FlowMatchEulerDiscreteScheduler(shift=shift)
    pictures = []
    for seed in seeds:
        generator = torch.Generator("cpu").manual_seed(seed)
        image = pipe(generator=generator, output_type="pil", **call).images[0]
        pictures.append(np.asarray(image))
    return pictures


def assert_same_picture(ours: np.ndarray, theirs: np.ndarray) -> None:
    """Equal to rounding: one level of 255 at most, on all but a thousandth of the values."""
    assert ours.shape == theirs.shape
    off = np.abs(ours.astype(int) - theirs.astype(int))
    assert (off > 1).mean() <= 0.001, f"{(off > 1).mean():.2%} differ by more than one: {off.max()}"
    assert theirs.std() > 20, "a flat reference would hide a difference"
