"""SphereMultiheadAttention: queries, keys and values by angles, from the packed weight of the torch twin."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from spherify.errors import ModelError
from spherify.functional.sphere import sphere_linear
from spherify.layers.angular import AngularLayer


class SphereMultiheadAttention(AngularLayer, nn.MultiheadAttention):
    """``nn.MultiheadAttention`` whose packed ``in_proj_weight`` answers with the response of an angle.

    The output projection is called as the module it is, so that it can be an angular layer itself. Between them the
    attention is the plain one. Not for separate weights of keys and values, ``bias_k``, ``add_zero_attn``.

    Shape: as ``nn.MultiheadAttention``: (L, N, E), (N, L, E) with ``batch_first``, or (L, E).
    """

    @property
    def weight(self) -> Tensor:  # type: ignore[override]
        """(3E, E): what the angles are taken to."""
        return self.in_proj_weight

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        if is_causal and attn_mask is None:
            raise ModelError("SphereMultiheadAttention: is_causal is a hint about attn_mask; give the mask too.")
        is_batched = query.dim() == 3
        turn = is_batched and not self.batch_first
        inputs = [x.transpose(0, 1) if turn else x if is_batched else x[None] for x in (query, key, value)]
        is_self_attention = query is key and key is value
        q, k, v = self.project_at_once(inputs[0]) if is_self_attention else self.project_apart(*inputs)
        mask = self.additive_mask(q, k, attn_mask, key_padding_mask)
        dropout = self.dropout if self.training else 0.0
        weights = None
        if need_weights:
            scores = q @ k.transpose(-2, -1) / math.sqrt(self.head_dim)
            weights = torch.softmax(scores if mask is None else scores + mask, -1)
            weights = F.dropout(weights, dropout)
            mixed = weights @ v
        else:
            mixed = F.scaled_dot_product_attention(q, k, v, mask, dropout)
        out = self.out_proj(mixed.transpose(1, 2).flatten(2))
        if weights is not None and average_attn_weights:
            weights = weights.mean(1)
        if not is_batched:
            return out[0], None if weights is None else weights[0]
        return out.transpose(0, 1) if turn else out, weights

    def project_at_once(self, x: Tensor) -> list[Tensor]:
        """(N, L, E) to three times (N, heads, L, E / heads)."""
        return [self.split_heads(part) for part in self.project(x, slice(None)).chunk(3, -1)]

    def project_apart(self, *inputs: Tensor) -> list[Tensor]:
        rows = [slice(start, start + self.embed_dim) for start in range(0, 3 * self.embed_dim, self.embed_dim)]
        return [self.split_heads(self.project(x, part)) for x, part in zip(inputs, rows, strict=True)]

    def project(self, x: Tensor, rows: slice) -> Tensor:
        k, gain, bias = self.k, self.output_gain(), self.in_proj_bias
        return sphere_linear(
            x,
            self.filters()[rows],
            None if bias is None else bias[rows],
            operator=self.operator,
            k=k[rows] if isinstance(k, Tensor) and k.numel() > 1 else k,
            eps=self.eps,
            gain=None if gain is None else gain[rows],
        )

    def split_heads(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (self.num_heads, self.head_dim)).transpose(1, 2)

    def additive_mask(
        self, q: Tensor, k: Tensor, attn_mask: Tensor | None, key_padding_mask: Tensor | None
    ) -> Tensor | None:
        """Both masks as numbers to add to the scores, (N or 1, heads or 1, L, S). True means: do not look there."""
        masks = []
        if attn_mask is not None:
            is_per_head = attn_mask.dim() == 3  # (N heads, L, S)
            masks.append(attn_mask.unflatten(0, (-1, self.num_heads)) if is_per_head else attn_mask[None, None])
        if key_padding_mask is not None:
            masks.append(key_padding_mask.view(-1, 1, 1, k.shape[2]))
        numbers = [
            torch.zeros_like(mask, dtype=q.dtype).masked_fill(mask, -math.inf) if mask.dtype == torch.bool else mask
            for mask in masks
        ]
        return sum(numbers[1:], numbers[0]) if numbers else None

    def extra_repr(self) -> str:
        return self.operator_repr()
