"""How the latents of an autoencoder become those of a denoiser, and back."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from anamorph.arrays import Array
from anamorph.errors import ConfigError

F32 = NDArray[np.float32]


@dataclass(frozen=True)
class Scaling:
    """x = factor (z - mean) / deviation, with a mean and a deviation per channel [c, 1, 1] where there are any."""

    factor: float
    mean: F32 | None = None
    deviation: F32 | None = None

    @classmethod
    def of(cls, config: Mapping[str, Any]) -> "Scaling":
        """What an autoencoder's configuration says; raises ConfigError where it has other channels than it says."""
        mean, deviation = config.get("latents_mean"), config.get("latents_std")
        if mean is None or deviation is None:
            return cls(float(config["scaling_factor"]))
        for name in ("latents_mean", "latents_std"):
            if len(config[name]) != config["latent_channels"]:
                expected = config["latent_channels"]
                raise ConfigError(f"the vae's {name} has {len(config[name])} values, expected {expected}")
        mean, deviation = (np.array(values, np.float32).reshape(-1, 1, 1) for values in (mean, deviation))
        return cls(float(config["scaling_factor"]), mean, deviation)

    def scaled(self, latents: F32) -> F32:
        """Latents of the autoencoder [B, c, h, w] -> those of the denoiser."""
        if self.mean is None or self.deviation is None:
            return np.float32(self.factor) * latents
        return (latents - self.mean) * np.float32(self.factor) / self.deviation

    def unscaled(self, latents: Array, put: Callable[[F32], Array]) -> Array:
        """Latents of the denoiser [B, c, h, w] -> those of the autoencoder; `put` makes arrays of the same kind."""
        if self.mean is None or self.deviation is None:
            return latents / self.factor
        return latents * put(self.deviation) / self.factor + put(self.mean)
