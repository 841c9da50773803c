"""Prompts to the hidden states that condition a denoiser."""

import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from anamorph.engine import Program
from anamorph.errors import InputError
from anamorph.pipelines.sampling import FiniteCheck
from anamorph.tokenizer import ClipTokenizer

EPSILON = 1e-5
"""What CLIP's layer norms add to the variance."""


def hidden_states(
    tokenizer: ClipTokenizer, program: Program, texts: Sequence[str], clip_skip: int | None = None
) -> NDArray[Any]:
    """Texts to hidden states [len(texts), S, D]; warns where a text is longer than the encoder takes.

    `clip_skip` leaves out so many of the last layers; the final norm follows all the same.
    Raises InputError: the opened encoder hands out no states of single layers.
    """
    encoding = tokenizer(texts)
    for lost in filter(None, encoding.truncated):
        limit = tokenizer.model_max_length
        warnings.warn(f"a prompt is longer than {limit} tokens; this was cut off: {lost!r}", stacklevel=4)
    outputs = _encoded(program, encoding.input_ids)
    last = program.arrays.get(outputs["last_hidden_state"])
    if not clip_skip:
        return last
    layers = sorted(
        (name for name in outputs if name.startswith("hidden_states.")), key=lambda name: int(name.split(".")[1])
    )
    if len(layers) <= clip_skip:
        raise InputError(f"clip_skip is {clip_skip}, but the text encoder gives {len(layers)} layers")
    scale, shift = _final_norm(tokenizer, program, layers[-1], encoding.input_ids.shape)
    skipped = _normalised(program.arrays.get(outputs[layers[-1 - clip_skip]]))
    return (scale * skipped + shift).astype(np.float32)


def _encoded(program: Program, ids: NDArray[Any]) -> Mapping[str, Any]:
    outputs = program.session()({"input_ids": program.arrays.put(ids)})
    FiniteCheck(program.arrays, "text_encoder").add_now(outputs["last_hidden_state"], "encoding the prompts")
    return outputs


def _normalised(states: NDArray[Any]) -> NDArray[np.float64]:
    """Mean 0 and variance 1 over the last axis (Ba et al. 2016, eq. 4, without gain and bias)."""
    wide = states.astype(np.float64)
    centred = wide - wide.mean(-1, keepdims=True)
    result: NDArray[np.float64] = centred / np.sqrt((centred**2).mean(-1, keepdims=True) + EPSILON)
    return result


def _final_norm(
    tokenizer: ClipTokenizer, program: Program, layer: str, shape: tuple[int, ...]
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Gain and bias [D] of the encoder's final norm, by least squares from its own states before and after it.

    An engine hands out states, never weights, and a graph of another tool may not name them; random tokens vary every
    channel, so that the solution is as exact as the engine's arithmetic.
    """
    ids = np.random.default_rng(0).integers(0, tokenizer.vocab_size, shape)
    outputs = _encoded(program, ids)
    states = program.arrays.get(outputs[layer])
    before = _normalised(states).reshape(-1, states.shape[-1])
    after = program.arrays.get(outputs["last_hidden_state"]).astype(np.float64).reshape(before.shape)
    mean_before, mean_after = before.mean(0), after.mean(0)
    spread = before - mean_before
    gain = (spread * (after - mean_after)).sum(0) / (spread**2).sum(0)
    return gain, mean_after - gain * mean_before
