"""Which part of a scheduler's table a request runs: all of it, what a strength leaves, or a span of the whole way."""

from dataclasses import replace

from anamorph.errors import InputError
from anamorph.pipelines.request import Request, steps_left
from anamorph.schedulers import Scheduler, Table


def table_of(scheduler: Scheduler, request: Request, distilled: bool = False) -> Table:
    """The rows that a request runs; `distilled`: the scheduler itself knows what a strength means.

    Raises InputError: strength, start or end leave none, or the scheduler takes no such request.
    """

    teacher = {"strength": request.strength, "original_inference_steps": request.original_inference_steps}
    own = {name: value for name, value in teacher.items() if distilled and value is not None}

    def table(begin: int) -> Table:
        return scheduler.table(
            request.num_inference_steps, timesteps=request.timesteps, sigmas=request.sigmas, eta=request.eta,
            begin=begin, **own,
        )  # fmt: skip

    whole = table(0)
    begin = 0 if distilled else _begin(scheduler, request, whole)
    part = table(begin) if begin else whole
    if request.denoising_end is None:
        return part
    count = int((part.timesteps >= _cutoff(scheduler, request.denoising_end)).sum())
    if not count:
        raise InputError(f"denoising_end {request.denoising_end} leaves none of {len(part)} steps; take a later end")
    return replace(part, rows=part.rows[:count], timesteps=part.timesteps[:count])


def _begin(scheduler: Scheduler, request: Request, whole: Table) -> int:
    """Number of the first row."""
    if request.denoising_start is not None:
        left = int((whole.timesteps < _cutoff(scheduler, request.denoising_start)).sum())
        if not left:
            raise InputError(
                f"denoising_start {request.denoising_start} leaves none of {len(whole)} steps; take an earlier start"
            )
        if scheduler.order == 2 and left % 2 == 0:  # never begin between the two calls of a step
            left += 1
        return len(whole) - left
    if request.strength is None:
        return 0
    steps = request.num_inference_steps or len(whole)
    return (steps - steps_left(steps, request.strength)) * scheduler.order


def _cutoff(scheduler: Scheduler, fraction: float) -> int:
    """The training timestep at that fraction of the way: round(T - fraction T), half to even."""
    steps = len(scheduler)
    return round(steps - fraction * steps)
