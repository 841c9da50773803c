"""Weights as tensors of ONNX's messages: inside the model file, beside it, or left in the checkpoint."""

from typing import BinaryIO

import torch
from onnx import TensorProto

from anamorph.exporters.storing import INLINE, Origin, Storing, Weight

MODEL, DATA = "model.onnx", "model.onnx_data"
ALIGNMENT = 4096
"""Weights begin at multiples of this, so that engines can map them (bytes)."""
TYPES: dict[torch.dtype, int] = {
    torch.float32: TensorProto.FLOAT, torch.float16: TensorProto.FLOAT16, torch.bfloat16: TensorProto.BFLOAT16,
    torch.int64: TensorProto.INT64, torch.int32: TensorProto.INT32, torch.bool: TensorProto.BOOL,
    torch.uint8: TensorProto.UINT8,
}  # fmt: skip
STORED_TYPES: dict[str, int] = {"F32": TensorProto.FLOAT, "F16": TensorProto.FLOAT16, "BF16": TensorProto.BFLOAT16}


def type_of(storing: Storing, weight: Weight) -> int:
    """ONNX's number of the type in which a weight, of floating point, is stored."""
    if (entry := storing.link(weight)) is not None:
        return STORED_TYPES[entry.dtype]
    return TYPES[getattr(torch, storing.dtype)]


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
