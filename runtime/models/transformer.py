"""The transformer that a UNet runs over its pixels, and its feed-forward networks."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from types import MappingProxyType

from torch import Tensor, nn
from torch.nn import functional as F

from anamorph.models.activations import Activation, gelu_tanh
from anamorph.models.attention import Attention
from anamorph.models.linear import Linear
from anamorph.models.merging import merged
from anamorph.models.pixel_attention import to_pixels, to_tokens
from anamorph.models.split_einsum import split
from anamorph.models.told import Text


class GEGLU(nn.Module):
    """a * gelu(b) with [a, b] = W x + c (Shazeer 2020, arXiv:2002.05202, equation 6)."""

    def __init__(self, width: int, inner: int) -> None:
        super().__init__()
        self.proj = Linear(width, 2 * inner)

    def forward(self, x: Tensor) -> Tensor:
        value, gate = self.proj(x).chunk(2, dim=-1)
        gated: Tensor = value * F.gelu(gate)
        return gated


class Activated(nn.Module):
    """activation(W x + c)."""

    def __init__(self, width: int, inner: int, activation: Activation) -> None:
        super().__init__()
        self.activation = activation
        self.proj = Linear(width, inner)

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
        self.net = nn.Sequential(INNER[activation](width, 4 * width), nn.Identity(), Linear(4 * width, width))

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


def _projection(channels: int, linear: bool) -> nn.Module:
    return Linear(channels, channels) if linear else nn.Conv2d(channels, channels, 1)
