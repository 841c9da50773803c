"""One rule per PyTorch operation: how it is written in MIL, for Core ML 6 (macOS 13, iOS 16) and later.

A rule takes a `mil.Call` and returns its result: a variable, or a list of them.
"""

import operator
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np
from coremltools.converters.mil.mil import Builder, Var, types

from anamorph.errors import BackendError

if TYPE_CHECKING:
    from anamorph.exporters.mil import Call

Rule = Callable[["Call"], Any]
RULES: dict[str, Rule] = {}
CASTS = {types.fp16: "fp16", types.fp32: "fp32", types.int32: "int32", types.bool: "bool"}
EXACT = types.fp32


def rule(*names: str) -> Callable[[Rule], Rule]:
    """Enter a rule under the names of its operations."""

    def enter(function: Rule) -> Rule:
        RULES.update(dict.fromkeys(names, function))
        return function

    return enter


def cast(x: Var, kind: Any) -> Var:
    """A variable in another type, where it has not that one already."""
    return x if x.dtype == kind else Builder.cast(x=x, dtype=CASTS[kind])


def transposed(x: Var, order: list[int]) -> Var:
    """Dimensions in another order; orders that follow one another become one, or none."""
    if x.op is not None and x.op.op_type == "transpose":
        return transposed(x.op.x, [int(x.op.perm.val[place]) for place in order])
    return x if order == sorted(order) else Builder.transpose(x=x, perm=order)


def unsqueezed(x: Var, axis: int) -> Var:
    """A further dimension of one, or the variable before that was taken away."""
    if x.op is not None and x.op.op_type == "squeeze" and [int(each) for each in x.op.axes.val] == [axis]:
        return x.op.x
    return Builder.expand_dims(x=x, axes=[axis])


def _elementwise(kind: str) -> Rule:
    return lambda call: getattr(Builder, kind)(x=call.var("self"))


for _name in ("exp", "sigmoid", "tanh", "relu", "silu"):
    RULES[f"aten.{_name}.default"] = _elementwise(_name)


@rule("aten.sin.default", "aten.cos.default")
def _wave(call: "Call") -> Var:
    """In float32, of an angle in float32; the wave itself fits the function's type."""
    kind = str(call.node.target).split(".")[1]
    return cast(getattr(Builder, kind)(x=cast(call.var("self"), EXACT)), call.kind)


@rule("aten.log.default")
def _log(call: "Call") -> Var:
    return Builder.log(x=call.var("self"), epsilon=number_like(call.var("self"), 1e-45))


def number_like(x: Var, value: float) -> Any:
    """A number in the type of a variable."""
    from anamorph.exporters.mil import number

    return number(value, np.float32 if x.dtype == EXACT else np.float16)


def _binary(kind: str) -> Rule:
    def apply(call: "Call") -> Var:
        if call.arguments.get("alpha", 1) != 1:
            raise BackendError(f"the exporter has no rule for {kind} with alpha={call['alpha']} in Core ML")
        return getattr(Builder, kind)(**dict(zip("xy", operands(call), strict=True)))

    return apply


def operands(call: "Call") -> list[Var]:
    """Both operands in one type: float32 where one of them is."""
    given = [call[name] for name in ("self", "other")]
    kinds = {value.dtype for value in given if isinstance(value, Var)}
    kind = EXACT if EXACT in kinds else next(iter(kinds - {types.bool}), call.kind)
    dtype = {EXACT: np.float32, types.int32: np.int32}.get(kind, np.float16)
    return [cast(call.constant(value, dtype), kind) for value in given]


for _name, _kind in (("add", "add"), ("sub", "sub"), ("mul", "mul"), ("div", "real_div")):
    RULES[f"aten.{_name}.Tensor"] = _binary(_kind)
RULES["aten.eq.Scalar"] = RULES["aten.eq.Tensor"] = _binary("equal")


@rule("aten._assert_tensor_metadata.default")
def _nothing(call: "Call") -> None:
    """What the trace asserts holds for the sizes that it was made for."""


@rule(
    "aten.contiguous.default", "aten.alias.default", "aten.clone.default", "aten.to.dtype_layout", "aten.to.dtype",
    "aten._to_copy.default",
)  # fmt: skip
def _cast(call: "Call") -> Var:
    """Floats stay in the type that this module chooses for them."""
    x = call.var("self")
    if call.result.is_floating_point():
        return x if x.dtype in (types.fp16, EXACT) else cast(x, call.kind)
    return cast(x, types.int32)


@rule(str(operator.getitem))
def _getitem(call: "Call") -> Any:
    return call["arg0"][call["arg1"]]


@rule("aten.matmul.default")
def _matmul(call: "Call") -> Var:
    return Builder.matmul(x=call.var("self"), y=call.var("other"))


@rule("aten.einsum.default")
def _einsum(call: "Call") -> Var:
    """MIL knows products of the last dimension of one and the third last of the other alone."""
    return Builder.einsum(values=call.vars("tensors"), equation=call["equation"])


@rule("aten.transpose.int")
def _transpose(call: "Call") -> Var:
    order = list(range(len(call.shape("self"))))
    first, second = call["dim0"], call["dim1"]
    order[first], order[second] = order[second], order[first]
    return transposed(call.var("self"), order)


@rule("aten.t.default")
def _t(call: "Call") -> Var:
    return transposed(call.var("self"), [1, 0])


@rule("aten.permute.default")
def _permute(call: "Call") -> Var:
    return transposed(call.var("self"), [place % len(call["dims"]) for place in call["dims"]])


@rule("aten.unsqueeze.default")
def _unsqueeze(call: "Call") -> Var:
    return unsqueezed(call.var("self"), call["dim"] % len(call.result.shape))


@rule("aten.squeeze.dim")
def _squeeze(call: "Call") -> Var:
    return Builder.squeeze(x=call.var("self"), axes=[call["dim"] % len(call.shape("self"))])


@rule("aten.flatten.using_ints", "aten.unflatten.int", "aten.reshape.default", "aten.view.default")
def _reshape(call: "Call") -> Var:
    x, shape = call.var("self"), tuple(int(size) for size in call.result.shape)
    return x if tuple(x.shape) == shape else Builder.reshape(x=x, shape=shape)


@rule("aten.expand.default", "aten.expand_as.default")
def _expand(call: "Call") -> Var:
    x, shape = call.var("self"), tuple(int(size) for size in call.result.shape)
    if len(shape) > x.rank:
        x = Builder.reshape(x=x, shape=(1,) * (len(shape) - x.rank) + tuple(x.shape))
    times = [size // own for size, own in zip(shape, x.shape, strict=True)]
    return x if set(times) <= {1} else Builder.tile(x=x, reps=times)


@rule("aten.select.int")
def _select(call: "Call") -> Var:
    axis = call["dim"] % len(call.shape("self"))
    return Builder.squeeze(x=_cut(call, axis, call["index"], call["index"] + 1), axes=[axis])


@rule("aten.slice.Tensor")
def _slice(call: "Call") -> Var:
    axis = call["dim"] % len(call.shape("self"))
    size = call.shape("self")[axis]
    start, end, _ = slice(call["start"], call["end"]).indices(size)
    if call["step"] != 1:
        raise BackendError("the exporter has no rule for slices with steps in Core ML")
    return call.var("self") if (start, end) == (0, size) else _cut(call, axis, start, end)


def _cut(call: "Call", axis: int, start: int, end: int) -> Var:
    begin, stop = [0] * len(call.shape("self")), list(call.shape("self"))
    begin[axis], stop[axis] = start, end
    return Builder.slice_by_index(x=call.var("self"), begin=begin, end=stop)


@rule("aten.cat.default")
def _cat(call: "Call") -> Var:
    return Builder.concat(values=call.vars("tensors"), axis=call["dim"])


@rule("aten.stack.default")
def _stack(call: "Call") -> Var:
    return Builder.stack(values=call.vars("tensors"), axis=call["dim"])


@rule("aten.chunk.default")
def _chunk(call: "Call") -> list[Var]:
    axis = call["dim"] % len(call.shape("self"))
    sizes = [int(part.shape[axis]) for part in call.result]
    return list(Builder.split(x=call.var("self"), split_sizes=sizes, axis=axis))


@rule("aten.gather.default")
def _gather(call: "Call") -> Var:
    return Builder.gather_along_axis(x=call.var("self"), indices=cast(call.var("index"), types.int32), axis=call["dim"])


@rule("aten.embedding.default")
def _embedding(call: "Call") -> Var:
    return Builder.gather(x=call.var("weight"), indices=cast(call.var("indices"), types.int32), axis=0)


def _reduced(kind: str) -> Rule:
    def apply(call: "Call") -> Var:
        return getattr(Builder, kind)(x=call.var("self"), axes=call["dim"], keep_dims=call["keepdim"])

    return apply


for _name, _kind in (("mean.dim", "reduce_mean"), ("sum.dim_IntList", "reduce_sum"), ("amax.default", "reduce_max")):
    RULES[f"aten.{_name}"] = _reduced(_kind)


@rule("aten.linalg_vector_norm.default")
def _vector_norm(call: "Call") -> Var:
    if call["ord"] != 2:
        raise BackendError(f"the exporter has no rule for norms of order {call['ord']} in Core ML")
    return Builder.reduce_l2_norm(x=call.var("self"), axes=call["dim"], keep_dims=call["keepdim"])


@rule("aten.clamp_min.default")
def _clamp_min(call: "Call") -> Var:
    return Builder.maximum(x=call.var("self"), y=number_like(call.var("self"), call["min"]))


@rule("aten.argmax.default")
def _argmax(call: "Call") -> Var:
    """The first of equal maxima along the last dimension, spelt out because engines differ in which one they take."""
    x, rank = call.var("self"), len(call.shape("self"))
    if call["dim"] is None or call["keepdim"] or call["dim"] % rank != rank - 1:
        raise BackendError("the exporter has no rule for argmax over other dimensions than the last in Core ML")
    size = call.shape("self")[-1]
    top = Builder.equal(x=x, y=Builder.reduce_max(x=x, axes=[-1], keep_dims=True))
    places = np.broadcast_to(np.arange(size, dtype=np.int32), call.shape("self"))
    beyond = np.full(call.shape("self"), size, np.int32)
    return Builder.reduce_min(x=Builder.select(cond=top, a=places, b=beyond), axes=[-1], keep_dims=False)
