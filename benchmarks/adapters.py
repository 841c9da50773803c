"""What adapters cost on each engine: to switch, per call, to fuse, on disk and in memory.

    python -m anamorph.benchmarks.adapters [--model FOLDER] [--engines NAME ...] [--rank 16] [--size 512] [--out FILE]

Adapters of all attention and feed-forward layers of the denoiser, with random factors. Each engine runs in a process of
its own, one call of the denoiser with both branches of guidance at a time.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from anamorph.benchmarks.environment import environment
from anamorph.cache import cache_folder
from anamorph.checkpoint import BUNDLED
from anamorph.files import replacing
from anamorph.lora.adapting import layers_of
from anamorph.lora.factors import Layers
from anamorph.pipelines import LatentDiffusion
from anamorph.pipelines.base import DiffusionPipeline

CHANGED = ("attn1.to_", "attn2.to_", "ff.net.")
"""Parts of the names of attention and feed-forward layers."""
MANY = 10
CALLS = 3
TIMESTEP = 500.0
HEAD = """# What LoRA costs

{model} on {processor}, {cores} cores, float32, rank {rank} in all attention and feed-forward layers of the denoiser,
{size}x{size} pixels: to switch from one adapter to another; a call of the denoiser with both branches of guidance
without an adapter, and how much longer one with an adapter takes, hot and fused (medians of three calls; those without
one before and after all others); to fuse until the first call has ended; memory of the process's own pages without an
adapter and with 1, 2 and 10; files of an adapter, and of the compiled graph that all adapters share.

"""


def synthetic(layers: Layers, rank: int, seed: int = 0, size: float = 0.02) -> dict[str, NDArray[np.float32]]:
    """Factors by name for all attention and feed-forward layers; with a `size` of 0 they change nothing."""
    random = np.random.default_rng(seed)
    tensors = {}
    for layer, (out, taken, *_) in layers.items():
        if any(part in layer for part in CHANGED):
            tensors[f"{layer}.lora_A.weight"] = random.standard_normal((rank, taken), np.float32) / taken**0.5
            tensors[f"{layer}.lora_B.weight"] = size * random.standard_normal((out, rank), np.float32)
    return tensors


def denoiser_layers(pipe: DiffusionPipeline) -> Layers:
    """The layers of a pipeline's denoiser that can be changed."""
    return layers_of(pipe._models[pipe.DENOISER].programs)


class Measured:
    """One engine's pipeline and what was measured with it."""

    def __init__(self, pipe: LatentDiffusion, side: int) -> None:
        self.pipe, self.side = pipe, side
        self.found: dict[str, Any] = {}
        self.sample: Any = None
        self.predict: Any = None

    def seconds(self, name: str, work: Callable[[], Any]) -> None:
        """Do something once."""
        started = time.perf_counter()
        work()
        self.found[f"{name}_s"] = time.perf_counter() - started

    def calls(self, name: str) -> None:
        """Call the denoiser, first once with all that goes before; the median of the further calls counts."""
        self.seconds(f"{name}_first_call", self._prepare)
        times = []
        for _ in range(CALLS):
            self.seconds("call", self._predict)
            times.append(self.found.pop("call_s"))
        self.found |= {f"{name}_call_s": statistics.median(times), f"{name}_calls_s": times}
        self.found[f"{name}_memory_bytes"] = resident()

    def _prepare(self) -> None:
        job = self.pipe.job("red apple", height=self.side, width=self.side, guidance_scale=5.0, seed=0)
        plan, denoiser = self.pipe.plan(job), self.pipe.denoiser()
        branches = 2 if denoiser.shares else 1
        self.sample = denoiser.arrays.concat([plan.latents] * (2 // branches))
        self.predict = denoiser.prepare([TIMESTEP], plan.conditions, branches)
        self._predict()

    def _predict(self) -> None:
        self.predict(0, self.sample)


def resident() -> int:
    """Bytes of this process that are in memory and its own: pages of mapped files can be given back."""
    text = Path("/proc/self/status").read_text(encoding="utf-8")
    return 1024 * next(int(line.split()[1]) for line in text.splitlines() if line.startswith("RssAnon"))


def measure(engine: str, model: str, rank: int, side: int, place: Path) -> dict[str, Any]:
    """All figures of one engine, in this process."""
    started = time.perf_counter()
    pipe = DiffusionPipeline.from_pretrained(model, backend=engine, torch_dtype="float32")
    assert isinstance(pipe, LatentDiffusion)
    one = Measured(pipe, side)
    one.found["load_s"] = time.perf_counter() - started
    one.calls("plain")
    layers = denoiser_layers(pipe)
    files = []
    for index in range(MANY):
        pipe.save_lora_weights(place, synthetic(layers, rank, index), weight_name=f"{index}.safetensors")
        files.append(place / f"{index}.safetensors")
    one.found["adapter_bytes"] = files[0].stat().st_size
    cache = size_of(cache_folder())
    one.seconds("hot_load", lambda: pipe.load_lora_weights(files[0], "0"))
    one.calls("hot")
    one.found["hot_cache_bytes"] = size_of(cache_folder()) - cache
    pipe.load_lora_weights(files[1], "1")
    one.seconds("switch", lambda: _chosen(pipe, ["0"]))
    one.seconds("switch_to_two", lambda: _chosen(pipe, ["0", "1"]))
    one.calls("hot_two")
    for index in range(2, MANY):
        pipe.load_lora_weights(files[index], str(index))
    one.seconds("switch_among_ten", lambda: _chosen(pipe, ["5"]))
    one.calls("hot_one_of_ten")
    pipe.fuse_lora()
    pipe.unload_lora_weights()
    one.seconds("fuse", pipe.denoiser)
    one.calls("fused")
    pipe.unfuse_lora()
    one.seconds("unfuse", pipe.denoiser)
    one.calls("plain_again")
    return one.found


def _chosen(pipe: LatentDiffusion, names: list[str]) -> None:
    """Let these adapters count, and have their factors ready for the next call."""
    pipe.set_adapters(names, [1 / len(names)] * len(names))
    pipe.denoiser()


def size_of(folder: Path) -> int:
    """Bytes of all files below."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file()) if folder.is_dir() else 0


def table(results: Mapping[str, Mapping[str, Any]]) -> str:
    """The figures as Markdown."""
    rows = ["| engine | switch, s | plain call, s | hot | fused | fuse, first call, s | GB: plain, 1, 2, 10 "
            "| MB on disk: each, cache |", "|---|---|---|---|---|---|---|---|"]  # fmt: skip
    for engine, one in results.items():
        plain = statistics.median([*one["plain_calls_s"], *one["plain_again_calls_s"]])  # machines change meanwhile
        memory = ", ".join(f"{one[f'{name}_memory_bytes'] / 1e9:.2f}"
                           for name in ("plain", "hot", "hot_two", "hot_one_of_ten"))  # fmt: skip
        rows.append(
            f"| {engine} | {one['switch_s']:.3f} | {plain:.2f} | {one['hot_call_s'] / plain - 1:+.1%} | "
            f"{one['fused_call_s'] / plain - 1:+.1%} | {one['fuse_s'] + one['fused_first_call_s']:.1f} | {memory} | "
            f"{one['adapter_bytes'] / 1e6:.0f}, {one['hot_cache_bytes'] / 1e6:.0f} |"
        )
    return "\n".join(rows)


def page(whole: Mapping[str, Any]) -> str:
    """The table with what it says."""
    about = {name: whole["environment"][name] for name in ("processor", "cores")}
    return HEAD.format(**about, **whole) + table(whole["engines"]) + "\n"


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure every engine in a process of its own, and print the figures."""
    parser = argparse.ArgumentParser(description="What adapters cost on each engine.")
    parser.add_argument("--model", default=str(BUNDLED), help="checkpoint folder (default: the bundled model)")
    parser.add_argument("--engines", nargs="+", default=["eager", "onnxruntime", "openvino"])
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--size", type=int, default=512, help="pixels of a side (default: %(default)s)")
    parser.add_argument("--out", help="JSON file to write, and the table beside it as Markdown")
    parser.add_argument("--alone", help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.alone:
        with tempfile.TemporaryDirectory(prefix="anamorph-") as place:
            print(json.dumps(measure(options.alone, options.model, options.rank, options.size, Path(place))))
        return 0
    own = [sys.executable, "-P", "-m", "anamorph.benchmarks.adapters", "--model", options.model]
    results = {}
    for engine in options.engines:
        command = [*own, "--rank", str(options.rank), "--size", str(options.size), "--alone", engine]
        ran = subprocess.run(command, capture_output=True, text=True, check=False)
        if ran.returncode:
            print(f"{engine}: {ran.stderr.strip().splitlines()[-1]}", file=sys.stderr)
            return 1
        results[engine] = json.loads(ran.stdout.splitlines()[-1])
    print(table(results))
    if options.out:
        whole = {"model": Path(options.model).name, "rank": options.rank, "size": options.size,
                 "environment": environment(), "engines": results}  # fmt: skip
        with replacing(Path(options.out)) as draft:
            draft.write_text(json.dumps(whole, indent=1) + "\n", encoding="utf-8")
        with replacing(Path(options.out).with_suffix(".md")) as draft:
            draft.write_text(page(whole), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
