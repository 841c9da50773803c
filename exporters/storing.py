"""How the weights of an exported graph are stored: in its own file and type, or left in the checkpoint."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO

import torch
from onnx import TensorProto

from anamorph.errors import BackendError
from anamorph.linked import LINKABLE, Constant, Linked
from anamorph.weights import Entry

MODEL, DATA = "model.onnx", "model.onnx_data"
ALIGNMENT = 4096
"""Weights begin at multiples of this, so that engines can map them (bytes)."""
INLINE = 1024
"""Constants up to this size stay in the model file (bytes)."""
TYPES: dict[torch.dtype, int] = {
    torch.float32: TensorProto.FLOAT, torch.float16: TensorProto.FLOAT16, torch.bfloat16: TensorProto.BFLOAT16,
    torch.int64: TensorProto.INT64, torch.int32: TensorProto.INT32, torch.bool: TensorProto.BOOL,
}  # fmt: skip
STORED_TYPES: dict[str, int] = {"F32": TensorProto.FLOAT, "F16": TensorProto.FLOAT16, "BF16": TensorProto.BFLOAT16}
NAMES = {number: name for name, number in STORED_TYPES.items()}


@dataclass(frozen=True)
class Origin:
    """A tensor of the checkpoint: its name there, and where it lies if that can be mapped (`file` is relative)."""

    tensor: str
    file: str | None = None
    entry: Entry | None = None


@dataclass(frozen=True)
class Storing:
    """How weights are stored: in `dtype` beside the graph, or left in the checkpoint where `linked`.

    `origins` are the checkpoint's tensors by the names that the model gives them.
    """

    dtype: str = "float32"
    linked: bool = False
    origins: Mapping[str, Origin] = field(default_factory=dict)

    def link(self, weight: "Weight") -> Entry | None:
        """Where the weight lies in the checkpoint, if the graph shall refer to it there."""
        origin = self.origins.get(weight.name)
        if not self.linked or origin is None or weight.value.nbytes <= INLINE:
            return None
        return origin.entry if origin.entry is not None and origin.entry.dtype in LINKABLE else None

    def type_of(self, weight: "Weight") -> int:
        """ONNX's number of the type in which a weight, of floating point, is stored."""
        if (entry := self.link(weight)) is not None:
            return STORED_TYPES[entry.dtype]
        return TYPES[getattr(torch, self.dtype)]

    def values(self, weight: "Weight") -> Linked:
        """The values of a weight that is not linked, in the type of the file."""
        value = weight.stored(self.dtype)
        bits = value.view(torch.int16) if value.dtype == torch.bfloat16 else value  # which NumPy does not have
        return Linked(bits.numpy(), NAMES[TYPES[value.dtype]])


@dataclass(frozen=True)
class Weight:
    """A tensor of the model as the graph uses it; matrices of linear layers are stored transposed."""

    name: str
    value: torch.Tensor
    transposed: bool = False

    def stored(self, dtype: str) -> torch.Tensor:
        """The values in the order and type of the file; raises BackendError where the type cannot hold them."""
        value = self.value.detach()
        value = (value.t() if self.transposed else value).contiguous()
        if not value.is_floating_point():
            return value
        narrow = value.to(getattr(torch, dtype))
        if narrow.dtype != value.dtype and not narrow.isfinite().all():
            raise BackendError(f"weight {self.name} has values beyond {dtype}'s range; export with dtype fp32")
        return narrow


@dataclass(frozen=True)
class Written:
    """What was written: the `file` to open, block -> value that it ends with, constant -> where it comes from.

    `roots` are the folders that belong to the part where its own does not, `storage` the type of the weights on disk
    where it is not the one that was asked for.
    """

    file: str
    taps: Mapping[str, str]
    constants: Mapping[str, Constant]
    roots: tuple[Path, ...] = ()
    storage: str | None = None


def stored_tensor(name: str, value: torch.Tensor, file: BinaryIO) -> TensorProto:
    """A weight inside the model file, or appended to `file` where it is large."""
    tensor = TensorProto(name=name, data_type=TYPES[value.dtype], dims=value.shape)
    # NumPy has no bfloat16: its bits are written as whole numbers.
    data = (value.view(torch.int16) if value.dtype == torch.bfloat16 else value).numpy()
    if data.nbytes <= INLINE:
        tensor.raw_data = data.tobytes()
        return tensor
    file.write(b"\0" * (-file.tell() % ALIGNMENT))
    _place(tensor, DATA, file.tell(), data.nbytes)
    file.write(data.data)
    return tensor


def linked_tensor(name: str, weight: Weight, origin: Origin) -> TensorProto:
    """A weight that stays in the checkpoint's file."""
    assert origin.entry is not None
    assert origin.file is not None
    tensor = TensorProto(name=name, data_type=STORED_TYPES[origin.entry.dtype], dims=weight.value.shape)
    _place(tensor, origin.file, origin.entry.begin, origin.entry.end - origin.entry.begin)
    return tensor


def _place(tensor: TensorProto, file: str, offset: int, length: int) -> None:
    tensor.data_location = TensorProto.EXTERNAL
    for key, value in {"location": file, "offset": offset, "length": length}.items():
        tensor.external_data.add(key=key, value=str(value))
