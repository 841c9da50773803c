"""The files of CLIP's tokenizer: vocabulary, merges and special tokens, in the layouts of every version."""

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from tokenizers import AddedToken

from anamorph.errors import CheckpointError, ConfigError

LARGEST_FILE = 64 << 20
"""A larger file is refused before it is read (bytes); CLIP's own are below 4 MiB."""

NAMED = {"bos_token": "<|startoftext|>", "eos_token": "<|endoftext|>", "unk_token": "<|endoftext|>",
         "sep_token": None, "pad_token": "<|endoftext|>", "cls_token": None, "mask_token": None}  # fmt: skip
"""Keys of the special tokens with CLIP's defaults, in the order in which they are added."""

Merge = tuple[str, str]


class Vocabulary(NamedTuple):
    """What the model files hold: ids of tokens, pairs in the order in which they join, tokens added later with ids."""

    source: str
    ids: Mapping[str, int]
    merges: Sequence[Merge]
    added: Mapping[int, AddedToken]


def named_tokens(config: Mapping[str, Any]) -> Iterator[Any]:
    """The special tokens that a configuration names, as texts or with their settings."""
    yield from (value for key, default in NAMED.items() if (value := config.get(key, default)) is not None)
    extra = config.get("extra_special_tokens") or config.get("additional_special_tokens") or ()
    yield from extra.values() if isinstance(extra, Mapping) else extra


def read_vocabulary(place: Path, config: Mapping[str, Any]) -> Vocabulary:
    """What a folder holds: `tokenizer.json`, or `vocab.json` with `merges.txt`.

    Raises CheckpointError: a file is missing, damaged or too large. Raises ConfigError: it is not CLIP's.
    """
    whole = place / "tokenizer.json"
    complete = read_object(whole) if whole.is_file() else None
    added = _recorded_tokens(place, config, complete)
    if complete is not None:
        model = complete.get("model")
        if not isinstance(model, dict) or not isinstance(model.get("merges"), list):
            raise CheckpointError(f"{whole} holds no byte-pair model, expected CLIP's; download it again")
        if model.get("end_of_word_suffix") != "</w>":
            raise ConfigError(f"{whole} marks no ends of words with </w>, expected CLIP's tokenizer")
        return Vocabulary(str(whole), _ids(whole, model.get("vocab")), list(_pairs(whole, model["merges"])), added)
    words, merges = place / "vocab.json", place / "merges.txt"
    if not words.is_file() and not merges.is_file():
        raise CheckpointError(f"{place} has neither {whole.name} nor {words.name} and {merges.name}; download it again")
    lines = (line.removesuffix("\r") for line in read_text(merges).rstrip().split("\n"))
    pairs = [line for line in lines if not line.startswith("#version")]
    return Vocabulary(
        f"{words} with {merges.name}", _ids(words, read_object(words)), list(_pairs(merges, pairs)), added
    )


def _ids(path: Path, value: Any) -> dict[str, int]:
    if not isinstance(value, dict) or not value or not all(type(index) is int for index in value.values()):
        raise CheckpointError(f"{path} holds no vocabulary, expected tokens with their ids; download it again")
    return value


def _pairs(path: Path, values: Iterable[Any]) -> Iterator[Merge]:
    """Merges as "a b" (files of transformers 4) or ["a", "b"]."""
    for number, value in enumerate(values, 1):
        parts = value.split(" ") if isinstance(value, str) else value
        if not isinstance(parts, list) or len(parts) != 2 or not all(isinstance(part, str) for part in parts):
            raise CheckpointError(f"{path}: merge {number} is {value!r}, expected two tokens; download it again")
        yield parts[0], parts[1]


def _recorded_tokens(
    place: Path, config: Mapping[str, Any], complete: Mapping[str, Any] | None
) -> dict[int, AddedToken]:
    """Added tokens by id, from the place where this layout keeps them: the configuration, or files of their own."""
    source = place / "tokenizer_config.json"
    try:
        if "added_tokens_decoder" in config:
            return {int(index): added_token(value) for index, value in config["added_tokens_decoder"].items()}
        found = {}
        if (source := place / "added_tokens.json").is_file():
            special = {content_of(value) for value in named_tokens(with_special_tokens(place, config))}
            for content, index in read_object(source).items():
                found[int(index)] = AddedToken(content, special=content in special, normalized=content not in special)
        source = place / "tokenizer.json"
        for value in (complete or {}).get("added_tokens", ()):
            found[int(value["id"])] = added_token(value)
    except (TypeError, ValueError, KeyError, AttributeError) as error:
        raise CheckpointError(f"{source} holds damaged added tokens ({error}); download it again") from None
    return found


def with_special_tokens(place: Path, config: Mapping[str, Any]) -> dict[str, Any]:
    """The configuration with `special_tokens_map.json` on top, where the layout keeps special tokens there."""
    source = place / "special_tokens_map.json"
    separate = source.is_file() and "added_tokens_decoder" not in config
    merged = {**config, **(read_object(source) if separate else {})}
    for value in named_tokens(merged):
        content = value.get("content") if isinstance(value, Mapping) else value
        if not isinstance(content, str):
            raise CheckpointError(f"{place} names {value!r} as a special token, expected text; download it again")
    return merged


def added_token(value: Mapping[str, Any], **settings: bool) -> AddedToken:
    """A token as files describe it, with other `settings`."""
    flags = {key: value[key] for key in ("single_word", "lstrip", "rstrip", "normalized", "special") if key in value}
    return AddedToken(value["content"], **{**flags, **settings})


def content_of(value: Any) -> str | None:
    """The text of a token that a file gives as a string or with its settings."""
    content: str | None = value["content"] if isinstance(value, Mapping) else value
    return content


def as_settings(token: AddedToken) -> dict[str, str | bool]:
    """A token as files describe it."""
    return {"content": token.content, "lstrip": token.lstrip, "normalized": token.normalized, "rstrip": token.rstrip,
            "single_word": token.single_word, "special": token.special}  # fmt: skip


def read_text(path: Path) -> str:
    """A file of a tokenizer; raises CheckpointError: it is missing, too large or no UTF-8."""
    try:
        if (size := path.stat().st_size) > LARGEST_FILE:
            raise CheckpointError(f"{path} has {size} bytes, expected at most {LARGEST_FILE}; it is no vocabulary")
        return path.read_bytes().decode("utf-8")
    except FileNotFoundError:
        raise CheckpointError(f"{path} is missing; is {path.parent} a complete tokenizer folder?") from None
    except (OSError, UnicodeDecodeError) as error:
        raise CheckpointError(f"{path} cannot be read: {error}") from None


def read_object(path: Path) -> dict[str, Any]:
    """A JSON object of a tokenizer; raises CheckpointError: it is missing, damaged or something else."""
    try:
        value = json.loads(read_text(path))
    except (json.JSONDecodeError, RecursionError) as error:
        raise CheckpointError(f"{path} cannot be read as JSON: {error}") from None
    if not isinstance(value, dict):
        raise CheckpointError(f"{path} holds a {type(value).__name__}, expected a JSON object")
    return value
