"""Cross-attention to a fixed text: whatever depends on the text alone is computed once an image.

Head h gives text token s the score q·k = (x·W_q + b_q)·k_s, and adds p_s·v_s·W_o to the result.
The length of the text decides which of three forms is kept:

- `ConstantText`: a single token gets all the weight whatever the query, so the result is constant.
- `FoldedText`: for a few tokens the products W_q·k_s and v_s·W_o are kept, D numbers per head and
  token, and replace both projections of x. This saves work while heads·L is below D.
- `KeyValueText`: for many tokens the keys and values are kept.
"""

import math
from typing import NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sana_cli.kernels.linear import linear
from sana_cli.kernels.projection import gated_residual_linear_
from sana_cli.kernels.text_attention import attend_keys, attend_text
from sana_cli.models.dit import CrossAttention


class ConstantText(NamedTuple):
    result: Tensor  # (D,)


class FoldedText(NamedTuple):
    queries: Tensor  # (heads·L, D), on the CPU (L·heads, D)
    bias: Tensor  # (heads·L,) in the same order; -inf where padded
    results: Tensor  # (D, heads·L), its columns in that order too


class KeyValueText(NamedTuple):
    keys: Tensor  # (heads, L, d)
    values: Tensor
    bias: Tensor  # (1, L): 0, or -inf where padded; empty without padding


TextContext = ConstantText | FoldedText | KeyValueText  # of one text in one layer


class TextAttention(nn.Module):
    """A `CrossAttention` that adds its result to the image tokens in place."""

    def __init__(self, plain: CrossAttention) -> None:
        super().__init__()
        self.heads, self.qk_norm = plain.heads, plain.qk_norm
        self.to_q, self.to_k, self.to_v = plain.to_q, plain.to_k, plain.to_v
        self.to_out = cast(nn.Linear, plain.to_out[0])
        if self.qk_norm:
            self.norm_q, self.norm_k = plain.norm_q, plain.norm_k

    def encode_text(self, caption: Tensor, padded: int = 1, fold: bool = True) -> TextContext:
        """Precompute the context of a projected text (1, L, D).

        Shorter texts are padded to `padded` tokens, so that fewer shapes occur. With `fold` the
        context may take up to D² numbers, more than keys and values do, to save time.
        """
        k, v = self.to_k(caption), self.to_v(caption)
        if self.qk_norm:
            k = self.norm_k(k)
        length, width = caption.shape[1:]
        if length == padded == 1:
            return ConstantText(F.linear(v.flatten(), self.to_out.weight, self.to_out.bias))
        missing = max(0, padded - length)
        k, v = (F.pad(t[0], (0, 0, 0, missing)).unflatten(-1, (self.heads, -1)) for t in (k, v))
        k, v = k.transpose(0, 1), v.transpose(0, 1)  # (heads, L, d)
        bias = F.pad(caption.new_zeros((1, length)), (0, missing), value=-torch.inf)
        if self.qk_norm or not fold or 2 * self.heads * (length + missing) > width:
            return KeyValueText(k, v, bias if missing else bias[:, :0])
        k = k.float() / math.sqrt(k.shape[-1])
        of_query = self.to_q.weight.float().unflatten(0, (self.heads, -1))  # (heads, d, D)
        of_bias = cast(Tensor, self.to_q.bias).float().unflatten(0, (self.heads, -1, 1))
        of_value = self.to_out.weight.float().unflatten(1, (self.heads, -1))  # (D, heads, d)
        queries, result = k @ of_query, v.float() @ of_value.permute(1, 2, 0)
        scores = (k @ of_bias)[..., 0] + bias.float()
        if caption.is_cpu:  # where a softmax is many times faster if its dimension is not the last
            queries, result, scores = (t.transpose(0, 1) for t in (queries, result, scores))
        return FoldedText(
            queries.flatten(0, 1).to(caption.dtype),
            scores.flatten().to(caption.dtype),
            result.flatten(0, 1).t().contiguous().to(caption.dtype),
        )

    def forward(self, x: Tensor, text: TextContext) -> None:
        """Attend from image tokens (1, N, D) to the text and add the result to them in place."""
        if isinstance(text, ConstantText):
            x += text.result
            return
        if isinstance(text, FoldedText):
            scores = linear(x, text.queries, text.bias)
            if x.is_cpu:
                weights = scores.unflatten(-1, (-1, self.heads)).softmax(-2)
            else:
                weights = scores.unflatten(-1, (self.heads, -1)).softmax(-1)
            weights = weights.flatten(-2)
            gated_residual_linear_(x, weights, text.results, self.to_out.bias, None)
            return
        bias = text.bias if text.bias.numel() else None
        to_q = self.to_q.weight, cast(Tensor, self.to_q.bias)
        if self.qk_norm:
            norm = self.norm_q
            y = attend_text(x, *to_q, norm.weight, norm.eps, text.keys, text.values, bias)
        else:
            y = attend_keys(linear(x, *to_q), text.keys, text.values, bias)
        gated_residual_linear_(x, y, self.to_out.weight, self.to_out.bias, None)
