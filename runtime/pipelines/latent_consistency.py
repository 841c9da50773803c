"""Latent consistency models (Luo et al. 2023, arXiv:2310.04378): a few steps, and the guidance as an input."""

from collections.abc import Mapping
from typing import Any, ClassVar

from anamorph.config import Config
from anamorph.errors import ConfigError, InputError
from anamorph.pipelines.latent_diffusion import LatentDiffusion
from anamorph.pipelines.prompts import Family, guidance_embedding, texts
from anamorph.pipelines.signature import Arguments, Signature
from anamorph.pipelines.slots import Slots
from anamorph.pipelines.stable_diffusion import DRAWING, EDITING, OPTIONS, OURS, RETURNED, SHOWN, WATCHED
from anamorph.pipelines.tasks import Task, from_noise, from_picture, unguided
from anamorph.pipelines.texts import last_states


def _teacher(call: Arguments, prompts: int, *, options: Mapping[str, Any], encoders: int) -> dict[str, Any]:
    """The steps of the schedule that the student was distilled on."""
    del prompts, options, encoders
    steps = call["original_inference_steps"]
    if steps is not None and (not isinstance(steps, int) or steps < 1):
        raise InputError(f"original_inference_steps is {steps!r}, expected 1 or more")
    return {"original_inference_steps": steps}


def _check(owner: str, configs: Mapping[str, Config], options: Mapping[str, Any]) -> None:
    del options
    if configs["unet"].get("time_cond_proj_dim") is None:
        raise ConfigError(
            f"the unet takes no guidance as an input (time_cond_proj_dim), which {owner} needs; open it with Stable "
            "Diffusion's class"
        )


FAMILY = Family(last_states, (texts, guidance_embedding), _teacher, _check)
GIVEN = (
    "original_inference_steps timesteps guidance_scale num_images_per_prompt generator latents prompt_embeds "
    f"{SHOWN} {RETURNED} cross_attention_kwargs {WATCHED} * {OURS}"
)


class LatentConsistencyModelPipeline(LatentDiffusion):
    """Text to image in a few steps."""

    SLOTS: ClassVar[Slots] = DRAWING
    OPTIONS: ClassVar[Mapping[str, Any]] = OPTIONS
    FAMILY: ClassVar[Family] = FAMILY
    TAKES = Signature.of(
        f"prompt height width num_inference_steps {GIVEN}", num_inference_steps=4, guidance_scale=8.5
    )  # fmt: skip
    TASK = Task(from_noise, guidance=unguided, distilled=True)


class LatentConsistencyModelImg2ImgPipeline(LatentDiffusion):
    """Image to image in a few steps, among the timesteps that `strength` leaves of the teacher's."""

    SLOTS: ClassVar[Slots] = EDITING
    OPTIONS: ClassVar[Mapping[str, Any]] = OPTIONS
    FAMILY: ClassVar[Family] = FAMILY
    TAKES = Signature.of(
        f"prompt image num_inference_steps strength {GIVEN}", num_inference_steps=4, guidance_scale=8.5, strength=0.8
    )  # fmt: skip
    TASK = Task(from_picture, ("image",), guidance=unguided, distilled=True)
