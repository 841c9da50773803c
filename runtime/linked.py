"""Constants of an exported graph and the checkpoint tensors they come from; those that stay there are mapped here."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from anamorph.errors import ArtifactError
from anamorph.weights import Entry, safetensors_entries

AS_STORED, TRANSPOSED = "as stored", "transposed"
LINKABLE: dict[str, np.dtype[Any]] = {
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(np.uint16),
}
"""Stored types that graphs can take from the checkpoint, and how NumPy holds them: bfloat16 as its bits."""


@dataclass(frozen=True)
class Constant:
    """Provenance of one constant: `tensor` of the checkpoint, taken in `shape`, then `transform`ed.

    Where `linked`, the graph itself transforms, and the values are read from the checkpoint when it is opened.
    """

    tensor: str
    shape: tuple[int, ...]
    transform: str = AS_STORED
    linked: bool = False


@dataclass(frozen=True)
class Place:
    """Where a mapped tensor lies: its file, all bytes of that, and where among them it begins."""

    file: Path
    whole: NDArray[np.uint8]
    begin: int


@dataclass(frozen=True)
class Linked:
    """A tensor, the name of its stored type ("F32", "F16", "BF16"), and where it lies if it is mapped."""

    values: NDArray[Any]
    dtype: str
    place: Place | None = None


def open_linked(files: Mapping[str, Path], constants: Mapping[str, Constant]) -> dict[str, Linked]:
    """Map the linked constants from the checkpoint's files; nothing is read before it is used.

    Raises ArtifactError: a tensor is missing, or has another size than when the graph was exported.
    """
    entries: dict[str, Entry] = {}
    for path in files.values():
        entries |= safetensors_entries(path)
    maps = {path: np.memmap(path, np.uint8, mode="r") for path in files.values()}
    return dict(_linked(entries, maps, constants))


def _linked(
    entries: Mapping[str, Entry], maps: Mapping[Path, NDArray[Any]], constants: Mapping[str, Constant]
) -> Iterator[tuple[str, Linked]]:
    for name, constant in constants.items():
        if not constant.linked:
            continue
        entry = entries.get(constant.tensor)
        if entry is None or entry.dtype not in LINKABLE or prod(entry.shape) != prod(constant.shape):
            raise ArtifactError(
                f"the checkpoint has no tensor {constant.tensor} of shape {list(constant.shape)} that the exported "
                "graph refers to; export it again"
            )
        whole = maps[entry.file]
        values = whole[entry.begin : entry.end].view(LINKABLE[entry.dtype]).reshape(constant.shape)
        # Files that other libraries wrote may hold tensors at odd offsets, which engines cannot take.
        if values.flags.aligned:
            yield name, Linked(values, entry.dtype, Place(entry.file, whole, entry.begin))
        else:
            yield name, Linked(values.copy(), entry.dtype)
