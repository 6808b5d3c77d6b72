"""What the networks' published `config.json` files hold, and which values can be used.

Every field has the published name. The configs are apart from the networks so that commands which
only read them do not import torch.
"""

from dataclasses import dataclass

BLOCK_TYPES = ("ResBlock", "EfficientViTBlock")  # of the autoencoder's stages
CONV_ACTIVATIONS = ("relu", "silu")  # before the autoencoder's last convolution
MAX_BLOCKS = 100  # of the autoencoder, in a stage
WIRINGS = ("diffusers", "nvlabs")  # of a ControlNet: see `controlnet.py`
# Every other layer of Gemma-2 attends to a sliding window; texts here are always shorter.
LONGEST_TEXT = 2048

Stages = tuple[int, ...]


@dataclass(frozen=True)
class GemmaConfig:
    """The fields of the published `text_encoder/config.json` that matter, with its defaults."""

    vocab_size: int = 256_000
    hidden_size: int = 2304
    intermediate_size: int = 9216
    num_hidden_layers: int = 26
    num_attention_heads: int = 8
    num_key_value_heads: int = 4
    head_dim: int = 256
    hidden_activation: str = "gelu_pytorch_tanh"
    rms_norm_eps: float = 1e-6
    rope_theta: float = 10_000.0
    rope_parameters: dict | None = None  # holds rope_theta in newer files
    query_pre_attn_scalar: float = 256
    attn_logit_softcapping: float | None = 50.0
    sliding_window: int = 4096
    attention_bias: bool = False
    bos_token_id: int = 2

    def __post_init__(self) -> None:
        for name, most in (
            ("num_hidden_layers", 1000),
            ("num_attention_heads", 1024),
            ("num_key_value_heads", self.num_attention_heads),
            ("hidden_size", 2**16),
            ("head_dim", 2**12),
            ("rms_norm_eps", 1),
            ("query_pre_attn_scalar", 2**20),
            ("theta", 2**40),
        ):
            value = getattr(self, name)
            if not isinstance(value, int | float) or not 0 < value <= most:
                raise ValueError(f"{name} is {value!r}, not above 0 and at most {most}")
        for name, only in (("hidden_activation", "gelu_pytorch_tanh"), ("attention_bias", False)):
            if getattr(self, name) != only:
                raise ValueError(f"{name} is {getattr(self, name)!r}; Gemma-2 has {only!r}")
        kind = (self.rope_parameters or {}).get("rope_type", "default")
        if kind != "default":
            raise ValueError(f"rope_type is {kind!r}; Gemma-2 has 'default'")
        if self.num_attention_heads % self.num_key_value_heads or self.head_dim % 2:
            raise ValueError("the attention heads do not divide evenly")
        if self.attn_logit_softcapping == 0:
            raise ValueError("attn_logit_softcapping is 0")
        if self.sliding_window < LONGEST_TEXT:
            raise ValueError(f"sliding_window is {self.sliding_window}, below {LONGEST_TEXT}")
        if self.bos_token_id >= self.vocab_size:
            raise ValueError(f"bos_token_id is {self.bos_token_id} of {self.vocab_size} tokens")

    @property
    def theta(self) -> float:
        return (self.rope_parameters or {}).get("rope_theta", self.rope_theta)

    @property
    def linear_weights(self) -> int:
        """Number of weights in the linear maps of all layers: 2.02e9 for Gemma-2-2B."""
        heads = 2 * self.num_attention_heads + 2 * self.num_key_value_heads
        rows = heads * self.head_dim + 3 * self.intermediate_size
        return self.num_hidden_layers * self.hidden_size * rows


@dataclass(frozen=True)
class DiTConfig:
    """The fields of the published `transformer/config.json`; older files rely on the defaults."""

    in_channels: int = 32
    out_channels: int = 32
    num_attention_heads: int = 70
    attention_head_dim: int = 32
    num_layers: int = 20
    num_cross_attention_heads: int = 20
    cross_attention_head_dim: int = 112
    cross_attention_dim: int = 2240
    caption_channels: int = 2304
    mlp_ratio: float = 2.5
    dropout: float = 0.0
    attention_bias: bool = False
    sample_size: int = 32
    patch_size: int = 1
    norm_elementwise_affine: bool = False
    norm_eps: float = 1e-6
    interpolation_scale: float | None = None
    guidance_embeds: bool = False
    guidance_embeds_scale: float = 0.1
    qk_norm: str | None = None
    timestep_scale: float = 1.0

    def __post_init__(self) -> None:
        for name, only in (
            ("patch_size", 1),
            ("norm_elementwise_affine", False),
            ("attention_bias", False),
            ("cross_attention_dim", self.width),
        ):
            if getattr(self, name) != only:
                raise ValueError(
                    f"{name} is {getattr(self, name)!r}; every Sana model has {only!r}"
                )
        for name, least, most in (
            ("num_layers", 1, 1000),
            ("sample_size", 1, 1024),
            ("num_attention_heads", 1, 1024),
            ("attention_head_dim", 1, 1024),
        ):
            if not least <= getattr(self, name) <= most:
                raise ValueError(f"{name} is {getattr(self, name)}, not {least} to {most}")
        if self.interpolation_scale == 0:
            raise ValueError("interpolation_scale is 0")
        if self.num_cross_attention_heads * self.cross_attention_head_dim != self.width:
            raise ValueError(
                "num_cross_attention_heads x cross_attention_head_dim is not the width"
            )
        if self.qk_norm not in (None, "rms_norm_across_heads"):
            raise ValueError(f"qk_norm is {self.qk_norm!r}, not null or 'rms_norm_across_heads'")

    @property
    def width(self) -> int:
        return self.num_attention_heads * self.attention_head_dim


@dataclass(frozen=True)
class ControlNetConfig(DiTConfig):
    """The published `controlnet/config.json`: that of a transformer with fewer blocks.

    `wiring` is an extension; published files lack it.
    """

    num_layers: int = 7
    wiring: str = "diffusers"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.wiring not in WIRINGS:
            raise ValueError(f"wiring is {self.wiring!r}, not one of {', '.join(WIRINGS)}")
        if self.qk_norm is not None or self.guidance_embeds:
            raise ValueError("a Sana ControlNet has neither qk_norm nor guidance_embeds")
        if self.wiring == "nvlabs" and self.interpolation_scale is not None:
            raise ValueError("the nvlabs wiring has no positions; interpolation_scale must be null")

    @property
    def first_block(self) -> int:
        """The block of the transformer after which the result of the branch's block 0 is added."""
        return 1 if self.wiring == "diffusers" else 0

    def check_matches(self, dit: DiTConfig) -> None:
        """Raise ValueError if the ControlNet was made for another transformer."""
        for name in ("width", "in_channels", "caption_channels"):
            own, other = getattr(self, name), getattr(dit, name)
            if own != other:
                raise ValueError(f"the ControlNet has {name} {own}, the transformer {other}")
        if self.num_layers >= dit.num_layers:
            raise ValueError(
                f"the ControlNet has {self.num_layers} blocks, the transformer only"
                f" {dit.num_layers}"
            )
        if dit.guidance_embeds:
            raise ValueError("there is no ControlNet for Sana-Sprint")


@dataclass(frozen=True)
class DCAEConfig:
    """The fields of the published `vae/config.json`; older files rely on diffusers' defaults."""

    in_channels: int = 3
    latent_channels: int = 32
    attention_head_dim: int = 32
    encoder_block_types: str | tuple[str, ...] = "ResBlock"
    decoder_block_types: str | tuple[str, ...] = "ResBlock"
    encoder_block_out_channels: Stages = (128, 256, 512, 512, 1024, 1024)
    decoder_block_out_channels: Stages = (128, 256, 512, 512, 1024, 1024)
    encoder_layers_per_block: Stages = (2, 2, 2, 3, 3, 3)
    decoder_layers_per_block: Stages = (3, 3, 3, 3, 3, 3)
    encoder_qkv_multiscales: tuple[Stages, ...] = ((), (), (), (5,), (5,), (5,))
    decoder_qkv_multiscales: tuple[Stages, ...] = ((), (), (), (5,), (5,), (5,))
    upsample_block_type: str = "pixel_shuffle"
    downsample_block_type: str = "pixel_unshuffle"
    decoder_norm_types: str | tuple[str, ...] = "rms_norm"
    decoder_act_fns: str | tuple[str, ...] = "silu"
    encoder_out_shortcut: bool = True
    decoder_in_shortcut: bool = True
    decoder_conv_act_fn: str = "relu"
    scaling_factor: float = 1.0

    def __post_init__(self) -> None:
        for side in ("encoder", "decoder"):
            stages = len(getattr(self, f"{side}_block_out_channels"))
            for name in ("block_types", "layers_per_block", "qkv_multiscales"):
                value = getattr(self, f"{side}_{name}")
                if not isinstance(value, str) and len(value) != stages:
                    raise ValueError(f"{side}_{name} has {len(value)} entries for {stages} stages")
            unknown = set(per_stage(getattr(self, f"{side}_block_types"), stages)) - set(
                BLOCK_TYPES
            )
            if unknown:
                raise ValueError(
                    f"{side}_block_types has {sorted(unknown)}, not {sorted(BLOCK_TYPES)}"
                )
            if max(getattr(self, f"{side}_layers_per_block")) > MAX_BLOCKS:
                raise ValueError(f"{side}_layers_per_block has more than {MAX_BLOCKS} in a stage")
        if not self.scaling_factor > 0:
            raise ValueError(f"scaling_factor is {self.scaling_factor}")
        if set(per_stage(self.decoder_norm_types, 1)) != {"rms_norm"}:
            raise ValueError(f"decoder_norm_types is {self.decoder_norm_types!r}, not 'rms_norm'")
        if set(per_stage(self.decoder_act_fns, 1)) != {"silu"}:
            raise ValueError(f"decoder_act_fns is {self.decoder_act_fns!r}, not 'silu'")
        if self.decoder_conv_act_fn not in CONV_ACTIVATIONS:
            raise ValueError(f"decoder_conv_act_fn is {self.decoder_conv_act_fn!r}")

    @property
    def compression(self) -> int:
        """Pixels per latent cell, on each side."""
        return 2 ** (len(self.decoder_block_out_channels) - 1)


def per_stage(value: str | tuple[str, ...], stages: int) -> tuple[str, ...]:
    """Repeat a setting that the config gives once for all stages."""
    return (value,) * stages if isinstance(value, str) else value
