"""Masks that say where a picture counts as a prompt. No PyTorch here."""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from anamorph.pipelines.pictures import Fit, binary, read_masks


class IPAdapterMaskProcessor:
    """Pillow images or arrays -> masks [B, 1, H, W] of 0 and 1, for `ip_adapter_masks` of `cross_attention_kwargs`.

    Sides are rounded down to multiples of `vae_scale_factor`; values of 0.5 and above are 1. Name of diffusers' class.
    """

    def __init__(self, vae_scale_factor: int = 8) -> None:
        self.vae_scale_factor = vae_scale_factor

    def preprocess(self, image: Any, height: int | None = None, width: int | None = None) -> NDArray[np.float32]:
        """Masks of that size in pixels, or of their own.

        Raises InputError: something else than masks, or values outside 0..1.
        """
        given, multiple = read_masks(image), self.vae_scale_factor
        asked = zip((height, width), given.size, strict=True)
        rows, columns = (own if side is None else side for side, own in asked)
        return binary(given, Fit(rows - rows % multiple, columns - columns % multiple))
