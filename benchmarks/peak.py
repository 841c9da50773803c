"""How fast this machine multiplies matrices: the highest rate that any library here reaches, by precision.

    python -P -m anamorph.benchmarks.peak

prints {"peak": {"float32": {"gflops": 390.0, "by": "openvino"}, ...}, "torch_build": [...]}: the ceiling that rooflines
are drawn to, and the kernels that PyTorch was built with.
"""

import importlib.util
import json
import re
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

SIDE = 2048
SECONDS = 1.0
"""How long each library tries."""


def rate(multiply: Callable[[], Any]) -> float:
    """GFLOP/s of the fastest product."""
    multiply()
    best, ends = float("inf"), time.perf_counter() + SECONDS
    while time.perf_counter() < ends:
        started = time.perf_counter()
        multiply()
        best = min(best, time.perf_counter() - started)
    return 2 * SIDE**3 / best / 1e9


def rates() -> Iterator[tuple[str, str, float]]:
    """Precision, library and GFLOP/s."""
    left, right = np.random.default_rng(0).standard_normal((2, SIDE, SIDE)).astype(np.float32)
    yield "float32", "numpy", rate(lambda: left @ right)
    if importlib.util.find_spec("openvino"):
        yield from _openvino(left, right)
    if importlib.util.find_spec("torch"):
        yield from _torch(left, right)


def _torch(left: Any, right: Any) -> Iterator[tuple[str, str, float]]:
    import torch

    device = "cuda" if torch.cuda.is_available() else "cpu"
    precisions = ("float32", "bfloat16", "float16") if device == "cuda" else ("float32", "bfloat16")
    for precision in precisions:
        a, b = (torch.from_numpy(x).to(device, getattr(torch, precision)) for x in (left, right))

        def multiply(a: Any = a, b: Any = b) -> None:
            torch.mm(a, b)
            if device == "cuda":
                torch.cuda.synchronize()

        yield precision, "torch", rate(multiply)


def _openvino(left: Any, right: Any) -> Iterator[tuple[str, str, float]]:
    import openvino
    from openvino import opset13 as ops

    given = ops.parameter([SIDE, SIDE], np.float32)
    model = openvino.Model([ops.matmul(given, ops.constant(right), False, False)], [given])
    core = openvino.Core()
    capable = "BF16" in core.get_property("CPU", "OPTIMIZATION_CAPABILITIES")
    for precision, hint in (("float32", "f32"), *([("bfloat16", "bf16")] if capable else [])):
        request = core.compile_model(model, "CPU", {"INFERENCE_PRECISION_HINT": hint}).create_infer_request()
        yield precision, "openvino", rate(lambda request=request: request.infer([left], share_inputs=True))  # type: ignore[misc]


def main() -> None:
    """Print the highest of each precision."""
    best: dict[str, dict[str, Any]] = {}
    for precision, library, found in rates():
        if found > best.get(precision, {"gflops": 0.0})["gflops"]:
            best[precision] = {"gflops": round(found, 1), "by": library}
    print(json.dumps({"peak": best, "torch_build": build()}))


def build() -> list[str]:
    """What PyTorch was built with, for products and convolutions; nothing where it is not imported."""
    torch = sys.modules.get("torch")
    said = "" if torch is None else str(torch.__config__.show())
    kernels = re.findall(
        r"(?:MKL-DNN|oneDNN) v[\d.]+|Math Kernel Library Version [\d.]+|CPU capability usage: \w+", said
    )
    return [*kernels, *re.findall(r"BLAS_INFO=\w+|LAPACK_INFO=\w+|CUDA Runtime [\d.]+|CuDNN [\d.]+", said)]


if __name__ == "__main__":
    main()
