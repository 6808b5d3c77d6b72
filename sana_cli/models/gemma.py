"""The Gemma-2 decoder stack without its language-model head (arXiv 2408.00118).

Shapes: B batch, L tokens, D hidden size. Written out here rather than imported from
transformers, because that import alone (2.4 s, 150 MB) costs more than the rest of a cold start;
transformers' model is what the tests compare it with. Attribute names are the published ones.

The decoder is causal, so what a token leaves behind (its keys and values in every layer) does not
depend on what follows: `past` takes that of the tokens before, and only the new ones are run.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn


@dataclass(frozen=True)
class GemmaConfig:
    """What matters of the published `text_encoder/config.json`, with its defaults."""

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
    rope_parameters: dict | None = None  # where newer files keep rope_theta
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
        """How many numbers the linear maps of all layers hold: 2.02e9 in Gemma-2-2B."""
        heads = 2 * self.num_attention_heads + 2 * self.num_key_value_heads
        rows = heads * self.head_dim + 3 * self.intermediate_size
        return self.num_hidden_layers * self.hidden_size * rows


# Every other layer of Gemma-2 attends to a window only; texts here are always shorter than it.
LONGEST_TEXT = 2048

KeysValues = tuple[Tensor, Tensor]  # of one layer, each (B, kv heads, L, d); the keys are rotated


class Gemma(nn.Module):
    def __init__(self, config: GemmaConfig) -> None:
        super().__init__()
        self.config = config
        # Not drawn at random first: on the meta device that alone would import torch's compiler.
        table = torch.empty(config.vocab_size, config.hidden_size)
        self.embed_tokens = nn.Embedding.from_pretrained(table)
        self.layers = nn.ModuleList(Layer(config) for _ in range(config.num_hidden_layers))
        self.norm = GemmaRMSNorm(config.hidden_size, config.rms_norm_eps)

    def forward(
        self, ids: Tensor, past: list[KeysValues] | None = None
    ) -> tuple[Tensor, list[KeysValues]]:
        """Token ids (B, L) -> states after the final norm (B, L, D), and their keys and values.

        `past` holds the keys and values of the P tokens before them, by layer; P + L <= 2048.
        """
        before = past[0][0].shape[2] if past else 0
        x = self.embed_tokens(ids)
        x = x * torch.tensor(self.config.hidden_size**0.5, dtype=x.dtype)
        length = ids.shape[1]
        rotation = rotary(before, length, self.config, x)
        later = torch.ones(length, before + length, dtype=torch.bool, device=x.device)
        later = later.triu(1 + before)
        kept = []
        for i, layer in enumerate(self.layers):
            x, own = layer(x, rotation, later, past[i] if past else None)
            kept.append(own)
        return self.norm(x), kept


class Table(nn.Module):
    """An embedding table left where it was loaded, which may be a mapped file: only the rows asked
    for are read, converted to `dtype`, and moved. Gemma-2's table has a fifth of its weights."""

    def __init__(self, weight: Tensor, dtype: torch.dtype) -> None:
        super().__init__()
        self.stored, self.dtype = weight, dtype  # no parameter: it stays when the model moves

    def forward(self, ids: Tensor) -> Tensor:
        return F.embedding(ids.to(self.stored.device), self.stored).to(ids.device, self.dtype)


class Layer(nn.Module):
    """Attention, then a gated feed-forward, each between two norms and added to its input."""

    def __init__(self, config: GemmaConfig) -> None:
        super().__init__()
        width, eps = config.hidden_size, config.rms_norm_eps
        self.self_attn = Attention(config)
        self.mlp = FeedForward(config)
        self.input_layernorm = GemmaRMSNorm(width, eps)
        self.post_attention_layernorm = GemmaRMSNorm(width, eps)
        self.pre_feedforward_layernorm = GemmaRMSNorm(width, eps)
        self.post_feedforward_layernorm = GemmaRMSNorm(width, eps)

    def forward(
        self, x: Tensor, rotation: tuple[Tensor, Tensor], later: Tensor, past: KeysValues | None
    ) -> tuple[Tensor, KeysValues]:
        attended, own = self.self_attn(self.input_layernorm(x), rotation, later, past)
        x = x + self.post_attention_layernorm(attended)
        fed = self.mlp(self.pre_feedforward_layernorm(x))
        return x + self.post_feedforward_layernorm(fed), own


class Attention(nn.Module):
    """Causal grouped-query attention whose scores are capped by a tanh before the softmax."""

    def __init__(self, config: GemmaConfig) -> None:
        super().__init__()
        self.config = config
        width, head = config.hidden_size, config.head_dim
        self.q_proj = nn.Linear(width, config.num_attention_heads * head, bias=False)
        self.k_proj = nn.Linear(width, config.num_key_value_heads * head, bias=False)
        self.v_proj = nn.Linear(width, config.num_key_value_heads * head, bias=False)
        self.o_proj = nn.Linear(config.num_attention_heads * head, width, bias=False)

    def forward(
        self, x: Tensor, rotation: tuple[Tensor, Tensor], later: Tensor, past: KeysValues | None
    ) -> tuple[Tensor, KeysValues]:
        head = self.config.head_dim
        q, k, v = (
            project(x).unflatten(-1, (-1, head)).transpose(1, 2)  # (B, heads, L, d)
            for project in (self.q_proj, self.k_proj, self.v_proj)
        )
        q, k = rotate(q, rotation), rotate(k, rotation)
        own = (k, v)
        if past is not None:
            k, v = torch.cat([past[0], k], dim=2), torch.cat([past[1], v], dim=2)
        groups = self.config.num_attention_heads // self.config.num_key_value_heads
        k, v = k.repeat_interleave(groups, dim=1), v.repeat_interleave(groups, dim=1)
        scores = q @ k.transpose(-1, -2) * self.config.query_pre_attn_scalar**-0.5
        cap = self.config.attn_logit_softcapping
        if cap is not None:
            scores = torch.tanh(scores / cap) * cap
        scores = scores.masked_fill(later, float("-inf"))
        out = scores.softmax(dim=-1, dtype=torch.float32).to(x.dtype) @ v
        return self.o_proj(out.transpose(1, 2).flatten(2)), own


class FeedForward(nn.Module):
    def __init__(self, config: GemmaConfig) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.gelu(self.gate_proj(x), approximate="tanh") * self.up_proj(x))


class GemmaRMSNorm(nn.Module):
    """In float32 throughout; the weight is stored as its difference from one."""

    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.zeros(width))

    def forward(self, x: Tensor) -> Tensor:
        wide = x.float()
        scale = torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + self.eps)
        return (wide * scale * (1 + self.weight.float())).to(x.dtype)


def rotary(first: int, length: int, config: GemmaConfig, like: Tensor) -> tuple[Tensor, Tensor]:
    """cos and sin (L, d) of the positions first … first+L-1 (RoFormer), computed in float32."""
    steps = torch.arange(0, config.head_dim, 2, device=like.device).float()
    frequencies = 1.0 / config.theta ** (steps / config.head_dim)
    position = torch.arange(first, first + length, device=like.device).float()
    angle = position[:, None] * frequencies
    angle = torch.cat([angle, angle], dim=-1)  # the halves of a head rotate in pairs
    return angle.cos().to(like.dtype), angle.sin().to(like.dtype)


def rotate(x: Tensor, rotation: tuple[Tensor, Tensor]) -> Tensor:
    cos, sin = rotation
    first, second = x.chunk(2, dim=-1)
    return x * cos + torch.cat([-second, first], dim=-1) * sin
