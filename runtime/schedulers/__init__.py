"""Schedulers: a table of plain numbers per run, under diffusers' class names. NumPy only.

    table = EulerDiscreteScheduler(beta_schedule="scaled_linear").table(20)
    x, history = advance(table, n, x, out, history, noise)

The same classes also have diffusers' stateful face: `set_timesteps`, `scale_model_input`, `step`, `add_noise`.
"""

from anamorph.schedulers.base import Scheduler, StepOutput
from anamorph.schedulers.ddim import DDIMScheduler, DDPMScheduler
from anamorph.schedulers.dpmsolver import DPMSolverMultistepScheduler
from anamorph.schedulers.euler import EulerAncestralDiscreteScheduler, EulerDiscreteScheduler
from anamorph.schedulers.pndm import PNDMScheduler
from anamorph.schedulers.registry import SCHEDULERS, load_scheduler, scheduler_from_folder
from anamorph.schedulers.table import Clip, History, Row, Table, Threshold, add_noise, advance, estimate

__all__ = [
    "SCHEDULERS",
    "Clip",
    "DDIMScheduler",
    "DDPMScheduler",
    "DPMSolverMultistepScheduler",
    "EulerAncestralDiscreteScheduler",
    "EulerDiscreteScheduler",
    "History",
    "PNDMScheduler",
    "Row",
    "Scheduler",
    "StepOutput",
    "Table",
    "Threshold",
    "add_noise",
    "advance",
    "estimate",
    "load_scheduler",
    "scheduler_from_folder",
]
