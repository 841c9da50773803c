"""The schedulers beside diffusers': order of convergence, size and complexity of the code, overhead per step.

python -m anamorph.benchmarks.schedulers order      measured order beside the theoretical one
python -m anamorph.benchmarks.schedulers size       lines and complexity (needs ruff)
python -m anamorph.benchmarks.schedulers overhead   microseconds per step on a 4x64x64 latent, interleaved
"""

import argparse
import ast
import importlib.util
import json
import math
import re
import statistics
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

import anamorph.schedulers
from anamorph.schedulers import SCHEDULERS, Row, Scheduler, advance

SD = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
LATENT = {**SD, "clip_sample": False}
"""Latents have no bounds to be clipped to."""
MEAN, WIDTH = 0.7, 0.5
"""The data: a normal distribution, for which the best denoiser and the exact flow are known."""
SMOOTH = {**SD, "use_exponential_sigmas": True}
DPM = {**SMOOTH, "final_sigmas_type": "sigma_min", "lower_order_final": False}

ORDERS: list[tuple[str, dict[str, Any], float]] = [
    ("DDIMScheduler", {**SD, "clip_sample": False}, 1),
    ("EulerDiscreteScheduler", SMOOTH, 1),
    ("HeunDiscreteScheduler", SMOOTH, 2),
    ("KDPM2DiscreteScheduler", SMOOTH, 2),
    ("LMSDiscreteScheduler", SMOOTH, 4),
    ("DPMSolverMultistepScheduler", {**DPM, "solver_order": 1}, 1),
    ("DPMSolverMultistepScheduler", {**DPM, "solver_order": 2}, 2),
    ("DPMSolverMultistepScheduler", {**DPM, "solver_order": 3}, 2),  # it takes half of D'', as its authors' code does
    ("DPMSolverMultistepScheduler", {**DPM, "algorithm_type": "dpmsolver"}, 2),
    ("DPMSolverSinglestepScheduler", {**DPM, "solver_order": 2}, 2),
    ("DPMSolverSinglestepScheduler", {**DPM, "solver_order": 3}, 3),
    ("DEISMultistepScheduler", {**SMOOTH, "lower_order_final": False, "solver_order": 2}, 2),
    ("DEISMultistepScheduler", {**SMOOTH, "lower_order_final": False, "solver_order": 3}, 3),
    ("UniPCMultistepScheduler", {**SMOOTH, "final_sigmas_type": "sigma_min", "solver_order": 2}, 3),
    ("UniPCMultistepScheduler", {**SMOOTH, "final_sigmas_type": "sigma_min", "solver_order": 3}, 4),
    ("UniPCMultistepScheduler", {**SMOOTH, "final_sigmas_type": "sigma_min", "predict_x0": False}, 3),
    ("SASolverScheduler", {**SMOOTH, "tau_func": lambda _: 0.0}, 2),
    ("EDMEulerScheduler", {}, 1),
    ("EDMDPMSolverMultistepScheduler", {"final_sigmas_type": "sigma_min"}, 2),
    ("FlowMatchEulerDiscreteScheduler", {"shift": 3.0}, 1),
    ("FlowMatchHeunDiscreteScheduler", {"shift": 3.0}, 2),
]
"""Class, configuration, and the order of the solver once its history is full (with its corrector, one more)."""

CRAMPED: list[tuple[str, dict[str, Any], float]] = [
    ("PNDMScheduler", SD, 4),
    ("PNDMScheduler", {**SD, "skip_prk_steps": True}, 4),
    ("IPNDMScheduler", {}, 4),
]
"""Solvers bound to equidistant timesteps: near the clean end the levels change too fast for their order to show.

IPNDM starts with a step of order 1 besides, where there is no signal at all.
"""


def exact(x: NDArray[Any], row: Row, alpha: float, sigma: float) -> NDArray[Any]:
    """The probability flow from a row's level: x keeps its place in standard deviations of the marginal."""
    spread = np.hypot(alpha * WIDTH, sigma) / np.hypot(row.alpha * WIDTH, row.sigma)
    return np.asarray(alpha * MEAN + spread * (x - row.alpha * MEAN))


def output(x: NDArray[Any], row: Row) -> NDArray[Any]:
    """What a perfect network would return: the `out` for which the row's clean estimate is E[x_0 | x]."""
    p, q = (row.p, row.q) if row.clean is None else row.clean
    clean = (WIDTH**2 * row.alpha * x + row.sigma**2 * MEAN) / (row.alpha**2 * WIDTH**2 + row.sigma**2)
    return np.asarray((clean - p * x) / q)


def flow_error(scheduler: Scheduler, steps: int) -> float:
    """Largest error at the level of the last call, relative to the spread of the data."""
    table = scheduler.table(steps)
    first, last = table.rows[0], table.rows[-1]
    start = x = first.alpha * MEAN + np.linspace(-2, 2, 9) * np.hypot(first.alpha * WIDTH, first.sigma)
    history: tuple[Any, ...] = ()
    for n, row in enumerate(table.rows[:-1]):
        out = output(x, row)
        x, history = advance(table, n, x, out, history, None if not row.draws else np.zeros_like(x))
    if last.fix:  # the corrector of the last step belongs to it
        estimate = last.p * x + last.q * output(x, last)
        x = sum(weight * value for weight, value in zip(last.fix, (x, estimate, *history), strict=True) if weight)
    return float(np.abs(x - exact(start, first, last.alpha, last.sigma)).max() / WIDTH)


def measured(name: str, config: dict[str, Any], steps: int = 50) -> tuple[float, float, float]:
    """The order between `steps` and twice as many, and both errors."""
    scheduler = SCHEDULERS[name](**config)
    coarse, fine = flow_error(scheduler, steps), flow_error(scheduler, 2 * steps)
    return math.log2(coarse / fine), coarse, fine


SHOWN = ("solver_order", "skip_prk_steps", "shift", "algorithm_type", "predict_x0")


def show_order() -> None:
    """Print the table."""
    print(f"{'scheduler':<36} {'options':<44} {'theory':>6} {'order':>6} {'error, 50':>10} {'100 steps':>10}")
    for name, config, theory in ORDERS + CRAMPED:
        order, coarse, fine = measured(name, config)
        shown = ", ".join(f"{k}={v}" for k, v in config.items() if k in SHOWN)
        print(f"{name:<36} {shown:<44} {theory:>6g} {order:>6.2f} {coarse:>10.1e} {fine:>10.1e}")


def code_lines(path: Path) -> int:
    """Lines that hold code: no blank ones, no comments, no docstrings."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    lines: set[int] = set()
    for node in ast.walk(tree):
        text = isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str)
        if isinstance(node, ast.stmt) and not text:
            parts = (getattr(node, name, []) for name in ("body", "orelse", "finalbody", "handlers"))
            end = min((child.lineno for part in parts for child in part), default=(node.end_lineno or node.lineno) + 1)
            lines |= set(range(node.lineno, max(end, node.lineno + 1)))
    source = path.read_text(encoding="utf-8").splitlines()
    return sum(bool(source[n - 1].strip()) and not source[n - 1].strip().startswith("#") for n in lines)


def complexity(paths: Sequence[Path]) -> list[int]:
    """McCabe's number of every function, by ruff."""
    command = ["ruff", "check", "--isolated", "--select", "C901", "--config", "lint.mccabe.max-complexity=0",
               "--output-format", "json", *map(str, paths)]  # fmt: skip
    found = subprocess.run([sys.executable, "-m", *command], capture_output=True, text=True, check=False)
    return [int(re.findall(r"\((\d+) > ", item["message"])[0]) for item in json.loads(found.stdout)]


def show_size() -> None:
    """Print lines and complexity of both sides, for the same classes."""
    ours = sorted(Path(anamorph.schedulers.__file__).parent.glob("*.py"))
    theirs = []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import diffusers

        for name in SCHEDULERS:
            spec = importlib.util.find_spec(getattr(diffusers, name).__module__)
            assert spec is not None
            assert spec.origin is not None
            theirs.append(Path(spec.origin))
    theirs = sorted(set(theirs) | {theirs[0].with_name("scheduling_utils.py")})
    for label, paths in (("anamorph", ours), ("diffusers", theirs)):
        numbers = complexity(paths)
        total = sum(len(path.read_text(encoding="utf-8").splitlines()) for path in paths)
        print(
            f"{label:<10} {len(paths):>3} files  {total:>6} lines  {sum(map(code_lines, paths)):>6} of code  "
            f"complexity: {sum(numbers)} in all, {statistics.mean(numbers):.1f} per function, {max(numbers)} at most"
        )


Arm = Callable[[], Callable[[], int]]
"""Prepares a run and returns its loop, which returns how often it stepped."""


def _once(prepare: Arm) -> tuple[float, float]:
    """Microseconds of processor time per step: of the loop, and of its preparation."""
    started = time.process_time()  # other processes do not count; one thread and the CPU do all the work here
    loop = prepare()
    ready = time.process_time()
    steps = loop()
    return (time.process_time() - ready) / steps * 1e6, (ready - started) / steps * 1e6


def _table_arm(scheduler: Scheduler, steps: int, x: Any, out: Any) -> Arm:
    """As a pipeline runs it."""
    import torch

    def prepare() -> Callable[[], int]:
        table = scheduler.table(steps)

        def loop() -> int:
            sample, history = x, ()
            for n, row in enumerate(table.rows):
                _ = sample if row.scale == 1.0 else row.scale * sample
                noise = torch.randn(x.shape) if row.draws else None
                sample, history = advance(table, n, sample, out, history, noise)
            return len(table)

        return loop

    return prepare


def _face_arm(scheduler: Any, steps: int, x: Any, out: Any) -> Arm:
    """The loop of diffusers' documentation."""

    def prepare() -> Callable[[], int]:
        scheduler.set_timesteps(steps)

        def loop() -> int:
            sample = x
            for t in scheduler.timesteps:
                if hasattr(scheduler, "scale_model_input"):
                    scheduler.scale_model_input(sample, t)
                sample = scheduler.step(out, t, sample).prev_sample
            return len(scheduler.timesteps)

        return loop

    return prepare


def show_overhead(names: Sequence[str], rounds: int) -> None:
    """Print microseconds of processor time per step: our table, our face, diffusers; the arms take turns."""
    import diffusers
    import torch

    torch.set_num_threads(1)
    steps, shape = 20, (1, 4, 64, 64)
    x, out, noise = torch.randn(shape), torch.randn(shape), torch.randn(shape)
    torch.randn = lambda *_, **__: noise  # both sides draw the same numbers, which takes longer than all the rest
    print(f"Microseconds per step, minimum/median of {rounds} rounds; ratios of minima (medians) to diffusers'")
    print(f"{'scheduler':<36} {'table':>13} {'face':>13} {'diffusers':>13} {'table ratio':>13} {'face ratio':>13}   "
          f"{'preparation':>11}")  # fmt: skip
    for name in names:
        config = {key: value for key, value in LATENT.items() if key in SCHEDULERS[name].DEFAULTS}
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            reference = getattr(diffusers, name)(**config)
            ours = SCHEDULERS[name](**config)
            arms = [_table_arm(ours, steps, x, out), _face_arm(ours, steps, x, out),
                    _face_arm(reference, steps, x, out)]  # fmt: skip
            turns = [[_once(arm) for arm in arms] for _ in range(rounds + 1)][1:]  # the first turn warms up
        times = [[turn[place][0] for turn in turns] for place in range(3)]
        ready = [min(turn[place][1] for turn in turns) for place in range(3)]
        low, middle = [min(values) for values in times], [statistics.median(values) for values in times]
        shown = [f"{a:.1f}/{b:.1f}" for a, b in zip(low, middle, strict=True)]
        shown += [f"{low[2] / low[place]:.1f} ({middle[2] / middle[place]:.1f})" for place in (0, 1)]
        print(f"{name:<36} " + " ".join(f"{text:>13}" for text in shown) + f"   {ready[0]:.0f}, {ready[2]:.0f}")


def main(arguments: Sequence[str] | None = None) -> None:
    """Run one of the three."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("order", "size", "overhead"))
    parser.add_argument("--rounds", type=int, default=15, help="turns of each arm (overhead)")
    parser.add_argument(
        "--schedulers",
        default=",".join(name for name in sorted(SCHEDULERS) if name != "RePaintScheduler"),
        help="names joined by commas (overhead)",
    )
    options = parser.parse_args(arguments)
    if options.what == "order":
        show_order()
    elif options.what == "size":
        show_size()
    else:
        names = [f"{name.strip().removesuffix('Scheduler')}Scheduler" for name in options.schedulers.split(",")]
        show_overhead(names, options.rounds)


if __name__ == "__main__":
    main()
