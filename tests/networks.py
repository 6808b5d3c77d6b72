"""Networks in miniature with random weights, their inputs, and how far two results differ."""

import torch
from hypothesis import Phase, settings

from reference import LIKE_0_6B, LIKE_1_6B
from sana_cli.models.configs import DCAEConfig, DiTConfig
from sana_cli.models.dc_ae import DCAE
from sana_cli.models.dit import DiT
from sana_cli.models.fused_dit import FusedDiT

DIT_KINDS = {
    "0.6B": {},
    "1.6B": LIKE_1_6B,
    "qk-norm": {"qk_norm": "rms_norm_across_heads"},
    "positions": {"interpolation_scale": 2.0},
}

# The released autoencoders in full; `SMALL` and `TINY` narrow them, `FEW` makes them shallow.
DC_AE = {
    "encoder_block_types": ("ResBlock",) * 3 + ("EfficientViTBlock",) * 3,
    "decoder_block_types": ("ResBlock",) * 3 + ("EfficientViTBlock",) * 3,
    "encoder_layers_per_block": (2, 2, 2, 3, 3, 3),
    "upsample_block_type": "interpolate",
    "downsample_block_type": "Conv",
    "scaling_factor": 0.41407,
}
DC_AE_LITE = {
    "encoder_block_types": ("ResBlock",) * 3 + ("EfficientViTBlock",) * 3,
    "decoder_block_types": "ResBlock",
    "decoder_layers_per_block": (0, 3, 5, 4, 4, 4),
    "decoder_qkv_multiscales": ((),) * 6,
    "upsample_block_type": "pixel_shuffle",
    "downsample_block_type": "Conv",
    "decoder_conv_act_fn": "silu",
}
SMALL = {
    "encoder_block_out_channels": (8, 8, 16, 32, 64, 64),
    "decoder_block_out_channels": (8, 8, 16, 32, 64, 64),
}
TINY = {
    "encoder_block_out_channels": (4, 4, 8, 32, 32, 32),
    "decoder_block_out_channels": (4, 4, 8, 32, 32, 32),
}
FEW = {"encoder_layers_per_block": (1,) * 6, "decoder_layers_per_block": (1,) * 6}


def random_dit(**config) -> DiT:
    """Random weights throughout, norms and tables included, so that no term is hidden by a one."""
    torch.manual_seed(0)
    dit = DiT(DiTConfig(**{"num_layers": 2, "caption_channels": 16, **LIKE_0_6B, **config}))
    for name, parameter in dit.named_parameters():
        if "table" in name:  # left uninitialised when the network is built
            parameter.data = 0.3 * torch.randn_like(parameter)
        if "norm" in name:
            parameter.data = 1 + 0.3 * torch.randn_like(parameter)
    return dit.eval().requires_grad_(False)


def random_dc_ae(config: dict, seed: int = 0) -> DCAE:
    """Random weights throughout, norms included, so that no term is hidden by a zero or a one."""
    torch.manual_seed(seed)
    model = DCAE(DCAEConfig(**config)).eval().requires_grad_(False)
    for name, parameter in model.named_parameters():
        if "norm" in name or name.endswith("bias"):
            parameter.copy_(torch.randn_like(parameter) * 0.3 + name.endswith("weight"))
    return model.to(memory_format=torch.channels_last)


def random_latents(height: int, width: int) -> torch.Tensor:
    """(1, 32, height, width) in channels-last, the same for the same size."""
    generator = torch.Generator().manual_seed(height + width)
    latents = torch.randn(1, 32, height, width, generator=generator)
    return latents.contiguous(memory_format=torch.channels_last)


def random_image(height: int, width: int) -> torch.Tensor:
    """uint8 (height, width, 3), the same for the same size."""
    generator = torch.Generator().manual_seed(height + width)
    return torch.randint(0, 256, (height, width, 3), generator=generator, dtype=torch.uint8)


def relative_error(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    ours, theirs = ours.double(), theirs.double()
    return ((ours - theirs).norm() / theirs.norm()).item()


def velocity_error(dit: DiT, height: int, width: int, rows=None, lengths=(2, 5), padded=1) -> float:
    """Relative difference between the velocities of the fused and the plain transformer."""
    dtype = dit.proj_out.weight.dtype
    latents = torch.randn(1, 32, height, width, dtype=dtype)
    texts = [torch.randn(1, length, 16, dtype=dtype) for length in lengths]
    longest = max(lengths)
    batch = [torch.cat([text, text.new_zeros(1, longest - text.shape[1], 16)], 1) for text in texts]
    mask = torch.arange(longest) < torch.tensor(lengths)[:, None]
    count = len(texts)
    caption = dit.project_text(torch.cat(batch))
    at = torch.full((count,), 700.0)
    plain = dit(latents.expand(count, -1, -1, -1), at, caption, mask)
    fused = FusedDiT(dit)
    fused.row_chunk = rows
    contexts = [fused.encode_text(text, padded) for text in texts]
    return relative_error(
        fused(latents, fused.time_modulations([900.0, 700.0])[1], contexts), plain
    )


# Of networks, an eighth of what the profile draws of texts.
few_examples = settings(
    max_examples=settings.default.max_examples // 8,
    derandomize=True,
    phases=[Phase.explicit, Phase.generate],
)
