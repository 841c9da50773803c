"""The denoising loop: one generator for every task and every engine."""

from collections.abc import Callable, Generator, Mapping
from dataclasses import dataclass

import numpy as np

from anamorph.arrays import Array
from anamorph.errors import InputError
from anamorph.pipelines.controls import total
from anamorph.pipelines.denoiser import Denoiser, Opened, branch_by_branch
from anamorph.pipelines.sampling import Changes, FiniteCheck, Guidance, Plan, Step
from anamorph.pipelines.stepping import check_table, guidance_weights, step_weights
from anamorph.schedulers import History, advance
from anamorph.stepping import GUIDANCE, HISTORY, NOISE, REMEMBERED, SCALE, SCOPE, WEIGHTS

Move = Callable[[int, Array, History, Array | None], tuple[Array, History]]
"""From a row's number, samples [N, ...], what is remembered and noise to the next samples, and what is remembered."""


@dataclass(frozen=True)
class _Told:
    """What calls are told from now on; `alike`: all branches see the same samples."""

    guidance: Guidance
    conditions: Mapping[str, Array]
    beside: Mapping[str, Array]
    alike: bool


def denoise(plan: Plan, denoiser: Denoiser) -> Generator[Step, Changes | None, Array]:
    """Run the scheduler's table; yields after every row and takes `Changes` by `send`. Returns the last latents.

    Raises InputError: the denoiser computes the next samples itself, but not as this plan wants them.
    """
    table, arrays, alike = plan.table, denoiser.arrays, plan.alike
    moves: dict[int, Move] = {}
    check = FiniteCheck(arrays, "unet", denoiser.engine)
    x, conditions, beside, history = plan.latents, dict(plan.conditions), dict(plan.beside), ()
    for n, row in enumerate(table.rows):
        now = plan.guidance.at(n)
        if now.branches not in moves:
            mine, beside_mine = (
                values if now is plan.guidance else _last(values, len(x)) for values in (conditions, beside)
            )
            moves[now.branches] = _moving(plan, denoiser, _Told(now, mine, beside_mine, alike), check)
        noise = arrays.put(plan.noise.normal(tuple(x.shape[1:]))) if row.draws else None
        x, history = moves[now.branches](n, x, history, noise)
        if plan.after is not None:
            x = plan.after(n, x, beside)
        changes = yield Step(n, len(table.rows), row.timestep, x, {**conditions, **beside})
        if changes is not None:
            x = x if changes.latents is None else changes.latents
            for name, value in changes.conditions.items():
                (beside if name in beside else conditions)[name] = value
            if changes.conditions:
                moves.clear()
                # What a caller joins to the samples may differ from branch to branch.
                alike = alike and not set(changes.conditions) & set(plan.joined)
    check.settle()
    return x


def _moving(plan: Plan, denoiser: Denoiser, told: _Told, check: FiniteCheck) -> Move:
    if isinstance(denoiser, Opened) and denoiser.goes_on:
        return _inside(plan, denoiser, told, check)
    return _outside(plan, denoiser, told, check)


def _outside(plan: Plan, denoiser: Denoiser, told: _Told, check: FiniteCheck) -> Move:
    """Guidance and the scheduler's row are computed here."""
    table, arrays, now = plan.table, denoiser.arrays, told.guidance
    timesteps = [row.timestep for row in table.rows]
    shared = now.branches if told.alike and denoiser.shares and not now.apart else 1
    controls = [each.prepare(timesteps, told.conditions, now.branches, arrays) for each in plan.controls]
    if now.apart:
        predict = branch_by_branch(denoiser, timesteps, told.conditions, now.branches, plan.refresh)
    else:
        predict = denoiser.prepare(timesteps, told.conditions, shared, plan.refresh)

    def move(n: int, x: Array, history: History, noise: Array | None) -> tuple[Array, History]:
        row = table.rows[n]
        sample = x if row.scale == 1.0 else row.scale * x
        added = total([each(n, sample) for each in controls])
        sample = arrays.concat([sample] * (now.branches // shared)) if now.branches > shared else sample
        if plan.joined:
            sample = arrays.concat([sample, *(told.beside[name][: len(sample)] for name in plan.joined)], 1)
        out = predict(n, sample, added)
        check.add(out, _where(plan, n))
        return advance(table, n, x, now.combine(out), history, noise)

    return move


def _inside(plan: Plan, denoiser: Opened, told: _Told, check: FiniteCheck) -> Move:
    """The denoiser's graph computes both: see `anamorph.stepping`."""
    table, arrays, now = plan.table, denoiser.arrays, told.guidance
    check_table(table)
    if now.rescale or now.apart or plan.joined or not told.alike:
        raise InputError(
            f"{SCOPE} serves no guidance_rescale, no branches that are called apart or see other samples; open the "
            "model without it"
        )
    timesteps = [row.timestep for row in table.rows]
    controls = [each.prepare(timesteps, told.conditions, now.branches, arrays) for each in plan.controls]
    call = denoiser.calls(timesteps, told.conditions, now.branches, plan.refresh)
    guidance = arrays.put(guidance_weights(now.scales))

    def move(n: int, x: Array, history: History, noise: Array | None) -> tuple[Array, History]:
        scale = table.rows[n].scale
        added = total([each(n, x if scale == 1.0 else scale * x) for each in controls])
        weights = arrays.put(step_weights(table, n))
        own = {SCALE: arrays.put(np.array([scale], np.float32)), GUIDANCE: guidance, WEIGHTS: weights}
        own |= {HISTORY: history[0]} if history else {}
        own |= {} if noise is None else {NOISE: noise}
        made = call(n, x, added, own)
        check.add(made["out_sample"], _where(plan, n))
        return made["out_sample"], (made[REMEMBERED],)

    return move


def _where(plan: Plan, n: int) -> str:
    return f"step {n + 1} of {len(plan.table.rows)} (timestep {plan.table.rows[n].timestep:g})"


def _last(values: Mapping[str, Array], count: int) -> dict[str, Array]:
    """Arrays of the most conditioned branch alone, which are those of `count` pictures."""
    return {name: value[-count:] for name, value in values.items()}
