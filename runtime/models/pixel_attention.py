"""Attention over the pixels of feature maps."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from anamorph.models.attention import Attention, Sliceable, multi_head
from anamorph.models.linear import Linear
from anamorph.models.row_norm import GroupNorm
from anamorph.models.told import Text


class PixelAttention(Attention):
    """Self-attention over the pixels of feature maps [B, C, h, w]: (x + attention(norm(x))) / scale.

    `groups=None` leaves the norm out.
    """

    def __init__(
        self, channels: int, *, groups: int | None, heads: int = 1, eps: float = 1e-6, scale: float = 1.0
    ) -> None:
        super().__init__(channels, heads, bias=True)
        self.scale = scale
        self.group_norm = None if groups is None else GroupNorm(groups, channels, eps=eps)

    def forward(self, x: Tensor, text: Text | None = None) -> Tensor:
        normed = x if self.group_norm is None else self.group_norm(x)
        total = x + to_pixels(super().forward(to_tokens(normed), text), x)
        return total if self.scale == 1.0 else total / self.scale


class AddedAttention(Sliceable):
    """Attention of the pixels of feature maps [B, C, h, w] to a text [B, T, D] and to themselves at once, added.

    `only_cross` leaves the pixels out of keys and values; `norm_context` is None, "layer_norm" or "group_norm".
    Source: Nichol et al. 2021 (arXiv:2112.10741), section 4.1: the text's keys and values join the layer's own.
    """

    def __init__(
        self, channels: int, heads: int, context_width: int, *, groups: int, only_cross: bool, norm_context: str | None
    ) -> None:
        super().__init__()
        self.heads, self.only_cross = heads, only_cross
        self.group_norm = nn.GroupNorm(groups, channels, eps=1e-5)
        self.norm_cross = _context_norm(norm_context, channels, context_width)
        self.to_q, self.add_k_proj, self.add_v_proj = (
            Linear(width, channels) for width in (channels, context_width, context_width)
        )
        self.to_k, self.to_v = (None if only_cross else Linear(channels, channels) for _ in range(2))
        self.to_out = nn.Sequential(Linear(channels, channels))

    def forward(self, x: Tensor, text: Text) -> Tensor:
        tokens, context, mask = to_tokens(self.group_norm(x)), text.states, text.mask
        assert context is not None
        if isinstance(self.norm_cross, nn.GroupNorm):
            context = self.norm_cross(context.transpose(1, 2)).transpose(1, 2)
        elif self.norm_cross is not None:
            context = self.norm_cross(context)
        k, v = self.add_k_proj(context), self.add_v_proj(context)
        if self.to_k is not None and self.to_v is not None:
            k, v = torch.cat((k, self.to_k(tokens)), dim=1), torch.cat((v, self.to_v(tokens)), dim=1)
            mask = None if mask is None else F.pad(mask, (0, tokens.shape[1]))
        mixed = multi_head(self.to_q(tokens), k, v, self.heads, bias=mask, at_once=self.at_once, fused=self.way)
        update: Tensor = self.to_out(mixed)
        return x + to_pixels(update, x)


OLD_NAMES = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}
"""Names of the layers of attention over pixels in files written before diffusers 0.17."""


def renamed(name: str) -> str:
    """The name of a weight of attention over pixels, whichever version of diffusers wrote it."""
    return ".".join(OLD_NAMES.get(layer, layer) for layer in name.split("."))


def to_tokens(x: Tensor) -> Tensor:
    """Feature maps [B, C, h, w] as tokens [B, h w, C]; a view where channels are innermost in memory."""
    return x.flatten(2).transpose(1, 2).contiguous()


def to_pixels(tokens: Tensor, like: Tensor) -> Tensor:
    """Tokens [B, h w, C] as feature maps of the height and width of `like`; a view with channels innermost."""
    return torch.unflatten(tokens.transpose(1, 2), 2, like.shape[2:])


def _context_norm(kind: str | None, channels: int, context_width: int) -> nn.Module | None:
    if kind is None:
        return None
    return nn.LayerNorm(channels) if kind == "layer_norm" else nn.GroupNorm(32, context_width, eps=1e-5)
