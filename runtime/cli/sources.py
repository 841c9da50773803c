"""Pictures that a command starts from: which task they mean, reading them, and recording which ones they were."""

import argparse
import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from PIL import Image

from anamorph.errors import InputError
from anamorph.pipelines import (
    AutoPipelineForImage2Image,
    AutoPipelineForInpainting,
    DiffusionPipeline,
    LatentDiffusion,
)

FILES = {"image": "image", "mask_image": "mask"}
"""Argument of a pipeline -> option of the command line."""


def task_of(options: argparse.Namespace) -> type[DiffusionPipeline]:
    """The pipeline that the options call for; without pictures, the one that the checkpoint names.

    Raises InputError: a mask or a strength without a picture, or a size where the picture's own counts.
    """
    if options.image is None:
        if stray := [f"--{name}" for name in ("mask", "strength") if getattr(options, name) is not None]:
            raise InputError(f"{stray[0]} without --image; name the picture that it is for")
        return DiffusionPipeline
    if options.mask is not None:
        return AutoPipelineForInpainting
    if options.size is not None:
        raise InputError("--size does not go with --image alone, whose own size counts; resize the picture")
    return AutoPipelineForImage2Image


def read_sources(options: argparse.Namespace) -> tuple[dict[str, Image.Image], dict[str, dict[str, str]]]:
    """The pictures as a pipeline takes them, and what is recorded of them: file name and SHA-256.

    Raises InputError: a file is missing or no picture.
    """
    pictures, recorded = {}, {}
    for argument, option in FILES.items():
        if (name := getattr(options, option)) is not None:
            pictures[argument] = _read(Path(name), option)
            recorded[argument] = {"file": Path(name).name, "sha256": _digest(Path(name))}
    return pictures, recorded


def same_sources(recorded: Mapping[str, Any], options: argparse.Namespace, picture: Path) -> dict[str, Image.Image]:
    """The pictures that a recorded request started from, found to be the same files.

    Raises InputError: one is not named, is another file, or takes no part in the request.
    """
    pictures, found = read_sources(options)
    for argument, option in FILES.items():
        entry = recorded.get(argument)
        if entry is None and argument in found:
            raise InputError(f"{picture} was made without --{option}; leave it out")
        if entry is None:
            continue
        file, digest = (str(entry.get(key)) for key in ("file", "sha256")) if isinstance(entry, dict) else ("", "")
        if argument not in found:
            raise InputError(f"{picture} started from {file}; name that file with --{option} to replay it")
        if found[argument]["sha256"] != digest:
            raise InputError(
                f"--{option} {getattr(options, option)} is not the file that {picture} started from: {file} has "
                f"SHA-256 {digest[:12]}..., this one {found[argument]['sha256'][:12]}..."
            )
    return pictures


def _read(path: Path, option: str) -> Image.Image:
    try:
        with Image.open(path) as image:
            image.load()
            return image.copy()
    except FileNotFoundError:
        raise InputError(f"--{option}: there is no file {path}") from None
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise InputError(f"--{option}: {path} cannot be read as a picture: {error}") from None


def _digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def drawing(pipe: DiffusionPipeline) -> LatentDiffusion:
    """The pipeline, found to be one that draws from prompts; raises InputError."""
    if not isinstance(pipe, LatentDiffusion):
        raise InputError(f"{type(pipe).__name__} makes no pictures from prompts; name a text-to-image checkpoint")
    return pipe
