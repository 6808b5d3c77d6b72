"""The sizes of the released networks, from their published configs and the converter.

An installed model is built from its own config files. These constants serve what runs without
one: memory plans, and benchmarks on random weights.
"""

from dataclasses import dataclass, replace

from sana_cli.models.configs import DCAEConfig, DiTConfig, GemmaConfig

NARROW = DiTConfig(
    num_attention_heads=36,
    num_layers=28,
    num_cross_attention_heads=16,
    cross_attention_head_dim=72,
    cross_attention_dim=1152,
)
WIDE = DiTConfig()
QK_NORM = "rms_norm_across_heads"
TRANSFORMERS = {
    "sana-0.6b": NARROW,
    "sana-1.6b": WIDE,
    "sana1.5-1.6b": replace(WIDE, qk_norm=QK_NORM),
    "sana1.5-4.8b": replace(WIDE, qk_norm=QK_NORM, num_layers=60),
    "sana-sprint-0.6b": replace(NARROW, qk_norm=QK_NORM, guidance_embeds=True),
    "sana-sprint-1.6b": replace(WIDE, qk_norm=QK_NORM, guidance_embeds=True),
}
# The 2K and 4K models add sine-cosine positions, which span 64 units at either size.
INTERPOLATION = {2048: 1.0, 4096: 2.0}

GEMMA_2_2B = GemmaConfig()
STAGES = ("ResBlock",) * 3 + ("EfficientViTBlock",) * 3
DC_AE_F32C32 = DCAEConfig(
    encoder_block_types=STAGES,
    decoder_block_types=STAGES,
    upsample_block_type="interpolate",
    downsample_block_type="Conv",
    scaling_factor=0.41407,
)


@dataclass(frozen=True)
class Architecture:
    dit: DiTConfig
    text: GemmaConfig
    vae: DCAEConfig
    flow_shift: float | None  # None for Sana-Sprint


def architecture(name: str, side: int) -> Architecture:
    """Return the configs of a released model whose native size is `side` x `side` pixels."""
    dit = replace(
        TRANSFORMERS[name],
        sample_size=side // DC_AE_F32C32.compression,
        interpolation_scale=INTERPOLATION.get(side),
    )
    shift = None if dit.guidance_embeds else 6.0 if side == 4096 else 3.0
    return Architecture(dit, GEMMA_2_2B, DC_AE_F32C32, shift)
