"""Driving a pipeline's loop: step by step for whoever iterates, or to its end with a callback between the steps."""

import time
from collections.abc import Generator, Mapping
from contextlib import closing
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from anamorph.arrays import Array
from anamorph.errors import InputError
from anamorph.pipelines.arguments import Job
from anamorph.pipelines.denoising import denoise
from anamorph.pipelines.sampling import Changes, Plan, Step
from anamorph.pipelines.signature import StepCallback
from anamorph.progress import Bar

if TYPE_CHECKING:
    from anamorph.pipelines.base import DiffusionPipeline

CALLED: Mapping[str, str] = {
    "encoder_hidden_states": "prompt_embeds",
    "text_embeds": "add_text_embeds",
    "time_ids": "add_time_ids",
    "timestep_cond": "w_embedding",
}
"""Input of the denoiser -> how diffusers' callbacks call it, where that is another name."""


@dataclass(frozen=True)
class State:
    """One finished step of a running generation; `seconds` is the time that it took on the host."""

    step: Step
    seconds: float
    pipeline: "DiffusionPipeline"

    @property
    def index(self) -> int:
        """Number of the step, from 0."""
        return self.step.index

    @property
    def total(self) -> int:
        """Number of all steps."""
        return self.step.total

    @property
    def timestep(self) -> float:
        """What the denoiser was told about the noise, in training steps."""
        return self.step.timestep

    @property
    def latents(self) -> Array:
        """[N, c, h, w], the denoiser's own arrays (PyTorch tensors or NumPy)."""
        return self.step.latents

    def preview(self, output_type: str = "pil") -> Any:
        """Decode the latents of this step to pictures."""
        return self.pipeline.decode(self.latents, output_type)


def states(pipe: "DiffusionPipeline", plan: Plan) -> Generator[State, Changes | None, Array]:
    """Run a plan; yields after each call of the denoiser and takes `Changes` by `send`. Returns the last latents."""
    with closing(denoise(plan, pipe.denoiser(scale=plan.scale))) as loop:
        changes: Changes | None = None
        while True:
            started = time.perf_counter()
            try:
                step = loop.send(changes)
            except StopIteration as stop:
                return stop.value
            changes = yield State(step, time.perf_counter() - started, pipe)


def finished(
    pipe: "DiffusionPipeline", job: Job, callback: StepCallback | None = None, names: tuple[str, ...] = ()
) -> Array:
    """Run a job to its end; `callback` gets the values `names` after each step.

    Raises InputError: the callback asks for, or returns, a value that the denoiser does not have.
    """
    plan = pipe.plan(job)
    known = {"latents": "latents", **{CALLED.get(name, name): name for name in plan.conditions}}
    known |= {name: name for name in plan.beside}
    if strange := [name for name in names if name not in known]:
        raise InputError(f"callbacks cannot have {', '.join(strange)}; they can have {', '.join(known)}")
    with closing(states(pipe, plan)) as steps, Bar(len(plan.table.rows), "denoising", pipe.show_progress) as bar:
        changes: Changes | None = None
        while True:
            try:
                state = steps.send(changes)
            except StopIteration as stop:
                return stop.value
            bar.advance()
            have = {"latents": state.latents, **state.step.conditions}
            values = {name: have[known[name]] for name in names}
            changes = None if callback is None else _changes(callback(pipe, state.index, state.timestep, values), known)


def _changes(answer: Mapping[str, Any] | None, known: Mapping[str, str]) -> Changes:
    answer = answer or {}
    if strange := [name for name in answer if name not in known]:
        raise InputError(f"the callback returned {', '.join(strange)}; expected {', '.join(known)}")
    conditions = {known[name]: value for name, value in answer.items() if name != "latents"}
    return Changes(answer.get("latents"), conditions)
