"""Running one scheduler in diffusers and here, side by side, with the same outputs of an imagined model."""

import inspect
import math
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import diffusers
import torch

from anamorph.schedulers import SCHEDULERS, Scheduler, Table, advance

SHAPE = (2, 3, 4, 4)
TOLERANCE = 1e-5
Samples = list[torch.Tensor]


@contextmanager
def quiet() -> Iterator[None]:
    """diffusers warns of deprecated options; some of its combinations divide by zero."""
    level = diffusers.logging.get_verbosity()
    diffusers.logging.set_verbosity_error()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        diffusers.logging.set_verbosity(level)


def theirs(name: str, config: dict[str, Any]) -> Any:
    with quiet():
        return getattr(diffusers, name)(**config)


def ours(name: str, config: dict[str, Any]) -> Scheduler:
    return SCHEDULERS[name](**config)


def model_outputs(count: int, channels: int = SHAPE[1], dtype: torch.dtype = torch.float32) -> torch.Tensor:
    shape = (count, SHAPE[0], channels, *SHAPE[2:])
    outs = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    if channels == 2 * SHAPE[1]:  # the second half is a variance, or its place between two, -1..1
        outs[:, :, SHAPE[1] :] = outs[:, :, SHAPE[1] :].abs().clamp(0.01, 1)
    return outs.to(dtype)


def first_sample(scale: float, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return (torch.randn(SHAPE, generator=torch.Generator().manual_seed(0)) * scale).to(dtype)


def noises(table: Table, dtype: torch.dtype = torch.float32) -> list[torch.Tensor | None]:
    """What every row draws from a generator with seed 7."""
    generator = torch.Generator().manual_seed(7)
    return [torch.randn(SHAPE, generator=generator, dtype=dtype) if row.draws else None for row in table.rows]


class PathNoise:
    """diffusers' place of torchsde's Brownian tree: increments of the path that our rows build from the same draws."""

    def __init__(self, table: Table, dtype: torch.dtype) -> None:
        self.draws = iter([noise for noise in noises(table, dtype) if noise is not None])
        self.from_top: tuple[float, torch.Tensor] | None = None

    def __call__(self, sigma: torch.Tensor, sigma_next: torch.Tensor) -> torch.Tensor:
        length, fresh = float(sigma) - float(sigma_next), next(self.draws)
        if self.from_top is None:  # the first call of a step goes to the middle
            self.from_top = (length, fresh)
            return fresh
        (part, before), self.from_top = self.from_top, None
        return (math.sqrt(part) * before + math.sqrt(length - part) * fresh) / math.sqrt(length)


def run_theirs(
    scheduler: Any,
    timesteps: Any,
    x: torch.Tensor,
    outs: torch.Tensor,
    table: Table | None = None,
    noise_dtype: torch.dtype | None = None,
    **options: Any,
) -> Samples:
    takes = inspect.signature(scheduler.step).parameters
    if "generator" in takes:
        options["generator"] = torch.Generator().manual_seed(7)
    if hasattr(scheduler, "noise_sampler"):
        assert table is not None
        scheduler.noise_sampler = PathNoise(table, x.dtype if noise_dtype is None else noise_dtype)
    samples = []
    with quiet():
        for out, t in zip(outs, timesteps, strict=True):
            if hasattr(scheduler, "scale_model_input"):
                scheduler.scale_model_input(x, t)  # it finds its place there
            x = scheduler.step(out, t, x, **options).prev_sample
            samples.append(x)
    return samples


def run_double(
    scheduler: Any, timesteps: Any, x: torch.Tensor, outs: torch.Tensor, table: Table, **options: Any
) -> Samples:
    """diffusers' own code on its own levels, in double precision as far as it goes."""
    for key in ("sigmas", "alphas_cumprod", "alphas", "betas", "one", "final_alpha_cumprod", "initial_alpha_cumprod",
                "sigmas_interpol", "sigmas_up", "sigmas_down", "alpha_t", "sigma_t", "lambda_t"):  # fmt: skip
        if isinstance(getattr(scheduler, key, None), torch.Tensor):
            setattr(scheduler, key, getattr(scheduler, key).double())
    noise_dtype = x.dtype
    original = torch.randn

    def randn(*shape: Any, **keys: Any) -> torch.Tensor:
        if keys.get("dtype") == torch.float64:
            keys["dtype"] = noise_dtype  # the same draws as in the run that is judged
        return original(*shape, **keys).double()

    torch.randn = randn
    try:
        return run_theirs(scheduler, timesteps, x.double(), outs.double(), table, noise_dtype, **options)
    finally:
        torch.randn = original


def run_table(table: Table, x: Any, outs: Any, convert: Any = lambda tensor: tensor) -> list[Any]:
    history: tuple[Any, ...] = ()
    samples = []
    for n, (out, noise) in enumerate(
        zip(outs, noises(table, x.dtype if isinstance(x, torch.Tensor) else torch.float32), strict=True)
    ):
        x, history = advance(table, n, x, out, history, None if noise is None else convert(noise))
        samples.append(x)
    assert history == ()
    return samples


def run_face(scheduler: Scheduler, timesteps: Any, x: Any, outs: Any, **options: Any) -> list[Any]:
    generator = torch.Generator().manual_seed(7)
    samples = []
    for out, t in zip(outs, timesteps, strict=True):
        scheduler.scale_model_input(x, t)
        x = scheduler.step(out, t, x, generator=generator, **options).prev_sample
        samples.append(x)
    return samples


def difference(a: torch.Tensor, b: torch.Tensor) -> float:
    """Relative L2 difference."""
    return float((a.double() - b.double()).norm() / b.double().norm().clamp(min=1e-30))


def worst(a: list[Any], b: list[Any]) -> float:
    return max(difference(x, y) for x, y in zip(a, b, strict=True))
