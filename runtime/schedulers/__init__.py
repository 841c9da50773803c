"""Schedulers: a table of plain numbers per run, under diffusers' class names. NumPy only.

    table = EulerDiscreteScheduler(beta_schedule="scaled_linear").table(20)
    x, history = advance(table, n, x, out, history, noise)

The same classes also have diffusers' stateful face: `set_timesteps`, `scale_model_input`, `step`, `add_noise`.
"""

from anamorph.schedulers.base import Scheduler
from anamorph.schedulers.consistency import LCMScheduler, LCMSchedulerOutput, TCDScheduler, TCDSchedulerOutput
from anamorph.schedulers.ddim import DDIMInverseScheduler, DDIMScheduler, DDPMScheduler
from anamorph.schedulers.dpmsolver import (
    DPMSolverMultistepInverseScheduler,
    DPMSolverMultistepScheduler,
    DPMSolverSinglestepScheduler,
)
from anamorph.schedulers.edm import CMStochasticIterativeScheduler, EDMDPMSolverMultistepScheduler, EDMEulerScheduler
from anamorph.schedulers.euler import EulerAncestralDiscreteScheduler, EulerDiscreteScheduler
from anamorph.schedulers.flow import FlowMatchEulerDiscreteScheduler, FlowMatchHeunDiscreteScheduler
from anamorph.schedulers.kdiffusion import (
    DPMSolverSDEScheduler,
    HeunDiscreteScheduler,
    KDPM2AncestralDiscreteScheduler,
    KDPM2DiscreteScheduler,
    LMSDiscreteScheduler,
)
from anamorph.schedulers.multistep import DEISMultistepScheduler, SASolverScheduler, UniPCMultistepScheduler
from anamorph.schedulers.pndm import IPNDMScheduler, PNDMScheduler
from anamorph.schedulers.registry import SCHEDULERS, load_scheduler, scheduler_from_folder
from anamorph.schedulers.repaint import RePaintScheduler
from anamorph.schedulers.table import (
    Clip,
    History,
    Row,
    StepOutput,
    Table,
    Threshold,
    add_noise,
    advance,
    clean_estimate,
)

__all__ = [
    "SCHEDULERS",
    "CMStochasticIterativeScheduler",
    "Clip",
    "DDIMInverseScheduler",
    "DDIMScheduler",
    "DDPMScheduler",
    "DEISMultistepScheduler",
    "DPMSolverMultistepInverseScheduler",
    "DPMSolverMultistepScheduler",
    "DPMSolverSDEScheduler",
    "DPMSolverSinglestepScheduler",
    "EDMDPMSolverMultistepScheduler",
    "EDMEulerScheduler",
    "EulerAncestralDiscreteScheduler",
    "EulerDiscreteScheduler",
    "FlowMatchEulerDiscreteScheduler",
    "FlowMatchHeunDiscreteScheduler",
    "HeunDiscreteScheduler",
    "History",
    "IPNDMScheduler",
    "KDPM2AncestralDiscreteScheduler",
    "KDPM2DiscreteScheduler",
    "LCMScheduler",
    "LCMSchedulerOutput",
    "LMSDiscreteScheduler",
    "PNDMScheduler",
    "RePaintScheduler",
    "Row",
    "SASolverScheduler",
    "Scheduler",
    "StepOutput",
    "TCDScheduler",
    "TCDSchedulerOutput",
    "Table",
    "Threshold",
    "UniPCMultistepScheduler",
    "add_noise",
    "advance",
    "clean_estimate",
    "load_scheduler",
    "scheduler_from_folder",
]
