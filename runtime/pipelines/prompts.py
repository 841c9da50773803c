"""What the denoiser is told beside x_t and t: functions from a checked call to its inputs, for every branch."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from anamorph.config import Config
from anamorph.errors import InputError
from anamorph.pipelines.arguments import EMBEDS, Job
from anamorph.pipelines.sampling import Guidance
from anamorph.pipelines.signature import Arguments
from anamorph.pipelines.texts import Embeds, TextsToEmbeds

PORTS: Mapping[str, str] = {"prompt_embeds": "encoder_hidden_states", "pooled_prompt_embeds": "text_embeds"}
"""Encoded texts -> input of the denoiser."""


@dataclass(frozen=True)
class Asking:
    """All that conditions may be made of.

    `encode` takes one list of texts for each encoder, and the number of layers to skip; `options` are the pipeline's
    own settings.
    """

    job: Job
    guidance: Guidance
    encode: Callable[[Sequence[Sequence[str]], int | None], Embeds]
    encoders: int
    unet: Mapping[str, Any]
    options: Mapping[str, Any]


Condition = Callable[[Asking], dict[str, NDArray[Any]]]
"""Inputs of the denoiser by name, [branches * N, ...], the least conditioned branch first."""


class MoreFields(Protocol):
    """From a call and its number of prompts to further fields of its request; raises InputError."""

    def __call__(
        self, call: Arguments, prompts: int, *, options: Mapping[str, Any], encoders: int
    ) -> dict[str, Any]: ...


def no_more(call: Arguments, prompts: int, *, options: Mapping[str, Any], encoders: int) -> dict[str, Any]:  # noqa: ARG001
    """No further fields."""
    return {}


Check = Callable[[str, Mapping[str, Config], Mapping[str, Any]], None]
"""Looks at a pipeline's class, its models' configurations and its settings; raises ConfigError."""


def no_check(owner: str, configs: Mapping[str, Config], options: Mapping[str, Any]) -> None:
    """Everything fits."""


@dataclass(frozen=True)
class Family:
    """How the denoisers of a family are told what to draw: from texts to embeds, and all that they get to know."""

    encode: TextsToEmbeds
    conditions: tuple[Condition, ...]
    more: MoreFields = no_more
    check: Check = no_check
    unused_layers: int = 0
    """Layers at the end of an encoder that are left out without `clip_skip`."""


def texts(asking: Asking) -> dict[str, NDArray[Any]]:
    """The prompt for the last branch, and the negative prompt for all before it."""
    request, branches = asking.job.request, asking.guidance.branches
    words = _for_each(asking, request.prompt, request.prompt_2)
    positive = _given(asking.job, "") or asking.encode(words, request.clip_skip)
    negative = _negative(asking, positive) if branches > 1 else {}
    if negative:
        positive, negative = _equally_long(asking, positive, negative)
    result = {}
    for name, value in positive.items():
        every = [*[negative[name]] * (branches - 1), value] if branches > 1 else [value]
        result[PORTS[name]] = np.repeat(np.concatenate(every), request.num_images_per_prompt, axis=0)
    return result


def _negative(asking: Asking, positive: Embeds) -> Embeds:
    request = asking.job.request
    given = _given(asking.job, "negative_")
    if not given and request.negative_prompt is None and asking.options.get("force_zeros_for_empty_prompt"):
        return {name: np.zeros_like(value) for name, value in positive.items()}
    words = request.negative_prompt or ("",) * len(request.prompt)
    return given or asking.encode(_for_each(asking, words, request.negative_prompt_2), None)


def _equally_long(asking: Asking, positive: Embeds, negative: Embeds) -> tuple[Embeds, Embeds]:
    """Both with as many tokens: the shorter one goes on with encodings of the empty text, as often as it takes."""
    states = "prompt_embeds"
    lengths = [value[states].shape[1] for value in (positive, negative)]
    if lengths[0] == lengths[1]:
        return positive, negative
    empty = asking.encode([("",)] * asking.encoders, None)[states]
    longer = max(lengths)
    if any((longer - length) % empty.shape[1] for length in lengths):
        raise InputError(f"the prompts have {lengths[0]} and {lengths[1]} tokens, expected as many; encode both alike")

    def filled(embeds: Embeds, length: int) -> Embeds:
        more = np.tile(empty, (len(embeds[states]), (longer - length) // empty.shape[1], 1))
        return {**embeds, states: np.concatenate([embeds[states], more], axis=1)}

    return filled(positive, lengths[0]), filled(negative, lengths[1])


def _for_each(asking: Asking, first: Sequence[str], second: Sequence[str] | None) -> list[Sequence[str]]:
    """The texts of each encoder: all but the first get the second ones, if there are any."""
    return [first if index == 0 or second is None else second for index in range(asking.encoders)]


def _given(job: Job, prefix: str) -> Embeds:
    """What the caller has encoded, under the names of the prompt's own."""
    names = [name for name in EMBEDS if not name.startswith("negative_")]
    return {name: job.embeds[prefix + name] for name in names if prefix + name in job.embeds}


GUIDANCE_WAVES = 1000.0
"""The guidance less 1 is multiplied by this before it becomes waves."""


def guidance_embedding(asking: Asking) -> dict[str, NDArray[Any]]:
    """The guidance as an input of a distilled model, [N, D]: sin and cos of 1000 (s - 1) / 10000^(i / (D / 2 - 1)).

    Empty where the model has no such input. Source: Meng et al. 2023 (arXiv:2210.03142), appendix; Luo et al. 2023
    (arXiv:2310.04378), section 4.2.
    """
    width = asking.unet.get("time_cond_proj_dim")
    if width is None:
        return {}
    request = asking.job.request
    half = width // 2
    rates = np.exp(np.arange(half) * -np.log(10000.0) / (half - 1))
    angles = GUIDANCE_WAVES * (request.guidance_scale - 1) * rates
    waves = np.zeros(width, np.float32)
    waves[: 2 * half] = np.concatenate([np.sin(angles), np.cos(angles)])
    return {"timestep_cond": np.tile(waves, (request.images, 1))}
