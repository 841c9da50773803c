"""OpenVINO's devices by name, and what each is told; AUTO is asked once which of them it takes."""

import functools
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

from anamorph.backends.cores import physical_cores
from anamorph.backends.numpy_program import imported
from anamorph.engine import kind_of
from anamorph.errors import BackendError
from anamorph.interface import Interface

HINTS = {"float32": "f32", "bfloat16": "bf16", "float16": "f16"}
EXACT = "float32"
AUTO = "auto"
PLACES: Mapping[str, tuple[str, ...]] = MappingProxyType({
    "cpu": ("float32", "bfloat16"), "gpu": ("float16", "float32"), "npu": ("float16",), AUTO: ("float32",),
})  # fmt: skip
"""Kind of device -> precisions (docs.openvino.ai, supported devices); a second GPU is `gpu.1`."""
STATIC = ("npu",)
"""Kinds that take graphs of one size alone."""


@functools.cache
def core() -> Any:
    """OpenVINO's entry point; one per process, because each loads the plug-ins of all devices."""
    return imported("openvino", "openvino").Core()


@functools.cache
def devices() -> tuple[str, ...]:
    """Those of this machine when this process first asks, the processor first, and "auto", which chooses among them."""
    found = [name.lower() for name in core().available_devices if kind_of(name.lower()) in PLACES]
    return (*sorted(found, key=lambda name: name != "cpu"), AUTO)


def precisions(device: str) -> tuple[str, ...]:
    """What a device serves; not every processor has bfloat16."""
    able = core().get_property(resolved(device), "OPTIMIZATION_CAPABILITIES")
    named = {"bfloat16": "BF16", "float16": "FP16"}
    return tuple(name for name in PLACES[kind_of(device)] if name not in named or named[name] in able)


@functools.cache
def resolved(device: str) -> str:
    """OpenVINO's name of the device that really runs: AUTO tells only of models that it compiled."""
    if device != AUTO:
        return device.upper()
    compiled = core().compile_model(addition(), "AUTO", {"PERFORMANCE_HINT": "LATENCY"})
    return str(compiled.get_property("EXECUTION_DEVICES")[0]).removeprefix("(").removesuffix(")")


def addition() -> Any:
    """A model of one addition."""
    openvino = imported("openvino", "openvino")
    value = openvino.op.Parameter(openvino.Type.f32, openvino.Shape([1]))
    return openvino.Model([openvino.opset13.add(value, value)], [value], "addition")


def settings_for(precision: str, device: str) -> dict[str, Any]:
    """What OpenVINO is told: the precision is pinned, because left alone it chooses bfloat16 by itself."""
    everywhere = {
        "INFERENCE_PRECISION_HINT": HINTS[precision],
        "EXECUTION_MODE_HINT": "ACCURACY" if precision == EXACT else "PERFORMANCE",
        "PERFORMANCE_HINT": "LATENCY",
    }
    if resolved(device) != "CPU":
        return everywhere
    threads = {"NUM_STREAMS": 1, "INFERENCE_NUM_THREADS": physical_cores(), "DYNAMIC_QUANTIZATION_GROUP_SIZE": 0}
    return {**everywhere, **threads}


@functools.cache
def promised(precision: str, device: str) -> dict[str, str]:
    """What OpenVINO makes of the settings, read back from a model of one addition: the part's own come with a call."""
    compiled = core().compile_model(addition(), resolved(device), settings_for(precision, device))
    chosen = {"chosen": resolved(device).lower()} if device == AUTO else {}
    return {**read_back(compiled, device), **chosen}


def read_back(compiled: Any, device: str) -> dict[str, str]:
    """Precision and mode of a compiled model, and the threads of a processor."""
    runs = compiled.get_property("INFERENCE_PRECISION_HINT").to_string()
    mode = str(compiled.get_property("EXECUTION_MODE_HINT")).rsplit(".", 1)[-1].lower()
    found = {"precision": {name: key for key, name in HINTS.items()}.get(runs, runs), "mode": mode}
    if resolved(device) == "CPU":
        found["threads"] = str(compiled.get_property("INFERENCE_NUM_THREADS"))
    return found


def check_sizes(part: str, interface: Interface, device: str) -> None:
    """Raise BackendError where a graph of open sizes would go to a device that takes one size alone."""
    loose = [name for name, axis in interface.axes.items() if axis.minimum != axis.maximum]
    if kind_of(device) in STATIC and loose:
        raise BackendError(
            f"OpenVINO's device {device} takes graphs of one size, but {part} leaves {', '.join(loose)} open; export "
            "it with --static HxW --batch N"
        )
