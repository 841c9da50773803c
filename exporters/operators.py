"""One rule per PyTorch operation: how it is written in ONNX, opset 18.

A rule takes a `Call` and returns the name of its result, a tuple of names, or a `Size`.
"""

import operator
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from onnx import TensorProto

from anamorph.errors import BackendError
from anamorph.exporters.storing import TYPES, Weight

if TYPE_CHECKING:
    from anamorph.exporters.emit import Call

END = 2**63 - 1


@dataclass(frozen=True)
class Size:
    """A size that is known when the graph runs: the name of an int64 tensor of shape [1]."""

    name: str


Rule = Callable[["Call"], Any]
OPERATORS: dict[str, Rule] = {}


def rule(*names: str) -> Callable[[Rule], Rule]:
    """Enter a rule under the names of its operations."""

    def enter(function: Rule) -> Rule:
        OPERATORS.update(dict.fromkeys(names, function))
        return function

    return enter


def _elementwise(kind: str) -> Rule:
    def apply(call: "Call") -> str:
        name = next(iter(call.arguments))
        return call.builder.op(kind, call.tensor(name))

    return apply


for _name, _kind in (("exp", "Exp"), ("sin", "Sin"), ("cos", "Cos"), ("sigmoid", "Sigmoid")):
    OPERATORS[f"aten.{_name}.default"] = _elementwise(_kind)


def _binary(kind: str) -> Rule:
    def apply(call: "Call") -> str:
        if call.arguments.get("alpha", 1) != 1:
            raise BackendError(f"the exporter has no rule for {kind.lower()} with alpha={call['alpha']}")
        return call.builder.op(kind, _operand(call, "self"), _operand(call, "other"))

    return apply


for _name, _kind in (("add", "Add"), ("sub", "Sub"), ("mul", "Mul"), ("div", "Div")):
    OPERATORS[f"aten.{_name}.Tensor"] = _binary(_kind)


def _operand(call: "Call", name: str) -> str:
    """A tensor, or a number in the type of the result."""
    value = call[name]
    if isinstance(value, int | float):
        return call.builder.constant(value, str(call.result.dtype).removeprefix("torch."))
    return call.tensor(name)


@rule("aten.eq.Scalar")
def _eq(call: "Call") -> str:
    dtype = str(call.arguments["self"].meta["val"].dtype).removeprefix("torch.")
    return call.builder.op("Equal", call.tensor("self"), call.builder.constant(call["other"], dtype))


@rule("aten._assert_tensor_metadata.default")
def _nothing(call: "Call") -> None:
    """What the trace asserts holds for every input that the interface admits."""


@rule("aten.contiguous.default", "aten.to.dtype_layout", "aten.to.dtype", "aten._to_copy.default")
def _cast(call: "Call") -> str:
    source, wanted = call.arguments["self"].meta["val"].dtype, call.result.dtype
    x = call.tensor("self")
    return x if source == wanted else call.builder.op("Cast", x, to=TYPES[wanted])


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


@rule(str(operator.getitem))
def _getitem(call: "Call") -> Any:
    return call["arg0"][call["arg1"]]


@rule("aten.conv2d.default")
def _conv2d(call: "Call") -> str:
    inputs = [call.tensor("input"), call.tensor("weight")]
    if call["bias"] is not None:
        inputs.append(call.tensor("bias"))
    padding = _pair(call["padding"])
    return call.builder.op(
        "Conv", *inputs, strides=_pair(call["stride"]), pads=[*padding, *padding], dilations=_pair(call["dilation"]),
        group=call["groups"],
    )  # fmt: skip


def _pair(value: list[int]) -> list[int]:
    return list(value) * (3 - len(value)) if len(value) < 2 else list(value)


@rule("aten.linear.default")
def _linear(call: "Call") -> str:
    builder, weight = call.builder, call["weight"]
    matrix = builder.weight(Weight(weight.name, weight.value, transposed=True))
    product = builder.op("MatMul", call.tensor("input"), matrix)
    return product if call["bias"] is None else builder.op("Add", product, call.tensor("bias"))


@rule("aten.matmul.default")
def _matmul(call: "Call") -> str:
    return call.builder.op("MatMul", call.tensor("self"), call.tensor("other"))


@rule("aten.group_norm.default")
def _group_norm(call: "Call") -> str:
    """Instance normalisation over the groups as rows, then scale and shift per channel."""
    builder, groups, x = call.builder, call["num_groups"], call.tensor("input")
    rows = builder.op("Reshape", x, builder.constant([0, groups, -1], np.int64))
    ones, zeros = (builder.constant(np.full(groups, value, np.float32)) for value in (1, 0))
    normed = builder.op("InstanceNormalization", rows, ones, zeros, epsilon=call["eps"])
    y = builder.op("Reshape", normed, builder.op("Shape", x))
    shape = builder.constant([-1] + [1] * (len(call.shape("input")) - 2), np.int64)
    y = builder.op("Mul", y, builder.op("Reshape", call.tensor("weight"), shape))
    return builder.op("Add", y, builder.op("Reshape", call.tensor("bias"), shape))


@rule("aten.layer_norm.default")
def _layer_norm(call: "Call") -> str:
    given = [name for name in ("weight", "bias") if call[name] is not None]
    scale = [] if given else [call.builder.constant(np.ones(call["normalized_shape"], np.float32))]
    inputs = [call.tensor("input"), *scale, *(call.tensor(name) for name in given)]
    axis = -len(call["normalized_shape"])
    return call.builder.op("LayerNormalization", *inputs, axis=axis, epsilon=call["eps"])


@rule("aten.silu.default")
def _silu(call: "Call") -> str:
    x = call.tensor("self")
    return call.builder.op("Mul", x, call.builder.op("Sigmoid", x))


@rule("aten.gelu.default")
def _gelu(call: "Call") -> str:
    """x (1 + erf(x / sqrt 2)) / 2, in the form that engines recognise, or its approximation by tanh."""
    builder, x = call.builder, call.tensor("self")
    if call["approximate"] == "tanh":  # sqrt(2 / pi) (x + 0.044715 x^3), arXiv:1606.08415
        cube = builder.op("Mul", builder.op("Mul", x, x), builder.op("Mul", x, builder.constant(0.044715, np.float32)))
        inner = builder.op("Mul", builder.op("Add", x, cube), builder.constant((2 / np.pi) ** 0.5, np.float32))
        wave = builder.op("Tanh", inner)
    else:
        wave = builder.op("Erf", builder.op("Div", x, builder.constant(2**0.5, np.float32)))
    total = builder.op("Mul", x, builder.op("Add", wave, builder.constant(1, np.float32)))
    return builder.op("Mul", total, builder.constant(0.5, np.float32))


@rule("aten.scaled_dot_product_attention.default")
def _attention(call: "Call") -> str:
    if call["attn_mask"] is not None or call["dropout_p"] or call["enable_gqa"]:
        raise BackendError("the exporter has no rule for attention with a mask, dropout or grouped heads")
    builder, q, k, v = call.builder, call.tensor("query"), call.tensor("key"), call.tensor("value")
    scale = call["scale"] or int(call.shape("query")[-1]) ** -0.5
    rank = len(call.shape("key"))
    turned = builder.op("Transpose", k, perm=[*range(rank - 2), rank - 1, rank - 2])
    scaled = builder.op("Mul", q, builder.constant(scale, np.float32))
    scores = builder.op("MatMul", scaled, turned)
    if call["is_causal"]:
        square = builder.op("Shape", scores, start=-2)
        low = builder.op("ConstantOfShape", square, value=_filled(-np.inf))
        scores = builder.op("Add", scores, builder.op("Trilu", low, builder.constant(1, np.int64), upper=1))
    return builder.op("MatMul", builder.op("Softmax", scores, axis=-1), v)


def _filled(value: float) -> TensorProto:
    return TensorProto(data_type=TensorProto.FLOAT, dims=[1], float_data=[value])


@rule("aten.transpose.int")
def _transpose(call: "Call") -> str:
    rank = len(call.shape("self"))
    order = list(range(rank))
    first, second = call["dim0"] % rank, call["dim1"] % rank
    order[first], order[second] = order[second], order[first]
    return call.builder.op("Transpose", call.tensor("self"), perm=order)


@rule("aten.permute.default")
def _permute(call: "Call") -> str:
    return call.builder.op("Transpose", call.tensor("self"), perm=[d % len(call["dims"]) for d in call["dims"]])


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


@rule("aten.cat.default")
def _cat(call: "Call") -> str:
    return call.builder.op("Concat", *call.tensors("tensors"), axis=call["dim"])


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


@rule("aten.pad.default")
def _pad(call: "Call") -> str:
    if call["mode"] != "constant":
        raise BackendError(f"the exporter has no rule for padding in mode {call['mode']!r}")
    pads, rank = call["pad"], len(call.shape("self"))
    x = call.tensor("self")
    if not any(pads):
        return x
    before, after = [0] * rank, [0] * rank
    for index in range(len(pads) // 2):  # PyTorch counts from the last dimension, ONNX from the first
        before[rank - 1 - index], after[rank - 1 - index] = pads[2 * index], pads[2 * index + 1]
    value = call.builder.constant(call["value"] or 0.0, np.float32)
    return call.builder.op("Pad", x, call.builder.constant(before + after, np.int64), value)


@rule("aten.upsample_nearest2d.vec")
def _upsample(call: "Call") -> str:
    builder, x = call.builder, call.tensor("input")
    how = {"mode": "nearest", "coordinate_transformation_mode": "asymmetric", "nearest_mode": "floor"}
    if call["output_size"] is None:
        return builder.op("Resize", x, "", builder.constant([1, 1, *call["scale_factors"]], np.float32), **how)
    leading = Size(builder.op("Shape", x, start=0, end=2))
    return builder.op("Resize", x, "", "", builder.sizes([leading, *call["output_size"]]), **how)


@rule("aten.embedding.default")
def _embedding(call: "Call") -> str:
    return call.builder.op("Gather", call.tensor("weight"), call.tensor("indices"))


@rule("aten.gather.default")
def _gather(call: "Call") -> str:
    return call.builder.op("GatherElements", call.tensor("self"), call.tensor("index"), axis=call["dim"])


@rule("aten.argmax.default")
def _argmax(call: "Call") -> str:
    """The first of equal maxima, spelt out because engines differ in which one they take."""
    if call["dim"] is None or call["keepdim"]:
        raise BackendError("the exporter has no rule for argmax over all dimensions or with keepdim")
    builder, x, rank = call.builder, call.tensor("self"), len(call.shape("self"))
    axis = call["dim"] % rank
    if axis != rank - 1:
        raise BackendError("the exporter has no rule for argmax over another dimension than the last")
    axes = builder.constant([axis], np.int64)
    length = builder.op("Squeeze", builder.op("Shape", x, start=axis, end=axis + 1))
    places = builder.op("Range", builder.constant(0, np.int64), length, builder.constant(1, np.int64))
    top = builder.op("Equal", x, builder.op("ReduceMax", x, axes, keepdims=1))
    return builder.op("ReduceMin", builder.op("Where", top, places, length), axes, keepdims=0)
