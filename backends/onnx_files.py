"""Which files an ONNX model refers to, and a model with further outputs, without the `onnx` package.

Only the fields that can lead to a tensor are followed (github.com/onnx/onnx, onnx.proto), so that a model from
elsewhere cannot make the engine read files outside its folder.
"""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType

from anamorph.errors import ArtifactError

FIELDS: Mapping[str, Mapping[int, str]] = MappingProxyType({
    "Model": {7: "Graph", 25: "Function", 20: "Training"},
    "Training": {1: "Graph", 2: "Graph"},
    "Function": {7: "Node", 11: "Attribute"},
    "Graph": {1: "Node", 5: "Tensor", 15: "Sparse"},
    "Node": {5: "Attribute"},
    "Attribute": {5: "Tensor", 6: "Graph", 10: "Tensor", 11: "Graph", 22: "Sparse", 23: "Sparse"},
    "Sparse": {1: "Tensor", 2: "Tensor"},
    "Tensor": {13: "Entry"},
    "Entry": {},
})  # fmt: skip
"""Message -> field number -> message, for every way from a model to external data."""


def external_locations(model: Path) -> set[str]:
    """The `location` of every tensor whose data lies outside the model file.

    Raises ArtifactError: the file is no protocol buffer.
    """
    try:
        return set(_locations("Model", memoryview(model.read_bytes())))
    except (IndexError, ValueError) as error:
        raise ArtifactError(f"{model} is no ONNX model ({error}); export the checkpoint again") from None


def with_outputs(model: bytes, names: Sequence[str]) -> bytes:
    """The model with these values as further outputs.

    Messages that follow each other are one message (protobuf.dev, "Last One Wins"): repeated fields are joined.
    """
    outputs = b"".join(_field(12, _field(1, name.encode())) for name in names)
    return model + _field(7, outputs) if names else model


def _field(number: int, value: bytes) -> bytes:
    head, length = bytes([number << 3 | 2]), len(value)
    while length > 127:
        head += bytes([length & 127 | 128])
        length >>= 7
    return head + bytes([length]) + value


def _locations(kind: str, data: memoryview) -> Iterator[str]:
    entry: dict[int, bytes] = {}
    for number, value in _fields(data):
        if kind == "Entry":
            entry[number] = bytes(value)
        elif number in FIELDS[kind]:
            yield from _locations(FIELDS[kind][number], value)
    if entry.get(1) == b"location":
        yield entry.get(2, b"").decode()


def _fields(data: memoryview) -> Iterator[tuple[int, memoryview]]:
    """Length-delimited fields of a message; numbers are skipped."""
    place = 0
    while place < len(data):
        tag, place = _varint(data, place)
        kind = tag & 7
        if kind == 0:
            _, place = _varint(data, place)
        elif kind in (1, 5):
            place += 8 if kind == 1 else 4
        elif kind == 2:
            length, place = _varint(data, place)
            if place + length > len(data):
                raise ValueError("a field is cut off")
            yield tag >> 3, data[place : place + length]
            place += length
        else:
            raise ValueError(f"wire type {kind}")


def _varint(data: memoryview, place: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        byte = data[place]
        place += 1
        value |= (byte & 127) << shift
        if byte < 128:
            return value, place
        shift += 7
