"""The exact denoiser of Gaussian data, as an engine: samplers have closed-form answers under it."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from anamorph.arrays import Array, NumpyArrays
from anamorph.backends.null import Null
from anamorph.components import Component
from anamorph.engine import Backend, Graph, Placement, Program, Session, Target
from anamorph.errors import BackendError
from anamorph.interface import Interface
from anamorph.plugins import hookimpl

MEAN, DEVIATION = 0.5, 0.25
"""The data: every latent is drawn from N(MEAN, DEVIATION^2)."""


def cumulative_alphas() -> NDArray[np.float64]:
    """Stable Diffusion's scaled-linear schedule, 1000 values of alpha^2."""
    betas = np.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=np.float64) ** 2
    return np.cumprod(1 - betas, dtype=np.float64)


@dataclass(frozen=True)
class GaussianProgram(Graph):
    """Predicts epsilon = (x - a D) / s with D = (d^2 a x + s^2 m) / (a^2 d^2 + s^2).

    x = a x0 + s n is the noisy latent, x0 ~ N(m, d^2), a^2 + s^2 = 1; D is the posterior mean of x0.
    """

    interface: Interface
    placement: Placement
    arrays: NumpyArrays
    alphas: NDArray[np.float64]

    def session(self) -> Session:
        return self

    def __call__(self, inputs: Mapping[str, Array]) -> dict[str, Array]:
        alpha2 = float(np.interp(float(inputs["timestep"]), np.arange(1000), self.alphas))
        a, s = alpha2**0.5, (1 - alpha2) ** 0.5
        x = inputs["sample"]
        clean = (DEVIATION**2 * a * x + s**2 * MEAN) / (a**2 * DEVIATION**2 + s**2)
        return {"out_sample": ((x - a * clean) / s).astype(np.float32)}


class Gaussian(Null):
    """Serves the denoiser alone; give the other components the null engine."""

    name = "gaussian"

    def open(self, component: Component, parts: Sequence[str], target: Target) -> dict[str, Program]:
        if list(parts) != ["unet"]:
            raise BackendError(
                f"engine gaussian only serves the unet, not {', '.join(parts)}; use the null engine there"
            )
        placement = Placement("unet", self.name, target.device, target.precision)
        return {"unet": GaussianProgram(component.interface("unet"), placement, NumpyArrays(), cumulative_alphas())}


@hookimpl
def anamorph_backends() -> list[Backend]:
    return [Gaussian()]
