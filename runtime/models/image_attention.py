"""Attention of pixels to pictures that are prompts, beside the text (IP-Adapter)."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from anamorph.image_prompts import IMAGE_BIAS, IMAGE_KEYS, IMAGE_VALUES, mask_name


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
        """sum_g m_g softmax(Q K_g^T / sqrt(d) + b_g) V_g for each head: Q [B, heads, S, d] -> the same shape.

        All groups enter both products at once. Source: Ye et al. 2023 (arXiv:2308.06721), equation 5, with diffusers'
        masks.
        """
        heads, width = q.shape[1], q.shape[3]
        k, v = (
            torch.unflatten(x[..., place].flatten(1, 2), -1, (heads, -1)).transpose(1, 2)
            for x in (self.keys, self.values)
        )
        scores = torch.unflatten((q @ (k * width**-0.5).transpose(-1, -2)).float(), -1, self.keys.shape[1:3])
        if self.bias is not None:
            scores = scores + self.bias[:, None, None]
        shares = scores.softmax(-1)
        if (mask := self.masks.get(level)) is not None:
            shares = shares * (1 + mask.flatten(2).transpose(1, 2))[:, None, :, :, None]
        mixed: Tensor = shares.flatten(3).to(v.dtype) @ v
        return mixed
