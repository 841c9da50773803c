"""Rules for the layers of networks: convolutions, norms, activations, attention, changes of resolution."""

from typing import TYPE_CHECKING

import numpy as np
from onnx import TensorProto

from anamorph.errors import BackendError
from anamorph.exporters.operators import ONNX_RUNTIME, Size, rule
from anamorph.exporters.storing import Weight

if TYPE_CHECKING:
    from anamorph.exporters.emit import Call


@rule("aten.conv2d.default", "aten.conv3d.default")
def _conv(call: "Call") -> str:
    inputs = [call.tensor("input"), call.tensor("weight")]
    if call["bias"] is not None:
        inputs.append(call.tensor("bias"))
    sides = len(call.shape("input")) - 2
    padding, stride, dilation = (_each(call[name], sides) for name in ("padding", "stride", "dilation"))
    return call.builder.op(
        "Conv", *inputs, strides=stride, pads=[*padding, *padding], dilations=dilation, group=call["groups"]
    )


def _each(value: list[int], sides: int) -> list[int]:
    """One number for each side; a single one counts for all."""
    return list(value) * sides if len(value) == 1 else list(value)


@rule("aten.linear.default")
def _linear(call: "Call") -> str:
    builder, weight = call.builder, call["weight"]
    matrix = builder.weight(Weight(weight.name, weight.value, transposed=True))
    product = builder.op("MatMul", call.tensor("input"), matrix)
    return product if call["bias"] is None else builder.op("Add", product, call.tensor("bias"))


@rule("aten.group_norm.default")
def _group_norm(call: "Call") -> str:
    """Instance normalisation over the groups as rows, then scale and shift per channel."""
    builder, groups, x = call.builder, call["num_groups"], call.tensor("input")
    rows = builder.op("Reshape", x, builder.constant([0, groups, -1], np.int64))
    ones, zeros = (builder.constant(np.full(groups, value, np.float32)) for value in (1, 0))
    normed = builder.op("InstanceNormalization", rows, ones, zeros, epsilon=call["eps"])
    y = builder.op("Reshape", normed, builder.op("Shape", x))
    if call["weight"] is None:
        return y
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


@rule("anamorph.attention.default")
def _one_attention(call: "Call") -> str:
    """ONNX Runtime's operation, whose heads are side by side: [B, S, heads d], [B, T, heads d] twice."""
    builder, heads = call.builder, int(call.shape("q")[1])
    side_by_side = builder.constant([0, 0, -1], np.int64)
    q, k, v = (
        builder.op("Reshape", builder.op("Transpose", call.tensor(name), perm=[0, 2, 1, 3]), side_by_side)
        for name in ("q", "k", "v")
    )
    mixed = builder.op("MultiHeadAttention", q, k, v, domain=ONNX_RUNTIME, num_heads=heads)
    apart = builder.op("Reshape", mixed, builder.constant([0, 0, heads, -1], np.int64))
    return builder.op("Transpose", apart, perm=[0, 2, 1, 3])


@rule("anamorph.image_attention.default")
def _image_attention(call: "Call") -> str:
    """See `anamorph.models.image_attention`; groups and tokens are those of the keys, whatever else is absent."""
    builder, q = call.builder, call.tensor("q")
    keys, values, bias, mask = (call.tensor(name) for name in ("keys", "values", "bias", "mask"))
    heads, width = (int(call.shape("q")[axis]) for axis in (1, 3))
    apart = builder.constant([0, -1, heads, width], np.int64)
    scaled = builder.op("Mul", keys, builder.constant(width**-0.5, np.float32))
    k = builder.op("Transpose", builder.op("Reshape", scaled, apart), perm=[0, 2, 3, 1])
    v = builder.op("Transpose", builder.op("Reshape", values, apart), perm=[0, 2, 1, 3])
    groups = Size(builder.op("Shape", keys, start=1, end=3))
    scores = builder.op("Reshape", builder.op("MatMul", q, k), builder.sizes([0, 0, 0, groups]))
    scores = builder.op("Add", scores, builder.op("Unsqueeze", bias, builder.constant([1, 2], np.int64)))
    pixels = builder.op("Reshape", mask, builder.constant([0, 0, -1], np.int64))
    pixels = builder.op(
        "Unsqueeze", builder.op("Transpose", pixels, perm=[0, 2, 1]), builder.constant([1, 4], np.int64)
    )
    kept = builder.op("Add", pixels, builder.constant(1, np.float32))
    shares = builder.op("Mul", builder.op("Softmax", scores, axis=-1), kept)
    return builder.op("MatMul", builder.op("Reshape", shares, builder.constant([0, 0, 0, -1], np.int64)), v)


def _filled(value: float) -> TensorProto:
    return TensorProto(data_type=TensorProto.FLOAT, dims=[1], float_data=[value])


@rule("aten.pad.default")
def _pad(call: "Call") -> str:
    if call["mode"] not in ("constant", "reflect"):
        raise BackendError(f"the exporter has no rule for padding in mode {call['mode']!r}")
    pads, rank = call["pad"], len(call.shape("self"))
    x = call.tensor("self")
    if not any(pads):
        return x
    before, after = [0] * rank, [0] * rank
    for index in range(len(pads) // 2):  # PyTorch counts from the last dimension, ONNX from the first
        before[rank - 1 - index], after[rank - 1 - index] = pads[2 * index], pads[2 * index + 1]
    sides = call.builder.constant(before + after, np.int64)
    if call["mode"] == "reflect":
        return call.builder.op("Pad", x, sides, mode="reflect")
    return call.builder.op("Pad", x, sides, call.builder.constant(call["value"] or 0.0, np.float32))


@rule("aten.avg_pool2d.default")
def _avg_pool2d(call: "Call") -> str:
    if call["divisor_override"] is not None:
        raise BackendError("the exporter has no rule for means with a divisor of their own")
    kernel, padding = _each(call["kernel_size"], 2), _each(call["padding"], 2)
    strides = _each(call["stride"], 2) if call["stride"] else kernel
    return call.builder.op(
        "AveragePool", call.tensor("self"), kernel_shape=kernel, strides=strides, pads=[*padding, *padding],
        ceil_mode=int(call["ceil_mode"]), count_include_pad=int(call["count_include_pad"]),
    )  # fmt: skip


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
