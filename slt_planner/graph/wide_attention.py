"""Attention whose heads are narrower than the stream they read: the block at the boundary to a scaled head."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class WideAttention(nn.Module):
    """`nn.MultiheadAttention` with fewer heads than the embedding holds.

    It takes queries, keys and values of one width C and gives heads * head_dim channels, which
    `nn.MultiheadAttention` cannot. Parameters have its names: ``in_proj_weight`` (3 * heads * head_dim, C),
    ``out_proj.weight`` (heads * head_dim, heads * head_dim). Made from a cut copy of one.
    """

    def __init__(self, cut: nn.MultiheadAttention) -> None:
        super().__init__()
        self.num_heads, self.head_dim = cut.num_heads, cut.head_dim
        self.dropout, self.batch_first = cut.dropout, cut.batch_first
        self.in_proj_weight, self.in_proj_bias, self.out_proj = cut.in_proj_weight, cut.in_proj_bias, cut.out_proj

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
        """As torch's; masks of padding are added to `attn_mask` by torch's rules."""
        own = query is key and key is value
        if not self.batch_first and query.dim() == 3:
            query, key, value = (x.transpose(0, 1) for x in (query, key, value))
        q, k, v = self._projected(query, key, value, own)
        mask = _joint_mask(attn_mask, key_padding_mask, q)
        drop = self.dropout if self.training else 0.0
        weights = None
        if need_weights:
            scores = q @ k.transpose(-2, -1) / self.head_dim**0.5
            weights = F.softmax(scores if mask is None else scores + mask, dim=-1)
            mixed = F.dropout(weights, drop) @ v
            weights = weights.mean(dim=1) if average_attn_weights else weights
        else:
            mixed = F.scaled_dot_product_attention(q, k, v, mask, drop, is_causal and mask is None)
        output = self.out_proj(mixed.transpose(1, 2).flatten(2))
        if not self.batch_first:
            output = output.transpose(0, 1)
        return output, weights

    def _projected(self, query: Tensor, key: Tensor, value: Tensor, own: bool) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values as (N, heads, positions, head_dim)."""
        if own:
            parts = F.linear(query, self.in_proj_weight, self.in_proj_bias).chunk(3, dim=-1)
        else:
            biases = [None] * 3 if self.in_proj_bias is None else self.in_proj_bias.chunk(3)
            weights = self.in_proj_weight.chunk(3)
            parts = tuple(F.linear(x, w, b) for x, w, b in zip((query, key, value), weights, biases, strict=True))
        q, k, v = (x.unflatten(-1, (self.num_heads, self.head_dim)).transpose(1, 2) for x in parts)
        return q, k, v


def _joint_mask(mask: Tensor | None, padding: Tensor | None, like: Tensor) -> Tensor | None:
    """One mask to add to the scores, (N or 1, 1, targets, sources)."""
    joint = None
    for part in (mask, None if padding is None else padding[:, None, None, :]):
        if part is not None:
            added = (
                torch.zeros_like(part, dtype=like.dtype).masked_fill(part, -torch.inf)
                if part.dtype == torch.bool
                else part
            )
            joint = added if joint is None else joint + added
    return joint
