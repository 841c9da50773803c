"""Products with weights by oneDNN: their values, when they are taken, and what says so."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from parity import relative
from torch import Tensor
from torch._inductor.utils import run_and_get_code
from torch.utils._python_dispatch import TorchDispatchMode

from anamorph import DiffusionPipeline, machine
from anamorph.errors import InputError
from anamorph.models import MODELS
from anamorph.models.linear import Linear
from anamorph.rewrites import ONEDNN, REWRITES, wanted

BOUND = 1e-5
"""Largest relative L2 difference of an exact rewrite (float32)."""


class Counted(TorchDispatchMode):
    """Counts the calls of oneDNN's product, and of PyTorch's own with weights."""

    def __init__(self) -> None:
        super().__init__()
        self.onednn = self.own = 0

    def __torch_dispatch__(self, function: Any, _types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = str(function)
        self.onednn += name.startswith("anamorph.onednn_linear")
        self.own += name.startswith(("aten.addmm", "aten.mm", "aten.linear"))
        return function(*args, **(kwargs or {}))


def called(layer: Linear, x: Tensor) -> tuple[Tensor, Counted]:
    with torch.inference_mode(), Counted() as counted:
        return layer(x), counted


@given(
    rows=st.lists(st.integers(1, 5), min_size=1, max_size=3),
    sizes=st.tuples(st.integers(1, 70), st.integers(1, 70)),
    bias=st.booleans(),
    turned=st.booleans(),
)
def test_the_product_is_that_of_float64(rows: Sequence[int], sizes: tuple[int, int], bias: bool, turned: bool) -> None:
    layer = Linear(*sizes, bias=bias).requires_grad_(False)
    layer.rewritten = True
    # Large against their sum, so that a lost term or a narrower type would be seen; turned: values do not lie in a row.
    x = torch.randn(sizes[0], *rows).movedim(0, -1) if turned else torch.randn(*rows, sizes[0])
    y, counted = called(layer, x)
    assert (counted.onednn, counted.own) == (1, 0)
    exact = x.double() @ layer.weight.double().T + (layer.bias.double() if bias else 0.0)
    scale = float((x.double().abs() @ layer.weight.double().abs().T).max())
    assert y.shape == exact.shape
    assert y.dtype == torch.float32
    assert float((y - exact).abs().max()) <= 1e-6 * scale + 1e-6


@pytest.mark.parametrize("change", ["off", "gradients", "bfloat16", "float64"])
def test_elsewhere_it_is_pytorchs_own(change: str) -> None:
    layer = Linear(6, 4)
    layer.rewritten = change != "off"
    x = torch.randn(3, 6)
    if change == "gradients":
        layer(x).sum().backward()
        assert layer.weight.grad is not None
        assert torch.allclose(layer.weight.grad, x.sum(0).expand(4, 6))
        return
    if change in ("bfloat16", "float64"):
        dtype = getattr(torch, change)
        layer, x = layer.to(dtype), x.to(dtype)
    y, counted = called(layer, x)
    assert counted.onednn == 0
    assert torch.equal(y, torch.nn.functional.linear(x, layer.weight, layer.bias))


def test_a_whole_model_computes_the_same(sd2: Path) -> None:
    model = MODELS["UNet2DConditionModel"].from_pretrained(sd2, subfolder="unet")
    inputs = (torch.randn(2, 4, 8, 12), torch.tensor(31.0), torch.randn(2, 7, 32))
    with torch.inference_mode():
        plain = model(*inputs)[0].numpy()
        model.rewrite([ONEDNN])
        with Counted() as counted:
            other = model(*inputs)[0].numpy()
    assert counted.onednn > 30
    assert counted.own == 0
    assert 0 < relative(other, plain) <= BOUND


def test_compiles_as_one_graph(sd2: Path) -> None:
    model = MODELS["UNet2DConditionModel"].from_pretrained(sd2, subfolder="unet")
    model.rewrite([ONEDNN])
    inputs = (torch.randn(2, 4, 8, 12), torch.tensor(31.0), torch.randn(2, 7, 32))
    graphs: list[torch.fx.GraphModule] = []

    def keep(graph: torch.fx.GraphModule, _: Any) -> Any:
        graphs.append(graph)
        return graph

    torch._dynamo.reset()
    with torch.inference_mode():
        found = torch.compile(lambda *x: model(*x)[0], fullgraph=True, backend=keep, dynamic=False)(*inputs)
        assert torch.equal(found, model(*inputs)[0])
    assert len(graphs) == 1
    assert sum("onednn_linear" in str(node.target) for node in graphs[0].graph.nodes) > 30


@pytest.mark.parametrize("bias", [True, False])
def test_inductor_takes_it(bias: bool) -> None:
    layer = Linear(6, 4, bias=bias)
    layer.rewritten = True
    x = torch.randn(2, 3, 6)
    with torch.inference_mode():
        found, code = run_and_get_code(torch.compile(layer, fullgraph=True, dynamic=False), x)
        assert torch.equal(found, layer(x))
    assert "onednn_linear" in code[0]


def test_the_pipeline_takes_it_and_says_so(sd2: Path) -> None:
    call: dict[str, Any] = {"num_inference_steps": 2, "seed": 0, "height": 48, "width": 32, "output_type": "latent"}
    pipes = {name: DiffusionPipeline.from_pretrained(sd2, backend="eager", rewrites=name) for name in ("none", ONEDNN)}
    for part in ("text_encoder", "unet", "vae_decoder"):
        assert pipes[ONEDNN].placement[part].details["rewrites"] == ONEDNN
        assert "rewrites" not in pipes["none"].placement[part].details
    one, other = (np.asarray(pipe("a cat", **call).images) for pipe in pipes.values())
    assert 0 < relative(one, other) <= BOUND


def test_it_is_refused_where_it_would_do_nothing(sd2: Path) -> None:
    with pytest.raises(InputError, match="onednn-linear applies to no part"):
        DiffusionPipeline.from_pretrained(sd2, backend="eager", rewrites=ONEDNN, torch_dtype="bfloat16")
    with pytest.raises(InputError, match="onednn-linear is for compile and eager, and onnx does not have it"):
        wanted(ONEDNN, "onnx")
    unmet = REWRITES[ONEDNN].unmet
    assert unmet("adapter", "T2IAdapter", {}) == "nothing in it multiplies by a matrix"
    assert unmet("vae_decoder", "AutoencoderKL", {"mid_block_add_attention": False}) is not None
    assert unmet("vae_decoder", "AutoencoderKL", {}) is None


@pytest.mark.parametrize(
    ("told", "zen"),
    [("vendor_id\t: AuthenticAMD\n", True), ("vendor_id\t: HygonGenuine\n", True),
     ("vendor_id\t: GenuineIntel\n", False), ("CPU implementer\t: 0x41\n", False)],
)  # fmt: skip
def test_processors_are_known_by_their_makers(
    told: str, zen: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "cpuinfo").write_text(f"processor\t: 0\n{told}flags\t: avx2\n")
    monkeypatch.setattr(machine, "INFO", tmp_path / "cpuinfo")
    assert machine.is_zen.__wrapped__() == zen
    monkeypatch.setattr(machine, "INFO", tmp_path / "none")
    monkeypatch.setattr("platform.processor", lambda: f"Family 25 Model 1, {told.split()[-1]}")
    assert machine.is_zen.__wrapped__() == zen
