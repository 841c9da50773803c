"""Weights on disk: which tensor lies where, checked before any memory is taken. No PyTorch here."""

import json
import struct
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from anamorph.config import read_json
from anamorph.errors import CheckpointError, InputError

WIDTH = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2, "F8_E4M3": 1, "F8_E5M2": 1, "I64": 8, "I32": 4, "I16": 2, "I8": 1,
         "U8": 1, "BOOL": 1}  # fmt: skip
"""Bytes per element of safetensors' types."""

NUMPY: dict[str, np.dtype[Any]] = {
    "F64": np.dtype(np.float64), "F32": np.dtype(np.float32), "F16": np.dtype(np.float16), "BF16": np.dtype(np.uint16),
    "F8_E4M3": np.dtype(np.uint8), "F8_E5M2": np.dtype(np.uint8), "I64": np.dtype(np.int64), "I32": np.dtype(np.int32),
    "I16": np.dtype(np.int16), "I8": np.dtype(np.int8), "U8": np.dtype(np.uint8), "BOOL": np.dtype(np.bool_),
}  # fmt: skip
"""How NumPy holds safetensors' types: those it does not have as their bits."""

LARGEST_HEADER = 100 << 20
"""A safetensors header beyond this size is refused, as the reference implementation does (bytes)."""


@dataclass(frozen=True)
class Entry:
    """One stored tensor: `begin`..`end` are byte offsets from the start of `file`."""

    file: Path
    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int


def safetensors_entries(path: Path) -> dict[str, Entry]:
    """Read the header of a safetensors file and check it against the file's size.

    Format: 8 bytes little-endian header length, JSON header, data (github.com/huggingface/safetensors).
    Raises CheckpointError: the file is truncated, corrupt, or its header lies about sizes.
    """
    header, base, size = _header(path)
    try:
        return dict(_entries(path, header, base, size))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise _corrupt(path, error) from None


def safetensors_metadata(path: Path) -> dict[str, str]:
    """The texts that a safetensors file holds beside its tensors; raises CheckpointError as `safetensors_entries`."""
    metadata = _header(path)[0].get("__metadata__", {})
    if not isinstance(metadata, dict):
        raise _corrupt(path, "its metadata is no mapping")
    return {str(key): str(value) for key, value in metadata.items()}


def _corrupt(path: Path, what: object) -> CheckpointError:
    return CheckpointError(f"{path} has a corrupt safetensors header ({what}); download it again")


def _header(path: Path) -> tuple[dict[str, Any], int, int]:
    """The header of a safetensors file, where its data begins, and where the file ends."""
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            head = file.read(8)
            length = struct.unpack("<Q", head)[0] if len(head) == 8 else LARGEST_HEADER + 1
            if length > min(LARGEST_HEADER, size - 8):
                raise CheckpointError(f"{path} is no complete safetensors file: its header is cut off or corrupt")
            header = json.loads(file.read(length))
        if not isinstance(header, dict):
            raise _corrupt(path, "it is no mapping")
        return header, 8 + length, size
    except FileNotFoundError:
        raise CheckpointError(f"{path} is missing; download the checkpoint again") from None
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error}") from None
    except ValueError as error:
        raise _corrupt(path, error) from None


def _entries(path: Path, header: dict[str, dict[str, object]], base: int, size: int) -> Iterator[tuple[str, Entry]]:
    for name, value in header.items():
        if name == "__metadata__":
            continue
        dtype, shape, offsets = str(value["dtype"]), value["shape"], value["data_offsets"]
        if not isinstance(shape, list) or not isinstance(offsets, list):
            raise ValueError(f"tensor {name}")
        begin, end = (base + int(offset) for offset in offsets)
        if min(shape, default=1) < 0 or not base <= begin <= end or end - begin != prod(shape) * WIDTH[dtype]:
            raise ValueError(f"tensor {name} of type {dtype} and shape {shape} does not fit its offsets")
        if end > size:
            raise CheckpointError(f"{path} is truncated: tensor {name} ends at byte {end}, the file has {size}")
        yield name, Entry(path, dtype, tuple(shape), begin, end)


@dataclass(frozen=True)
class Stored:
    """A tensor's values as NumPy holds them (see NUMPY), and the name of its stored type."""

    values: NDArray[Any]
    dtype: str


def floats(stored: Stored, where: Path) -> NDArray[np.float32]:
    """A tensor's values in float32; raises CheckpointError where it holds something else than floating point."""
    if stored.dtype == "BF16":
        return (stored.values.astype(np.uint32) << 16).view(np.float32)
    if not np.issubdtype(stored.values.dtype, np.floating):
        raise CheckpointError(f"{where} holds a tensor of type {stored.dtype}, expected floating point")
    return stored.values.astype(np.float32, copy=False)


def as_stored(values: NDArray[np.float32], dtype: str) -> NDArray[Any]:
    """The inverse of `floats`, rounded to the nearest value of the type, to the even one where two are as near."""
    if dtype == "BF16":
        bits = np.ascontiguousarray(values, np.float32).view(np.uint32)
        return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)
    return values.astype(NUMPY[dtype])


def write_safetensors(path: Path, tensors: Mapping[str, Stored]) -> None:
    """Write the tensors one after another, so that no more than one of them is in memory."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    # Wide types first: the header's length is a multiple of 8, so that every tensor begins at a multiple of its width.
    order = sorted(tensors, key=lambda name: (-WIDTH[tensors[name].dtype], name))
    for name in order:
        begin, end = end, end + tensors[name].values.size * WIDTH[tensors[name].dtype]
        header[name] = {
            "dtype": tensors[name].dtype, "shape": list(tensors[name].values.shape), "data_offsets": [begin, end],
        }  # fmt: skip
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for name in order:
            file.write(np.ascontiguousarray(tensors[name].values).data)


@dataclass(frozen=True)
class WeightFiles:
    """The files that hold one component's weights: safetensors (one or sharded), or a pickle (`.bin`)."""

    files: tuple[Path, ...]

    @property
    def pickled(self) -> bool:
        """Whether these are pickles, which are only ever opened with weights-only loading."""
        return self.files[0].suffix == ".bin"

    def entries(self) -> dict[str, Entry]:
        """All tensors of all safetensors files."""
        return {name: entry for file in self.files for name, entry in safetensors_entries(file).items()}


def find_weights(folder: Path, stem: str, variant: str | None = None) -> WeightFiles:
    """Find a component's weights as diffusers and transformers name them.

    `stem` is `diffusion_pytorch_model` or `model`; `variant` ("fp16", "non_ema") stands before the suffix.
    Raises CheckpointError: there are none, or the variant does not exist (nothing else is taken instead).
    """
    tag = f".{variant}" if variant else ""
    pickles = "pytorch_model" if stem == "model" else stem  # transformers' name for its pickles
    tried = []
    for name, suffix in ((stem, "safetensors"), (pickles, "bin")):
        single = folder / f"{name}{tag}.{suffix}"
        indexes = (folder / f"{name}.{suffix}.index{tag}.json", folder / f"{name}{tag}.{suffix}.index.json")
        if single.is_file():
            return WeightFiles((single,))
        for index in indexes:
            if index.is_file():
                return WeightFiles(_shards(index))
        tried.append(single.name)
    found = sorted(path.name for path in folder.glob("*") if path.suffix in (".safetensors", ".bin"))
    there = f"it holds {', '.join(found)}" if found else "it holds no weights"
    raise CheckpointError(f"{folder} has neither {' nor '.join(tried)}; {there}. Is the variant right?")


def check_form(weights: WeightFiles, use_safetensors: bool | None) -> None:
    """Raise CheckpointError where the caller wants safetensors and there are none, InputError where pickles are wanted.

    None: safetensors where they are, and pickles otherwise.
    """
    if use_safetensors is False:
        raise InputError("use_safetensors=False asks for pickles, which are taken only where there is nothing else")
    if use_safetensors and weights.pickled:
        raise CheckpointError(
            f"{weights.files[0].parent} holds pickles and no safetensors; leave out use_safetensors to load them, "
            "which runs no code"
        )


def _shards(index: Path) -> tuple[Path, ...]:
    """The files that an index names; they must lie beside it."""
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{index} has no weight_map; download it again")
    names = sorted({str(name) for name in weight_map.values()})
    for name in names:
        if Path(name).name != name:
            raise CheckpointError(f"{index} names {name!r}, which is not a file beside it; the checkpoint is refused")
        if not (index.parent / name).is_file():
            raise CheckpointError(f"{index.parent / name} is missing, {index.name} lists it; download it again")
    return tuple(index.parent / name for name in names)
