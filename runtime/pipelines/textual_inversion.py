"""Words that were learned from pictures (Gal et al. 2022, arXiv:2208.01618): read from files, given to tokenizers."""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from anamorph.arrays import to_numpy
from anamorph.errors import CheckpointError, InputError
from anamorph.hub import HubOptions, find_component
from anamorph.original.reading import open_original
from anamorph.pickles import load_pickle
from anamorph.tokenizer import ClipTokenizer
from anamorph.weights import floats

FILES = ("learned_embeds.safetensors", "learned_embeds.bin")
"""What a folder or hub id holds, unless a name is given."""
NAMELESS = "emb_params"
"""The only name in files that leave the word to whoever loads them."""
ENCODERS: Mapping[str, str] = {"clip_l": "tokenizer", "clip_g": "tokenizer_2"}
"""Names in files for SDXL -> the tokenizer that the vectors belong to."""

LEARNED_PORTS = ("learned_embeds", "learned_mask")
"""Inputs of a text encoder that take vectors for words that its vocabulary does not have."""
Vectors = NDArray[np.float32]


def read_source(source: Any, weight_name: str | None, subfolder: str | None, hub: HubOptions) -> Mapping[str, Any]:
    """What a path, a hub id, a mapping or a tensor holds, by name.

    Raises CheckpointError: there is no such file, or it is damaged or holds code.
    """
    if isinstance(source, Mapping):
        return source
    if not isinstance(source, str | Path):
        return {NAMELESS: source}
    path = Path(source).expanduser()
    if not path.is_file():
        names = (weight_name,) if weight_name else FILES
        folder = find_component(source, subfolder, names, **hub)
        path = next((folder / name for name in names if (folder / name).is_file()), folder / names[0])
        if not path.is_file():
            raise CheckpointError(f"{folder} has no {' and no '.join(names)}; name the file with weight_name=")
    if path.suffix == ".safetensors":
        return {name: floats(value, path) for name, value in open_original(path).tensors.items()}
    return load_pickle(path)


def learned(state: Mapping[str, Any], token: str | None) -> dict[str, tuple[str, Vectors]]:
    """Slot of the tokenizer ("" where the file does not tell) -> the word and its vectors [n, D].

    Files of diffusers hold the vectors under the word; those of AUTOMATIC1111's web interface under
    `string_to_param`, beside the word's name; those for SDXL one tensor for each encoder.
    Raises InputError: the content is of none of these forms, or no word is known.
    """
    if "string_to_param" in state:
        found, inner = {"": state["string_to_param"].get("*")}, state.get("name")
    elif set(state) <= set(ENCODERS):
        found, inner = {ENCODERS[name]: value for name, value in state.items()}, None
    elif len(state) == 1:
        ((name, value),) = state.items()
        found, inner = {"": value}, None if name == NAMELESS else name
    else:
        names = ", ".join(sorted(map(str, state))[:5])
        raise InputError(f"a learned word is one tensor, or one for each of {', '.join(ENCODERS)}; this holds {names}")
    word = token or inner
    if not isinstance(word, str) or not word.strip():
        raise InputError("the file does not name its word; pass token=")
    return {slot: (word, _vectors(value)) for slot, value in found.items()}


def _vectors(value: Any) -> Vectors:
    array = to_numpy(value) if hasattr(value, "shape") else None
    if array is None or array.ndim not in (1, 2) or not array.size or not np.isfinite(array).all():
        shape = "no tensor" if array is None else f"a tensor of shape {list(array.shape)}"
        raise InputError(f"a learned word is {shape}, expected finite vectors [n, D]")
    return array.reshape(-1, array.shape[-1]).astype(np.float32)


def with_word(tokenizer: ClipTokenizer, word: str, vectors: Vectors) -> ClipTokenizer:
    """The tokenizer with a token for each vector: `word`, `word_1`, `word_2` and so on.

    Raises InputError: it knows one of them already.
    """
    names = [word, *(f"{word}_{index}" for index in range(1, len(vectors)))]
    return tokenizer.with_learned(dict(zip(names, vectors, strict=True)))


def without_words(tokenizer: ClipTokenizer, words: Sequence[str] | None) -> ClipTokenizer:
    """The tokenizer without these words and their further vectors (None: without any).

    Raises InputError: it has not learned one of them.
    """
    if words is None:
        return tokenizer.with_learned({}, anew=True)
    kept = dict(tokenizer.learned)
    for word in words:
        if word not in kept:
            raise InputError(f"{word!r} is no learned word; learned are {', '.join(kept) or 'none'}")
        for name in _further(word, kept):
            del kept[name]
    return tokenizer.with_learned(kept, anew=True)


def spelled_out(prompt: str, tokenizer: ClipTokenizer) -> str:
    """The prompt with all tokens of words that have several: "a <x>" -> "a <x> <x>_1 <x>_2"."""
    several = {word: found for word in tokenizer.learned if len(found := _further(word, tokenizer.learned)) > 1}
    if not several:
        return prompt
    longest = sorted(tokenizer.learned, key=len, reverse=True)
    pattern = re.compile("|".join(map(re.escape, longest)))
    return pattern.sub(lambda match: " ".join(several.get(match[0], [match[0]])), prompt)


def _further(word: str, known: Mapping[str, Any]) -> list[str]:
    names = [word]
    while f"{word}_{len(names)}" in known:
        names.append(f"{word}_{len(names)}")
    return names


def placed(tokenizer: ClipTokenizer, ids: NDArray[np.int64]) -> tuple[NDArray[np.int64], Vectors, Vectors] | None:
    """Ids [B, S] that the encoder knows, the vectors that take the place of others [B, S, D], and where, [B, S, 1].

    None where there is no learned word.
    """
    if not tokenizer.learned or not (ids >= tokenizer.base_size).any():
        return None
    table = np.stack(list(tokenizer.learned.values()))
    new = ids >= tokenizer.base_size
    vectors = np.where(new[..., None], table[np.where(new, ids - tokenizer.base_size, 0)], 0).astype(np.float32)
    return np.where(new, 0, ids), vectors, new[..., None].astype(np.float32)
