"""BERT's tokenizer of word pieces (Devlin et al. 2018; pieces: Wu et al. 2016) without transformers."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Unpack

from tokenizers import AddedToken, Tokenizer, decoders, normalizers, pre_tokenizers, processors
from tokenizers.models import WordPiece

from anamorph.config import Config
from anamorph.errors import CheckpointError, ConfigError
from anamorph.files import replacing
from anamorph.hub import HubOptions, find_component
from anamorph.tokenizer import Encoding, encode
from anamorph.vocabulary import read_object, read_text

CLASSES = ("BertTokenizer", "BertTokenizerFast")
SPECIAL = {"unk_token": "[UNK]", "sep_token": "[SEP]", "pad_token": "[PAD]", "cls_token": "[CLS]",
           "mask_token": "[MASK]"}  # fmt: skip
"""Keys of the special tokens with BERT's defaults."""
USUAL = 512
"""The length of files that do not state one (tokens)."""


class BertTokenizer:
    """Texts to token ids as transformers' BertTokenizer gives them: [CLS], pieces of words, [SEP], padding.

    Words are cut at white space, punctuation and Chinese characters, in lower case and without accents unless the
    configuration says otherwise; each is the longest pieces of the vocabulary from the left on.
    """

    def __init__(self, vocabulary: Mapping[str, int], config: Mapping[str, Any], length: int | None = None) -> None:
        """Build from the files' content; `from_pretrained` is the usual way, and `limited` sets the `length`.

        Raises CheckpointError: the vocabulary lacks a special token.
        Raises ConfigError: the configuration asks for what BERT's tokenizer does not do.
        """
        self.config, self.vocabulary = Config(config), dict(vocabulary)
        self.model_max_length = _length(config) if length is None else length
        self.special = {key: content_of(config.get(key) or default) for key, default in SPECIAL.items()}
        if missing := [name for name in self.special.values() if name not in self.vocabulary]:
            raise CheckpointError(f"the vocabulary lacks the special token {missing[0]!r}; download it again")
        ids = {key: self.vocabulary[name] for key, name in self.special.items()}
        self.end_id, self.pad_token_id = ids["sep_token"], ids["pad_token"]
        self._tokenizer = Tokenizer(WordPiece(self.vocabulary, unk_token=self.special["unk_token"]))
        self._tokenizer.normalizer = normalizers.BertNormalizer(
            clean_text=True,
            handle_chinese_chars=config.get("tokenize_chinese_chars", True),
            strip_accents=config.get("strip_accents"),
            lowercase=config.get("do_lower_case", True),
        )
        self._tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
        self._tokenizer.decoder = decoders.WordPiece(prefix="##")
        self._tokenizer.add_special_tokens([AddedToken(name, special=True) for name in self.special.values()])
        begin, end = self.special["cls_token"], self.special["sep_token"]
        self._tokenizer.post_processor = processors.BertProcessing((end, self.end_id), (begin, ids["cls_token"]))

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path: str | Path, *, subfolder: str | None = None, **hub: Unpack[HubOptions]
    ) -> "BertTokenizer":
        """Read a `tokenizer` folder, or that of a hub id: `tokenizer_config.json`, and `tokenizer.json` or `vocab.txt`.

        Raises CheckpointError: a file is missing, damaged or too large.
        Raises ConfigError: it is another kind of tokenizer.
        """
        place = find_component(pretrained_model_name_or_path, subfolder, ("*.json", "*.txt"), **hub)
        file = place / "tokenizer_config.json"
        config = read_object(file) if file.is_file() else {}  # BERT's defaults are enough
        if (name := config.get("tokenizer_class", CLASSES[0])) not in CLASSES:
            raise ConfigError(f"{place} holds a {name}, expected a BertTokenizer; this pipeline serves no other")
        return cls(read_vocabulary(place), config)

    def limited(self, length: int) -> "BertTokenizer":
        """The same with another `model_max_length`, such as what a text encoder takes (tokens)."""
        return BertTokenizer(self.vocabulary, self.config, length)

    def __call__(self, prompts: Sequence[str]) -> Encoding:
        """Encode each prompt, cut to `model_max_length` (begin and end stay) or padded to it.

        Raises InputError: a bare string instead of a sequence, or something that is no valid text.
        """
        return encode(self._tokenizer, prompts, self.model_max_length, self.end_id, self.pad_token_id)

    def to_json(self) -> str:
        """The text of a complete `tokenizer.json`, without truncation and padding."""
        return str(self._tokenizer.to_str(pretty=True))

    def save_pretrained(self, folder: str | Path) -> None:
        """Write `vocab.txt` and `tokenizer_config.json`; raises OutputError: a file cannot be written."""
        place = Path(folder)
        words = sorted(self.vocabulary, key=self.vocabulary.__getitem__)
        config = {**self.config, **self.special, "tokenizer_class": CLASSES[0]}
        texts = {
            "vocab.txt": "".join(f"{word}\n" for word in words),
            "tokenizer_config.json": json.dumps(config, indent=2, ensure_ascii=False, sort_keys=True) + "\n",
        }
        for name, text in texts.items():
            with replacing(place / name) as draft:
                draft.write_bytes(text.encode())


def _length(config: Mapping[str, Any]) -> int:
    length = config.get("model_max_length", USUAL)
    if isinstance(length, bool) or not isinstance(length, int) or length < 2:
        raise ConfigError(f"the tokenizer's model_max_length is {length!r}, expected 2 or more")
    return min(length, USUAL)  # transformers writes 10^30 for none


def content_of(value: Any) -> str:
    content = value.get("content") if isinstance(value, Mapping) else value
    if not isinstance(content, str):
        raise ConfigError(f"the tokenizer names {value!r} as a special token, expected text")
    return content


def read_vocabulary(place: Path) -> dict[str, int]:
    """Pieces with their ids, from whichever file is there; `tokenizer.json` counts first, as in transformers."""
    whole, words = place / "tokenizer.json", place / "vocab.txt"
    if not whole.is_file():
        lines = read_text(words).removesuffix("\n").split("\n")
        return {line.removesuffix("\r"): index for index, line in enumerate(lines)}
    model = read_object(whole).get("model")
    if not isinstance(model, dict) or model.get("type", "WordPiece") != "WordPiece":
        raise ConfigError(f"{whole} holds no model of word pieces, expected BERT's")
    found = model.get("vocab")
    if not isinstance(found, dict) or not all(type(index) is int for index in found.values()):
        raise CheckpointError(f"{whole} holds no vocabulary, expected tokens with their ids; download it again")
    return found
