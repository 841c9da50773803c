"""The parts that engines call: graphs for sizes that our exports leave out (odd ones), and compiled without breaks."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.export import Dim

from anamorph.models import MODELS

SLOTS = {"unet": ("UNet2DConditionModel", "unet"), "vae_encoder": ("AutoencoderKL", "vae"),
         "vae_decoder": ("AutoencoderKL", "vae"), "text_encoder": ("CLIPTextModel", "text_encoder")}  # fmt: skip


class Part(nn.Module):
    """One part of a model as a module of its own."""

    def __init__(self, folder: Path, part: str) -> None:
        super().__init__()
        name, slot = SLOTS[part]
        self.model = MODELS[name].from_pretrained(folder, subfolder=slot)
        self.method = self.model.PARTS[part]

    def forward(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        results: tuple[Tensor, ...] = getattr(self.model, self.method)(*inputs)
        return results


def unet_inputs(batch: int, height: int, width: int, length: int = 7) -> tuple[Tensor, ...]:
    return torch.randn(batch, 4, height, width), torch.tensor(31.0), torch.randn(batch, length, 32)


def ids(batch: int, length: int) -> tuple[Tensor, ...]:
    return (torch.randint(0, 525, (batch, length)),)


BATCH = Dim("batch", max=64)


def plane(minimum: int) -> dict[int, Any]:
    return {0: BATCH, 2: Dim("height", min=minimum, max=256), 3: Dim("width", min=minimum, max=256)}


TEXT = {0: BATCH, 1: Dim("sequence", max=77)}
EXPORTS: dict[str, tuple[str, tuple[Any, ...], list[tuple[Tensor, ...]]]] = {
    "unet, any size": (
        "unet",
        (plane(5), {}, TEXT),
        [unet_inputs(2, 15, 13), unet_inputs(1, 8, 20, 5), unet_inputs(3, 9, 7)],
    ),
    "decoder": ("vae_decoder", (plane(1),), [(torch.randn(2, 4, 5, 7),), (torch.randn(1, 4, 9, 6),)]),
}


@pytest.mark.parametrize("case", EXPORTS)
def test_exports_for_any_size(sd1: Path, case: str) -> None:
    part, axes, inputs = EXPORTS[case]
    module = Part(sd1, part)
    with torch.no_grad():
        program = torch.export.export(module, inputs[0], dynamic_shapes=(axes,), strict=False)
        symbols = {str(symbol) for symbol in program.range_constraints}
        assert len(symbols) >= sum(len(axis) for axis in axes) - (part == "unet")  # `batch` is shared by two inputs
        exported = program.module()
        for values in inputs:
            for result, expected in zip(exported(*values), module(*values), strict=True):
                assert torch.allclose(result, expected, atol=1e-5)
    grown = [node for node in program.graph.nodes if node.target is torch.ops.aten.upsample_nearest2d.vec]
    if grown:
        assert all((node.args[1] is None) == (case != "unet, any size") for node in grown)


@pytest.mark.parametrize("part", SLOTS)
def test_compiles_as_one_graph(sd2: Path, part: str) -> None:
    inputs = {
        "unet": unet_inputs(2, 7, 6),
        "vae_encoder": (torch.randn(1, 3, 16, 16),),
        "vae_decoder": (torch.randn(1, 4, 5, 7),),
        "text_encoder": ids(2, 11),
    }[part]
    module = Part(sd2, part)
    torch._dynamo.reset()
    compiled = torch.compile(module, fullgraph=True, backend="eager", dynamic=False)
    with torch.no_grad():
        for result, expected in zip(compiled(*inputs), module(*inputs), strict=True):
            assert torch.allclose(result, expected, atol=1e-5)
