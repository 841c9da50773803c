"""Rules for what moves, joins and cuts tensors, and computes their sizes."""

import operator
from typing import TYPE_CHECKING

import numpy as np

from anamorph.exporters.operators import OPERATORS, Rule, Size, rule

if TYPE_CHECKING:
    from anamorph.exporters.emit import Call

END = 2**63 - 1
INTERLEAVING = [0, 3, 4, 1, 5, 2]
"""What `models.phases` moves: phases [B, 2, 2, C, h, w], of rows and of columns, to pixels [B, C, h, 2, w, 2]."""


@rule("aten.sym_size.int")
def _sym_size(call: "Call") -> Size:
    return call.values.size(call.arguments["self"], call["dim"] % len(call.shape("self")))


def _arithmetic(kind: str) -> Rule:
    def apply(call: "Call") -> Size:
        return Size(call.builder.op(kind, *(call.builder.sizes([call[name]]) for name in ("arg0", "arg1"))))

    return apply


for _function, _kind in (
    (operator.add, "Add"),
    (operator.sub, "Sub"),
    (operator.mul, "Mul"),
    (operator.floordiv, "Div"),
):
    OPERATORS[str(_function)] = _arithmetic(_kind)  # sizes are never negative, so that Div rounds down


@rule("aten.transpose.int")
def _transpose(call: "Call") -> str:
    rank = len(call.shape("self"))
    order = list(range(rank))
    first, second = call["dim0"] % rank, call["dim1"] % rank
    order[first], order[second] = order[second], order[first]
    return call.builder.op("Transpose", call.tensor("self"), perm=order)


@rule("aten.permute.default")
def _permute(call: "Call") -> str:
    order = [axis % len(call["dims"]) for axis in call["dims"]]
    if order == INTERLEAVING and not call.builder.for_converter:
        return _interleaved(call)
    return call.builder.op("Transpose", call.tensor("self"), perm=order)


def _interleaved(call: "Call") -> str:
    """Columns first, then rows: ONNX Runtime moves one axis fast, and several number by number in one thread."""
    op, constant = call.builder.op, call.builder.constant
    channels, height, _ = _following(call, 3)
    apart = op("Reshape", call.tensor("self"), constant([0, 0, 0, -1], np.int64))
    columns = op("Transpose", apart, perm=[0, 1, 3, 2])
    lines = op("Reshape", columns, call.builder.sizes([0, 0, channels, height, -1]))
    rows = op("Transpose", lines, perm=[0, 2, 3, 1, 4])
    return op("Reshape", rows, constant([0, 0, 0, 0, -1, 2], np.int64))


@rule("aten.t.default")
def _t(call: "Call") -> str:
    return call.builder.op("Transpose", call.tensor("self"), perm=[*range(len(call.shape("self")))][::-1])


@rule("aten.unsqueeze.default")
def _unsqueeze(call: "Call") -> str:
    axis = call["dim"] % len(call.result.shape)
    return call.builder.op("Unsqueeze", call.tensor("self"), call.builder.constant([axis], np.int64))


@rule("aten.squeeze.dim")
def _squeeze(call: "Call") -> str:
    return call.builder.op("Squeeze", call.tensor("self"), call.builder.constant([call["dim"]], np.int64))


@rule("aten.flatten.using_ints")
def _flatten(call: "Call") -> str:
    rank = len(call.shape("self"))
    start, end = call["start_dim"] % rank, call["end_dim"] % rank
    return _reshape_to(call, [*[0] * start, -1, *_following(call, end + 1)])


@rule("aten.unflatten.int")
def _unflatten(call: "Call") -> str:
    axis = call["dim"] % len(call.shape("self"))
    return _reshape_to(call, [*[0] * axis, *call["sizes"], *_following(call, axis + 1)])


@rule("aten.reshape.default", "aten.view.default")
def _reshape(call: "Call") -> str:
    return _reshape_to(call, call["shape"] if "shape" in call.arguments else call["size"])


def _reshape_to(call: "Call", shape: list["int | Size"]) -> str:
    return call.builder.op("Reshape", call.tensor("self"), call.builder.sizes(shape))


def _following(call: "Call", start: int) -> list["int | Size"]:
    """The sizes from dimension `start` on: numbers where the trace knows them."""
    x = call.tensor("self")
    known = list(call.shape("self"))[start:]
    return [
        size if isinstance(size, int) else Size(call.builder.op("Shape", x, start=start + index, end=start + index + 1))
        for index, size in enumerate(known)
    ]


@rule("aten.expand.default")
def _expand(call: "Call") -> str:
    """ONNX reads 1 as "keep", as PyTorch reads -1."""
    sizes = [1 if size == -1 else size for size in call["size"]]
    return call.builder.op("Expand", call.tensor("self"), call.builder.sizes(sizes))


@rule("aten.expand_as.default")
def _expand_as(call: "Call") -> str:
    return call.builder.op("Expand", call.tensor("self"), call.builder.op("Shape", call.tensor("other")))


@rule("aten.select.int")
def _select(call: "Call") -> str:
    return call.builder.op(
        "Gather", call.tensor("self"), call.builder.constant(call["index"], np.int64), axis=call["dim"]
    )


@rule("aten.unbind.int")
def _unbind(call: "Call") -> list[str]:
    axis, count = call["dim"] % len(call.shape("self")), len(call.result)
    builder, x = call.builder, call.tensor("self")
    return [builder.op("Gather", x, builder.constant(index, np.int64), axis=axis) for index in range(count)]


@rule("aten.cat.default")
def _cat(call: "Call") -> str:
    return call.builder.op("Concat", *call.tensors("tensors"), axis=call["dim"])


@rule("aten.stack.default")
def _stack(call: "Call") -> str:
    builder = call.builder
    axis = builder.constant([call["dim"]], np.int64)
    parts = [builder.op("Unsqueeze", part, axis) for part in call.tensors("tensors")]
    return builder.op("Concat", *parts, axis=call["dim"])


@rule("aten.chunk.default")
def _chunk(call: "Call") -> list[str]:
    sizes = [int(part.shape[call["dim"]]) for part in call.result]
    split = call.builder.constant(sizes, np.int64)
    return call.builder.ops("Split", call.tensor("self"), split, outputs=len(sizes), axis=call["dim"])


@rule("aten.slice.Tensor")
def _slice(call: "Call") -> str:
    builder = call.builder
    bounds = (call["start"] or 0, END if call["end"] is None else call["end"], call["dim"], call["step"])
    return builder.op("Slice", call.tensor("self"), *(builder.sizes([bound]) for bound in bounds))


@rule("aten.gather.default")
def _gather(call: "Call") -> str:
    return call.builder.op("GatherElements", call.tensor("self"), call.tensor("index"), axis=call["dim"])
