"""OpenVINO's devices: what exists, what each is told, and AUTO, which really runs here on the processor."""

from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from exported import exported

from anamorph import StableDiffusionPipeline
from anamorph.backends import openvino_devices
from anamorph.backends.openvino import OpenVino
from anamorph.backends.openvino_devices import check_sizes, promised, resolved, settings_for
from anamorph.errors import BackendError
from anamorph.guard import places_here
from anamorph.interface import Axis, Interface, Port

CALL: dict[str, Any] = {"num_inference_steps": 2, "seed": 0, "height": 32, "width": 32, "output_type": "np"}


def test_auto_chooses_and_says_what_it_chose(sd2: Path) -> None:
    folder = exported(sd2, "openvino")
    pipes = [StableDiffusionPipeline.from_pretrained(folder, device=device) for device in ("auto", "cpu")]
    placed = pipes[0].placement["unet"]
    assert (placed.device, placed.precision, placed.details["chosen"]) == ("auto", "float32", "cpu")
    assert "chosen" not in pipes[1].placement["unet"].details
    drawn = [pipe("a cat", **CALL).images for pipe in pipes]
    assert np.abs(drawn[0] - drawn[1]).max() <= 1e-5


class Fake:
    """A machine with two graphics processors and a neural one."""

    available_devices = ("GPU.0", "CPU", "NPU", "GPU.1", "ABACUS")

    def get_property(self, device: str, _: str) -> list[str]:
        return {"CPU": ["FP32"], "NPU": ["FP16"]}.get(device, ["FP32", "FP16"])

    def compile_model(self, _: Any, device: str, __: Any) -> Any:
        assert device == "AUTO"
        return SimpleNamespace(get_property=lambda _: ["(GPU.1)"])


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(openvino_devices, "core", Fake)
    monkeypatch.setattr(openvino_devices, "resolved", resolved.__wrapped__)
    openvino_devices.devices.cache_clear()
    yield
    openvino_devices.devices.cache_clear()


@pytest.mark.usefixtures("machine")
def test_devices_are_those_of_the_machine_with_what_they_serve() -> None:
    assert places_here(OpenVino()) == {
        "cpu": ("float32",), "gpu.0": ("float16", "float32"), "npu": ("float16",), "gpu.1": ("float16", "float32"),
        "auto": ("float32",),
    }  # fmt: skip
    assert openvino_devices.resolved("auto") == "GPU.1"


@pytest.mark.usefixtures("machine")
def test_settings_of_the_processor_reach_no_other_device() -> None:
    told = {"INFERENCE_PRECISION_HINT", "EXECUTION_MODE_HINT", "PERFORMANCE_HINT"}
    assert set(settings_for("float16", "gpu.1")) == told
    assert settings_for("float16", "npu")["INFERENCE_PRECISION_HINT"] == "f16"
    assert {"NUM_STREAMS", "INFERENCE_NUM_THREADS"} <= set(settings_for("float32", "cpu"))


def test_what_was_set_is_read_back_from_the_real_processor() -> None:
    assert promised("float32", "cpu")["precision"] == promised("float32", "auto")["precision"] == "float32"
    assert promised("float32", "cpu")["mode"] == "accuracy"


def test_a_device_of_one_size_refuses_open_ones(sd2: Path) -> None:
    open_one = Interface("unet", (Port("sample", (Axis("batch"), 4)),), ())
    with pytest.raises(BackendError, match="npu takes graphs of one size, but unet leaves batch open; export it with"):
        check_sizes("unet", open_one, "npu")
    check_sizes("unet", open_one, "gpu.1")
    check_sizes("unet", Interface("unet", (Port("sample", (Axis("batch", 1, 2, 2), 4)),), ()), "npu")
    with pytest.raises(BackendError, match="engine openvino has no device 'npu' on this machine; it has cpu, auto"):
        StableDiffusionPipeline.from_pretrained(exported(sd2, "openvino"), device="npu", torch_dtype="float16")
