"""Weights that wait in host memory: what visits the device and when, on a processor that plays the accelerator.

The weights at home are half of what they shall be, and the journey doubles them: whatever computes with weights that
were not fetched gives another result.
"""

from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from checkpoints import noisy
from exported import FORMATS, exported
from pictures import picture
from test_models_memory import EVERY
from torch import Tensor, nn

from anamorph import DiffusionPipeline, StableDiffusionImg2ImgPipeline, StableDiffusionXLPipeline
from anamorph.backends import offloading
from anamorph.backends.eager import Eager
from anamorph.denoiser_interfaces import even
from anamorph.errors import BackendError, InputError
from anamorph.memory import Offload
from anamorph.model_interfaces import interfaces
from anamorph.models import MODELS
from anamorph.probes import probe, probe_sizes
from anamorph.rewrites import ONEDNN, wanted

DEVICE = "cpu:0"
"""The processor under a name of its own, as an accelerator."""
CALL: dict[str, Any] = {"num_inference_steps": 3, "strength": 0.7, "seed": 0, "output_type": "np"}


class Journeys:
    """What is on the device, and the most that ever was."""

    def __init__(self) -> None:
        self.there: dict[int, int] = {}
        self.most = 0
        self.waited: set[bool] = set()

    def copied(self, weight: Tensor, device: torch.device, non_blocking: bool) -> Tensor:
        assert str(device) == DEVICE
        self.waited.add(not non_blocking)
        return weight * 2


@pytest.fixture
def journeys(monkeypatch: pytest.MonkeyPatch) -> Journeys:
    """A machine with an accelerator that counts what comes and goes."""
    seen = Journeys()
    fetch, leave = offloading.Piece.fetch, offloading.Piece.leave

    def fetching(piece: offloading.Piece) -> None:
        fetch(piece)
        seen.there[id(piece)] = sum(weight.nbytes for weight in piece.weights)
        seen.most = max(seen.most, sum(seen.there.values()))

    def leaving(piece: offloading.Piece) -> None:
        leave(piece)
        seen.there.pop(id(piece), None)

    monkeypatch.setattr(offloading, "copied", seen.copied)
    monkeypatch.setattr(offloading.Piece, "fetch", fetching)
    monkeypatch.setattr(offloading.Piece, "leave", leaving)
    monkeypatch.setattr(offloading, "_turns", {})
    monkeypatch.setattr(Eager, "devices", lambda _: (DEVICE, "cpu"))
    return seen


def halved(module: nn.Module) -> nn.Module:
    for weight in (*module.parameters(), *module.buffers()):
        weight.data = weight.data / 2
    return module


def opened(kind: type[DiffusionPipeline], folder: Path) -> tuple[Any, int, int]:
    """A pipeline whose weights are half of what they shall be, the bytes of its largest model, and of all."""
    plain = kind.from_pretrained(folder, backend="eager", device="cpu")
    parts = {
        name: halved(MODELS[loaded.component.class_name].from_pretrained(folder, subfolder=name))
        for name, loaded in plain._models.items()
    }
    sizes = [sum(weight.nbytes for weight in module.parameters()) for module in parts.values()]
    return kind(**{**plain.components, **parts}, backend="eager", device="cpu"), max(sizes), sum(sizes)


def drawn(pipe: Any) -> Any:
    return pipe("a cat", picture(), **CALL).images


SWITCHES: dict[str, Callable[[Any], None]] = {
    "model": lambda pipe: pipe.enable_model_cpu_offload(),
    "sequential": lambda pipe: pipe.enable_sequential_cpu_offload(device=DEVICE),
    "block_level": lambda pipe: pipe.enable_group_offload(DEVICE, num_blocks_per_group=2),
    "leaf_level": lambda pipe: pipe.enable_group_offload(torch.device(DEVICE), offload_type="leaf_level"),
}


@pytest.mark.parametrize("kind", SWITCHES)
def test_pictures_are_the_same_and_the_device_holds_less(sd1: Path, journeys: Journeys, kind: str) -> None:
    plain = {"backend": "eager", "device": "cpu", "rewrites": "none"}  # as modules that a caller brings are computed
    expected = drawn(StableDiffusionImg2ImgPipeline.from_pretrained(sd1, **plain))
    pipe, largest, everything = opened(StableDiffusionImg2ImgPipeline, sd1)
    assert np.abs(drawn(pipe) - expected).max() > 1e-2  # half the weights draw something else
    SWITCHES[kind](pipe)
    assert np.array_equal(drawn(pipe), expected)
    assert np.array_equal(drawn(pipe), expected)
    assert 0 < journeys.most <= {"model": largest, "block_level": 0.7 * largest}.get(kind, 0.4 * largest)
    assert largest < everything
    assert str(pipe.placement["unet"]) == f"unet: eager on {DEVICE} in float32, offload {kind}"
    with pytest.raises(BackendError, match=r"unet are offloaded; call remove_all_hooks\(\) before to\(\)"):
        pipe.to("cpu")
    pipe.remove_all_hooks()
    assert not journeys.there
    assert np.abs(drawn(pipe) - expected).max() > 1e-2


@pytest.mark.parametrize("kind", SWITCHES)
def test_models_that_wait_can_be_called_by_hand(sd1: Path, journeys: Journeys, kind: str) -> None:
    elsewhere = [name for name in wanted(None, "eager") if name != ONEDNN]  # what accelerators compute by
    plain: Any = StableDiffusionImg2ImgPipeline.from_pretrained(sd1, backend="eager", device="cpu", rewrites=elsewhere)
    pipe, *_ = opened(StableDiffusionImg2ImgPipeline, sd1)
    inputs = torch.randn(1, 4, 8, 8), torch.tensor(500), torch.randn(1, 77, 32)
    with torch.no_grad():
        expected = plain.unet(*inputs).sample
        assert not torch.allclose(pipe.unet(*inputs).sample, expected, atol=1e-2)
        SWITCHES[kind](pipe)
        assert torch.equal(pipe.unet(*inputs).sample, expected)
    assert journeys.most


def test_whole_models_take_turns(sd1: Path, journeys: Journeys) -> None:
    pipe, *_ = opened(StableDiffusionImg2ImgPipeline, sd1)
    pipe.enable_model_cpu_offload()
    names = {id(pipe._models[name].component.module): name for name in pipe._models}
    order: list[str] = []
    take = offloading.Turn.take

    def taking(turn: offloading.Turn, piece: offloading.Piece) -> None:
        owner = next(module for module in offloading._offloaded if offloading._offloaded[module].rest is piece)
        take(turn, piece)
        order.append(names[id(owner)])
        assert len(journeys.there) == 1

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(offloading.Turn, "take", taking)
        drawn(pipe)
    changes = [name for name, before in zip(order, [None, *order], strict=False) if name != before]
    assert changes == ["text_encoder", "vae", "unet", "vae"]


def test_two_text_encoders_and_a_prompt_of_numbers(sdxl: Path, journeys: Journeys) -> None:
    call: dict[str, Any] = {"prompt": "a cat", "num_inference_steps": 2, "seed": 0, "output_type": "np"}
    plain = {"backend": "eager", "device": "cpu", "rewrites": "none"}
    expected = StableDiffusionXLPipeline.from_pretrained(sdxl, **plain)(**call).images
    pipe, largest, _ = opened(StableDiffusionXLPipeline, sdxl)
    pipe.enable_sequential_cpu_offload()
    assert np.array_equal(pipe(**call).images, expected)
    assert 0 < journeys.most < largest / 2
    pipe.remove_all_hooks()
    pipe.enable_group_offload(DEVICE, num_blocks_per_group=1, exclude_modules="text_encoder")
    assert [part for part, placed in pipe.placement.items() if not placed.details] == ["text_encoder"]


@pytest.mark.parametrize("name", [name for name in EVERY if name != "CLIPVisionModel"])  # no pipeline opens it
def test_every_model_fetches_all_that_it_computes_with(name: str, journeys: Journeys) -> None:
    model = noisy(MODELS[name](**EVERY[name]), 1)
    calls = []
    for part, declare in interfaces(name, "part").items():
        interface = even(declare(model.config), model.config)
        inputs = probe(interface.required, probe_sizes(interface)[0])
        values = [torch.from_numpy(inputs[port.name]) if port.name in inputs else None for port in interface.inputs]
        calls.append((getattr(model, model.method(part)), values))
    with torch.inference_mode():
        expected = [[out.clone() for out in method(*values)] for method, values in calls]
        halved(model)
        for kind in ("model", "sequential", "block_level"):
            offloading.offload(model, Offload(kind, DEVICE))
            waits = offloading.offloaded(model)
            assert waits is not None
            for (method, values), before in zip(calls, expected, strict=True):
                with waits.awake():
                    found = method(*values)
                assert all(torch.equal(a, b) for a, b in zip(found, before, strict=True))
        offloading.offload(model, Offload(None))
        changed = [torch.equal(out, b[0]) for (out, *_), b in zip((m(*v) for m, v in calls), expected, strict=True)]
    assert not any(changed)
    assert journeys.most


ORDERS = {
    1: "0 leaves, 0 is there, 1 leaves, 0 computed, 1 is there, 2 leaves, 1 computed, 2 is there, 3 leaves, "
       "2 computed, 3 is there, 3 computed",
    2: "0 leaves, 0 is there, 2 leaves, 0 computed, 1 computed, 2 is there, 2 computed, 3 computed",
}  # fmt: skip
"""Blocks of a group -> what happens from the second call on; a group is called as its first block."""


@pytest.mark.parametrize("blocks", ORDERS)
def test_what_comes_next_is_fetched_while_the_last_computes(blocks: int, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    events: list[str] = []
    model = nn.Module()
    model.blocks = nn.ModuleList(nn.Linear(4, 4) for _ in range(4))
    names = {id(block.weight): str(n) for n, block in enumerate(model.blocks)}
    homes: dict[int, str] = {}

    class Recorded(offloading.Lane):
        """A lane that says when journeys begin and when their end is waited for."""

        def __init__(self, device: torch.device, *, lean: bool = False) -> None:
            super().__init__(device)
            events.append("lean" if lean else "locked")

        def bring(self, given: Sequence[Tensor]) -> list[Tensor]:
            weights = super().bring(given)
            if given:
                homes[id(weights[0])] = homes[id(given[0])]
                events.append(f"{homes[id(given[0])]} leaves")
            return weights

        def arrived(self, weights: Sequence[Tensor]) -> None:
            if weights:
                events.append(f"{homes[id(weights[0])]} is there")

    monkeypatch.setattr(offloading, "Prefetch", Recorded)
    offloading.offload(model, Offload("block_level", DEVICE, blocks, stream=True, lean=True))
    assert events == ["lean"]
    waits = offloading.offloaded(model)
    assert waits is not None
    homes.update({id(piece.homes[0]): names[id(piece.weights[0])] for piece in waits.pieces})
    for n, block in enumerate(model.blocks):
        block.register_forward_hook(lambda *_, n=n: events.append(f"{n} computed"))  # type: ignore[misc]
    x = torch.randn(2, 4)
    for _ in range(3):
        events.clear()
        with waits.awake(), torch.inference_mode():
            for block in model.blocks:
                block(x)
    assert ", ".join(events) == ORDERS[blocks]


@pytest.mark.parametrize("ahead", [False, True])
def test_the_host_waits_for_copies_unless_told_otherwise(sd1: Path, journeys: Journeys, ahead: bool) -> None:
    pipe, *_ = opened(StableDiffusionImg2ImgPipeline, sd1)
    pipe.enable_group_offload(DEVICE, offload_type="leaf_level", non_blocking=ahead)
    pipe.encode(["a cat"])
    assert journeys.waited == {not ahead}


def test_wrong_wishes_are_refused(sd1: Path, journeys: Journeys) -> None:
    pipe, *_ = opened(StableDiffusionImg2ImgPipeline, sd1)
    with pytest.raises(InputError, match="num_blocks_per_group is missing; offload_type block_level needs it"):
        pipe.enable_group_offload(DEVICE)
    with pytest.raises(InputError, match="offload_type is 'layers', expected block_level or leaf_level"):
        pipe.unet.enable_group_offload(DEVICE, offload_type="layers")
    with pytest.raises(InputError, match="offload_device is 'disk', expected cpu"):
        pipe.enable_group_offload(DEVICE, "disk", "leaf_level")
    with pytest.raises(
        InputError, match="offload_to_disk_path is not served; weights in their stored type stay mapped"
    ):
        pipe.enable_group_offload(DEVICE, "cpu", "leaf_level", offload_to_disk_path="x")
    for name in ("record_stream", "low_cpu_mem_usage"):
        with pytest.raises(InputError, match=f"{name} has no meaning without use_stream=True; leave it out"):
            pipe.enable_group_offload(DEVICE, offload_type="leaf_level", **{name: True})
    with pytest.raises(InputError, match="exclude_modules names tokenizer; expected some of vae, text_encoder, unet"):
        pipe.enable_group_offload(DEVICE, num_blocks_per_group=1, exclude_modules=["tokenizer"])
    with pytest.raises(InputError, match="gpu_id is 1 and device 'cuda:0'; give the number once"):
        pipe.enable_model_cpu_offload(1, "cuda:0")
    with pytest.raises(BackendError, match="vae_decoder cannot visit 'cuda:1': engine eager has no such device"):
        pipe.enable_model_cpu_offload(gpu_id=1)
    assert not any(placed.details for placed in pipe.placement.values())
    assert not journeys.most


@pytest.mark.parametrize("engine", [*FORMATS, "compile"])
def test_other_engines_say_why_they_keep_their_weights(sd1: Path, monkeypatch: pytest.MonkeyPatch, engine: str) -> None:
    folder = exported(sd1, engine) if engine in FORMATS else sd1
    pipe: Any = DiffusionPipeline.from_pretrained(folder, backend=engine, device=None if engine in FORMATS else "cpu")
    devices = SimpleNamespace(devices=lambda: ("gpu", "cpu"))
    monkeypatch.setattr("anamorph.pipelines.loaded.get_backend", lambda _: devices)
    with pytest.raises(BackendError, match=f"offloading does not apply: {engine} keeps weights where it computes"):
        pipe.enable_model_cpu_offload()
    with pytest.warns(UserWarning, match=f"attention slicing does not apply: {engine} fuses attention"):
        pipe.enable_attention_slicing()
