"""Adapters on the command line: reading `file:weight`, loading them into a pipeline, and recording which they were."""

import argparse
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from anamorph.digests import digest
from anamorph.errors import InputError
from anamorph.lora.reading import find_adapter
from anamorph.pipelines import DiffusionPipeline
from anamorph.pipelines.lora import LoraLoading

HOT, FUSED = "hot", "fused"


@dataclass(frozen=True)
class Lora:
    """An adapter's file, and how much it counts."""

    file: Path
    weight: float = 1.0


def named(values: Sequence[str]) -> list[Lora]:
    """`style.safetensors:0.8` as file and weight; without a weight it counts whole.

    Raises InputError: the weight is no number. Raises CheckpointError: there is no such file.
    """
    found = []
    for value in values:
        name, colon, weight = value.rpartition(":")
        if not colon or Path(value).exists():
            name, weight = value, "1"
        try:
            number = float(weight)
        except ValueError:
            raise InputError(
                f"--lora {value!r} is not of the form FILE or FILE:WEIGHT, such as a.safetensors:0.8"
            ) from None
        found.append(Lora(find_adapter(name), number))
    return found


def load(pipe: DiffusionPipeline, loras: Sequence[Lora], mode: str) -> list[dict[str, Any]]:
    """Let the adapters count together; returns what is recorded of them.

    Raises InputError: the pipeline takes none.
    """
    if not loras:
        return []
    if not isinstance(pipe, LoraLoading):
        raise InputError(f"--lora does not go with {type(pipe).__name__}, which has no model that adapters change")
    names = [f"{index}-{lora.file.stem.replace('.', '-')}" for index, lora in enumerate(loras)]
    for name, lora in zip(names, loras, strict=True):
        pipe.load_lora_weights(lora.file, name)
    pipe.set_adapters(names, [lora.weight for lora in loras])
    if mode == FUSED:
        pipe.fuse_lora()
    return [
        {"file": str(lora.file), "sha256": digest(lora.file), "weight": lora.weight, "mode": mode} for lora in loras
    ]


def recorded(values: Mapping[str, Any], options: argparse.Namespace, picture: Path) -> tuple[list[Lora], str]:
    """The adapters of a recorded request and their mode, from where they lay or as they are named now.

    Raises InputError: a file is missing or another one, or there are more or fewer than the picture had.
    """
    entries, given = values.get("loras", []), named(options.lora)
    if not isinstance(entries, list) or not all(isinstance(one, dict) and "sha256" in one for one in entries):
        raise InputError(f"{picture} has a damaged request: no list of adapters")
    if given and len(given) != len(entries):
        raise InputError(f"{picture} was made with {len(entries)} adapters, {len(given)} are named; name as many")
    found = []
    for index, entry in enumerate(entries):
        file = given[index].file if given else Path(str(entry.get("file")))
        if not file.is_file():
            raise InputError(f"{picture} was made with the adapter {file}, which is missing; name it with --lora")
        if digest(file) != entry["sha256"]:
            raise InputError(f"{file} is not the adapter that {picture} was made with (SHA-256); name it with --lora")
        weight = entry.get("weight")
        if not isinstance(weight, int | float):
            raise InputError(f"{picture} has a damaged request: an adapter's weight is {weight!r}")
        found.append(Lora(file, float(weight)))
    return found, FUSED if entries and entries[0].get("mode") == FUSED else HOT
