"""Execution providers of ONNX Runtime: which is asked, with what, and which really ran; the processor is real."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnxruntime
import pytest
from exported import exported

from anamorph import StableDiffusionPipeline
from anamorph.backends import onnx_models, onnx_providers
from anamorph.backends import onnxruntime as adapter
from anamorph.backends.onnx_providers import HOST, PROVIDERS, RECORD, Choice
from anamorph.engine import Target
from anamorph.errors import BackendError, InputError
from anamorph.guard import places_here
from anamorph.interface import Axis, Interface, Port

NAMES = {
    "cpu": "CPUExecutionProvider", "cuda": "CUDAExecutionProvider", "tensorrt": "TensorrtExecutionProvider",
    "coreml": "CoreMLExecutionProvider", "directml": "DmlExecutionProvider", "rocm": "ROCMExecutionProvider",
    "migraphx": "MIGraphXExecutionProvider", "openvino": "OpenVINOExecutionProvider", "qnn": "QNNExecutionProvider",
}  # fmt: skip


def test_names_are_those_of_onnx_runtime() -> None:
    assert {name: one.name for name, one in PROVIDERS.items()} == NAMES
    gone = {"ROCMExecutionProvider"}  # builds since 1.23 have MIGraphX in its place
    assert set(NAMES.values()) - gone <= set(onnxruntime.get_all_providers())


@dataclass
class Fake:
    """A session of which an accelerator runs all operators but `left`."""

    provider: str
    left: Sequence[str] = ()
    dropped: bool = False
    bound: list[Any] = field(default_factory=list)

    def get_providers(self) -> list[str]:
        return [HOST] if self.dropped else [self.provider, HOST]

    def get_provider_graph_assignment_info(self) -> list[Any]:
        def graph(name: str, kinds: Sequence[str]) -> Any:
            return SimpleNamespace(ep_name=name, get_nodes=lambda: [SimpleNamespace(op_type=kind) for kind in kinds])

        return [graph(self.provider, ["Conv", "Conv", "MatMul"]), graph(HOST, self.left)]


@pytest.mark.parametrize("device", [name for name in PROVIDERS if name != "cpu"])
def test_partial_fallback_is_refused_unless_it_is_allowed(device: str) -> None:
    strict, loose = Choice.of(Target(device)), Choice.of(Target(device, options=(("strict", "no"),)))
    name = NAMES[device]
    assert strict.assigned(Fake(name)) == {"operators": f"3 by {name}"}
    assert strict.assigned(Fake(name, ["Shape", "Gather"])) == {"operators": f"3 by {name}, 2 by {HOST}"}
    with pytest.raises(BackendError, match=rf"{name} leaves 1 Einsum, 2 Resize to the processor; pass .* strict=no"):
        strict.assigned(Fake(name, ["Shape", "Resize", "Einsum", "Resize"]))
    with pytest.raises(
        BackendError, match=r"1 MultiHeadAttention to .* leave the rewrite fused-attention out, or take"
    ):
        strict.assigned(Fake(name, ["MultiHeadAttention"]))
    assert loose.assigned(Fake(name, ["Resize"])) == {"operators": f"3 by {name}, 1 by {HOST}"}
    for choice in (strict, loose):
        with pytest.raises(BackendError, match=f"ONNX Runtime has dropped {name}"):
            choice.assigned(Fake(name, dropped=True))


def test_options_reach_the_provider_and_nothing_else() -> None:
    choice = Choice.of(Target("tensorrt", options=(("provider.trt_fp16_enable", "1"), ("strict", "no"))))
    assert choice.listed() == [("TensorrtExecutionProvider", {"trt_fp16_enable": "1"}), (HOST, {})]
    assert Choice.of(Target()).listed() == [(HOST, {})]
    with pytest.raises(BackendError, match="strict of onnxruntime is 'maybe', expected yes or no"):
        Choice.of(Target(options=(("strict", "maybe"),)))


def test_a_provider_of_one_size_refuses_open_ones() -> None:
    open_one = Interface("unet", (Port("sample", (Axis("batch"), 4)),), ())
    fixed = Interface("unet", (Port("sample", (Axis("batch", 1, 2, 2), 4)),), ())
    with pytest.raises(BackendError, match=r"qnn takes graphs of one size, but unet leaves batch open; .*--static"):
        Choice.of(Target("qnn")).check_sizes("unet", open_one)
    Choice.of(Target("qnn")).check_sizes("unet", fixed)
    Choice.of(Target("cuda")).check_sizes("unet", open_one)


def test_inputs_and_outputs_are_bound_to_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[Any] = []

    class Binding:
        def bind_ortvalue_input(self, name: str, value: Any) -> None:
            told.append(("in", name, value))

        def bind_output(self, name: str, kind: str, number: int) -> None:
            told.append(("out", name, kind, number))

        def copy_outputs_to_cpu(self) -> list[Any]:
            return [np.ones(3)]

    session = SimpleNamespace(io_binding=Binding, run_with_iobinding=lambda _: told.append("ran"))
    fake = SimpleNamespace(OrtValue=SimpleNamespace(ortvalue_from_numpy=lambda value, *where: (value, *where)))
    monkeypatch.setattr(onnx_providers, "imported", lambda *_: fake)
    choice = Choice.of(Target("cuda", options=(("provider.device_id", "1"),)))
    (found,) = choice.run(session, ["y"], {"x": 5})
    assert found.sum() == 3
    assert told == [("in", "x", (5, "cuda", 1)), ("out", "y", "cuda", 1), "ran"]
    host = SimpleNamespace(run=lambda names, values: [names, values])
    assert Choice.of(Target()).run(host, ["y"], {"x": 5}) == [["y"], {"x": 5}]


def test_only_providers_of_this_build_are_devices(monkeypatch: pytest.MonkeyPatch) -> None:
    assert "cpu" in onnx_providers.available()
    fake = SimpleNamespace(get_available_providers=lambda: ["AzureExecutionProvider", "CUDAExecutionProvider", HOST])
    monkeypatch.setattr(onnx_providers, "imported", lambda *_: fake)
    assert places_here(adapter.OnnxRuntime()) == {"cpu": ("float32",), "cuda": ("float32",)}


def test_what_runs_each_operator_is_read_back_from_the_real_processor(sd2: Path) -> None:
    """An arena option makes it a provider with options, whose operators are counted."""
    folder, call = exported(sd2, "onnxruntime"), {"num_inference_steps": 1, "seed": 0, "height": 16, "width": 16}
    told = {"provider.arena_extend_strategy": "kSameAsRequested"}
    pipe = StableDiffusionPipeline.from_pretrained(folder, backend="onnxruntime", backend_options=told)
    details = pipe.placement["unet"].details
    assert details["operators"].endswith(f" by {HOST}")
    assert int(details["operators"].split()[0]) > 50
    plain = StableDiffusionPipeline.from_pretrained(folder, backend="onnxruntime")
    assert "operators" not in plain.placement["unet"].details
    drawn = [np.asarray(one("a cat", output_type="np", **call).images) for one in (pipe, plain)]
    assert np.abs(drawn[0] - drawn[1]).max() <= 1e-5
    options = onnx_models._options()
    options.add_session_config_entry(RECORD, "1")
    session = onnxruntime.InferenceSession(str(folder / "unet" / "model.onnx"), options, providers=[HOST])
    elsewhere = Choice.of(Target("cuda"))
    session.get_providers = lambda: [elsewhere.provider.name]  # as if it had stayed, and run nothing
    with pytest.raises(BackendError, match=r"CUDAExecutionProvider leaves .*\d+ Conv"):
        elsewhere.assigned(session)


def test_unknown_options_and_absent_providers_are_refused(sd2: Path) -> None:
    folder = exported(sd2, "onnxruntime")
    with pytest.raises(BackendError, match=r"has no option colour; it has strict, own_sizes, provider\.\*"):
        StableDiffusionPipeline.from_pretrained(folder, backend_options={"colour": "red"})
    with pytest.raises(BackendError, match="has no device 'tensorrt' on this machine"):
        StableDiffusionPipeline.from_pretrained(folder, device="tensorrt")
    with pytest.raises(InputError, match="backend_options names nothing"):
        StableDiffusionPipeline.from_pretrained(folder, backend_options={"nothing": {"strict": "no"}})
