"""What a command starts from: which task its pictures mean, reading them, and recording which ones they were."""

import argparse
import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from anamorph.errors import InputError
from anamorph.pipelines import DiffusionPipeline
from anamorph.pipelines.auto import tasks_of_class

FILES = {"image": "image", "mask_image": "mask", "depth_map": "depth_map"}
"""Argument of a pipeline -> option of the command line."""


def check_sources(options: argparse.Namespace) -> None:
    """Raise InputError: a mask or a strength without a picture, or a size where the picture's own counts."""
    if options.image is None:
        stray = [name for name in ("mask", "depth_map", "strength") if getattr(options, name) is not None]
        if stray:
            raise InputError(f"--{spelled(stray[0])} without --image; name the picture that it is for")
    elif options.mask is None and options.size is not None:
        raise InputError("--size does not go with --image alone, whose own size counts; resize the picture")


def class_for(class_name: str, options: argparse.Namespace) -> type[DiffusionPipeline]:
    """The pipeline for the task that is named, or that the pictures call for, or that the checkpoint is for.

    Raises InputError: a checkpoint of that class does not serve the task.
    """
    served = tasks_of_class(class_name)
    wanted = None if options.task is None else options.task.replace("-to-", " to ")
    if wanted is None and options.image is not None and len(served) > 1:
        wanted = "image to image" if options.mask is None else "inpainting"
    if wanted is None or class_name not in DiffusionPipeline.registry:
        return DiffusionPipeline
    if wanted not in served:
        can = ", ".join(task.replace(" ", "-") for task in served) or "no task that is known here"
        raise InputError(f"a checkpoint of {class_name} does not serve {wanted.replace(' ', '-')}; it serves {can}")
    return DiffusionPipeline.registry[served[wanted]]


def spelled(option: str) -> str:
    """An option as it is written on the command line."""
    return option.replace("_", "-")


def read_sources(options: argparse.Namespace) -> tuple[dict[str, Any], dict[str, dict[str, str]]]:
    """The pictures as a pipeline takes them, and what is recorded of them: file name and SHA-256.

    Raises InputError: a file is missing or no picture.
    """
    pictures: dict[str, Any] = {}
    recorded = {}
    for argument, option in FILES.items():
        if (name := getattr(options, option)) is not None:
            picture = read_picture(Path(name), spelled(option))
            pictures[argument] = _depths(picture, name) if argument == "depth_map" else picture
            recorded[argument] = file_record(Path(name))
    return pictures, recorded


def same_sources(recorded: Mapping[str, Any], options: argparse.Namespace, picture: Path) -> dict[str, Any]:
    """The pictures that a recorded request started from, found to be the same files.

    Raises InputError: one is not named, is another file, or takes no part in the request.
    """
    pictures, found = read_sources(options)
    for argument, option in FILES.items():
        entry = recorded.get(argument)
        if entry is None and argument in found:
            raise InputError(f"{picture} was made without --{spelled(option)}; leave it out")
        if entry is None:
            continue
        file, digest = (str(entry.get(key)) for key in ("file", "sha256")) if isinstance(entry, dict) else ("", "")
        if argument not in found:
            raise InputError(f"{picture} started from {file}; name that file with --{spelled(option)} to replay it")
        if found[argument]["sha256"] != digest:
            raise InputError(
                f"--{spelled(option)} {getattr(options, option)} is not the file that {picture} started from: "
                f"{file} has SHA-256 {digest[:12]}..., this one {found[argument]['sha256'][:12]}..."
            )
    return pictures


def read_picture(path: Path, option: str) -> Image.Image:
    """A picture; raises InputError where the file of an option is missing or none."""
    try:
        with Image.open(path) as image:
            image.load()
            return image.copy()
    except FileNotFoundError:
        raise InputError(f"--{option}: there is no file {path}") from None
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise InputError(f"--{option}: {path} cannot be read as a picture: {error}") from None


def file_record(path: Path) -> dict[str, str]:
    """What is recorded of a file that a picture was made from."""
    return {"file": path.name, "sha256": hashlib.sha256(path.read_bytes()).hexdigest()}


def _depths(picture: Image.Image, name: str) -> NDArray[np.float32]:
    """A grey picture as depths [H, W]; raises InputError where it has colours."""
    depths = np.asarray(picture, np.float32)
    if depths.ndim != 2:
        raise InputError(f"--depth-map {name} has mode {picture.mode}, expected grey; use one channel")
    return depths
