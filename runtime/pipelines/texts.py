"""Prompts to the hidden states that condition a denoiser."""

import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from anamorph.engine import Program
from anamorph.errors import InputError
from anamorph.pipelines.sampling import FiniteCheck
from anamorph.pipelines.textual_inversion import LEARNED_PORTS, placed, spelled_out
from anamorph.pipelines.wording import PLAIN, Tokens, Wording, emphasised, filled, read
from anamorph.tokenizer import ClipTokenizer

EPSILON = 1e-5
"""What CLIP's layer norms add to the variance."""


@dataclass(frozen=True)
class Encoder:
    """A tokenizer, the opened text encoder that it belongs to, and how prompts are read."""

    tokenizer: ClipTokenizer
    program: Program
    wording: Wording = PLAIN

    def read(self, texts: Sequence[str]) -> Tokens:
        """The texts as tokens; warns where one is longer than what is taken."""
        tokens = read(self.tokenizer, [spelled_out(text, self.tokenizer) for text in texts], self.wording)
        for lost in filter(None, tokens.cut):
            limit = self.tokenizer.model_max_length
            warnings.warn(
                f"a prompt is longer than {limit} tokens; this was cut off: {lost!r}; long_prompts=True takes it all",
                stacklevel=4,
            )
        return tokens

    def said(self, tokens: Tokens) -> "Said":
        """Everything that the encoder says about the tokens, chunk by chunk."""
        _, _, length = tokens.ids.shape
        outputs = _encoded(self.program, self.tokenizer, tokens.ids.reshape(-1, length))
        return Said(outputs, tokens, self.program)


@dataclass(frozen=True)
class Said:
    """What an encoder has said about prompts [P] in chunks [K] of tokens [S]."""

    outputs: Mapping[str, Any]
    tokens: Tokens
    program: Program

    def states(self, name: str) -> NDArray[Any]:
        """States of all chunks, one after another: [P, K S, D]."""
        values = self.program.arrays.get(self.outputs[name])
        prompts, chunks, length = self.tokens.ids.shape
        return values.reshape(prompts, chunks * length, values.shape[-1])

    def pooled(self, name: str) -> NDArray[Any]:
        """The vectors of the first chunks, [P, E]."""
        values = self.program.arrays.get(self.outputs[name])
        prompts, chunks, _ = self.tokens.ids.shape
        first: NDArray[Any] = values.reshape(prompts, chunks, -1)[:, 0]
        return first


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
    tokens = encoder.read(prompts)
    said = encoder.said(tokens)
    if not clip_skip:
        return {"prompt_embeds": emphasised(said.states("last_hidden_state"), tokens.weights)}
    layers = _layers(said.outputs)
    if len(layers) <= clip_skip:
        raise InputError(f"clip_skip is {clip_skip}, but the text encoder gives {len(layers)} layers")
    scale, shift = _final_norm(encoder, layers[-1], tokens.ids.shape[0] * tokens.ids.shape[1])
    skipped = _normalised(said.states(layers[-1 - clip_skip]))
    return {"prompt_embeds": emphasised((scale * skipped + shift).astype(np.float32), tokens.weights)}


def penultimate_states(encoders: Sequence[Encoder], texts: Sequence[Sequence[str]], clip_skip: int | None) -> Embeds:
    """SDXL: each encoder's states before its last layer, joined [P, S, D_1 + D_2], and the last one's pooled [P, E].

    No norm follows; `clip_skip` leaves out so many layers more. Source: Podell et al. 2023 (arXiv:2307.01952),
    section 2.1.
    Raises InputError: an opened encoder hands out no states of single layers.
    """
    states, back = [], 2 + (clip_skip or 0)
    every = [encoder.read(prompts) for encoder, prompts in zip(encoders, texts, strict=True)]
    chunks = max(tokens.ids.shape[1] for tokens in every)
    for encoder, tokens in zip(encoders, every, strict=True):
        said = encoder.said(filled(encoder.tokenizer, tokens, chunks))
        layers = _layers(said.outputs)
        if len(layers) < back:
            name = encoder.program.interface.component
            raise InputError(f"{name} gives the states of {len(layers)} layers, expected {back}; export it anew")
        states.append(emphasised(said.states(layers[-back]), said.tokens.weights))
    return {"prompt_embeds": np.concatenate(states, axis=-1), "pooled_prompt_embeds": said.pooled("text_embeds")}


def raw_states(encoders: Sequence[Encoder], texts: Sequence[Sequence[str]], clip_skip: int | None) -> Embeds:
    """The last layer's states without the final norm [P, S, D], and the pooled states [P, D].

    Raises InputError: an opened encoder hands out no states of single layers.
    """
    del clip_skip  # no such pipeline takes it
    (encoder,), (prompts,) = encoders, texts
    tokens = encoder.read(prompts)
    said = encoder.said(tokens)
    if not (layers := _layers(said.outputs)):
        raise InputError(f"{encoder.program.interface.component} gives no states of its layers; export it anew")
    states = emphasised(said.states(layers[-1]), tokens.weights)
    return {"prompt_embeds": states, "pooled_prompt_embeds": said.pooled("pooler_output")}


def _layers(outputs: Mapping[str, Any]) -> list[str]:
    """Names of the outputs that hold the states before the first layer and after each, in order."""
    names = (name for name in outputs if name.startswith("hidden_states."))
    return sorted(names, key=lambda name: int(name.split(".")[1]))


def _encoded(program: Program, tokenizer: ClipTokenizer, ids: NDArray[Any]) -> Mapping[str, Any]:
    """The encoder's outputs for ids [B, S]; learned words come with vectors in the place of an id that it knows."""
    inputs = {"input_ids": ids}
    if (words := placed(tokenizer, ids)) is not None:
        inputs = dict(zip(("input_ids", *LEARNED_PORTS), words, strict=True))
    outputs = program.session()({name: program.arrays.put(value) for name, value in inputs.items()})
    check = FiniteCheck.of(program)
    # Only the first is sure to be there: optimum-intel's graphs give the last states a single name of two.
    check.add_now(outputs[program.interface.outputs[0].name], "encoding the prompts")
    return outputs


def _normalised(states: NDArray[Any]) -> NDArray[np.float64]:
    """Mean 0 and variance 1 over the last axis (Ba et al. 2016, eq. 4, without gain and bias)."""
    wide = states.astype(np.float64)
    centred = wide - wide.mean(-1, keepdims=True)
    result: NDArray[np.float64] = centred / np.sqrt((centred**2).mean(-1, keepdims=True) + EPSILON)
    return result


def _final_norm(encoder: Encoder, layer: str, texts: int) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Gain and bias [D] of the encoder's final norm, by least squares from its own states before and after it.

    An engine hands out states, never weights, and a graph of another tool may not name them; random tokens vary every
    channel, so that the solution is as exact as the engine's arithmetic.
    """
    tokenizer, program = encoder.tokenizer, encoder.program
    ids = np.random.default_rng(0).integers(0, tokenizer.base_size, (texts, tokenizer.model_max_length))
    outputs = _encoded(program, tokenizer, ids)
    states = program.arrays.get(outputs[layer])
    before = _normalised(states).reshape(-1, states.shape[-1])
    after = program.arrays.get(outputs["last_hidden_state"]).astype(np.float64).reshape(before.shape)
    mean_before, mean_after = before.mean(0), after.mean(0)
    spread = before - mean_before
    gain = (spread * (after - mean_after)).sum(0) / (spread**2).sum(0)
    return gain, mean_after - gain * mean_before
