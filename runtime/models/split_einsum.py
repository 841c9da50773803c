"""Transformers over pixels for Apple's Neural Engine: the rewrite "split-einsum".

Tokens lie as [B, C, 1, S], so that linear layers are 1x1 convolutions, and each head is a product of its own of two
small tensors. Source: Apple, "Deploying Transformers on the Apple Neural Engine" (2022), principles 1 to 3.
"""

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from anamorph.models.told import Text

if TYPE_CHECKING:
    from anamorph.models.attention import Attention
    from anamorph.models.transformer import FeedForward, SpatialTransformer, TransformerBlock


def split(layer: "SpatialTransformer", x: Tensor, text: Text) -> Tensor:
    """What `layer` computes of feature maps [B, C, h, w]."""
    tokens = pointwise(layer.norm(x), layer.proj_in)
    tokens = tokens.reshape(*tokens.shape[:2], 1, -1)
    for block in layer.transformer_blocks:
        tokens = _block(block, tokens, text)  # type: ignore[arg-type]
    update = pointwise(tokens.reshape(*tokens.shape[:2], *x.shape[2:]), layer.proj_out)
    return text.dealt(x, layer.transformer_blocks[0].attn2.place) + update  # type: ignore[union-attr, arg-type]


def pointwise(x: Tensor, layer: nn.Module) -> Tensor:
    """A linear layer, or a 1x1 convolution, along the channels of [B, C, h, w]."""
    weight: Tensor = layer.weight  # type: ignore[assignment]
    return F.conv2d(x, weight if weight.ndim == 4 else weight[:, :, None, None], layer.bias)  # type: ignore[arg-type]


def _block(block: "TransformerBlock", x: Tensor, text: Text) -> Tensor:
    own = Text(text.states) if block.only_cross else None
    x = x + _attention(block.attn1, _normed(x, block.norm1), own)
    x = text.dealt(x, block.attn2.place) + _attention(block.attn2, _normed(x, block.norm2), text)
    return x + _feed_forward(block.ff, _normed(x, block.norm3))


def _normed(x: Tensor, norm: nn.LayerNorm) -> Tensor:
    """Layer norm along the channels."""
    normed: Tensor = norm(x.transpose(1, 3))
    return normed.transpose(1, 3)


def _attention(layer: "Attention", x: Tensor, text: Text | None) -> Tensor:
    """softmax(K Q / sqrt(d)) along the keys, head by head: [B, C, 1, S] -> [B, C, 1, S]."""
    width = layer.width // layer.heads
    q = pointwise(x, layer.to_q)
    if text is None:
        k, v = pointwise(x, layer.to_k), pointwise(x, layer.to_v)
    else:
        q = text.dealt(q, layer.place)
        k, v = _told(layer, text)
    q, k = q * width**-0.5, k.transpose(1, 3)
    mask = None if text is None or text.mask is None else text.mask.transpose(1, 3)
    heads = []
    for head in range(layer.heads):
        place = slice(head * width, (head + 1) * width)
        scores = torch.einsum("bkhc,bchq->bkhq", k[..., place], q[:, place])
        scores = scores if mask is None else scores + mask
        heads.append(torch.einsum("bchk,bkhq->bchq", v[:, place], scores.softmax(1)))
    return pointwise(torch.cat(heads, dim=1), layer.to_out[0])


def _told(layer: "Attention", text: Text) -> tuple[Tensor, Tensor]:
    """Keys and values of a text as [B, C, 1, T]."""
    if text.keys is not None:
        k, v = (each.transpose(1, 2).unsqueeze(2) for each in layer.told(text))
        return k, v
    assert text.states is not None
    states = text.states.transpose(1, 2).unsqueeze(2)
    return pointwise(states, layer.to_k), pointwise(states, layer.to_v)


def _feed_forward(layer: "FeedForward", x: Tensor) -> Tensor:
    inner = layer.net[0]
    value, gate = pointwise(x, inner.proj).chunk(2, dim=1)  # type: ignore[arg-type]
    return pointwise(value * F.gelu(gate), layer.net[2])
