"""RePaint: inpainting with a model that knows nothing of masks, by going back and forth in noise."""

from collections.abc import Mapping
from typing import Any, ClassVar

import numpy as np

from anamorph.errors import InputError
from anamorph.schedulers.arrays import Array, cast, draw, widen
from anamorph.schedulers.configuration import CURVES, NOISE
from anamorph.schedulers.grids import Grid, Request, variance_preserving
from anamorph.schedulers.position import Position
from anamorph.schedulers.registry import register
from anamorph.schedulers.solvers import Columns, first_order
from anamorph.schedulers.table import StepOutput, Table, advance
from anamorph.schedulers.training import TrainingLevels


@register
class RePaintScheduler(TrainingLevels):
    """RePaint (Lugmayr et al. 2022, arXiv:2201.09865, alg. 1).

    A step denoises the masked part as DDIM does and puts the rest there at the new level; wherever the next timestep
    is higher, `undo_step` first adds noise again, so that both parts grow together. Its step takes a picture and a
    mask, so that there is no plain table for it.
    """

    SUMMARY: ClassVar = "inpainting with a model that was never trained for it; slow, hundreds of calls"
    DEFAULTS: ClassVar = {**NOISE, "eta": 0.0, "clip_sample": True}
    ONLY: ClassVar = {"beta_schedule": (*CURVES, "sigmoid")}
    STATELESS: ClassVar = True

    def plan(self, request: Request) -> Grid:
        """Raises InputError: a run needs a picture and a mask."""
        del request
        raise InputError(
            "RePaintScheduler needs a picture and a mask in every step; drive it by set_timesteps, step and undo_step"
        )

    def set_timesteps(  # type: ignore[override]  # diffusers' own signature, with the jumps
        self, num_inference_steps: int, jump_length: int = 10, jump_n_sample: int = 10, device: object = None
    ) -> None:
        """Descending timesteps that jump back by `jump_length` steps, `jump_n_sample` - 1 times at each landing."""
        del device
        steps = min(num_inference_steps, len(self))
        left = dict.fromkeys(range(0, steps - jump_length, jump_length), jump_n_sample - 1)
        places, at = [], steps
        while at >= 1:
            at -= 1
            places.append(at)
            if left.get(at, 0) > 0:
                left[at] -= 1
                places.extend(range(at + 1, at + jump_length + 1))
                at += jump_length
        stride = len(self) // steps
        timesteps = np.array(places, np.int64) * stride
        grid = variance_preserving(timesteps, timesteps - stride, self.alphas_cumprod, 1.0, steps)
        self.num_inference_steps = steps
        self._position = Position(grid)

    def solve(self, grid: Grid, eta: float) -> Table:
        """x' = alpha' clip(D) + sqrt(sigma'^2 - c^2) out + c noise, for the part under the mask."""
        a, _, c = first_order(grid, eta)
        c = np.where(grid.timesteps > 0, c, 0.0)
        return self.table_of(grid, Columns(D=grid.alpha_next, O=a * grid.sigma, Z=c), draws=True)

    def step(  # type: ignore[override]  # diffusers' own signature, with the picture and its mask
        self,
        model_output: Array,
        timestep: Any,
        sample: Array,
        original_image: Array,
        mask: Array,
        generator: Any = None,
        return_dict: bool = True,
    ) -> StepOutput | tuple[Array, ...]:
        """The sample of the next lower level; `mask` is 1 where the original picture stays, 0 where it is repainted."""
        table, n = self._current(timestep, {"eta": self.own["eta"]})
        grid = self._position.grid
        assert grid is not None
        noise, x, out = widen(draw(model_output, generator)), widen(sample), widen(model_output)
        unknown, _ = advance(table, n, x, out, (), noise)
        known = float(grid.alpha_next[n]) * original_image + float(grid.sigma_next[n]) * noise
        result = cast(mask * known + (1.0 - mask) * unknown, model_output)
        output = StepOutput(result, table, n, x, out)
        return output if return_dict else (result, output.pred_original_sample)

    def _table(self, grid: Grid, options: Mapping[str, Any], begin: int) -> Table:
        del begin  # every step stands for itself
        return self.solve(grid, **options)

    def undo_step(self, sample: Array, timestep: Any, generator: Any = None) -> Array:
        """One stride back up: x = sqrt(1 - beta) x + sqrt(beta) noise for each training timestep from `timestep` on."""
        value = int(timestep)
        if self.num_inference_steps is None:
            raise InputError("RePaintScheduler has no steps yet; call set_timesteps first")
        bar = np.append(1.0, self.alphas_cumprod.astype(np.float64))
        for place in range(value, value + len(self) // self.num_inference_steps):
            kept = float(bar[place + 1] / bar[place])
            sample = kept**0.5 * sample + max(1 - kept, 0.0) ** 0.5 * draw(sample, generator)
        return sample
