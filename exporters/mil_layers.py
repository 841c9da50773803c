"""Rules for the layers of networks: convolutions, norms, activations, attention, changes of resolution."""

from typing import TYPE_CHECKING, Any

import numpy as np
from coremltools.converters.mil.mil import Builder, Var

from anamorph.errors import BackendError
from anamorph.exporters.mil_operators import cast, number_like, rule, transposed

if TYPE_CHECKING:
    from anamorph.exporters.mil import Call


@rule("aten.conv2d.default")
def _conv(call: "Call") -> Var:
    sides = len(call.shape("input")) - 2
    padding, stride, dilation = (each(call[name], sides) for name in ("padding", "stride", "dilation"))
    return Builder.conv(
        x=_narrow(call, "input"), weight=call.var("weight"), **_bias(call), strides=stride, pad_type="custom",
        pad=[side for side in padding for _ in range(2)], dilations=dilation, groups=call["groups"],
    )  # fmt: skip


def each(value: list[int], sides: int) -> list[int]:
    """One number for each side; a single one counts for all."""
    return list(value) * sides if len(value) == 1 else list(value)


def _bias(call: "Call") -> dict[str, Var]:
    return {} if call["bias"] is None else {"bias": call.var("bias")}


def _narrow(call: "Call", name: str) -> Var:
    """What weights multiply has their type."""
    return cast(call.var(name), call.kind)


@rule("aten.linear.default")
def _linear(call: "Call") -> Var:
    return Builder.linear(x=_narrow(call, "input"), weight=call.var("weight"), **_bias(call))


@rule("aten.group_norm.default")
def _group_norm(call: "Call") -> Var:
    """(x - mean) / sqrt(variance + eps) over the channels and pixels of each group, then scale and shift per channel.

    Spelt out as coremltools does it, which devices are known to compute well in float16.
    """
    x, groups, shape = call.var("input"), call["num_groups"], call.shape("input")
    grouped = Builder.reshape(x=x, shape=(shape[0], groups, shape[1] // groups, *shape[2:]))
    axes = list(range(2, grouped.rank))
    centred = Builder.sub(x=grouped, y=Builder.reduce_mean(x=grouped, axes=axes, keep_dims=True))
    variance = Builder.reduce_mean(x=Builder.square(x=centred), axes=axes, keep_dims=True)
    spread = Builder.sqrt(x=Builder.add(x=variance, y=number_like(x, call["eps"])))
    y = Builder.reshape(x=Builder.real_div(x=centred, y=spread), shape=shape)
    if call["weight"] is None:
        return y
    columns = (1, shape[1], *[1] * (len(shape) - 2))
    y = Builder.mul(x=y, y=call.constant(call["weight"].reshape(columns)))
    return Builder.add(x=y, y=call.constant(call["bias"].reshape(columns)))


@rule("aten.layer_norm.default")
def _layer_norm(call: "Call") -> Var:
    """Along the last dimensions, or along the channels [B, C, 1, S] that were moved there, where they lie."""
    given = {key: call.var(name) for key, name in (("gamma", "weight"), ("beta", "bias")) if call[name] is not None}
    x, count = call.var("input"), len(call["normalized_shape"])
    moved = x.op is not None and x.op.op_type == "transpose" and list(x.op.perm.val) == [0, 3, 2, 1] and count == 1
    source, axes = (x.op.x, [1]) if moved else (x, list(range(x.rank - count, x.rank)))
    normed = Builder.layer_norm(x=source, axes=axes, epsilon=number_like(x, call["eps"]), **given)
    return transposed(normed, [0, 3, 2, 1]) if moved else normed


@rule("aten.gelu.default")
def _gelu(call: "Call") -> Var:
    mode = "TANH_APPROXIMATION" if call["approximate"] == "tanh" else "EXACT"
    return Builder.gelu(x=call.var("self"), mode=mode)


@rule("aten.softmax.int")
def _softmax(call: "Call") -> Var:
    return Builder.softmax(x=call.var("self"), axis=call["dim"])


@rule("aten.scaled_dot_product_attention.default")
def _attention(call: "Call") -> Var:
    if call["dropout_p"] or call["enable_gqa"] or call["attn_mask"] is not None:
        raise BackendError("the exporter has no rule for attention with a mask or dropout in Core ML")
    q, k, v = (call.var(name) for name in ("query", "key", "value"))
    scale = call["scale"] or call.shape("query")[-1] ** -0.5
    scores = Builder.matmul(x=Builder.mul(x=q, y=number_like(q, scale)), y=k, transpose_y=True)
    if call["is_causal"]:
        scores = Builder.add(x=scores, y=_causal(scores))
    return Builder.matmul(x=Builder.softmax(x=scores, axis=-1), y=v)


def _causal(scores: Var) -> Any:
    """Nothing is added to scores of tokens before, and to those after what stands for minus infinity."""
    rows, columns = scores.shape[-2:]
    return np.triu(np.full((1, 1, rows, columns), number_like(scores, -np.inf)), 1)


@rule("aten.pad.default")
def _pad(call: "Call") -> Var:
    if call["mode"] not in ("constant", "reflect"):
        raise BackendError(f"the exporter has no rule for padding in mode {call['mode']!r} in Core ML")
    pads = call["pad"]
    if not any(pads):
        return call.var("self")
    pairs = [list(pads[place : place + 2]) for place in range(0, len(pads), 2)][::-1]  # PyTorch counts from the last
    untouched = [[0, 0]] * (len(call.shape("self")) - len(pairs))
    sides = [side for pair in (*untouched, *pairs) for side in pair]
    x = call.var("self")
    return Builder.pad(x=x, pad=sides, mode=call["mode"], constant_val=number_like(x, call["value"] or 0.0))


@rule("aten.avg_pool2d.default")
def _avg_pool2d(call: "Call") -> Var:
    if call["divisor_override"] is not None:
        raise BackendError("the exporter has no rule for means with a divisor of their own in Core ML")
    kernel, padding = each(call["kernel_size"], 2), each(call["padding"], 2)
    return Builder.avg_pool(
        x=call.var("self"), kernel_sizes=kernel, strides=each(call["stride"], 2) if call["stride"] else kernel,
        pad_type="custom", pad=[side for side in padding for _ in range(2)],
        exclude_padding_from_average=not call["count_include_pad"], ceil_mode=call["ceil_mode"],
    )  # fmt: skip


@rule("aten.upsample_nearest2d.vec")
def _upsample(call: "Call") -> Var:
    before, after = call.shape("input")[2:], tuple(int(size) for size in call.result.shape)[2:]
    factors = [new // old for new, old in zip(after, before, strict=True)]
    if [old * factor for old, factor in zip(before, factors, strict=True)] != list(after):
        raise BackendError(
            f"the exporter has no rule for growing {before} to {after} in Core ML; take a size of more twos"
        )
    return Builder.upsample_nearest_neighbor(
        x=call.var("input"), scale_factor_height=factors[0], scale_factor_width=factors[1]
    )
