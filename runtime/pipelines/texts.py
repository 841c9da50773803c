"""Prompts to the hidden states that condition a denoiser."""

import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from anamorph.bert_tokenizer import BertTokenizer
from anamorph.engine import Program
from anamorph.errors import InputError
from anamorph.pipelines.sampling import FiniteCheck
from anamorph.tokenizer import ClipTokenizer

EPSILON = 1e-5
"""What CLIP's layer norms add to the variance."""


@dataclass(frozen=True)
class Encoder:
    """A tokenizer and the opened text encoder that it belongs to."""

    tokenizer: ClipTokenizer | BertTokenizer
    program: Program

    def outputs(self, texts: Sequence[str]) -> Mapping[str, Any]:
        """Everything that the encoder says about the texts; warns where one is longer than it takes."""
        encoding = self.tokenizer(texts)
        for lost in filter(None, encoding.truncated):
            limit = self.tokenizer.model_max_length
            warnings.warn(f"a prompt is longer than {limit} tokens; this was cut off: {lost!r}", stacklevel=4)
        return _encoded(self.program, encoding.input_ids)


Embeds = dict[str, NDArray[Any]]
"""Encoded texts, by the name of the argument that takes them."""
TextsToEmbeds = Callable[[Sequence[Encoder], Sequence[Sequence[str]], int | None], Embeds]
"""From encoders, the texts for each, and how many of their last layers to leave out."""


def last_states(encoders: Sequence[Encoder], texts: Sequence[Sequence[str]], clip_skip: int | None) -> Embeds:
    """Stable Diffusion: the last hidden states [P, S, D].

    `clip_skip` leaves out so many of the last layers; the final norm follows all the same.
    Raises InputError: the opened encoder hands out no states of single layers.
    """
    (encoder,), (prompts,) = encoders, texts
    outputs, program = encoder.outputs(prompts), encoder.program
    last = program.arrays.get(outputs["last_hidden_state"])
    if not clip_skip:
        return {"prompt_embeds": last}
    layers = _layers(outputs)
    if len(layers) <= clip_skip:
        raise InputError(f"clip_skip is {clip_skip}, but the text encoder gives {len(layers)} layers")
    scale, shift = _final_norm(program, layers[-1], last.shape[:2])
    skipped = _normalised(program.arrays.get(outputs[layers[-1 - clip_skip]]))
    return {"prompt_embeds": (scale * skipped + shift).astype(np.float32)}


def penultimate_states(encoders: Sequence[Encoder], texts: Sequence[Sequence[str]], clip_skip: int | None) -> Embeds:
    """SDXL: each encoder's states before its last layer, joined [P, S, D_1 + D_2], and the last one's pooled [P, E].

    No norm follows; `clip_skip` leaves out so many layers more. Source: Podell et al. 2023 (arXiv:2307.01952),
    section 2.1.
    Raises InputError: an opened encoder hands out no states of single layers.
    """
    states, back = [], 2 + (clip_skip or 0)
    for encoder, prompts in zip(encoders, texts, strict=True):
        outputs = encoder.outputs(prompts)
        layers = _layers(outputs)
        if len(layers) < back:
            name = encoder.program.interface.component
            raise InputError(f"{name} gives the states of {len(layers)} layers, expected {back}; export it anew")
        states.append(encoder.program.arrays.get(outputs[layers[-back]]))
    pooled = encoder.program.arrays.get(outputs["text_embeds"])
    return {"prompt_embeds": np.concatenate(states, axis=-1), "pooled_prompt_embeds": pooled}


def raw_states(encoders: Sequence[Encoder], texts: Sequence[Sequence[str]], clip_skip: int | None) -> Embeds:
    """The last layer's states without the final norm [P, S, D], and the pooled states [P, D].

    Raises InputError: an opened encoder hands out no states of single layers.
    """
    del clip_skip  # no such pipeline takes it
    (encoder,), (prompts,) = encoders, texts
    outputs, get = encoder.outputs(prompts), encoder.program.arrays.get
    if not (layers := _layers(outputs)):
        raise InputError(f"{encoder.program.interface.component} gives no states of its layers; export it anew")
    return {"prompt_embeds": get(outputs[layers[-1]]), "pooled_prompt_embeds": get(outputs["pooler_output"])}


def _layers(outputs: Mapping[str, Any]) -> list[str]:
    """Names of the outputs that hold the states before the first layer and after each, in order."""
    names = (name for name in outputs if name.startswith("hidden_states."))
    return sorted(names, key=lambda name: int(name.split(".")[1]))


def _encoded(program: Program, ids: NDArray[Any]) -> Mapping[str, Any]:
    outputs = program.session()({"input_ids": program.arrays.put(ids)})
    check = FiniteCheck(program.arrays, program.interface.component)
    # Only the first is sure to be there: optimum-intel's graphs give the last states a single name of two.
    check.add_now(outputs[program.interface.outputs[0].name], "encoding the prompts")
    return outputs


def _normalised(states: NDArray[Any]) -> NDArray[np.float64]:
    """Mean 0 and variance 1 over the last axis (Ba et al. 2016, eq. 4, without gain and bias)."""
    wide = states.astype(np.float64)
    centred = wide - wide.mean(-1, keepdims=True)
    result: NDArray[np.float64] = centred / np.sqrt((centred**2).mean(-1, keepdims=True) + EPSILON)
    return result


def _final_norm(
    program: Program, layer: str, shape: tuple[int, ...]
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Gain and bias [D] of the encoder's final norm, by least squares from its own states before and after it.

    An engine hands out states, never weights, and a graph of another tool may not name them; random tokens vary every
    channel, so that the solution is as exact as the engine's arithmetic.
    """
    if (words := program.interface.inputs[0].below) is None:
        raise InputError("this folder does not say how many tokens its text encoder knows; export it again")
    ids = np.random.default_rng(0).integers(0, words, shape)
    outputs = _encoded(program, ids)
    states = program.arrays.get(outputs[layer])
    before = _normalised(states).reshape(-1, states.shape[-1])
    after = program.arrays.get(outputs["last_hidden_state"]).astype(np.float64).reshape(before.shape)
    mean_before, mean_after = before.mean(0), after.mean(0)
    spread = before - mean_before
    gain = (spread * (after - mean_after)).sum(0) / (spread**2).sum(0)
    return gain, mean_after - gain * mean_before
