"""One UNet call by every engine: interleaved, and each arm of each round in a process of its own.

    python -m anamorph.benchmarks.full_size engines FOLDER [--rounds 3] [--calls 3] [--arms eager-float32,...]

An arm is engine-precision. `openvino_static` and `genai` run the sizes of this benchmark only; `genai` is
openvino-genai in the environment that `make interop` builds. Artifacts are kept beside FOLDER.
"""

import json
import platform
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from importlib.metadata import version
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
from numpy.typing import NDArray

from anamorph.backends.cores import physical_cores
from anamorph.benchmarks import interop
from anamorph.checkpoint import Source, component_config, open_checkpoint
from anamorph.components import vae_scale_factor
from anamorph.engine import Target
from anamorph.errors import BackendError
from anamorph.exporting import ExportOptions
from anamorph.noise import SeededNoise
from anamorph.pipelines.loading import read_component
from anamorph.plugins import get_backend, get_exporter

ARMS = (
    "diffusers-float32", "eager-float32", "compile-float32", "onnxruntime-float32", "openvino-float32",
    "openvino_static-float32", "genai-float32", "diffusers-bfloat16", "eager-bfloat16", "compile-bfloat16",
    "openvino-bfloat16", "openvino_static-bfloat16", "genai-bfloat16",
)  # fmt: skip
ARTIFACTS = {"onnxruntime": "onnx", "openvino": "openvino", "openvino_static": "static", "genai": "openvino"}
"""Engine -> ending of the folder that it opens, beside the checkpoint's."""
HINTS = {"float32": "f32", "bfloat16": "bf16"}
TIMESTEP = 500.0
TOKENS = 77
GENAI = Path("build/interop/openvino-genai/bin/python")


def compare(folder: Path, arms: Sequence[str], rounds: int, calls: int) -> dict[str, Any]:
    """Seconds per call of every arm over all rounds, and how far it is from the first arm (relative L2)."""
    places = {arm: prepared(folder, arm.split("-")[0]) for arm in arms}
    runs: dict[str, list[dict[str, Any]]] = {arm: [] for arm in arms}
    with TemporaryDirectory() as place:
        inputs = Path(place)
        shapes = write_inputs(folder, inputs)
        for number in range(rounds):
            for arm in arms:
                runs[arm].append(run(arm, places[arm], inputs, calls))
                print(f"round {number + 1}, {arm}: {min(runs[arm][-1]['calls_s']):.3f} s", file=sys.stderr, flush=True)
        first = np.load(inputs / f"{arms[0]}.npy")
        away = {arm: _distance(np.load(inputs / f"{arm}.npy"), first) for arm in arms}
    packages = ("anamorph", "torch", "diffusers", "onnxruntime", "openvino")
    return {
        "environment": {
            "processor": platform.processor() or platform.machine(),
            "threads": physical_cores(),
            **{name: version(name) for name in packages},
        },
        "shapes": shapes,
        "arms": {arm: {**_summary(runs[arm]), "relative_l2": away[arm]} for arm in arms},
    }


def prepared(folder: Path, engine: str) -> Path:
    """What an engine opens: the checkpoint, or its artifact, exported now if it is not there."""
    if engine not in ARTIFACTS:
        return folder
    ending = ARTIFACTS[engine]
    place = folder.with_name(f"{folder.name}-{ending}")
    if not place.exists():
        size = side(folder) * vae_scale_factor(component_config(folder / "vae"))
        options = ExportOptions(size=(size, size), batch=1) if ending == "static" else ExportOptions()
        form = "onnx" if ending == "onnx" else "openvino"
        print(f"exporting {place}", file=sys.stderr, flush=True)
        get_exporter([form]).export(open_checkpoint(Source(str(folder))), place, options, lambda _: None)
    return place


def side(folder: Path) -> int:
    """Height and width of the latents: those that the model was made for."""
    return int(component_config(folder / "unet")["sample_size"])


def write_inputs(folder: Path, place: Path) -> dict[str, list[int]]:
    """Write a batch of two, as guidance needs, from seeded noise; returns the shapes."""
    config = component_config(folder / "unet")
    shapes = {
        "sample": (config["in_channels"], side(folder), side(folder)),
        "encoder_hidden_states": (TOKENS, config["cross_attention_dim"]),
    }
    noise = SeededNoise((0, 1))
    for name, shape in shapes.items():
        np.save(place / f"{name}.npy", noise.normal(shape))
    return {name: [2, *shape] for name, shape in shapes.items()}


def run(arm: str, place: Path, inputs: Path, calls: int) -> dict[str, Any]:
    """One arm in a fresh process; raises BackendError with its last line where it fails."""
    engine, precision = arm.split("-")
    out = str(inputs / f"{arm}.npy")
    if engine == "genai":
        script = Path(interop.__file__).parent / "genai_static.py"
        command = [str(GENAI), "-I", str(script), str(place), str(inputs), out, HINTS[precision]]
        command += [str(physical_cores()), str(calls)]
    else:
        command = [sys.executable, "-m", __name__, arm, str(place), str(inputs), out, str(calls)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise BackendError(f"{arm} failed: {(done.stderr.strip().splitlines() or ['without a word'])[-1]}")
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return result


def opened(arm: str, place: Path, inputs: Path) -> Callable[[], NDArray[Any]]:
    """A call of the UNet in this process."""
    engine, precision = arm.split("-")
    arrays = {name: np.load(inputs / f"{name}.npy") for name in ("sample", "encoder_hidden_states")}
    if engine == "diffusers":
        return _diffusers(place, precision, arrays)
    component = read_component(open_checkpoint(Source(str(place))), "unet", ("UNet2DConditionModel",))
    backend = get_backend(engine.removesuffix("_static"))
    program = backend.open(component, ["unet"], Target("cpu", precision))["unet"]
    session, kind = program.session(), program.arrays
    arrays["timestep"] = np.array(TIMESTEP, np.float32)
    given = {name: kind.put(value) for name, value in arrays.items()}
    return lambda: kind.get(session(given)["out_sample"])


def _diffusers(place: Path, precision: str, arrays: dict[str, NDArray[Any]]) -> Callable[[], NDArray[Any]]:
    import diffusers
    import torch

    dtype = getattr(torch, precision)
    model = diffusers.UNet2DConditionModel.from_pretrained(place / "unet", torch_dtype=dtype)
    given = {name: torch.from_numpy(value).to(dtype) for name, value in arrays.items()}

    def call() -> NDArray[Any]:
        with torch.inference_mode():
            prediction: NDArray[Any] = model(**given, timestep=torch.tensor(TIMESTEP)).sample.float().numpy()
        return prediction

    return call


def _distance(value: NDArray[Any], reference: NDArray[Any]) -> float:
    return float(np.linalg.norm(value - reference) / np.linalg.norm(reference))


def _summary(runs: Sequence[dict[str, Any]]) -> dict[str, Any]:
    calls = [seconds for run in runs for seconds in run["calls_s"]]
    return {
        "load_s": [round(run["load_s"], 3) for run in runs],
        "first_call_s": [round(run["first_call_s"], 3) for run in runs],
        "calls_s": [[round(seconds, 4) for seconds in run["calls_s"]] for run in runs],
        "min_s": round(min(calls), 4),
        "median_s": round(statistics.median(calls), 4),
        "peak_gib": round(max(run["peak_gib"] for run in runs), 2),
    }


def main(arm: str, place: str, inputs: str, out: str, calls: str) -> None:
    """One arm: print its seconds, keep its prediction."""
    started = time.perf_counter()
    call = opened(arm, Path(place), Path(inputs))
    load = time.perf_counter() - started
    times = []
    for _ in range(1 + int(calls)):
        started = time.perf_counter()
        prediction = call()
        times.append(time.perf_counter() - started)
    np.save(out, prediction)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    print(json.dumps({"load_s": load, "first_call_s": times[0], "calls_s": times[1:], "peak_gib": peak}))


if __name__ == "__main__":
    main(*sys.argv[1:])
