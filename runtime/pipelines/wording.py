"""From prompts to tokens with weights: emphasis in brackets, and texts longer than the encoder takes.

The notation is that of AUTOMATIC1111's web interface: `(words)` weighs 1.1 times more, `[words]` 1.1 times less,
`(words:1.3)` 1.3 times more, brackets nest, and a backslash takes a bracket as it is. In prompts that may be long, the
word BREAK in capitals fills a chunk up, so that what follows begins the next one, and a chunk that is full ends behind
its last comma, where that is among its last twenty tokens and the next token is none.
"""

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from anamorph.tokenizer import ClipTokenizer

MORE = 1.1
"""What a pair of round brackets multiplies a weight with, and a pair of square ones divides it by."""
PIECE = re.compile(r"\\[()\[\]\\]|[()\[\]]|[^()\[\]\\]+|\\")
BREAK = re.compile(r"\s*\bBREAK\b\s*")
TAIL = 20
"""So many tokens at the end of a full chunk are looked through for a comma; what follows it moves on."""
NUMBER = re.compile(r"^(.*):\s*([+-]?(?:\d+\.?\d*|\.\d+))\s*$", re.DOTALL)


@dataclass(frozen=True)
class Wording:
    """How prompts are read: with `weighted` brackets, and `long` ones in as many chunks as they need."""

    weighted: bool = False
    long: bool = False


PLAIN = Wording()
"""Brackets are characters like others, and what is too long is cut off."""


@dataclass(frozen=True)
class Tokens:
    """Prompts as chunks of the encoder's length.

    `ids` and `weights` [P, K, S]; begin, end and padding weigh 1. `cut` is what was left out of each prompt.
    """

    ids: NDArray[np.int64]
    weights: NDArray[np.float32]
    cut: tuple[str, ...]


def emphases(prompt: str) -> list[tuple[str, float]]:
    """Runs of text and their weights; a bracket that is never closed counts to the end.

    >>> emphases("a (red:1.5) [cat]")
    [('a ', 1.0), ('red', 1.5), (' ', 1.0), ('cat', 0.9090909090909091)]
    """
    runs: list[tuple[str, float]] = []
    open_: list[tuple[str, int]] = []
    """Brackets that wait for their end, and how many runs came before."""
    for piece in PIECE.findall(prompt):
        if piece in ("(", "["):
            open_.append((piece, len(runs)))
        elif piece in (")", "]") and open_ and open_[-1][0] == {")": "(", "]": "["}[piece]:
            bracket, first = open_.pop()
            factor = MORE if bracket == "(" else 1 / MORE
            if bracket == "(" and len(runs) > first and (found := NUMBER.match(runs[-1][0])):
                runs[-1] = (found[1], runs[-1][1])
                factor = float(found[2])
            runs[first:] = [(text, weight * factor) for text, weight in runs[first:]]
        else:
            runs.append((piece[1:] if len(piece) == 2 and piece[0] == "\\" else piece, 1.0))
    for bracket, first in open_:
        factor = MORE if bracket == "(" else 1 / MORE
        runs[first:] = [(text, weight * factor) for text, weight in runs[first:]]
    return list(_joined(runs))


def _joined(runs: Sequence[tuple[str, float]]) -> Iterator[tuple[str, float]]:
    """Neighbours of equal weight are one run, so that words that an escaped bracket divides are tokenised together."""
    text, weight = "", 1.0
    for part, own in runs:
        if own != weight and text:
            yield text, weight
            text = ""
        text, weight = text + part, own
    if text:
        yield text, weight


def read(tokenizer: ClipTokenizer, prompts: Sequence[str], wording: Wording) -> Tokens:
    """Prompts to chunks; what does not fit into one is cut off, unless `long` is asked for.

    All prompts get as many as the longest one needs; chunks without words stand for the empty text.
    """
    if not wording.weighted and not wording.long:
        encoding = tokenizer(prompts)
        ids = encoding.input_ids[:, None]
        return Tokens(ids, np.ones(ids.shape, np.float32), encoding.truncated)
    room = tokenizer.model_max_length - 2
    rows = [_chunks(tokenizer, prompt, wording, room) for prompt in prompts]
    count = max(map(len, rows)) if wording.long else 1
    ids = _empty(tokenizer, len(rows), count)
    weights = np.ones(ids.shape, np.float32)
    for prompt, row in enumerate(rows):
        for chunk, words in enumerate(row[:count]):
            ids[prompt, chunk, 1 : 1 + len(words)] = [index for index, _, _ in words]
            ids[prompt, chunk, 1 + len(words)] = tokenizer.eos_token_id
            weights[prompt, chunk, 1 : 1 + len(words)] = [weight for _, weight, _ in words]
    cut = tuple("".join(word for words in row[count:] for _, _, word in words).strip() for row in rows)
    return Tokens(ids, weights, cut)


def filled(tokenizer: ClipTokenizer, tokens: Tokens, chunks: int) -> Tokens:
    """The same with chunks without words after it, until there are so many."""
    more = _empty(tokenizer, len(tokens.ids), chunks - tokens.ids.shape[1])
    weights = np.concatenate([tokens.weights, np.ones(more.shape, np.float32)], axis=1)
    return Tokens(np.concatenate([tokens.ids, more], axis=1), weights, tokens.cut)


def _empty(tokenizer: ClipTokenizer, prompts: int, chunks: int) -> NDArray[np.int64]:
    """Chunks that say nothing: begin, end, padding."""
    ids = np.full((prompts, chunks, tokenizer.model_max_length), tokenizer.pad_token_id, np.int64)
    ids[:, :, 0], ids[:, :, 1] = tokenizer.bos_token_id, tokenizer.eos_token_id
    return ids


Word = tuple[int, float, str]
"""A token, its weight, and the text that it stands for."""


def _chunks(tokenizer: ClipTokenizer, prompt: str, wording: Wording, room: int) -> list[list[Word]]:
    """As many words as have `room` in each chunk; at least one chunk."""
    sections: list[list[Word]] = [[]]
    for text, weight in emphases(prompt) if wording.weighted else [(prompt, 1.0)]:
        for number, part in enumerate(BREAK.split(text) if wording.long else [text]):
            sections += [[]] if number else []
            sections[-1] += [(index, weight, word) for index, word in tokenizer.words(part)]
    if len(sections) > 1 and not sections[-1]:  # nothing follows the last BREAK
        sections.pop()
    comma = tokenizer.words(",")[0][0] if wording.long else None
    return [chunk for words in sections for chunk in _divided(words, room, comma)]


def _divided(words: list[Word], room: int, comma: int | None) -> Iterator[list[Word]]:
    """Words in chunks that end where there is no more room, or behind a comma shortly before."""
    while len(words) > room:
        near = () if words[room][0] == comma else range(room - 1, room - 1 - TAIL, -1)
        end = next((place + 1 for place in near if words[place][0] == comma), room)
        yield words[:end]
        words = words[end:]
    yield words


def emphasised(states: NDArray[np.float32], weights: NDArray[np.float32]) -> NDArray[np.float32]:
    """Hidden states times their tokens' weights, each chunk brought back to its mean: [P, K S, D], [P, K, S] -> same.

    z' = w z mean(z) / mean(w z) for each chunk, as AUTOMATIC1111's web interface does it for one prompt.
    """
    if (weights == 1).all():
        return states
    prompts, chunks, length = weights.shape
    before = states.reshape(prompts, chunks, length, -1).astype(np.float64)
    after = before * weights[..., None]
    axes = (2, 3)
    scale = before.mean(axes, keepdims=True) / after.mean(axes, keepdims=True)
    result: NDArray[np.float32] = (after * scale).reshape(states.shape).astype(np.float32)
    return result
