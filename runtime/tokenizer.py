"""CLIP's byte-pair tokenizer on the `tokenizers` package; no transformers needed."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

from anamorph.config import read_json
from anamorph.errors import CheckpointError, ConfigError, InputError
from anamorph.files import replacing

LARGEST_FILE = 64 << 20
"""A vocabulary file beyond this size is refused (bytes); CLIP's has 1 MB."""

WORDS = r"<\|startoftext\|>|<\|endoftext\|>|'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"
"""What counts as a word (Radford et al. 2021, github.com/openai/CLIP, simple_tokenizer.py)."""

SPECIAL = {"bos_token": "<|startoftext|>", "eos_token": "<|endoftext|>", "unk_token": "<|endoftext|>",
           "pad_token": "<|endoftext|>"}  # fmt: skip
CLASSES = ("CLIPTokenizer", "CLIPTokenizerFast", "PreTrainedTokenizerFast", "TokenizersBackend")
USUAL_LENGTH = 77


@dataclass(frozen=True)
class Encoding:
    """Token ids [B, model_max_length] int64, and per text what did not fit ("" where all did)."""

    input_ids: NDArray[np.int64]
    truncated: tuple[str, ...]


class ClipTokenizer:
    """Texts to token ids, begun, ended, cut and padded to `model_max_length` as CLIP was trained."""

    def __init__(self, tokenizer: Tokenizer, special: Mapping[str, str], model_max_length: int) -> None:
        self._tokenizer = tokenizer
        self.special = dict(special)
        self.model_max_length = model_max_length
        self.bos_token_id = self._id("bos_token")
        self.eos_token_id = self._id("eos_token")
        self.pad_token_id = self._id("pad_token")

    def _id(self, role: str) -> int:
        index = self._tokenizer.token_to_id(self.special[role])
        if index is None:
            raise CheckpointError(f"the tokenizer's vocabulary has no {role} {self.special[role]!r}; it is incomplete")
        return int(index)

    @property
    def vocab_size(self) -> int:
        """Number of tokens, special ones included."""
        return int(self._tokenizer.get_vocab_size())

    @classmethod
    def from_pretrained(cls, folder: str | Path, *, subfolder: str | None = None) -> "ClipTokenizer":
        """Read a `tokenizer/` folder: `tokenizer.json`, or `vocab.json` and `merges.txt`.

        Raises CheckpointError: a file is missing, damaged or too large.
        Raises ConfigError: the folder holds a tokenizer of another kind.
        """
        place = Path(folder) / subfolder if subfolder else Path(folder)
        config = _optional(place / "tokenizer_config.json")
        if (kind := config.get("tokenizer_class", CLASSES[0])) not in CLASSES:
            raise ConfigError(f"{place} holds a {kind}, expected a CLIPTokenizer")
        special = {**SPECIAL, **_tokens(_optional(place / "special_tokens_map.json")), **_tokens(config)}
        whole = place / "tokenizer.json"
        tokenizer = _from_json(whole) if whole.is_file() else _from_vocabulary(place, special)
        length = config.get("model_max_length", USUAL_LENGTH)
        if not isinstance(length, int) or not 3 <= length <= 1 << 20:
            length = USUAL_LENGTH  # transformers writes 1e30 where the length was never said
        return cls(tokenizer, special, length)

    def __call__(self, texts: Sequence[str]) -> Encoding:
        """Encode texts; raises InputError where one is no text."""
        if isinstance(texts, str) or not all(isinstance(text, str) for text in texts):
            raise InputError("the tokenizer takes a list of texts")
        ids = np.full((len(texts), self.model_max_length), self.pad_token_id, np.int64)
        lost = []
        room = self.model_max_length - 2
        for row, text in enumerate(texts):
            encoding = self._tokenizer.encode(text, add_special_tokens=False)
            kept = encoding.ids[:room]
            ids[row, : len(kept) + 2] = [self.bos_token_id, *kept, self.eos_token_id]
            lost.append(text[encoding.offsets[room][0] :].strip() if len(encoding.ids) > room else "")
        return Encoding(ids, tuple(lost))

    def to_json(self) -> str:
        """The text of a complete `tokenizer.json`."""
        return str(self._tokenizer.to_str())

    def save_pretrained(self, folder: str | Path) -> None:
        """Write the files that transformers 4 and 5 read.

        Raises OutputError: the disk is full or read-only.
        """
        place = Path(folder)
        model = json.loads(self.to_json())["model"]
        merges = [pair if isinstance(pair, str) else " ".join(pair) for pair in model["merges"]]
        config = {**self.special, "tokenizer_class": CLASSES[0], "model_max_length": self.model_max_length,
                  "do_lower_case": True, "add_prefix_space": False, "errors": "replace"}  # fmt: skip
        texts = {
            "vocab.json": json.dumps(model["vocab"], ensure_ascii=False),
            "merges.txt": "\n".join(["#version: 0.2", *merges]) + "\n",
            "special_tokens_map.json": json.dumps(self.special, indent=2) + "\n",
            "tokenizer_config.json": json.dumps(config, indent=2) + "\n",
        }
        for name, text in texts.items():
            with replacing(place / name) as draft:
                draft.write_text(text, encoding="utf-8")


def _optional(path: Path) -> dict[str, Any]:
    return read_json(path) if path.is_file() else {}


def _tokens(values: Mapping[str, Any]) -> dict[str, str]:
    """The special tokens of a file, each a text or an object with its text under `content`."""
    found = {role: values[role] for role in SPECIAL if values.get(role) is not None}
    return {role: str(token["content"] if isinstance(token, dict) else token) for role, token in found.items()}


def _checked(path: Path) -> str:
    try:
        if path.stat().st_size > LARGEST_FILE:
            raise CheckpointError(f"{path} is larger than {LARGEST_FILE >> 20} MiB; no CLIP vocabulary is")
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise CheckpointError(f"{path} cannot be read: {error}") from None


def _from_json(path: Path) -> Tokenizer:
    try:
        tokenizer = Tokenizer.from_str(_checked(path))
    except CheckpointError:
        raise
    except Exception as error:  # the tokenizers package raises plain Exception for whatever it cannot parse
        raise CheckpointError(f"{path} is no complete tokenizer: {error}") from None
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer


def _from_vocabulary(place: Path, special: Mapping[str, str]) -> Tokenizer:
    vocab, merges = place / "vocab.json", place / "merges.txt"
    pairs = [tuple(line.split(" ")) for line in _checked(merges).splitlines() if line and not line.startswith("#version")]
    _checked(vocab)
    try:
        bpe = models.BPE(
            vocab=read_json(vocab),
            merges=pairs,
            continuing_subword_prefix="",
            end_of_word_suffix="</w>",
            unk_token=special["unk_token"],
        )
    except Exception as error:  # the tokenizers package raises plain Exception for whatever does not fit
        raise CheckpointError(f"{merges} does not fit {vocab.name}: {error}") from None
    tokenizer = Tokenizer(bpe)
    spaces = normalizers.Replace(Regex(r"\s+"), " ")
    tokenizer.normalizer = normalizers.Sequence([normalizers.NFC(), spaces, normalizers.Lowercase()])
    words = pre_tokenizers.Split(Regex(WORDS), behavior="removed", invert=True)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([words, pre_tokenizers.ByteLevel(add_prefix_space=False)])
    tokenizer.decoder = decoders.ByteLevel()
    names = dict.fromkeys(special[role] for role in ("bos_token", "eos_token"))
    tokenizer.add_special_tokens([AddedToken(name, normalized=False, special=True) for name in names])
    ends = [(special[role], int(tokenizer.token_to_id(special[role]))) for role in ("eos_token", "bos_token")]
    tokenizer.post_processor = processors.RobertaProcessing(*ends, trim_offsets=False, add_prefix_space=False)
    return tokenizer
