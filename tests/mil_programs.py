"""Core ML packages run by PyTorch, operation by operation in float32: what a Mac computes, but for its rounding."""

import functools
from collections.abc import Callable, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import coremltools
import numpy as np
import torch
from coremltools.converters.mil.frontend.milproto.load import load as load_program
from coremltools.converters.mil.mil import Var, types
from torch import Tensor
from torch.nn import functional as F

Operation = Callable[..., Any]


@functools.cache
def program(package: Path) -> Any:
    """The program of a package, as coremltools reads it back from the files."""
    model = coremltools.models.MLModel(str(package), skip_model_load=True)
    spec = model.get_spec()
    return load_program(spec, spec.specificationVersion, model.weights_dir)


def operations(package: Path, function: str | None = None) -> list[Any]:
    """The operations of a function but for constants."""
    functions = program(package).functions
    chosen = functions[function] if function else next(iter(functions.values()))
    return [op for op in chosen.operations if op.op_type != "const"]


def _pairs(pad: Any) -> list[tuple[int, int]]:
    flat = [int(side) for side in pad]
    return list(zip(flat[::2], flat[1::2], strict=True))


def _conv(x: Tensor, weight: Tensor, pad: Any, bias: Tensor | None = None, **rest: Any) -> Tensor:
    sides = [side for pair in reversed(_pairs(pad)) for side in pair]
    return F.conv2d(
        F.pad(x, sides), weight, bias, list(rest["strides"]), 0, list(rest["dilations"]), int(rest["groups"])
    )


def _pad(x: Tensor, pad: Any, mode: str, constant_val: float) -> Tensor:
    pairs = _pairs(pad)
    count = 2 if mode == "reflect" else len(pairs)
    sides = [side for pair in reversed(pairs[-count:]) for side in pair]
    return F.pad(x, sides, mode, **({} if mode == "reflect" else {"value": float(constant_val)}))


def _layer_norm(x: Tensor, axes: Any, epsilon: float, gamma: Any = None, beta: Any = None) -> Tensor:
    places = [int(axis) % x.ndim for axis in axes]
    mean = x.mean(places, keepdim=True)
    y = (x - mean) / ((x - mean).square().mean(places, keepdim=True) + epsilon).sqrt()
    shape = [size if place in places else 1 for place, size in enumerate(x.shape)]
    y = y if gamma is None else y * gamma.reshape(shape)
    return y if beta is None else y + beta.reshape(shape)


def _slice(x: Tensor, begin: Any, end: Any, **masks: Any) -> Tensor:
    assert not any(np.any(mask) for name, mask in masks.items() if name != "stride")
    return x[tuple(slice(int(a), int(b)) for a, b in zip(begin, end, strict=True))]


def _split(x: Tensor, split_sizes: Any, axis: int, **_: Any) -> tuple[Tensor, ...]:
    return x.split([int(size) for size in split_sizes], int(axis))


def _reduce(name: str) -> Operation:
    def run(x: Tensor, axes: Any, keep_dims: bool) -> Tensor:
        function = {"mean": torch.mean, "sum": torch.sum, "max": torch.amax, "min": torch.amin}.get(name)
        places = [int(axis) for axis in axes]
        if function is None:
            return torch.linalg.vector_norm(x, 2, places, bool(keep_dims))
        return function(x, places, bool(keep_dims))  # type: ignore[operator]

    return run


def _lut(lut: Any, indices: Any, shape: Any) -> Tensor:
    """Values by indices that are packed bit after bit, the lowest first."""
    table, sizes = np.asarray(lut, np.float32).reshape(-1), [int(size) for size in shape]
    width = int(np.log2(len(table)))
    bits = np.unpackbits(np.asarray(indices, np.uint8), bitorder="little")[: int(np.prod(sizes)) * width]
    places = bits.reshape(-1, width) @ (2 ** np.arange(width))
    return torch.from_numpy(table[places].reshape(sizes))


def _cast(x: Tensor, dtype: str) -> Tensor:
    return x.to({"int32": torch.int32, "bool": torch.bool}.get(dtype, torch.float32))


def _gelu(x: Tensor, mode: str) -> Tensor:
    return F.gelu(x, approximate="tanh" if mode.startswith("TANH") else "none")


OPERATIONS: Mapping[str, Operation] = {
    "add": lambda x, y: x + y,
    "sub": lambda x, y: x - y,
    "mul": lambda x, y: x * y,
    "real_div": lambda x, y: x / y,
    "maximum": lambda x, y: torch.maximum(x, y),
    "greater": lambda x, y: x > y,
    "equal": lambda x, y: x == y,
    "select": lambda cond, a, b: torch.where(cond, a, b),
    "square": lambda x: x.square(),
    "sqrt": lambda x: x.sqrt(),
    "sin": lambda x: x.sin(),
    "cos": lambda x: x.cos(),
    "exp": lambda x: x.exp(),
    "sigmoid": lambda x: x.sigmoid(),
    "silu": lambda x: F.silu(x),
    "gelu": _gelu,
    "softmax": lambda x, axis: x.softmax(int(axis)),
    "identity": lambda x: x,
    "cast": _cast,
    "conv": _conv,
    "linear": lambda x, weight, bias=None: F.linear(x, weight, bias),
    "matmul": lambda x, y, transpose_x, transpose_y: (x.mT if transpose_x else x) @ (y.mT if transpose_y else y),
    "einsum": lambda values, equation: torch.einsum(equation, *values),
    "layer_norm": _layer_norm,
    "reduce_mean": _reduce("mean"),
    "reduce_sum": _reduce("sum"),
    "reduce_max": _reduce("max"),
    "reduce_min": _reduce("min"),
    "reduce_l2_norm": _reduce("norm"),
    "reshape": lambda x, shape: x.reshape([int(size) for size in shape]),
    "transpose": lambda x, perm: x.permute([int(place) for place in perm]),
    "expand_dims": lambda x, axes: x.unsqueeze(int(axes[0])),
    "squeeze": lambda x, axes: x.squeeze(int(axes[0])),
    "tile": lambda x, reps: x.repeat([int(count) for count in reps]),
    "concat": lambda values, axis, **_: torch.cat(values, int(axis)),
    "split": _split,
    "slice_by_index": _slice,
    "pad": _pad,
    "upsample_nearest_neighbor": lambda x, scale_factor_height, scale_factor_width: x.repeat_interleave(
        int(scale_factor_height), 2
    ).repeat_interleave(int(scale_factor_width), 3),
    "gather": lambda x, indices, **_: F.embedding(indices, x),
    "gather_along_axis": lambda x, indices, axis, **_: x.gather(int(axis), indices.long()),
    "constexpr_lut_to_dense": _lut,
}


class Interpreted:
    """What stands for coremltools' MLModel: the same calls, checked as Core ML checks them."""

    def __init__(self, package: Path, units: str, function: str | None) -> None:
        functions = program(package).functions
        self.compute_unit = SimpleNamespace(name=units)
        self.function = functions[function] if function else next(iter(functions.values()))
        self.constants = {
            op.outputs[0]: _known(op.outputs[0].val) for op in self.function.operations if op.op_type == "const"
        }

    def predict(self, given: Mapping[str, Any]) -> dict[str, Any]:
        """Run the function on NumPy arrays; types and shapes must be those of its inputs."""
        known: dict[Var, Any] = dict(self.constants)
        assert set(given) == set(self.function.inputs)
        for name, var in self.function.inputs.items():
            value = given[name]
            assert value.shape == var.shape, name
            assert value.dtype == types.nptype_from_builtin(var.dtype), name
            known[var] = torch.from_numpy(value.astype(np.float32 if value.dtype == np.float16 else value.dtype))
        for op in self.function.operations:
            if op.op_type != "const":
                results = OPERATIONS[op.op_type](**arguments(op, known))
                known |= zip(op.outputs, [results] if isinstance(results, Tensor) else results, strict=True)
        return {var.name: known[var].numpy() for var in self.function.outputs}


def arguments(op: Any, known: Mapping[Var, Any] | None = None) -> dict[str, Any]:
    """The arguments of an operation: what is known of its variables, or the constants that they are."""

    def value(var: Var) -> Any:
        return known[var] if known is not None and var in known else _known(var.val)

    return {
        name: [value(each) for each in given] if isinstance(given, list | tuple) else value(given)
        for name, given in op.inputs.items()
        if given is not None
    }


def _known(value: Any) -> Any:
    """A constant: arrays as tensors, except those that operations take as numbers."""
    if isinstance(value, np.ndarray) and value.dtype in (np.float16, np.float32):
        return torch.from_numpy(np.asarray(value, np.float32))
    if isinstance(value, np.floating):
        return torch.tensor(float(value))
    if isinstance(value, np.ndarray) and value.ndim > 1:
        return torch.from_numpy(value.astype(np.int32))
    return value
