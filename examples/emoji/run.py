"""What both trainings share: moving average of the weights, a loss log, resumable checkpoints."""

import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn


class Average:
    """Exponential moving average of a module's state, with a warm-up of the decay: min(decay, (1 + n) / (10 + n))."""

    def __init__(self, module: nn.Module, decay: float) -> None:
        self.decay = decay
        self.state: dict[str, Tensor] = {name: value.clone() for name, value in module.state_dict().items()}

    def update(self, module: nn.Module, step: int) -> None:
        rate = 1 - min(self.decay, (1 + step) / (10 + step))
        with torch.no_grad():
            for name, value in module.state_dict().items():
                if value.is_floating_point():
                    self.state[name].lerp_(value, rate)


class Log:
    """Smoothed losses: a line on the screen and in a CSV file every 50 steps."""

    def __init__(self, path: Path, header: str) -> None:
        self.path, self.header = path, header
        self.lines: list[str] = []
        self.seconds = 0.0
        self.smooth: list[float] = []
        self.clock = time.time()

    def add(self, step: int, *losses: float) -> None:
        now = time.time()
        self.seconds, self.clock = self.seconds + now - self.clock, now
        self.smooth = [0.98 * a + 0.02 * b for a, b in zip(self.smooth or losses, losses, strict=True)]
        if step % 50 == 0:
            self.lines.append(",".join([str(step), f"{self.seconds:.0f}", *(f"{value:.5f}" for value in self.smooth)]))
            print(self.header, self.lines[-1], flush=True)
            self.path.write_text("\n".join([self.header, *self.lines]) + "\n")


def save_checkpoint(
    path: Path, step: int, module: nn.Module, average: Average, optimizer: torch.optim.Optimizer, log: Log
) -> None:
    """Write everything that a later run needs to go on, under a temporary name first."""
    state: dict[str, Any] = {
        "step": step,
        "module": module.state_dict(),
        "average": average.state,
        "optimizer": optimizer.state_dict(),
        "random": torch.get_rng_state(),
        "log": {"lines": log.lines, "seconds": log.seconds, "smooth": log.smooth},
    }
    draft = path.with_suffix(".tmp")
    torch.save(state, draft)
    draft.replace(path)


def load_checkpoint(path: Path, module: nn.Module, average: Average, optimizer: torch.optim.Optimizer, log: Log) -> int:
    """Go on from `path` where it exists; the number of steps already done."""
    if not path.exists():
        return 0
    state = torch.load(path, weights_only=True)
    module.load_state_dict(state["module"])
    average.state = state["average"]
    optimizer.load_state_dict(state["optimizer"])
    torch.set_rng_state(state["random"])
    log.lines, log.seconds, log.smooth = state["log"]["lines"], state["log"]["seconds"], state["log"]["smooth"]
    return int(state["step"])
