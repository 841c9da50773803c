"""Pictures as CLIP's picture encoder and DPT's depth estimator want them. No PyTorch here."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any, ClassVar, Self, Unpack

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from anamorph.config import Config, complete, read_json
from anamorph.errors import ConfigError, InputError
from anamorph.files import replacing
from anamorph.hub import HubOptions, find_component

FILE = "preprocessor_config.json"
CLIP: Mapping[str, Any] = MappingProxyType(
    {
        "do_convert_rgb": True,
        "do_resize": True,
        "size": {"shortest_edge": 224},
        "resample": 3,
        "do_center_crop": True,
        "crop_size": {"height": 224, "width": 224},
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": (0.48145466, 0.4578275, 0.40821073),
        "image_std": (0.26862954, 0.26130258, 0.27577711),
    }
)
"""transformers' keys and defaults; means and deviations are those of CLIP's training pictures."""
DPT: Mapping[str, Any] = MappingProxyType(
    {
        **CLIP,
        "size": {"height": 384, "width": 384},
        "do_center_crop": False,
        "image_mean": (0.5, 0.5, 0.5),
        "image_std": (0.5, 0.5, 0.5),
        "ensure_multiple_of": 1,
        "keep_aspect_ratio": False,
    }
)
"""transformers' keys and defaults of DPT's processor."""

FOREIGN = (
    "feature_extractor_type", "image_processor_type", "processor_class", "default_to_square", "data_format",
    "input_data_format", "device", "disable_grouping", "return_tensors", "do_pad", "pad_size", "image_seq_length",
    "size_divisor", "do_reduce_labels",
)  # fmt: skip
"""Keys that versions of transformers write into the file and that say nothing about this processor."""


class CLIPImageProcessor:
    """Pillow images -> resized, cropped at the centre and normalised arrays [B, 3, h, w], float32.

    (p / 255 - mean) / std per channel, after the shorter side is resized to `size`.
    Source: Radford et al. 2021 (arXiv:2103.00020), section 2.4; keys of transformers' class of this name.
    """

    DEFAULTS: ClassVar[Mapping[str, Any]] = CLIP
    SQUARE: ClassVar[bool] = False
    """Whether a single number for a size means a square, and not the shorter side."""

    def __init__(self, **config: Any) -> None:
        if self.SQUARE and isinstance(side := config.get("size"), int):
            config["size"] = {"height": side, "width": side}
        self.config = complete(type(self).__name__, config, self.DEFAULTS, FOREIGN)
        for key in ("size", "crop_size"):
            _sides(self.config, key)

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> Self:
        """From the contents of a `preprocessor_config.json`; raises ConfigError on an unknown key or size."""
        return cls(**config)

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path: str | Path, *, subfolder: str | None = None, **hub: Unpack[HubOptions]
    ) -> Self:
        """Read `preprocessor_config.json` of a folder or hub id.

        Raises CheckpointError: the file is missing or damaged. Raises ConfigError: it holds an unknown key or size.
        """
        return cls(**read_json(find_component(pretrained_model_name_or_path, subfolder, (FILE,), **hub) / FILE))

    def save_pretrained(self, folder: str | Path) -> None:
        """Write `preprocessor_config.json` so that transformers reads it."""
        values = {key: value for key, value in self.config.items() if key != "_class_name"}
        values["image_processor_type"] = type(self).__name__
        with replacing(Path(folder) / FILE) as draft:
            draft.write_text(json.dumps(values, indent=2, sort_keys=True) + "\n", encoding="utf-8")

    def __call__(self, images: Image.Image | Sequence[Image.Image]) -> NDArray[np.float32]:
        """One or more pictures of any size -> [B, 3, h, w].

        Raises InputError: there are none, or without a crop they come out in different sizes.
        """
        every = [images] if isinstance(images, Image.Image) else list(images)
        arrays = [self._one(image) for image in every]
        if len({array.shape for array in arrays}) != 1:
            raise InputError(
                f"got pictures of {len({array.shape for array in arrays})} sizes, expected one or more alike"
            )
        return np.stack(arrays)

    def _one(self, image: Image.Image) -> NDArray[np.float32]:
        config = self.config
        image = image.convert("RGB") if config.do_convert_rgb else image
        if config.do_resize:
            image = image.resize(self._target(image), config.resample)
        pixels = np.asarray(image, np.float32)
        if config.do_center_crop:
            pixels = _cropped(pixels, *_sides(config, "crop_size"))
        if config.do_rescale:
            pixels = pixels * np.float32(config.rescale_factor)
        if config.do_normalize:
            pixels = (pixels - np.float32(config.image_mean)) / np.float32(config.image_std)
        return np.ascontiguousarray(pixels.transpose(2, 0, 1), dtype=np.float32)

    def _target(self, image: Image.Image) -> tuple[int, int]:
        """Width and height that the picture is resized to."""
        sides = _sides(self.config, "size")
        if len(sides) == 2:
            return sides[1], sides[0]
        short = min(image.size)
        width, height = (sides[0] if side == short else int(sides[0] * side / short) for side in image.size)
        return width, height


class DPTImageProcessor(CLIPImageProcessor):
    """Pillow images -> arrays of one size [B, 3, h, w], float32, (p / 255 - mean) / std per channel.

    Sides are multiples of `ensure_multiple_of`. Source: Ranftl et al. 2021 (arXiv:2103.13413); keys of transformers'
    class of this name.
    """

    DEFAULTS: ClassVar[Mapping[str, Any]] = DPT
    SQUARE: ClassVar[bool] = True

    def __init__(self, **config: Any) -> None:
        super().__init__(**config)
        if self.config.keep_aspect_ratio or len(_sides(self.config, "size")) != 2:
            raise ConfigError(
                f"{type(self).__name__} does not serve keep_aspect_ratio={self.config.keep_aspect_ratio!r} with "
                f"size={self.config.size!r}; it serves one height and width"
            )

    def _target(self, image: Image.Image) -> tuple[int, int]:  # noqa: ARG002 - all pictures get one size
        multiple = self.config.ensure_multiple_of
        height, width = (max(round(side / multiple), 1) * multiple for side in _sides(self.config, "size"))
        return width, height


def _sides(config: Config, key: str) -> tuple[int, ...]:
    """A shorter side (one number), or height and width."""
    value = config[key]
    if isinstance(value, int):  # as transformers wrote it before 4.20
        value = {"shortest_edge": value} if key == "size" else {"height": value, "width": value}
    for names in (("shortest_edge",), ("height", "width")):
        if isinstance(value, Mapping) and set(value) == set(names) and (key == "size" or len(names) == 2):
            sides = tuple(value[name] for name in names)
            if all(isinstance(side, int) and side > 0 for side in sides):
                return sides
    raise ConfigError(f"the picture processor does not serve {key}={value!r}; it serves height and width")


def _cropped(pixels: NDArray[np.float32], height: int, width: int) -> NDArray[np.float32]:
    """The centre of [h, w, C]; black around it where it is smaller."""
    for axis, wanted in enumerate((height, width)):
        size = pixels.shape[axis]
        if size < wanted:
            before = -((size - wanted) // 2)
            padding = [(0, 0)] * pixels.ndim
            padding[axis] = (before, wanted - size - before)
            pixels = np.pad(pixels, padding)
        else:
            pixels = np.take(pixels, range((size - wanted) // 2, (size - wanted) // 2 + wanted), axis)
    return pixels
