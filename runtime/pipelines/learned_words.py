"""Learned words in a pipeline: which of its tokenizers they go to, and whether its encoders can take them."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from anamorph.errors import InputError
from anamorph.hub import HubOptions
from anamorph.pipelines.textual_inversion import (
    LEARNED_PORTS,
    Vectors,
    learned,
    read_source,
    with_word,
    without_words,
)

if TYPE_CHECKING:
    from anamorph.pipelines.base import DiffusionPipeline


def teach(
    pipe: "DiffusionPipeline",
    source: Any,
    token: str | Sequence[str] | None,
    weight_name: str | None,
    subfolder: str | None,
    chosen: tuple[Any, Any],
    hub: HubOptions,
) -> None:
    """Read the sources and give their words to the tokenizers; nothing changes where one of them is refused."""
    sources = list(source) if isinstance(source, list | tuple) else [source]
    tokens: list[str | None] = [token] * len(sources) if token is None or isinstance(token, str) else list(token)
    if len(tokens) != len(sources):
        raise InputError(f"there are {len(sources)} learned words and {len(tokens)} tokens; give as many")
    slot = _slot(pipe, *chosen)
    taught = {name: getattr(pipe, name) for name in _tokenizers(pipe)}
    for one, word in zip(sources, tokens, strict=True):
        for place, (name, vectors) in learned(read_source(one, weight_name, subfolder, hub), word).items():
            home = place or slot
            if home not in taught:
                raise InputError(f"the word {name!r} is for {home}, which {type(pipe).__name__} does not have")
            _check(pipe, home, name, vectors)
            taught[home] = with_word(taught[home], name, vectors)
    for home, tokenizer in taught.items():
        setattr(pipe, home, tokenizer)


def forget(pipe: "DiffusionPipeline", words: Sequence[str] | None) -> None:
    """Take words, or all of them, from every tokenizer that has them."""
    homes = _tokenizers(pipe)
    known = {word for home in homes for word in getattr(pipe, home).learned}
    if lost := [word for word in words or () if word not in known]:
        raise InputError(f"{lost[0]!r} is no learned word; learned are {', '.join(sorted(known)) or 'none'}")
    for home in homes:
        tokenizer = getattr(pipe, home)
        own = None if words is None else [word for word in words if word in tokenizer.learned]
        setattr(pipe, home, without_words(tokenizer, own))


def _tokenizers(pipe: "DiffusionPipeline") -> list[str]:
    slots = pipe.SLOTS.items()
    return [name for name, slot in slots if slot.kind == "tokenizer" and getattr(pipe, name) is not None]


def _slot(pipe: "DiffusionPipeline", tokenizer: Any, text_encoder: Any) -> str:
    """The tokenizer that the caller means, by itself or by its encoder; without either, the first one."""
    homes = _tokenizers(pipe)
    for given, names in ((tokenizer, homes), (text_encoder, [_encoder_of(home) for home in homes])):
        if given is None:
            continue
        for home, name in zip(homes, names, strict=True):
            if getattr(pipe, name) is given:
                return home
        raise InputError(f"tokenizer and text_encoder must be of this pipeline, which has {', '.join(names)}")
    return homes[0]


def _encoder_of(tokenizer: str) -> str:
    return tokenizer.replace("tokenizer", "text_encoder")


def _check(pipe: "DiffusionPipeline", home: str, word: str, vectors: Vectors) -> None:
    name = _encoder_of(home)
    program, width = pipe.program(name), pipe.components[name].config["hidden_size"]
    if vectors.shape[1] != width:
        raise InputError(f"the word {word!r} has vectors of {vectors.shape[1]} numbers, {name} takes {width}; "
                         "it was learned with another model")  # fmt: skip
    if not set(LEARNED_PORTS) <= {port.name for port in program.interface.inputs}:
        raise InputError(
            f"{name} was exported without inputs for learned words; export the checkpoint with the native signature, "
            "or open the checkpoint itself"
        )
