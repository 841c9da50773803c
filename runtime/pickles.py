"""PyTorch's pickles from strangers: tensors by name and nothing else, with sizes checked before memory is taken."""

import re
import warnings
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from anamorph.errors import CheckpointError

if TYPE_CHECKING:
    from torch import Tensor

LARGEST_PROGRAM = 64 << 20
"""A pickle program (everything but the tensors' values) beyond this size is refused (bytes)."""


def load_pickle(path: Path) -> dict[str, Any]:
    """What a `.bin`, `.pt` or `.ckpt` file holds, by weights-only loading; tensors are mapped where they can be.

    Raises CheckpointError: it is damaged, claims more than it holds, holds code or objects, or is no mapping.
    """
    import torch

    if not path.is_file():
        raise CheckpointError(f"{path} is missing; download the checkpoint again")
    zipped = zipfile.is_zipfile(path)
    if zipped:
        _check_sizes(path)
    try:
        # Files from before PyTorch 1.6 are no archives and cannot be mapped.
        with warnings.catch_warnings():  # PyTorch's own would stand beside our sentence
            warnings.simplefilter("ignore")
            value = torch.load(path, map_location="cpu", weights_only=True, mmap=zipped)
    except Exception as error:  # torch raises several unrelated types for damaged and for unsafe pickles
        raise CheckpointError(f"{path} cannot be loaded as plain weights: {_reason(str(error))}") from None
    if not isinstance(value, dict):
        raise CheckpointError(f"{path} holds a {type(value).__name__}, expected tensors by name")
    return value


def tensors(path: Path, values: Mapping[str, Any]) -> dict[str, "Tensor"]:
    """The values, found to be tensors that are no larger than what is stored; raises CheckpointError."""
    from torch import Tensor

    for name, value in values.items():
        if not isinstance(value, Tensor):
            raise CheckpointError(
                f"{path} holds no plain weights: {name} is a {type(value).__name__}, expected a tensor"
            )
        if value.nbytes > value.untyped_storage().nbytes():
            raise CheckpointError(
                f"{path} claims {value.nbytes} bytes for {name} and stores {value.untyped_storage().nbytes()}; "
                "it is refused"
            )
    return dict(values)


def _check_sizes(path: Path) -> None:
    """Raise CheckpointError where members of the archive would grow when they are read: PyTorch stores them as is."""
    try:
        with zipfile.ZipFile(path) as archive:
            members = archive.infolist()
    except (zipfile.BadZipFile, OSError) as error:
        raise CheckpointError(f"{path} is no sound archive ({error}); download it again") from None
    size = path.stat().st_size
    for member in members:
        if member.compress_type != zipfile.ZIP_STORED or member.file_size != member.compress_size:
            raise CheckpointError(
                f"{path} holds {member.filename} compressed from {member.file_size} to {member.compress_size} bytes; "
                "weights are stored as they are, so it is refused"
            )
        if member.file_size > size:
            raise CheckpointError(f"{path} claims {member.file_size} bytes for {member.filename} and has {size}")
        if member.filename.endswith("data.pkl") and member.file_size > LARGEST_PROGRAM:
            raise CheckpointError(f"{path} has a pickle program of {member.file_size} bytes, which is refused")


def _reason(message: str) -> str:
    """The cause in PyTorch's message, without its advice to load the file all the same."""
    if found := re.search(r"(?:Unsupported|disallowed|blocked)[^\n]*?(?:GLOBAL|global|class)s?[: ]+([\w.]+)", message):
        return f"it refers to {found[1]}, and code or objects are never loaded; ask for a safetensors file"
    if "Unsupported operand" in message:
        return "it holds code or objects beside the weights, which are never loaded; ask for a safetensors file"
    lines = [line.strip() for line in message.splitlines() if line.strip()]
    plain = [line for line in lines if "weights_only" not in line and not line.startswith("Weights only load failed")]
    return (plain or ["it is damaged or holds code or objects"])[0]
