"""Attention over tokens: the formula, in one piece or by heads, and the layer."""

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from anamorph.errors import InputError
from anamorph.models.attention_kernels import ONE, kernel
from anamorph.models.linear import Linear
from anamorph.models.told import Text
from anamorph.rewrites import ATTENTION


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
    REWRITE = ATTENTION
    rewritten = False

    @property
    def way(self) -> bool | str:
        """`fused`, or one operation of graphs where the rewrite says so and nothing else is asked for."""
        return ONE if self.rewritten and self.fused is True and self.at_once is None else self.fused


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
        self.to_q = Linear(width, width, bias=bias)
        self.to_k = Linear(context_width or width, width, bias=bias)
        self.to_v = Linear(context_width or width, width, bias=bias)
        self.to_out = nn.Sequential(Linear(width, width))

    def forward(self, x: Tensor, text: Text | None = None) -> Tensor:
        q = self.to_q(x)
        if text is None:
            k, v, mask, beside = *self.keys_values(x), None, None
        else:
            q, mask, beside = text.dealt(q, self.place), text.mask, self._beside(text)
            k, v = self.told(text)
        mixed: Tensor = self.to_out(
            multi_head(q, k, v, self.heads, bias=mask, at_once=self.at_once, fused=self.way, beside=beside)
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
