"""Opening a `.safetensors` or `.ckpt` file of the original layout: its tensors, mapped from disk where that can be."""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from anamorph.errors import CheckpointError
from anamorph.hub import Source, download_file
from anamorph.original import Shapes
from anamorph.pickles import load_pickle, tensors
from anamorph.weights import NUMPY, Stored, safetensors_entries

if TYPE_CHECKING:
    import torch

SUFFIXES = (".safetensors", ".ckpt", ".pt", ".pth", ".bin")
HUB_FILE = re.compile(
    r"(?:https?://)?(?:huggingface\.co|hf\.co)/(?P<repo>[\w.-]+/[\w.-]+)/(?:(?:blob|resolve)/(?P<revision>[^/]+)/)?(?P<file>.+)"
)
"""The address of a file on the hub."""


@dataclass(frozen=True)
class Original:
    """An opened file; `step` is how long it was trained, where it says so."""

    path: Path
    tensors: Mapping[str, Stored]
    step: int | None = None

    @property
    def shapes(self) -> Shapes:
        """Name -> shape of all tensors."""
        return {name: tuple(tensor.values.shape) for name, tensor in self.tensors.items()}

    def below(self, *prefixes: str) -> dict[str, Stored]:
        """The tensors below the first of the prefixes that has any, named without it."""
        for prefix in prefixes:
            found = {name[len(prefix) :]: value for name, value in self.tensors.items() if name.startswith(prefix)}
            if found:
                return found
        return {}


def find_file(
    name: str | Path, *, cache_dir: str | None = None, local_files_only: bool = False, revision: str | None = None
) -> Path:
    """A local file, or one on the hub by its address (downloaded into the hub's cache).

    Raises CheckpointError: there is no such file, it cannot be had, or its ending is none that is served.
    """
    path = Path(name).expanduser()
    address = HUB_FILE.fullmatch(str(name))
    if address is not None and not path.exists():
        source = Source(address["repo"], revision or address["revision"], cache_dir, local_files_only)
        path = download_file(source, address["file"])
    if path.is_dir():
        raise CheckpointError(f"{path} is a folder, expected one file; from_pretrained opens folders")
    if not path.is_file():
        raise CheckpointError(f"there is no file {path}, and it is no address of a file on huggingface.co")
    if path.suffix not in SUFFIXES:
        raise CheckpointError(f"{path} ends in {path.suffix or 'nothing'}, expected {', '.join(SUFFIXES)}")
    return path.absolute()


def open_original(path: Path) -> Original:
    """Open the file; values are not read before they are used.

    Raises CheckpointError: it is damaged, lies about sizes, or holds code.
    """
    return _safetensors(path) if path.suffix == ".safetensors" else _pickle(path)


def _safetensors(path: Path) -> Original:
    entries = safetensors_entries(path)
    mapped = np.memmap(path, np.uint8, mode="c")
    found = {}
    for name, entry in entries.items():
        bytes_ = mapped[entry.begin : entry.end]
        # Other libraries may have put tensors at odd offsets.
        kind = NUMPY[entry.dtype]
        aligned = bytes_ if entry.begin % kind.itemsize == 0 else bytes_.copy()
        found[name] = Stored(aligned.view(kind).reshape(entry.shape), entry.dtype)
    return Original(path, found)


def _pickle(path: Path) -> Original:
    whole = load_pickle(path)
    inner = whole.get("state_dict", whole)
    if not isinstance(inner, dict):
        raise CheckpointError(f"{path} holds a {type(inner).__name__} as state_dict, expected tensors by name")
    step = whole.get("global_step")
    # Training code leaves numbers and settings beside the tensors.
    weights = tensors(path, {name: value for name, value in inner.items() if hasattr(value, "shape")})
    return Original(path, {name: _stored(value) for name, value in weights.items()}, _number(step))


def _stored(value: "torch.Tensor") -> Stored:
    import torch

    kinds = {torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16",
             torch.int64: "I64", torch.int32: "I32", torch.uint8: "U8", torch.bool: "BOOL"}  # fmt: skip
    plain = value.detach()
    if value.dtype not in kinds:
        raise CheckpointError(
            f"a tensor of type {value.dtype} is not served; expected one of {', '.join(map(str, kinds))}"
        )
    bits = plain.view(torch.int16).numpy().view(np.uint16) if value.dtype == torch.bfloat16 else plain.numpy()
    return Stored(bits, kinds[value.dtype])


def _number(value: Any) -> int | None:
    return int(value) if isinstance(value, int | float) or getattr(value, "ndim", None) == 0 else None
