"""Attention over tokens, and the transformer that a UNet runs over its pixels."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F


def multi_head(q: Tensor, k: Tensor, v: Tensor, heads: int, *, causal: bool = False) -> Tensor:
    """softmax(Q K^T / sqrt(d)) V for each head: [B, S, heads d], [B, T, heads d] twice -> [B, S, heads d].

    Heads are views, never copies. Scores and softmax are float32 inside PyTorch's kernels whatever the type of
    the inputs, which is what the configuration key `upcast_attention` asks for.
    Source: Vaswani et al. 2017 (arXiv:1706.03762), equation 1.
    """
    q, k, v = (torch.unflatten(x, -1, (heads, -1)).transpose(1, 2) for x in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, is_causal=causal).transpose(1, 2).flatten(2)


class Attention(nn.Module):
    """Multi-head attention of tokens [B, S, width] to themselves, or to a context [B, T, context_width]."""

    def __init__(self, width: int, heads: int, context_width: int | None = None, *, bias: bool = False) -> None:
        super().__init__()
        self.heads = heads
        self.to_q = nn.Linear(width, width, bias=bias)
        self.to_k = nn.Linear(context_width or width, width, bias=bias)
        self.to_v = nn.Linear(context_width or width, width, bias=bias)
        self.to_out = nn.Sequential(nn.Linear(width, width))

    def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        context = x if context is None else context
        mixed: Tensor = self.to_out(multi_head(self.to_q(x), self.to_k(context), self.to_v(context), self.heads))
        return mixed


class GEGLU(nn.Module):
    """a * gelu(b) with [a, b] = W x + c (Shazeer 2020, arXiv:2002.05202, equation 6)."""

    def __init__(self, width: int, inner: int) -> None:
        super().__init__()
        self.proj = nn.Linear(width, 2 * inner)

    def forward(self, x: Tensor) -> Tensor:
        value, gate = self.proj(x).chunk(2, dim=-1)
        gated: Tensor = value * F.gelu(gate)
        return gated


class FeedForward(nn.Module):
    """A gated layer of four times the width and a projection back."""

    def __init__(self, width: int) -> None:
        super().__init__()
        # Checkpoints count the training's dropout as layer 1.
        self.net = nn.Sequential(GEGLU(width, 4 * width), nn.Identity(), nn.Linear(4 * width, width))

    def forward(self, x: Tensor) -> Tensor:
        update: Tensor = self.net(x)
        return update


class TransformerBlock(nn.Module):
    """Self-attention, attention to the text, feed-forward; each normed before and added after.

    With `only_cross` the first attention looks at the text as well.
    """

    def __init__(self, width: int, heads: int, context_width: int, *, only_cross: bool) -> None:
        super().__init__()
        self.only_cross = only_cross
        self.norm1 = nn.LayerNorm(width)
        self.attn1 = Attention(width, heads, context_width if only_cross else None)
        self.norm2 = nn.LayerNorm(width)
        self.attn2 = Attention(width, heads, context_width)
        self.norm3 = nn.LayerNorm(width)
        self.ff = FeedForward(width)

    def forward(self, x: Tensor, context: Tensor) -> Tensor:
        x = x + self.attn1(self.norm1(x), context if self.only_cross else None)
        x = x + self.attn2(self.norm2(x), context)
        total: Tensor = x + self.ff(self.norm3(x))
        return total


class SpatialTransformer(nn.Module):
    """Transformer blocks over the pixels of feature maps [B, C, h, w], added to them.

    Source: Rombach et al. 2022 (arXiv:2112.10752), appendix E.2.1.
    """

    def __init__(
        self,
        channels: int,
        heads: int,
        context_width: int,
        *,
        depth: int,
        groups: int,
        linear: bool,
        only_cross: bool,
    ) -> None:
        super().__init__()
        self.linear = linear
        self.norm = nn.GroupNorm(groups, channels, eps=1e-6)
        self.proj_in = _projection(channels, linear)
        self.transformer_blocks = nn.ModuleList(
            TransformerBlock(channels, heads, context_width, only_cross=only_cross) for _ in range(depth)
        )
        self.proj_out = _projection(channels, linear)

    def forward(self, x: Tensor, context: Tensor) -> Tensor:
        normed = self.norm(x)
        tokens = self.proj_in(to_tokens(normed)) if self.linear else to_tokens(self.proj_in(normed))
        for block in self.transformer_blocks:
            tokens = block(tokens, context)
        update = to_pixels(self.proj_out(tokens), x) if self.linear else self.proj_out(to_pixels(tokens, x))
        # `x` comes first so that the sum keeps its memory layout.
        return x + update


class PixelAttention(Attention):
    """One self-attention over the pixels of feature maps [B, C, h, w], normed before and added after."""

    def __init__(self, channels: int, *, groups: int) -> None:
        super().__init__(channels, heads=1, bias=True)
        self.group_norm = nn.GroupNorm(groups, channels, eps=1e-6)

    def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        return x + to_pixels(super().forward(to_tokens(self.group_norm(x)), context), x)


def to_tokens(x: Tensor) -> Tensor:
    """Feature maps [B, C, h, w] as tokens [B, h w, C]; a view where channels are innermost in memory."""
    return x.flatten(2).transpose(1, 2).contiguous()


def to_pixels(tokens: Tensor, like: Tensor) -> Tensor:
    """Tokens [B, h w, C] as feature maps of the height and width of `like`; a view with channels innermost."""
    return torch.unflatten(tokens.transpose(1, 2), 2, like.shape[2:])


def _projection(channels: int, linear: bool) -> nn.Module:
    return nn.Linear(channels, channels) if linear else nn.Conv2d(channels, channels, 1)
