"""Attention of pixels to pictures that are prompts, beside the text (IP-Adapter)."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from anamorph.conditions import IMAGE_BIAS, IMAGE_KEYS, IMAGE_VALUES, mask_name


def image_attention(q: Tensor, keys: Tensor, values: Tensor, bias: Tensor | None, mask: Tensor | None) -> Tensor:
    """sum_g (1 + m_g) softmax(Q K_g^T / sqrt(d) + b_g) V_g for each head: Q [B, heads, S, d] -> the same shape.

    Keys and values are [B, G, T, heads d], b [B, G, T], m [B, G, h, w] with h w = S. All groups enter both products at
    once. Source: Ye et al. 2023 (arXiv:2308.06721), equation 5, with diffusers' masks.
    """
    heads, width = q.shape[1], q.shape[3]
    k = torch.unflatten(keys.flatten(1, 2), -1, [heads, -1]).transpose(1, 2)
    v = torch.unflatten(values.flatten(1, 2), -1, [heads, -1]).transpose(1, 2)
    scores = torch.unflatten((q @ (k * width**-0.5).transpose(-1, -2)).float(), -1, keys.shape[1:3])
    if bias is not None:
        scores = scores + bias[:, None, None]
    shares = scores.softmax(-1)
    if mask is not None:
        shares = shares * (1 + mask.flatten(2).transpose(1, 2))[:, None, :, :, None]
    mixed: Tensor = shares.flatten(3).to(v.dtype) @ v
    return mixed


@torch.library.custom_op("anamorph::image_attention", mutates_args=())
def traced(q: Tensor, keys: Tensor, values: Tensor, bias: Tensor, mask: Tensor) -> Tensor:
    """The same as one operation of a graph of open sizes, whose products take longer to trace than all the rest."""
    return image_attention(q, keys, values, bias, mask)


@traced.register_fake
def _(q: Tensor, keys: Tensor, values: Tensor, bias: Tensor, mask: Tensor) -> Tensor:  # noqa: ARG001
    return torch.empty_like(q)


@dataclass(frozen=True)
class Images:
    """Keys and values of all attentions, [B, G, T, sum of widths], and what `image_ports` lists beside them."""

    keys: Tensor
    values: Tensor
    bias: Tensor | None
    masks: Mapping[int, Tensor]

    @classmethod
    def among(cls, given: Mapping[str, Tensor], levels: int) -> "Images | None":
        """Those among the inputs of a part, if there are any."""
        if IMAGE_KEYS not in given or IMAGE_VALUES not in given:
            return None
        masks = {level: given[name] for level in range(levels) if (name := mask_name(level)) in given}
        return cls(given[IMAGE_KEYS], given[IMAGE_VALUES], given.get(IMAGE_BIAS), masks)

    def seen(self, q: Tensor, place: slice, level: int) -> Tensor:
        """What the attention at `place` sees of the pictures; see `image_attention`."""
        keys, values, mask = self.keys[..., place], self.values[..., place], self.masks.get(level)
        opened = torch.compiler.is_exporting() and isinstance(keys.shape[1], torch.SymInt)
        if opened and self.bias is not None and mask is not None:
            seen: Tensor = traced(q, keys, values, self.bias, mask)
            return seen
        return image_attention(q, keys, values, self.bias, mask)
