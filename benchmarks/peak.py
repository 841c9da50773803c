"""How fast this machine multiplies matrices and takes softmax: the highest rates of any library here, by precision.

    python -P -m anamorph.benchmarks.peak

prints {"peak": {"float32": {"gflops": 390.0, "by": "openvino", "softmax": 3.1, "softmax_by": "torch"}, ...},
"torch_build": [...]}: the ceiling that rooflines are drawn to, how many 10^9 scores a second become probabilities, and
the kernels that PyTorch was built with.
"""

import importlib.util
import json
import re
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import numpy as np

SIDE = 2048
PRODUCT = 2 * SIDE**3
"""Operations of a product of two matrices of this side."""
SCORES = (128, 4096)
"""Rows of scores that stay near the cores, as attention takes them."""
SECONDS = 1.0
"""How long each library tries."""
Found = tuple[str, str, str, float]
"""Precision, kind (gflops, softmax), library and 10^9 a second."""


def rate(work: Callable[[], Any], count: int) -> float:
    """10^9 of what the work counts, a second, when it was fastest."""
    work()
    best, ends = float("inf"), time.perf_counter() + SECONDS
    while time.perf_counter() < ends:
        started = time.perf_counter()
        work()
        best = min(best, time.perf_counter() - started)
    return count / best / 1e9


def rates() -> Iterator[Found]:
    """What each library here reaches."""
    random = np.random.default_rng(0)
    left, right = random.standard_normal((2, SIDE, SIDE)).astype(np.float32)
    scores = random.standard_normal(SCORES).astype(np.float32)
    yield "float32", "gflops", "numpy", rate(lambda: left @ right, PRODUCT)
    if importlib.util.find_spec("openvino"):
        yield from _openvino(left, right, scores)
    if importlib.util.find_spec("torch"):
        yield from _torch(left, right, scores)


def _torch(*given: Any) -> Iterator[Found]:
    import torch

    device = "cuda" if torch.cuda.is_available() else "cpu"
    precisions = ("float32", "bfloat16", "float16") if device == "cuda" else ("float32", "bfloat16")

    def done(work: Callable[[Any, Any], Any], *given: Any) -> None:
        work(*given)
        if device == "cuda":
            torch.cuda.synchronize()

    for precision in precisions:
        left, right, scores = (torch.from_numpy(x).to(device, getattr(torch, precision)) for x in given)
        yield precision, "gflops", "torch", rate(partial(done, torch.mm, left, right), PRODUCT)
        yield precision, "softmax", "torch", rate(partial(done, torch.softmax, scores, -1), scores.numel())


def _openvino(left: Any, right: Any, scores: Any) -> Iterator[Found]:
    import openvino
    from openvino import opset13 as ops

    first, second = (ops.parameter(list(x.shape), np.float32) for x in (left, scores))
    product = openvino.Model([ops.matmul(first, ops.constant(right), False, False)], [first])
    softmax = openvino.Model([ops.softmax(second, 1)], [second])
    core = openvino.Core()
    capable = "BF16" in core.get_property("CPU", "OPTIMIZATION_CAPABILITIES")
    for precision, hint in (("float32", "f32"), *([("bfloat16", "bf16")] if capable else [])):
        for kind, model, given, count in (
            ("gflops", product, left, PRODUCT),
            ("softmax", softmax, scores, scores.size),
        ):
            request = core.compile_model(model, "CPU", {"INFERENCE_PRECISION_HINT": hint}).create_infer_request()
            yield precision, kind, "openvino", rate(partial(request.infer, [given], share_inputs=True), count)


def main() -> None:
    """Print the highest of each precision."""
    best: dict[str, dict[str, Any]] = {}
    for precision, kind, library, found in rates():
        known, by = best.setdefault(precision, {}), "by" if kind == "gflops" else f"{kind}_by"
        if found > known.get(kind, 0.0):
            known[kind], known[by] = round(found, 3), library
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
