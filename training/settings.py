"""All settings of the recipe, with presets for a GPU, for two CPU cores, and for a test."""

import json
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

from sana_cli.models.configs import DCAEConfig, DiTConfig
from training.world import World

_KINDS = ("ResBlock",) * 3 + ("EfficientViTBlock",) * 3


def _autoencoder(encoder: tuple[int, ...], decoder: tuple[int, ...], head: int = 32) -> DCAEConfig:
    return DCAEConfig(
        attention_head_dim=head,
        encoder_block_types=_KINDS,
        decoder_block_types=_KINDS,
        encoder_block_out_channels=encoder,
        decoder_block_out_channels=decoder,
        encoder_layers_per_block=(1, 1, 1, 1, 1, 1),
        decoder_layers_per_block=(1, 1, 2, 2, 2, 2),
        upsample_block_type="interpolate",
        downsample_block_type="Conv",
    )


def _transformer(heads: int, layers: int, text: int, sample_size: int) -> DiTConfig:
    """Return a configuration with the position embedding of the 2K and 4K models.

    Without it a small grid reveals little about the position of a token. Relative to `sample_size`
    the embedding of a place in the image is the same at both resolutions.
    """
    return DiTConfig(
        num_attention_heads=heads,
        attention_head_dim=32,
        num_layers=layers,
        num_cross_attention_heads=heads,
        cross_attention_head_dim=32,
        cross_attention_dim=32 * heads,
        caption_channels=text,
        sample_size=sample_size,
        interpolation_scale=1.0,
    )


@dataclass(frozen=True)
class Settings:
    # Models of 2.9 M, 7.6 M and (text) 0.9 M parameters, 23 MB in bfloat16.
    autoencoder: DCAEConfig = _autoencoder((8, 16, 32, 64, 128, 128), (16, 32, 64, 64, 128, 128))
    transformer: DiTConfig = _transformer(heads=7, layers=9, text=128, sample_size=16)
    text_width: int = 128
    text_layers: int = 4
    # What the images show and the languages of captions, as in `world.World`.
    shapes_share: float = 0.4
    things_share: float = 0.0
    chinese_share: float = 0.0
    emoji_share: float = 0.0
    # 1: begin with the bundled autoencoder and transformer, whose sizes must be those above.
    warm_start: int = 0
    low_side: int = 256  # pixels of the two resolutions of the cascade
    high_side: int = 512

    # Stage 1, the autoencoder, on crops of images of both sizes.
    crop: int = 128
    autoencoder_steps: int = 9000
    autoencoder_batch: int = 64
    autoencoder_rate: float = 1e-3
    # Noise on the latents, which makes the decoder tolerant of a sampler's errors, and a penalty
    # that prevents the encoder from outgrowing it. Together they lead to a standard deviation
    # near one.
    latent_noise: float = 0.3
    latent_decay: float = 2e-3
    # Fine-tuning of the decoder alone, after stage 3, on crops of `low_side`.
    decoder_steps: int = 2000
    decoder_batch: int = 32
    decoder_rate: float = 1e-4  # at 5e-4 the error rises by half before it recovers

    # Stage 2, the text encoder.
    tokenizer_captions: int = 20_000
    tokenizer_size: int = 1000  # most tokens beside bytes and special ones
    text_steps: int = 2500
    text_batch: int = 256
    text_rate: float = 2e-3

    # Stage 3, the transformer, at the low and then at the high resolution.
    low_images: int = 49_152  # in the bank of latents
    low_steps: int = 16_000
    low_batch: int = 512
    low_rate: float = 2e-3
    high_images: int = 16_384
    high_steps: int = 6000
    high_batch: int = 192
    high_rate: float = 2e-3
    low_every: int = 4  # one in so many batches of the second half has the low resolution
    flow_shift: float = 3.0
    object_weight: float = 3.0  # in the loss, of a cell that contains an object
    empty_captions: float = 0.1
    text_scale: float = 0.01  # initial scale of the RMS-normalised states (paper, section 2.3)
    average_decay: float = 0.9995

    # How to run it.
    workers: int = 14  # processes that draw images and write captions
    save_seconds: float = 60.0  # least interval; checkpoints are saved at rows of the log
    log_every: int = 25

    @property
    def world(self) -> World:
        return World(self.shapes_share, self.things_share, self.chinese_share, self.emoji_share)


H200 = Settings()
CPU = replace(
    H200,
    autoencoder_steps=4500,
    autoencoder_batch=8,
    decoder_steps=400,
    decoder_batch=2,
    text_steps=1500,
    text_batch=128,
    low_images=16_384,
    low_steps=1200,
    low_batch=64,
    high_images=6144,
    high_steps=3600,
    high_batch=24,
    average_decay=0.999,
    workers=0,
    save_seconds=300.0,
)
# The world with Noto's things, in three languages, from the bundled weights on.
THINGS = replace(
    CPU,
    transformer=_transformer(heads=7, layers=9, text=160, sample_size=16),
    text_width=160,
    shapes_share=0.15,
    things_share=0.65,
    chinese_share=0.3,
    emoji_share=0.1,
    warm_start=1,
    autoencoder_steps=7000,  # the bundled one blurs faces and thin lines of the drawings
    autoencoder_rate=5e-4,
    decoder_steps=1200,
    tokenizer_captions=60_000,
    tokenizer_size=2400,
    text_steps=4000,
    low_images=24_576,
    low_steps=3_500,
    high_images=14_336,
    high_steps=8_500,
)
TOY = replace(
    CPU,
    autoencoder=_autoencoder((4, 4, 8, 8, 16, 32), (4, 4, 8, 8, 16, 32), head=8),
    transformer=_transformer(heads=2, layers=2, text=32, sample_size=3),
    text_width=32,
    text_layers=1,
    low_side=64,
    high_side=96,
    crop=32,
    autoencoder_steps=12,
    autoencoder_batch=2,
    decoder_steps=4,
    tokenizer_captions=1000,
    text_steps=12,
    text_batch=8,
    low_images=48,
    low_steps=12,
    low_batch=8,
    high_images=16,
    high_steps=6,
    high_batch=4,
    save_seconds=0.0,
    log_every=4,
)
TOY_THINGS = replace(
    TOY, shapes_share=0.2, things_share=0.5, chinese_share=0.3, emoji_share=0.1, tokenizer_size=2400
)
PRESETS = {"h200": H200, "cpu": CPU, "things": THINGS, "toy": TOY, "toy-things": TOY_THINGS}


def with_changes(settings: Any, changes: list[str]) -> Any:
    """Apply changes given as "name=value"; raise ValueError for an unknown name."""
    kinds = {f.name: type(getattr(settings, f.name)) for f in fields(settings)}
    for change in changes:
        name, _, value = change.partition("=")
        if kinds.get(name) not in (int, float):
            numbers = sorted(n for n, kind in kinds.items() if kind in (int, float))
            raise ValueError(f"unknown setting {name!r}; choose from {', '.join(numbers)}")
        settings = replace(settings, **{name: kinds[name](value)})
    return settings


def changed_settings(path: Path, settings: Any, seed: int) -> list[str]:
    """Name the settings that differ from those the run was started with; record them if it is new.

    Settings that do not change the result are ignored: workers, intervals of saving and logging.
    """
    now = json.loads(json.dumps(asdict(settings) | {"seed": seed}))
    if not path.is_file():
        path.write_text(json.dumps(now, indent=2) + "\n")
    started = json.loads(path.read_text())
    free = {"workers", "save_seconds", "log_every"}
    return [name for name in now if name not in free and started.get(name) != now[name]]
