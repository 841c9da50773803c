"""Each rule of the exporter against PyTorch itself, where models of today do not reach every corner of it."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from anamorph.backends.openvino_devices import core
from anamorph.errors import BackendError
from anamorph.exporters.emit import emit
from anamorph.exporters.storing import Storing
from anamorph.interface import Axis, Interface, Port
from anamorph.models.phases import doubled

PLAIN = {"INFERENCE_PRECISION_HINT": "f32", "EXECUTION_MODE_HINT": "ACCURACY"}
"""What OpenVINO would change by itself."""


class Model(nn.Module):
    """A function as a module; its wrapper is called `model`, as in an export."""

    def __init__(self, function: Callable[..., Any], *layers: nn.Module) -> None:
        super().__init__()
        self.model = nn.ModuleList(layers)
        self.function = function

    def forward(self, *values: Tensor) -> tuple[Tensor, ...]:
        result = self.function(*self.model, *values)
        return result if isinstance(result, tuple) else (result,)


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def written(
    folder: Path, model: nn.Module, values: tuple[Tensor, ...], dynamic: Any, storage: str, converter: bool
) -> None:
    program = torch.export.export(model, values, dynamic_shapes=(dynamic,) if dynamic else None, strict=False)
    ports = tuple(
        Port(f"x{i}", tuple(Axis(f"a{i}{d}") for d in range(value.ndim)), str(value.dtype).removeprefix("torch."))
        for i, value in enumerate(values)
    )
    results = tuple(
        Port(f"y{i}", tuple(Axis(f"b{i}{d}") for d in range(value.ndim)), str(value.dtype).removeprefix("torch."))
        for i, value in enumerate(model(*values))
    )
    emit(program, Interface("test", ports, results), folder, Storing(storage), converter)


def check(
    folder: Path,
    model: nn.Module,
    values: tuple[Tensor, ...],
    *others: tuple[Tensor, ...],
    dynamic: Any = None,
    storage: str = "float32",
    bound: float = 1e-6,
    converter: bool = False,
) -> None:
    """Export with `values`, then compare on them and on `others`."""
    written(folder, model.eval(), values, dynamic, storage, converter)
    session = onnxruntime.InferenceSession(folder / "model.onnx")
    compiled = core().compile_model(folder / "model.onnx", "CPU", PLAIN)
    for inputs in (values, *others):
        named = {f"x{i}": value.numpy() for i, value in enumerate(inputs)}
        results = session.run(None, named), [*compiled(named).values()]
        exact = [value.detach().numpy() for value in model(*inputs)]
        for ours in results:
            for value, reference in zip(ours, exact, strict=True):
                assert value.shape == reference.shape
                assert np.abs(value - reference).max() <= bound * max(1.0, np.abs(reference).max())


CASES: dict[str, tuple[Model, tuple[Tensor, ...]]] = {
    "convolution with stride and groups": (
        Model(lambda conv, x: conv(x), nn.Conv2d(4, 6, 3, stride=2, padding=1, groups=2)), (normal(2, 4, 7, 9),)
    ),
    "convolution without bias": (
        Model(lambda conv, x: conv(x), nn.Conv2d(4, 3, (1, 3), bias=False)), (normal(1, 4, 5, 5),)
    ),
    "the same under another name": (Model(lambda x: 2 * torch.ops.aten.alias(x)), (normal(3, 7),)),
    "smallest first": (Model(lambda x: x.argsort(-1).argsort(-1)), (normal(3, 7),)),
    "largest numbers of rows": (Model(lambda x: (x.amax(-1), x.amax(0, keepdim=True))), (normal(3, 7),)),
    "one or the other": (
        Model(lambda x, y: torch.where((x >= 3) & (x == y), x, 9 * y)),
        (torch.arange(6), torch.tensor([0, 2, 2, 3, 9, 5])),
    ),
    "taken apart": (Model(lambda x: (sum(x.unbind(1)), torch.stack(x.unbind(-1)[::-1]))), (normal(2, 3, 4),)),
    "linear without bias": (Model(lambda linear, x: linear(x), nn.Linear(5, 7, bias=False)), (normal(2, 3, 5),)),
    "one linear layer used twice": (Model(lambda linear, x: linear(linear(x)), nn.Linear(5, 5)), (normal(2, 5),)),
    "group norm of rows": (Model(lambda norm, x: norm(x), nn.GroupNorm(2, 6, eps=1e-3)), (normal(2, 6, 5),)),
    "layer norm over two dimensions": (Model(lambda norm, x: norm(x), nn.LayerNorm((3, 5))), (normal(2, 3, 5),)),
    "exact gelu": (Model(lambda x: F.gelu(x)), (4 * normal(3, 50),)),
    "gelu by tanh": (Model(lambda x: F.gelu(x, approximate="tanh")), (4 * normal(3, 50),)),
    "product of matrices": (Model(lambda x, y: x @ y), (normal(2, 3, 5), normal(5, 4, seed=1))),
    "layer norm without scale": (Model(lambda x: F.layer_norm(x, (8,))), (normal(2, 3, 8),)),
    "silu": (Model(lambda x: F.silu(x)), (4 * normal(3, 50),)),
    "attention": (
        Model(lambda q, k, v: F.scaled_dot_product_attention(q, k, v)),
        (normal(2, 3, 5, 4), normal(2, 3, 7, 4, seed=1), normal(2, 3, 7, 4, seed=2)),
    ),
    "causal attention with a scale": (
        Model(lambda q, k, v: F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=0.7)),
        (normal(2, 3, 5, 4), normal(2, 3, 5, 4, seed=1), normal(2, 3, 5, 4, seed=2)),
    ),
    "uneven chunks": (Model(lambda x: x.chunk(3, dim=1)), (normal(2, 7, 3),)),
    "chunks counted from the end": (Model(lambda x: x.chunk(2, dim=-1)), (normal(2, 7, 4),)),
    "padding of two dimensions": (Model(lambda x: F.pad(x, (1, 2, 0, 3), value=0.5)), (normal(1, 2, 3, 4),)),
    "padding by nothing": (Model(lambda x: F.pad(x, (0, 0)) + 1), (normal(1, 2, 3, 4),)),
    "nearest neighbours to a size": (Model(lambda x: F.interpolate(x, size=[5, 7])), (normal(1, 2, 3, 4),)),
    "first of equal maxima": (
        Model(lambda x: (x == 3).int().argmax(-1)), (torch.tensor([[0, 3, 3, 3], [1, 1, 1, 1], [3, 0, 0, 3]]),)
    ),
    "largest number": (Model(lambda x: x.argmax(-1)), (torch.tensor([[0, 3, 9, 9], [7, 1, 1, 1]]),)),
    "means of neighbours": (Model(lambda x: F.avg_pool2d(x, 2)), (normal(1, 2, 5, 6),)),
    "means of neighbours with padding": (
        Model(lambda x: F.avg_pool2d(x, (2, 3), stride=1, padding=1)), (normal(1, 2, 5, 6),)
    ),
    "means of neighbours, their own number": (
        Model(lambda x: F.avg_pool2d(x, 3, 2, 1, ceil_mode=True, count_include_pad=False)), (normal(1, 2, 5, 6),)
    ),
    "reflected edges": (Model(lambda x: F.pad(x, (1, 2, 0, 3), mode="reflect")), (normal(1, 2, 5, 4),)),
    "group norm without weights": (Model(lambda x: F.group_norm(x, 2)), (normal(2, 6, 5, 4),)),
    "mean and sum": (
        Model(lambda x: (x.mean(1, keepdim=True), x.sum(-1), x.mean((-1, -2)), x.sum((0, 2), keepdim=True))),
        (normal(2, 3, 5),),
    ),
    "vectors of length one": (Model(lambda x: (F.normalize(x), F.normalize(0 * x, dim=-1))), (normal(2, 3, 5),)),
    "length of vectors": (Model(lambda x: torch.linalg.vector_norm(x, dim=-1)), (normal(2, 3, 5),)),
    "one of several": (Model(lambda x: (x[:, 1], x[..., -2])), (normal(2, 3, 5),)),
    "as large as another": (Model(lambda x, y: x.expand_as(y) + 1), (normal(2, 1), normal(4, 2, 3, seed=1))),
    "matrix transposed": (Model(lambda x: x.t() @ x), (normal(2, 5),)),
    "at least": (Model(lambda x: x.clamp_min(0.1)), (normal(2, 5),)),
    "curves": (Model(lambda x: (x.relu(), x.tanh(), (x * x + 1).log())), (3 * normal(2, 5),)),
    "slices with a step": (Model(lambda x: x[:, 1:6:2]), (normal(2, 7),)),
    "numbers on either side": (Model(lambda x: (2 * x - 1) / 3), (normal(2, 7),)),
    "whole numbers stay whole": (Model(lambda x: x * 2 + 1), (torch.arange(6),)),
    "constants are computed by PyTorch": (Model(lambda x: x * torch.exp(-torch.arange(4.0) / 3)), (normal(2, 4),)),
    "sines": (Model(lambda x: torch.cat((x.sin(), x.cos()), dim=-1)), (100 * normal(2, 7),)),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_a_rule_computes_what_pytorch_computes(name: str, tmp_path: Path) -> None:
    check(tmp_path, *CASES[name])


def test_sizes_known_only_at_run_time(tmp_path: Path) -> None:
    height, width = torch.export.Dim("h", min=1), torch.export.Dim("w", min=1)

    def function(x: Tensor) -> tuple[Tensor, ...]:
        tokens = x.flatten(2).transpose(1, 2)
        back = torch.unflatten(tokens.transpose(1, 2), 2, x.shape[2:])
        return tokens, back * 2, F.interpolate(x, size=[x.shape[2] * 2, x.shape[3] + 1])

    dynamic = ({2: height, 3: width},)
    check(
        tmp_path, Model(function), (normal(2, 3, 4, 5),), (normal(2, 3, 7, 2),), (normal(2, 3, 1, 1),), dynamic=dynamic
    )


def test_numbers_up_to_a_size(tmp_path: Path) -> None:
    def function(x: Tensor) -> tuple[Tensor, ...]:
        count = x.shape[1]
        return x * torch.arange(count).to(x.dtype), torch.where(x.argsort(-1) >= count - 2, x, 0 * x), x + count // 2

    width = torch.export.Dim("w", min=2)
    check(tmp_path, Model(function), (normal(2, 4),), (normal(2, 7),), dynamic=({1: width},))


def test_weights_in_float16_are_halved_on_disk_and_computed_in_float32(tmp_path: Path) -> None:
    layer = nn.Linear(64, 64)
    model, inputs = Model(lambda linear, x: linear(x), layer), (normal(3, 64),)
    check(tmp_path, model, inputs, storage="float16", bound=2e-3)
    assert (tmp_path / "model.onnx_data").stat().st_size == 64 * 64 * 2
    layer.weight.data[0, 0] = 1e6
    with pytest.raises(BackendError, match="float16"):
        written(tmp_path, model, inputs, None, "float16", converter=False)


def test_an_operation_without_a_rule_is_named(tmp_path: Path) -> None:
    with pytest.raises(BackendError, match=r"aten\.fft_fft"):
        written(tmp_path, Model(lambda x: torch.fft.fft(x).real), (normal(2, 4),), None, "float32", converter=False)


@pytest.mark.parametrize("converter", [False, True])
def test_phases_are_interleaved_axis_by_axis_except_for_converters(tmp_path: Path, converter: bool) -> None:
    """ONNX Runtime is quick at moving one axis alone; converters see what the model does."""
    conv = nn.Conv2d(3, 4, 3, padding=1)
    sizes = {0: torch.export.Dim("b"), 2: torch.export.Dim("h"), 3: torch.export.Dim("w")}
    values, other = (normal(2, 3, 4, 5),), (normal(3, 3, 7, 6, seed=1),)
    model = Model(lambda conv, x: doubled(x, conv), conv)
    check(tmp_path, model, values, other, dynamic=(sizes,), converter=converter)
    nodes = onnx.load(tmp_path / "model.onnx").graph.node
    moves = [[*node.attribute[0].ints] for node in nodes if node.op_type == "Transpose"]
    assert moves == ([[0, 3, 4, 1, 5, 2]] if converter else [[0, 1, 3, 2], [0, 2, 3, 1, 4]])
