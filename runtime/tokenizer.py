"""CLIP's byte-pair tokenizer (Radford et al. 2021; byte pairs: Sennrich et al. 2016) without transformers."""

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any, Unpack

import numpy as np
from numpy.typing import NDArray
from tokenizers import AddedToken, Regex, Tokenizer, decoders, normalizers, pre_tokenizers, processors
from tokenizers.models import BPE

from anamorph.config import Config
from anamorph.errors import CheckpointError, ConfigError, InputError
from anamorph.files import replacing
from anamorph.hub import HubOptions, find_component
from anamorph.vocabulary import (
    NAMED,
    Vocabulary,
    added_token,
    as_settings,
    content_of,
    named_tokens,
    read_object,
    read_vocabulary,
    with_special_tokens,
)

LONGEST = 1 << 16
"""A larger `model_max_length` is how transformers writes "none", which no text encoder of fixed length can take."""

CLASSES = (None, "CLIPTokenizer", "CLIPTokenizerFast", "PreTrainedTokenizerFast", "TokenizersBackend")

SERVED = {"padding_side": "right", "truncation_side": "right", "split_special_tokens": False}
"""Keys of which only one value is served."""

WORDS = r"<\|startoftext\|>|<\|endoftext\|>|'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"
"""What counts as one word: contractions, runs of letters, single digits, runs of anything else."""


@dataclass(frozen=True)
class Encoding:
    """`input_ids` [B, model_max_length], int64; `truncated[i]` is what was cut off text i ("" if nothing)."""

    input_ids: NDArray[np.int64]
    truncated: tuple[str, ...]


class ClipTokenizer:
    """Texts to token ids as transformers' CLIPTokenizer gives them: begin, text, end, padding.

    The text is normalised (NFC, white space to one blank, lower case), split into words, and the bytes of each word
    are joined pair by pair in the order of the merges, the last one marked with `</w>`.
    """

    def __init__(
        self,
        vocabulary: Vocabulary,
        config: Mapping[str, Any],
        learned: Mapping[str, NDArray[np.float32]] = MappingProxyType({}),
    ) -> None:
        """Build from the files' content; `from_pretrained` is the usual way.

        `learned` words get the ids after all others; what they mean are vectors that an encoder is given for them.

        Raises CheckpointError: the vocabulary is inconsistent, or lacks a special token.
        Raises ConfigError: the configuration asks for what CLIP's tokenizer does not do.
        """
        self.config = Config(config)
        self._vocabulary = vocabulary
        self.model_max_length = _length(config)
        for key, value in SERVED.items():
            if config.get(key, value) != value:
                raise ConfigError(f"the tokenizer does not serve {key}={config[key]!r}; it serves {value!r}")
        names = {key: content_of(config.get(key, default)) for key, default in NAMED.items()}
        self.special = {key: name for key, name in names.items() if name is not None}
        for key in ("bos_token", "eos_token", "unk_token", "pad_token"):
            if not names[key]:
                raise ConfigError(f"the tokenizer's {key} is {names[key]!r}, expected a token such as {NAMED[key]!r}")
        self._tokenizer = _build(vocabulary, self.special["unk_token"])
        self._added = _add(self._tokenizer, vocabulary, _special(config, vocabulary.added))
        self.base_size = self.vocab_size
        self.learned = MappingProxyType(dict(learned))
        self._tokenizer.add_tokens([AddedToken(word, normalized=True) for word in learned])
        known = {**vocabulary.ids, **{token.content: index for index, token in vocabulary.added.items()}}
        self.bos_token_id = known[self.special["bos_token"]]
        self.eos_token_id = known[self.special["eos_token"]]
        self.pad_token_id = known[self.special["pad_token"]]
        self._tokenizer.post_processor = processors.RobertaProcessing(
            (self.special["eos_token"], self.eos_token_id),
            (self.special["bos_token"], self.bos_token_id),
            trim_offsets=False,
            add_prefix_space=False,
        )

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path: str | Path, *, subfolder: str | None = None, **hub: Unpack[HubOptions]
    ) -> "ClipTokenizer":
        """Read a `tokenizer` folder, or that of a hub id.

        It holds `tokenizer_config.json`, and `tokenizer.json` or `vocab.json` and `merges.txt`.

        If both are there, `tokenizer.json` counts, as in transformers.

        Raises CheckpointError: a file is missing, damaged or too large.
        Raises ConfigError: it is another kind of tokenizer.
        """
        place = find_component(pretrained_model_name_or_path, subfolder, ("*.json", "*.txt"), **hub)
        config = read_object(place / "tokenizer_config.json")
        if (name := config.get("tokenizer_class")) not in CLASSES:
            raise ConfigError(f"{place} holds a {name}, expected a CLIPTokenizer; this pipeline serves no other")
        return cls(read_vocabulary(place, config), with_special_tokens(place, config))

    def __call__(self, prompts: Sequence[str]) -> Encoding:
        """Encode each prompt, cut to `model_max_length` (begin and end stay) or padded to it.

        Raises InputError: a bare string instead of a sequence, or something that is no valid text.
        """
        return encode(self._tokenizer, prompts, self.model_max_length, self.eos_token_id, self.pad_token_id)

    def replace(self, **changes: Any) -> "ClipTokenizer":
        """The same vocabulary with some keys of the configuration changed."""
        return ClipTokenizer(self._vocabulary, {**self.config, **changes}, self.learned)

    def with_learned(self, words: Mapping[str, NDArray[np.float32]], *, anew: bool = False) -> "ClipTokenizer":
        """The same with learned words and their vectors [D], beside those that it has or (`anew`) instead of them.

        Raises InputError: one of them is known already.
        """
        had: Mapping[str, NDArray[np.float32]] = {} if anew else self.learned
        known = self._tokenizer.get_vocab(with_added_tokens=True).keys() - (self.learned.keys() if anew else set())
        if twice := [word for word in words if word in known]:
            raise InputError(f"the tokenizer has the word {twice[0]!r} already; choose another one with token=")
        return ClipTokenizer(self._vocabulary, self.config, {**had, **words})

    def words(self, text: str) -> list[tuple[int, str]]:
        """Ids of a text, without begin and end, each with its piece of the text and the blanks before that."""
        found = _encoded(self._tokenizer, text, whole=False)
        ends = [0, *(end for _, end in found.offsets)]
        return [(index, text[begin:end]) for index, begin, end in zip(found.ids, ends, ends[1:], strict=False)]

    def __len__(self) -> int:
        return self.vocab_size

    @property
    def vocab_size(self) -> int:
        """Number of tokens, added ones included."""
        return int(self._tokenizer.get_vocab_size(with_added_tokens=True))

    def to_json(self) -> str:
        """The text of a complete `tokenizer.json`, without truncation and padding."""
        return str(self._tokenizer.to_str(pretty=True))

    def save_pretrained(self, folder: str | Path) -> None:
        """Write `vocab.json`, `merges.txt`, `special_tokens_map.json` and `tokenizer_config.json`.

        Raises OutputError: a file cannot be written.
        """
        if self.learned:
            raise InputError(
                f"the tokenizer has learned {', '.join(self.learned)}, which folders do not hold; call "
                "unload_textual_inversion first, and load the words again where they are needed"
            )
        place = Path(folder)
        words = sorted(self._tokenizer.get_vocab(with_added_tokens=False).items(), key=lambda item: item[1])
        added = {str(index): as_settings(token) for index, token in self._added.items()}
        config = {**self.config, **self.special, "tokenizer_class": "CLIPTokenizer", "added_tokens_decoder": added}
        texts = {
            "vocab.json": json.dumps(dict(words), ensure_ascii=False),
            "merges.txt": "".join(f"{line}\n" for line in ("#version: 0.2", *map(" ".join, self._vocabulary.merges))),
            "special_tokens_map.json": json.dumps(self.special, indent=2, ensure_ascii=False) + "\n",
            "tokenizer_config.json": json.dumps(config, indent=2, ensure_ascii=False, sort_keys=True) + "\n",
        }
        for name, text in texts.items():
            with replacing(place / name) as draft:
                draft.write_bytes(text.encode())


def encode(tokenizer: Tokenizer, prompts: Sequence[str], length: int, end: int, padding: int) -> Encoding:
    """Each prompt as `length` ids: cut off before an `end` token of its own, or filled up with `padding`.

    Raises InputError: a bare string instead of a sequence, or something that is no valid text.
    """
    if isinstance(prompts, str):
        raise InputError("got one string, expected a sequence of prompts; put it into a list")
    rows, lost = np.full((len(prompts), length), padding, np.int64), []
    for row, prompt in zip(rows, prompts, strict=True):
        encoded = _encoded(tokenizer, prompt)
        long = len(encoded.ids) > length
        ids = [*encoded.ids[: length - 1], end] if long else encoded.ids
        row[: len(ids)] = ids
        lost.append(prompt[encoded.offsets[length - 1][0] :] if long else "")
    return Encoding(rows, tuple(lost))


def _encoded(tokenizer: Tokenizer, prompt: str, *, whole: bool = True) -> Any:
    """What the tokenizers package makes of a text; with begin and end where it is `whole`."""
    if not isinstance(prompt, str):
        raise InputError(f"a prompt is a {type(prompt).__name__}, expected text")
    try:
        return tokenizer.encode(prompt, add_special_tokens=whole)
    except (UnicodeEncodeError, TypeError):  # what the tokenizers package raises for text that has no UTF-8 form
        raise InputError(f"the prompt {prompt!r} holds half of a surrogate pair, expected valid Unicode") from None


def _length(config: Mapping[str, Any]) -> int:
    length = config.get("model_max_length", config.get("max_len"))
    if isinstance(length, bool) or not isinstance(length, int) or not 2 <= length <= LONGEST:
        raise ConfigError(
            f"the tokenizer's model_max_length is {length!r}, expected 2 to {LONGEST}; set it in tokenizer_config.json "
            "to the text encoder's max_position_embeddings"
        )
    return length


def _build(vocabulary: Vocabulary, unknown: str) -> Tokenizer:
    """The byte-pair model with CLIP's normalisation and splitting."""
    try:
        model = BPE(
            vocab=dict(vocabulary.ids),
            merges=list(vocabulary.merges),
            unk_token=unknown,
            continuing_subword_prefix="",
            end_of_word_suffix="</w>",
            fuse_unk=False,
        )
    except Exception as error:  # the package raises Exception itself for a merge of unknown tokens
        raise CheckpointError(f"{vocabulary.source} is no sound byte-pair vocabulary: {error}") from None
    tokenizer = Tokenizer(model)
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.NFC(), normalizers.Replace(Regex(r"\s+"), " "), normalizers.Lowercase()]
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(WORDS), behavior="removed", invert=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def _special(config: Mapping[str, Any], added: Mapping[int, AddedToken]) -> list[AddedToken]:
    """Tokens to be found in a text before it is split into words: the recorded ones, then those that are named.

    Where several names share a token and its settings differ, the last one counts, as in transformers.
    """
    found = {token.content: token for _, token in sorted(added.items())}
    recorded = set(found)
    for value in named_tokens(config):
        content = str(content_of(value))
        settings = as_settings(found[content]) if content in recorded else value
        found[content] = added_token(settings if isinstance(settings, Mapping) else {"content": content}, special=True)
    return list(found.values())


def _add(tokenizer: Tokenizer, vocabulary: Vocabulary, tokens: Iterable[AddedToken]) -> dict[int, AddedToken]:
    """Register the special tokens; each must have the id that the files give it."""
    recorded = {token.content: index for index, token in vocabulary.added.items()}
    found: dict[int, AddedToken] = {}
    for token in tokens:
        wanted = recorded.get(token.content, vocabulary.ids.get(token.content))
        if wanted is None:
            raise CheckpointError(f"{vocabulary.source} lacks the special token {token.content!r}; download it again")
        tokenizer.add_tokens([token])
        if tokenizer.token_to_id(token.content) != wanted:
            raise CheckpointError(f"{vocabulary.source} does not give {token.content!r} the recorded id {wanted}")
        found.setdefault(wanted, token)
    return found
