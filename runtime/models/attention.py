"""Attention over tokens, and the transformer that a UNet runs over its pixels."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from types import MappingProxyType

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from anamorph.errors import InputError
from anamorph.models.activations import Activation, gelu_tanh
from anamorph.models.attention_kernels import kernel
from anamorph.models.merging import merged
from anamorph.models.split_einsum import split
from anamorph.models.told import Text


def multi_head(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    heads: int,
    *,
    causal: bool = False,
    bias: Tensor | None = None,
    at_once: int | None = None,
    fused: bool | str = True,
    beside: Callable[[Tensor], Tensor] | None = None,
) -> Tensor:
    """softmax(Q K^T / sqrt(d) + bias) V for each head: [B, S, heads d], [B, T, heads d] twice -> [B, S, heads d].

    `bias` broadcasts to [B, heads, S, T]. Heads are views, never copies. With `at_once`, so many heads of one picture
    are computed at a time, and no more scores than theirs are ever in memory. Scores and softmax are float32, inside
    PyTorch's kernels (`fused` may insist on one by its name) or, `fused=False`, outside, whatever the type of the
    inputs, which is what the configuration key `upcast_attention` asks for. What `beside` makes of Q [B, heads, S, d]
    is added.
    Source: Vaswani et al. 2017 (arXiv:1706.03762), equation 1.
    """
    q, k, v = (torch.unflatten(x, -1, (heads, -1)).transpose(1, 2) for x in (q, k, v))
    attend = kernel(fused) if isinstance(fused, str) else F.scaled_dot_product_attention if fused else _written_out
    if at_once is not None:
        mixed = _sliced(attend, q, k, v, at_once, causal, bias)
    else:
        mixed = attend(q, k, v, attn_mask=bias, is_causal=causal)
    if beside is not None:
        mixed = mixed + beside(q)
    return mixed.transpose(1, 2).flatten(2)


def _written_out(q: Tensor, k: Tensor, v: Tensor, attn_mask: Tensor | None, is_causal: bool) -> Tensor:
    """What PyTorch's function of the same arguments computes, step by step."""
    scores = q.float() @ k.float().transpose(-1, -2) / q.shape[-1] ** 0.5
    if is_causal:
        scores = scores + torch.full_like(scores, -torch.inf).triu(1)
    if attn_mask is not None:
        scores = scores + attn_mask
    mixed: Tensor = scores.softmax(-1).to(v.dtype) @ v
    return mixed


def _sliced(
    attend: Callable[..., Tensor],
    q: Tensor,
    k: Tensor,
    v: Tensor,
    at_once: int,
    causal: bool,
    bias: Tensor | None,
) -> Tensor:
    """Attention of [B, heads, S, d], some heads of one picture at a time."""
    out = torch.empty_like(q)
    masks = None if bias is None else bias.expand(*q.shape[:2], *bias.shape[2:])
    for picture in range(q.shape[0]):
        for first in range(0, q.shape[1], at_once):
            part = slice(picture, picture + 1), slice(first, first + at_once)
            mask = None if masks is None else masks[part]
            out[part] = attend(q[part], k[part], v[part], attn_mask=mask, is_causal=causal)
    return out


class Sliceable(nn.Module):
    """Attention whose heads may go one after another."""

    heads: int
    fused: bool | str = True
    """Whether PyTorch's fused function computes it, or the kernel of that name."""
    at_once: int | None = None
    """How many heads of one picture are computed at a time; None: all of them, of all pictures."""


def slice_attention(module: nn.Module, size: int | str | None) -> None:
    """Let the attention of a model take some heads at a time: a number, "auto" (half of them), "max" (one), None (all).

    Raises InputError: the size is something else, or larger than the number of heads of a layer.
    """
    layers = [layer for layer in module.modules() if isinstance(layer, Sliceable)]
    whole = isinstance(size, int) and not isinstance(size, bool)
    most = min((layer.heads for layer in layers), default=0)
    if not (size in (None, "auto", "max") or (whole and layers and 1 <= int(size) <= most)):
        raise InputError(f"slice_size is {size!r}, expected auto, max, None or 1 to {most} heads")
    for layer in layers:
        named = {None: None, "auto": max(layer.heads // 2, 1), "max": 1}
        layer.at_once = size if isinstance(size, int) else named[size]


class Attention(Sliceable):
    """Multi-head attention of tokens [B, S, width] to themselves, or to a text [B, T, context_width].

    `norm_context` norms the text first.
    """

    place: slice | None = None
    """Where its keys and values lie among those of all attentions to the text."""
    level = 0
    """The resolution at which it stands, the highest first."""

    def __init__(
        self,
        width: int,
        heads: int,
        context_width: int | None = None,
        *,
        bias: bool = False,
        norm_context: bool = False,
    ) -> None:
        super().__init__()
        self.heads, self.width, self.cross = heads, width, context_width is not None
        self.norm_cross = nn.LayerNorm(context_width or width) if norm_context else None
        self.to_q = nn.Linear(width, width, bias=bias)
        self.to_k = nn.Linear(context_width or width, width, bias=bias)
        self.to_v = nn.Linear(context_width or width, width, bias=bias)
        self.to_out = nn.Sequential(nn.Linear(width, width))

    def forward(self, x: Tensor, text: Text | None = None) -> Tensor:
        q = self.to_q(x)
        if text is None:
            k, v, mask, beside = *self.keys_values(x), None, None
        else:
            q, mask, beside = text.dealt(q, self.place), text.mask, self._beside(text)
            k, v = self.told(text)
        mixed: Tensor = self.to_out(
            multi_head(q, k, v, self.heads, bias=mask, at_once=self.at_once, fused=self.fused, beside=beside)
        )
        return mixed

    def keys_values(self, context: Tensor) -> tuple[Tensor, Tensor]:
        """What this layer makes of the tokens that it looks at: [B, T, D] -> twice [B, T, width]."""
        if self.norm_cross is not None:
            context = self.norm_cross(context)
        return self.to_k(context), self.to_v(context)

    def told(self, text: Text) -> tuple[Tensor, Tensor]:
        """Its keys and values of a text, computed now or before, twice [B, T, width]."""
        if text.keys is not None and text.values is not None and self.place is not None:
            return text.keys[..., self.place], text.values[..., self.place]
        assert text.states is not None
        return self.keys_values(text.states)

    def _beside(self, text: Text) -> Callable[[Tensor], Tensor] | None:
        """How pictures are seen beside the text, where there are any."""
        if text.images is None or self.place is None:
            return None
        return partial(text.images.seen, place=self.place, level=self.level)


class GEGLU(nn.Module):
    """a * gelu(b) with [a, b] = W x + c (Shazeer 2020, arXiv:2002.05202, equation 6)."""

    def __init__(self, width: int, inner: int) -> None:
        super().__init__()
        self.proj = nn.Linear(width, 2 * inner)

    def forward(self, x: Tensor) -> Tensor:
        value, gate = self.proj(x).chunk(2, dim=-1)
        gated: Tensor = value * F.gelu(gate)
        return gated


class Activated(nn.Module):
    """activation(W x + c)."""

    def __init__(self, width: int, inner: int, activation: Activation) -> None:
        super().__init__()
        self.activation = activation
        self.proj = nn.Linear(width, inner)

    def forward(self, x: Tensor) -> Tensor:
        return self.activation(self.proj(x))


INNER: Mapping[str, Callable[[int, int], nn.Module]] = MappingProxyType(
    {
        "geglu": GEGLU,
        "gelu": lambda width, inner: Activated(width, inner, F.gelu),
        "gelu-approximate": lambda width, inner: Activated(width, inner, gelu_tanh),
    }
)
"""diffusers' `activation_fn` -> the first layer of the feed-forward network."""


class FeedForward(nn.Module):
    """A layer of four times the width with its activation, and a projection back."""

    def __init__(self, width: int, activation: str = "geglu") -> None:
        super().__init__()
        # Checkpoints count the training's dropout as layer 1.
        self.net = nn.Sequential(INNER[activation](width, 4 * width), nn.Identity(), nn.Linear(4 * width, width))

    def forward(self, x: Tensor) -> Tensor:
        update: Tensor = self.net(x)
        return update


class TransformerBlock(nn.Module):
    """Self-attention, attention to the text, feed-forward; each normed before and added after.

    With `only_cross` the first attention looks at the text as well. With a `grid`, height and width of the pixels that
    the tokens are, half of them are merged for self-attention.
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

    def forward(self, x: Tensor, text: Text, grid: Sequence[int] | None = None) -> Tensor:
        if grid is None:
            x = x + self.attn1(self.norm1(x), replace(text, mask=None) if self.only_cross else None)
        else:
            fewer = merged(self.norm1(x), *grid)
            x = x + fewer.apart(self.attn1(fewer.tokens))
        x = text.dealt(x, self.attn2.place) + self.attn2(self.norm2(x), text)
        total: Tensor = x + self.ff(self.norm3(x))
        return total


class SpatialTransformer(nn.Module):
    """Transformer blocks over the pixels of feature maps [B, C, h, w], added to them.

    Source: Rombach et al. 2022 (arXiv:2112.10752), appendix E.2.1.
    """

    rewritten = False
    split = False
    """Whether it computes as the Neural Engine wants it; see `anamorph.models.split_einsum`."""

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

    def forward(self, x: Tensor, text: Text) -> Tensor:
        if self.split:
            return split(self, x, text)
        normed = self.norm(x)
        tokens = self.proj_in(to_tokens(normed)) if self.linear else to_tokens(self.proj_in(normed))
        grid = x.shape[2:] if self.rewritten else None
        for block in self.transformer_blocks:
            tokens = block(tokens, text, grid)
        update = to_pixels(self.proj_out(tokens), x) if self.linear else self.proj_out(to_pixels(tokens, x))
        # `x` comes first so that the sum keeps its memory layout.
        return text.dealt(x, self.transformer_blocks[0].attn2.place) + update  # type: ignore[union-attr, arg-type]


class PixelAttention(Attention):
    """Self-attention over the pixels of feature maps [B, C, h, w]: (x + attention(norm(x))) / scale.

    `groups=None` leaves the norm out.
    """

    def __init__(
        self, channels: int, *, groups: int | None, heads: int = 1, eps: float = 1e-6, scale: float = 1.0
    ) -> None:
        super().__init__(channels, heads, bias=True)
        self.scale = scale
        self.group_norm = None if groups is None else nn.GroupNorm(groups, channels, eps=eps)

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
            nn.Linear(width, channels) for width in (channels, context_width, context_width)
        )
        self.to_k, self.to_v = (None if only_cross else nn.Linear(channels, channels) for _ in range(2))
        self.to_out = nn.Sequential(nn.Linear(channels, channels))

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
        mixed = multi_head(self.to_q(tokens), k, v, self.heads, bias=mask, at_once=self.at_once, fused=self.fused)
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


def _projection(channels: int, linear: bool) -> nn.Module:
    return nn.Linear(channels, channels) if linear else nn.Conv2d(channels, channels, 1)


def _context_norm(kind: str | None, channels: int, context_width: int) -> nn.Module | None:
    if kind is None:
        return None
    return nn.LayerNorm(channels) if kind == "layer_norm" else nn.GroupNorm(32, context_width, eps=1e-5)
