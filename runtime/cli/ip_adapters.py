"""Pictures as prompts on the command line: IP-Adapters with their scales, and the pictures for each."""

import argparse
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from anamorph.cli.sources import file_record, read_picture, spelled
from anamorph.errors import InputError
from anamorph.pipelines import DiffusionPipeline, LatentDiffusion
from anamorph.pipelines.ip_adapters import adapter_file

ADAPTER, PICTURE = "ip_adapter", "ip_adapter_image"
"""Options of the command line, and names of what is recorded."""


def check_options(options: argparse.Namespace) -> None:
    """Raise InputError where there are no pictures, or as many as do not go with several adapters."""
    adapters, pictures = (getattr(options, name) or [] for name in (ADAPTER, PICTURE))
    if len(adapters) != len(pictures) and (len(adapters) != 1 or not pictures):
        raise InputError(
            f"--ip-adapter is given {len(adapters)} times and --ip-adapter-image {len(pictures)} times; name a picture "
            "for each adapter, or several for a single one"
        )
    if options.ip_adapter_encoder is not None and not adapters:
        raise InputError("--ip-adapter-encoder without --ip-adapter; name the adapter that it is for")


def read(options: argparse.Namespace) -> tuple[dict[str, Any], dict[str, Any]]:
    """The pictures as a call takes them, and what is recorded of adapters and pictures; both empty without any.

    Raises InputError: a file is missing, or no picture.
    """
    check_options(options)
    if not options.ip_adapter:
        return {}, {}
    named = [_parsed(text) for text in options.ip_adapter]
    given = [Path(name) for name in options.ip_adapter_image]
    every = [given] if len(named) == 1 else [[path] for path in given]
    pictures = [[read_picture(path, spelled(PICTURE)) for path in paths] for paths in every]
    adapters = [{**file_record(path), "scale": scale} for path, scale in named]
    files = [[file_record(path) for path in paths] for paths in every]
    return {PICTURE: pictures}, {ADAPTER: adapters, PICTURE: files}


def _parsed(text: str) -> tuple[Path, float]:
    """`FILE:0.8` -> the adapter's file and its scale."""
    name, colon, scale = text.rpartition(":")
    try:
        path, number = (name, float(scale)) if colon else (text, 1.0)
    except ValueError:
        path, number = text, 1.0
    return adapter_file(path, None, None, {}), number


def load(pipe: DiffusionPipeline, options: argparse.Namespace) -> None:
    """Load the adapters that the options name; raises InputError where the pipeline takes none."""
    if not options.ip_adapter:
        return
    if not isinstance(pipe, LatentDiffusion):
        raise InputError(f"--ip-adapter does not go with {type(pipe).__name__}, which takes no pictures as prompts")
    named = [_parsed(text) for text in options.ip_adapter]
    own = options.ip_adapter_encoder
    folder = "image_encoder" if own is None else str(Path(own).expanduser().absolute())
    pipe.load_ip_adapter([path for path, _ in named], image_encoder_folder=folder)
    pipe.set_ip_adapter_scale([scale for _, scale in named])


def check_same(recorded: Mapping[str, Any], found: Mapping[str, Any], picture: Path) -> None:
    """Raise InputError where a recorded request had other adapters, scales or pictures than were found now."""
    for name in (ADAPTER, PICTURE):
        wanted = recorded.get(name)
        if wanted == found.get(name):
            continue
        option = f"--{spelled(name)}"
        if wanted is None:
            raise InputError(f"{picture} was made without {option}; leave it out")
        raise InputError(f"{picture} was made with {option} {_spelled(wanted)}; name the same files to replay it")


def _spelled(wanted: Any) -> str:
    """What was recorded, as it would be typed; a PNG may come from a stranger."""

    def one(entry: Any) -> str:
        if not isinstance(entry, Mapping):
            return "?"
        return f"{entry.get('file')}:{entry['scale']}" if "scale" in entry else str(entry.get("file"))

    sets = [entry if isinstance(entry, list) else [entry] for entry in wanted] if isinstance(wanted, list) else []
    return ", ".join(" ".join(map(one, entry)) for entry in sets)
