"""The Gemma-2 decoder stack without its language-model head (arXiv 2408.00118).

Shapes: B batch, L tokens, D hidden size. The model is written out here because importing it from
transformers takes longer (2.4 s, 150 MB) than the rest of a cold start; the tests compare the two.
Attribute names are the published ones.

The decoder is causal, so the keys and values of a token do not depend on the tokens after it:
`past` takes those of the tokens before, and only the new tokens are run.
"""

from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sana_cli.models.configs import GemmaConfig
from sana_cli.system.memory import PeakMemory

KeysValues = tuple[Tensor, Tensor]  # of one layer, each (B, kv heads, L, d); keys after RoPE


class Gemma(nn.Module):
    def __init__(self, config: GemmaConfig) -> None:
        super().__init__()
        self.config = config
        # Without random initialisation, which on the meta device would import torch's compiler.
        table = torch.empty(config.vocab_size, config.hidden_size)
        self.embed_tokens = nn.Embedding.from_pretrained(table)
        self.layers = nn.ModuleList(Layer(config) for _ in range(config.num_hidden_layers))
        self.norm = GemmaRMSNorm(config.hidden_size, config.rms_norm_eps)

    def forward(
        self, ids: Tensor, past: list[KeysValues] | None = None
    ) -> tuple[Tensor, list[KeysValues]]:
        """Token ids (B, L) -> states after the final norm (B, L, D), and keys and values by layer.

        `past` holds the keys and values of the P tokens before these, by layer; P + L <= 2048.
        """
        start = past[0][0].shape[2] if past else 0
        x = self.embed_tokens(ids)
        x = x * torch.tensor(self.config.hidden_size**0.5, dtype=x.dtype)
        length = ids.shape[1]
        rotation = rotary(start, length, self.config, x)
        masked = torch.ones(length, start + length, dtype=torch.bool, device=x.device)
        masked = masked.triu(1 + start)
        present = []
        for i, layer in enumerate(self.layers):
            x, keys_values = layer(x, rotation, masked, past[i] if past else None)
            present.append(keys_values)
        return self.norm(x), present


def peak_bytes(config: GemmaConfig, precision: str, tokens: int) -> int:
    """Predict the most bytes that encoding a text of `tokens` tokens takes, weights included.

    `precision`: "int8" for 8-bit linear maps, else the name of a torch dtype. The embedding table
    does not count, as it stays in its file.
    """
    # With 8-bit weights, activations are in the device's widest dtype.
    dtype = torch.float32 if precision == "int8" else getattr(torch, precision)
    with torch.device("meta"):
        # A layer frees its activations before the next one runs, so one layer stands for all.
        gemma = Gemma(replace(config, num_hidden_layers=1)).requires_grad_(False).to(dtype)
        ids = torch.empty((1, tokens), dtype=torch.long)
    with PeakMemory() as memory:
        gemma(ids)
    return config.linear_weights * (1 if precision == "int8" else dtype.itemsize) + memory.peak


class MappedEmbedding(nn.Module):
    """An embedding whose table stays where it was loaded, which may be a memory-mapped file.

    Only the rows of the given ids are read, converted to `dtype` and moved to the device of the
    ids. The table holds a fifth of Gemma-2's weights.
    """

    def __init__(self, weight: Tensor, dtype: torch.dtype) -> None:
        super().__init__()
        # A plain attribute, not a parameter, so that moving the model leaves it in place.
        self.table, self.dtype = weight, dtype

    def forward(self, ids: Tensor) -> Tensor:
        return F.embedding(ids.to(self.table.device), self.table).to(ids.device, self.dtype)


class Layer(nn.Module):
    """Attention, then a gated feed-forward, each between two norms and with a residual."""

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
        self, x: Tensor, rotation: tuple[Tensor, Tensor], masked: Tensor, past: KeysValues | None
    ) -> tuple[Tensor, KeysValues]:
        y, keys_values = self.self_attn(self.input_layernorm(x), rotation, masked, past)
        x = x + self.post_attention_layernorm(y)
        y = self.mlp(self.pre_feedforward_layernorm(x))
        return x + self.post_feedforward_layernorm(y), keys_values


class Attention(nn.Module):
    """Causal grouped-query attention with soft-capped (tanh) scores."""

    def __init__(self, config: GemmaConfig) -> None:
        super().__init__()
        self.config = config
        width, head = config.hidden_size, config.head_dim
        self.q_proj = nn.Linear(width, config.num_attention_heads * head, bias=False)
        self.k_proj = nn.Linear(width, config.num_key_value_heads * head, bias=False)
        self.v_proj = nn.Linear(width, config.num_key_value_heads * head, bias=False)
        self.o_proj = nn.Linear(config.num_attention_heads * head, width, bias=False)

    def forward(
        self, x: Tensor, rotation: tuple[Tensor, Tensor], masked: Tensor, past: KeysValues | None
    ) -> tuple[Tensor, KeysValues]:
        head = self.config.head_dim
        q, k, v = (
            project(x).unflatten(-1, (-1, head)).transpose(1, 2)  # (B, heads, L, d)
            for project in (self.q_proj, self.k_proj, self.v_proj)
        )
        q, k = rotate(q, rotation), rotate(k, rotation)
        keys_values = (k, v)
        if past is not None:
            k, v = torch.cat([past[0], k], dim=2), torch.cat([past[1], v], dim=2)
        groups = self.config.num_attention_heads // self.config.num_key_value_heads
        k, v = k.repeat_interleave(groups, dim=1), v.repeat_interleave(groups, dim=1)
        scores = q @ k.transpose(-1, -2) * self.config.query_pre_attn_scalar**-0.5
        cap = self.config.attn_logit_softcapping
        if cap is not None:
            scores = torch.tanh(scores / cap) * cap
        scores = scores.masked_fill(masked, float("-inf"))
        out = scores.softmax(dim=-1, dtype=torch.float32).to(x.dtype) @ v
        return self.o_proj(out.transpose(1, 2).flatten(2)), keys_values


class FeedForward(nn.Module):
    def __init__(self, config: GemmaConfig) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.gelu(self.gate_proj(x), approximate="tanh") * self.up_proj(x))


class GemmaRMSNorm(nn.Module):
    """RMSNorm computed in float32; the stored weight is its difference from one."""

    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.zeros(width))

    def forward(self, x: Tensor) -> Tensor:
        wide = x.float()
        scale = torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + self.eps)
        return (wide * scale * (1 + self.weight.float())).to(x.dtype)


def rotary(first: int, length: int, config: GemmaConfig, like: Tensor) -> tuple[Tensor, Tensor]:
    """Return cos and sin (L, d) for positions first … first+L-1 (RoFormer), computed in float32."""
    steps = torch.arange(0, config.head_dim, 2, device=like.device).float()
    frequencies = 1.0 / config.theta ** (steps / config.head_dim)
    position = torch.arange(first, first + length, device=like.device).float()
    angle = position[:, None] * frequencies
    angle = torch.cat([angle, angle], dim=-1)  # channel i of a head pairs with channel i + d/2
    return angle.cos().to(like.dtype), angle.sin().to(like.dtype)


def rotate(x: Tensor, rotation: tuple[Tensor, Tensor]) -> Tensor:
    cos, sin = rotation
    first, second = x.chunk(2, dim=-1)
    return x * cos + torch.cat([-second, first], dim=-1) * sin
