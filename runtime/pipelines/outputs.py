"""What a pipeline returns."""

from dataclasses import dataclass
from typing import Any

from numpy.typing import NDArray
from PIL import Image

from anamorph.errors import InputError
from anamorph.image import to_pil, to_unit

OUTPUT_TYPES = ("pil", "np", "pt", "latent")


@dataclass(frozen=True)
class PipelineOutput:
    """`images`: Pillow images, NumPy [N, H, W, C] or torch [N, C, H, W] in 0..1, or latents [N, c, h, w].

    `nsfw_content_detected` says for each whether the safety checker holds it back; None: none ran.
    """

    images: Any
    nsfw_content_detected: list[bool] | None = None


def check_output_type(output_type: str) -> None:
    """Raise InputError on a kind of output that does not exist."""
    if output_type not in OUTPUT_TYPES:
        raise InputError(f"output_type is {output_type!r}, expected one of {', '.join(OUTPUT_TYPES)}")


def finish_images(pixels: NDArray[Any], output_type: str) -> list[Image.Image] | Any:
    """Decoded pictures in about -1..1 [N, C, H, W] (for "pil" also bytes [N, H, W, C]) as the caller wants them."""
    if output_type == "pil":
        return to_pil(pixels)
    if output_type == "np":
        return to_unit(pixels)
    import torch

    return torch.from_numpy(to_unit(pixels)).permute(0, 3, 1, 2).contiguous()
