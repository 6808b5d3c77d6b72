"""The dummy components of diffusers' own tests, and ours on the same weights.

Configurations and inputs are those of huggingface/diffusers at commit 58eb52c0803e, in the files
that `cases.json` lists. The package on PyPI, wheel and sdist, has no test files to read them from.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import (
    AutoencoderDC,
    FlowMatchEulerDiscreteScheduler,
    SanaControlNetModel,
    SanaControlNetPipeline,
    SanaPAGPipeline,
    SanaPipeline,
    SanaSprintImg2ImgPipeline,
    SanaSprintPipeline,
    SanaTransformer2DModel,
    SCMScheduler,
)
from transformers import AutoTokenizer, Gemma2Config, Gemma2Model

from reference import SPRINT, TOKENIZER
from sana_cli.models.configs import ControlNetConfig, DCAEConfig, DiTConfig
from sana_cli.models.controlnet import ControlNet
from sana_cli.models.dc_ae import DCAE
from sana_cli.models.dit import DiT
from sana_cli.weights.checkpoint import load_weights, on_meta
from sana_cli.weights.config_files import read_config
from sana_cli.weights.layout import find_component

TRANSFORMER = {
    "patch_size": 1,
    "in_channels": 4,
    "out_channels": 4,
    "num_layers": 1,
    "num_attention_heads": 2,
    "attention_head_dim": 4,
    "num_cross_attention_heads": 2,
    "cross_attention_head_dim": 4,
    "cross_attention_dim": 8,
    "caption_channels": 8,
    "sample_size": 32,
}
AUTOENCODER = {
    "in_channels": 3,
    "latent_channels": 4,
    "attention_head_dim": 2,
    "encoder_block_types": ("ResBlock", "EfficientViTBlock"),
    "decoder_block_types": ("ResBlock", "EfficientViTBlock"),
    "encoder_block_out_channels": (8, 8),
    "decoder_block_out_channels": (8, 8),
    "encoder_qkv_multiscales": ((), (5,)),
    "decoder_qkv_multiscales": ((), (5,)),
    "encoder_layers_per_block": (1, 1),
    "decoder_layers_per_block": (1, 1),
    "downsample_block_type": "conv",
    "upsample_block_type": "interpolate",
    "decoder_norm_types": "rms_norm",
    "decoder_act_fns": "silu",
    "scaling_factor": 0.41407,
}
TEXT_ENCODER = {
    "head_dim": 16,
    "hidden_size": 8,
    "initializer_range": 0.02,
    "intermediate_size": 64,
    "max_position_embeddings": 8192,
    "num_attention_heads": 2,
    "num_hidden_layers": 1,
    "num_key_value_heads": 2,
    "vocab_size": 8,
    "attn_implementation": "eager",
}
CALL = {
    "prompt": "",
    "num_inference_steps": 2,
    "guidance_scale": 6.0,
    "height": 32,
    "width": 32,
    "max_sequence_length": 16,
    "complex_human_instruction": None,
}
SHIFT = 7.0  # of the Euler scheduler
STRENGTH = 0.5  # of image to image
PAG_SCALE = 3.0

Network = torch.nn.Module


@dataclass(frozen=True)
class Kind:
    """A network of diffusers, the folder it is stored in, and the ours that loads it."""

    theirs: type
    config: dict[str, Any]
    part: str
    ours: type
    our_config: type

    def build(self, **changes: Any) -> Any:
        torch.manual_seed(0)
        network = self.theirs(**self.config | changes).eval().requires_grad_(False)
        if self.part == "controlnet":  # whose maps begin at zero, so that it would change nothing
            for parameter in network.parameters():
                parameter += 0.05 * torch.randn_like(parameter)
        return network

    def load(self, folder: Path, dtype: torch.dtype | None = torch.float32) -> Any:
        """Ours, with config and weights of a folder that diffusers has saved."""
        part = find_component(folder, self.part)
        config, _ = read_config(self.our_config, part.config)
        return load_weights(on_meta(self.ours, config, part.config), part.weights, dtype)


TRANSFORMERS = {
    "transformer": Kind(SanaTransformer2DModel, TRANSFORMER, "transformer", DiT, DiTConfig),
    "sprint": Kind(SanaTransformer2DModel, TRANSFORMER | SPRINT, "transformer", DiT, DiTConfig),
}
VAE = Kind(AutoencoderDC, AUTOENCODER, "vae", DCAE, DCAEConfig)
CONTROLNET = Kind(SanaControlNetModel, TRANSFORMER, "controlnet", ControlNet, ControlNetConfig)
KINDS = {**TRANSFORMERS, "autoencoder": VAE, "controlnet": CONTROLNET}


def generator() -> torch.Generator:
    return torch.Generator("cpu").manual_seed(0)


def transformer_inputs() -> dict[str, torch.Tensor]:
    """Of two rows: latents, text states, timesteps. Each begins the generator anew, as theirs."""
    return {
        "hidden_states": torch.randn(2, 4, 32, 32, generator=generator()),
        "encoder_hidden_states": torch.randn(2, 8, 8, generator=generator()),
        "timestep": torch.randint(0, 1000, size=(2,), generator=generator()),
    }


def autoencoder_input() -> torch.Tensor:
    return torch.randn(4, 3, 32, 32, generator=generator())


def pipeline(name: str) -> Any:
    """A pipeline of the dummy components: "sana", "sprint", "sprint-img2img", "controlnet", "pag".

    The tokenizer is ours, as theirs is only on the hub: of the empty prompt both make <bos>. The
    transformer of "pag" has two layers, as theirs; so has that of "controlnet", where theirs has
    one, whose block no result of the branch is added to.
    """
    sprint = name.startswith("sprint")
    layers = {"num_layers": 2} if name in ("pag", "controlnet") else {}
    torch.manual_seed(0)
    text = Gemma2Model(Gemma2Config(**TEXT_ENCODER)).eval()
    dit = TRANSFORMERS["sprint" if sprint else "transformer"].build(**layers)
    scheduler = SCMScheduler() if sprint else FlowMatchEulerDiscreteScheduler(shift=SHIFT)
    parts = {
        "tokenizer": AutoTokenizer.from_pretrained(TOKENIZER),
        "text_encoder": text,
        "vae": VAE.build(),
        "transformer": dit,
        "scheduler": scheduler,
    }
    more = {"controlnet": {"controlnet": CONTROLNET.build()}}
    pipe = PIPELINES[name](**parts, **more.get(name, {}))
    pipe.set_progress_bar_config(disable=True)
    return pipe


PIPELINES = {
    "sana": SanaPipeline,
    "sprint": SanaSprintPipeline,
    "sprint-img2img": SanaSprintImg2ImgPipeline,
    "controlnet": SanaControlNetPipeline,
    "pag": SanaPAGPipeline,
}
