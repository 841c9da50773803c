"""Token ids compared with transformers' CLIPTokenizer."""

import json
import re
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import pytest
import tokenizers
import transformers
from checkpoints import byte_alphabet, tiny_tokenizer
from hypothesis import given, settings
from hypothesis import strategies as st

from anamorph.checkpoint import BUNDLED
from anamorph.errors import CheckpointError, ConfigError, InputError
from anamorph.tokenizer import ClipTokenizer
from anamorph.vocabulary import LARGEST_FILE

Pair = tuple[ClipTokenizer, transformers.CLIPTokenizer]


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Pair:
    """Ours and transformers', from vocabulary and merges."""
    folder = tmp_path_factory.mktemp("tokenizer")
    theirs = tiny_tokenizer(folder)
    (folder / "tokenizer_config.json").write_text(json.dumps({"model_max_length": 77}))
    return ClipTokenizer.from_pretrained(folder), theirs


def expected(theirs: transformers.CLIPTokenizer, text: str) -> list[int]:
    encoded = theirs(text, padding="max_length", max_length=theirs.model_max_length, truncation=True)
    return list(encoded["input_ids"])


@given(st.text(max_size=200))
def test_any_text_gives_the_ids_of_transformers(pair: Pair, text: str) -> None:
    ours, theirs = pair
    assert ours([text]).input_ids[0].tolist() == expected(theirs, text)


@pytest.mark.parametrize(
    "text",
    ["a Photo of 3 CATS, isn't it?", "  two   spaces\tand\nlines ", "naïve café \uff21\uff22\uff23",
     "日本語 🐈\u200d⬛!!", "x" * 300, "", "A<|endoftext|>b", "😀" * 90],
)  # fmt: skip
@pytest.mark.parametrize("folder", ["bundled", "tiny"])
def test_chosen_texts_give_the_ids_of_transformers(pair: Pair, folder: str, text: str) -> None:
    ours, theirs = pair
    if folder == "bundled":
        ours = ClipTokenizer.from_pretrained(BUNDLED, subfolder="tokenizer")
        theirs = transformers.CLIPTokenizer.from_pretrained(BUNDLED / "tokenizer")
    assert ours([text]).input_ids[0].tolist() == expected(theirs, text)


def test_both_layouts_and_what_we_save_give_the_same_ids(pair: Pair, tmp_path: Path) -> None:
    ours, theirs = pair
    text = "a photo of a red dog"
    theirs.save_pretrained(tmp_path / "theirs")
    ours.save_pretrained(tmp_path / "ours")
    assert (tmp_path / "theirs" / "tokenizer.json").is_file()
    for folder in ("theirs", "ours"):
        again = ClipTokenizer.from_pretrained(tmp_path / folder)
        assert again([text]).input_ids.tolist() == ours([text]).input_ids.tolist()
    reread = transformers.CLIPTokenizer.from_pretrained(tmp_path / "ours")
    assert expected(reread, text) == ours([text]).input_ids[0].tolist()
    assert reread.model_max_length == 77


def test_the_pad_token_of_the_second_stable_diffusion(pair: Pair, tmp_path: Path) -> None:
    ours, _ = pair
    ours.save_pretrained(tmp_path)
    special = {**ours.special, "pad_token": {"content": "!", "lstrip": False}}
    (tmp_path / "special_tokens_map.json").write_text(json.dumps(special))
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"model_max_length": 77, "pad_token": "!"}))
    again = ClipTokenizer.from_pretrained(tmp_path)
    theirs = transformers.CLIPTokenizer.from_pretrained(tmp_path)
    assert again(["red cat"]).input_ids[0].tolist() == expected(theirs, "red cat")
    assert again.pad_token_id != again.eos_token_id


def test_what_did_not_fit_is_given_back(pair: Pair) -> None:
    ours, _ = pair
    encoding = ours(["cat " * 75 + "red dog", "cat"])
    assert encoding.truncated == ("red dog", "")
    assert encoding.input_ids[0, -1] == ours.eos_token_id


@pytest.mark.parametrize(
    ("name", "content", "error"),
    [
        ("vocab.json", "{", CheckpointError),
        ("vocab.json", None, CheckpointError),
        ("merges.txt", "zz qq\n", CheckpointError),
        ("tokenizer.json", "{}", CheckpointError),
        ("tokenizer_config.json", '{"tokenizer_class": "T5Tokenizer"}', ConfigError),
    ],
)
def test_damaged_folders_are_refused(
    pair: Pair, tmp_path: Path, name: str, content: str | None, error: type[Exception]
) -> None:
    pair[0].save_pretrained(tmp_path)
    (tmp_path / name).unlink(missing_ok=True)
    if content is not None:
        (tmp_path / name).write_text(content)
    with pytest.raises(error, match=name if error is CheckpointError else "T5Tokenizer"):
        ClipTokenizer.from_pretrained(tmp_path)


SENTENCES = [
    "a photo of a red cat and 12 dogs",
    "the cat's hat, isn't it?",
    "l'été à la plage",
    "they're painting 3 cats!",
] * 4
START, END = "<|startoftext|>", "<|endoftext|>"
SETTINGS = {"lstrip": False, "rstrip": False, "single_word": False}
NORMALISED = {**SETTINGS, "normalized": True}


def train(folder: Path) -> None:
    """Write `vocab.json` and `merges.txt` trained on `SENTENCES`, in CLIP's order."""
    trained = tokenizers.Tokenizer(tokenizers.models.BPE(end_of_word_suffix="</w>"))
    trained.pre_tokenizer = tokenizers.pre_tokenizers.Sequence(
        [tokenizers.pre_tokenizers.Whitespace(), tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=340, initial_alphabet=byte_alphabet(), end_of_word_suffix="</w>", show_progress=False
    )
    trained.train_from_iterator(SENTENCES, trainer)
    merges = [tuple(pair) for pair in json.loads(trained.to_str())["model"]["merges"]]
    letters = byte_alphabet()
    words = [*letters, *(f"{letter}</w>" for letter in letters), *map("".join, merges), START, END]
    (folder / "vocab.json").write_text(json.dumps({word: n for n, word in enumerate(dict.fromkeys(words))}))
    lines = ["#version: 0.2", *(" ".join(pair) for pair in merges)]
    (folder / "merges.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")


def write(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value), encoding="utf-8")


def layout_sd1(folder: Path) -> None:
    """As the first Stable Diffusion was published: special tokens with settings, matched after normalisation."""
    train(folder)
    token = {"__type": "AddedToken", **NORMALISED}
    write(folder / "tokenizer_config.json", {
        "bos_token": {**token, "content": START}, "eos_token": {**token, "content": END},
        "unk_token": {**token, "content": END}, "pad_token": END, "add_prefix_space": False, "errors": "replace",
        "do_lower_case": True, "model_max_length": 16, "tokenizer_class": "CLIPTokenizer", "name_or_path": "clip",
    })  # fmt: skip
    write(folder / "special_tokens_map.json", {
        "bos_token": {**NORMALISED, "content": START}, "eos_token": {**NORMALISED, "content": END},
        "unk_token": {**NORMALISED, "content": END}, "pad_token": END,
    })  # fmt: skip


def layout_sd2(folder: Path) -> None:
    """As the second was published: padded with "!"."""
    layout_sd1(folder)
    for name in ("tokenizer_config.json", "special_tokens_map.json"):
        write(folder / name, {**json.loads((folder / name).read_text()), "pad_token": "!"})


def layout_v4(folder: Path) -> None:
    """As transformers 4 writes it, with a token that was added for a learned concept."""
    layout_sd1(folder)
    size = len(json.loads((folder / "vocab.json").read_text()))
    tokens = {size - 2: {"content": START, **NORMALISED, "special": True},
              size - 1: {"content": END, **SETTINGS, "normalized": False, "special": True},
              size: {"content": "<toy>", **NORMALISED, "special": False}}  # fmt: skip
    write(folder / "tokenizer_config.json", {
        "added_tokens_decoder": tokens, "bos_token": START, "eos_token": END, "unk_token": END, "pad_token": END,
        "clean_up_tokenization_spaces": True, "do_lower_case": True, "errors": "replace", "model_max_length": 16,
        "tokenizer_class": "CLIPTokenizer",
    })  # fmt: skip


def layout_concept(folder: Path) -> None:
    """As textual inversion wrote it before: the added token in a file of its own."""
    layout_sd1(folder)
    write(folder / "added_tokens.json", {"<toy>": len(json.loads((folder / "vocab.json").read_text()))})


def layout_v5(folder: Path) -> None:
    """As transformers 5 writes it: `tokenizer.json`, padded with "!"."""
    with TemporaryDirectory() as draft:
        layout_sd2(Path(draft))
        transformers.CLIPTokenizer.from_pretrained(draft).save_pretrained(folder)
    assert sorted(path.name for path in folder.iterdir()) == ["tokenizer.json", "tokenizer_config.json"]


LAYOUTS = {"sd1": layout_sd1, "sd2": layout_sd2, "v4": layout_v4, "concept": layout_concept, "v5": layout_v5}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A folder of each layout."""
    made = {name: tmp_path_factory.mktemp(name) for name in LAYOUTS}
    for name, folder in made.items():
        LAYOUTS[name](folder)
    return made


@pytest.fixture(scope="module")
def pairs(folders: dict[str, Path]) -> list[Pair]:
    """Ours and transformers' of each layout, and what ours saves read by transformers."""
    loaded = []
    for name, folder in folders.items():
        ours = ClipTokenizer.from_pretrained(folder)
        saved = folder.with_name(f"{name}-saved")
        ours.save_pretrained(saved)
        for place in (folder, saved):
            loaded.append((ours, transformers.CLIPTokenizer.from_pretrained(place)))
        loaded.append((ClipTokenizer.from_pretrained(saved), loaded[-2][1]))
    return loaded


WORDS = ["cat", "Photo", " ", "  ", "\t", "\u00a0", "'s", "'LL", "!", "!!", ".", "12", "é", "e\u0301", "İ", "ß",
         "Ω", "٣", "½", "林檎", "🍎", "👩\u200d🚀", "\u0000", "\u0085", "\u2028", "<toy>", "<TOY>", START, END,
         START.upper(),
         END.upper(), "<|end"]  # fmt: skip
TEXTS = st.text(max_size=60) | st.lists(st.sampled_from(WORDS), max_size=14).map("".join)


@settings(max_examples=150, deadline=None)
@given(TEXTS)
def test_every_layout_gives_the_ids_of_transformers(pairs: list[Pair], text: str) -> None:
    for ours, theirs in pairs:
        assert ours([text]).input_ids[0].tolist() == expected(theirs, text)


@pytest.mark.parametrize("name", LAYOUTS)
def test_facts_about_the_vocabulary(folders: dict[str, Path], name: str) -> None:
    ours = ClipTokenizer.from_pretrained(folders[name])
    theirs = transformers.CLIPTokenizer.from_pretrained(folders[name])
    assert ours.model_max_length == theirs.model_max_length == 16
    assert ours.vocab_size == len(ours) == len(theirs)
    for attribute in ("bos_token_id", "eos_token_id", "pad_token_id"):
        assert getattr(ours, attribute) == getattr(theirs, attribute)
    assert ours.pad_token_id == (0 if name in ("sd2", "v5") else ours.eos_token_id)


@pytest.mark.parametrize("name", LAYOUTS)
def test_the_complete_file_equals_that_of_transformers(folders: dict[str, Path], tmp_path: Path, name: str) -> None:
    transformers.CLIPTokenizer.from_pretrained(folders[name]).save_pretrained(tmp_path)
    theirs = json.loads((tmp_path / "tokenizer.json").read_text(encoding="utf-8"))
    assert json.loads(ClipTokenizer.from_pretrained(folders[name]).to_json()) == theirs


def test_a_batch_and_its_lost_ends(folders: dict[str, Path]) -> None:
    ours = ClipTokenizer.from_pretrained(folders["sd1"])
    theirs = transformers.CLIPTokenizer.from_pretrained(folders["sd1"])
    texts = ["", "Red  Cat", "7 " * 14, "7 " * 14 + "Ünïcode  Tail!", "😀" * 30]
    encoding = ours(texts)
    expected = theirs(texts, padding="max_length", truncation=True, return_tensors="np")["input_ids"]
    assert encoding.input_ids.dtype == np.int64
    np.testing.assert_array_equal(encoding.input_ids, expected)
    assert encoding.truncated[:4] == ("", "", "", "Ünïcode  Tail!")
    assert set(encoding.truncated[4]) == {"😀"}
    assert ours([]).input_ids.shape == (0, 16)


@pytest.mark.parametrize("prompts", ["a bare string", [3], ["ok", None], ["\ud800"]])
def test_prompts_that_are_no_text(folders: dict[str, Path], prompts: Any) -> None:
    with pytest.raises(InputError, match="expected"):
        ClipTokenizer.from_pretrained(folders["sd1"])(prompts)


DAMAGE: list[tuple[str, str, str, type[Exception]]] = [
    ("sd1", "vocab.json", "[]", CheckpointError),
    ("sd1", "vocab.json", '{"a": "b"}', CheckpointError),
    ("sd1", "vocab.json", '{"a": -1}', CheckpointError),
    ("sd1", "vocab.json", "[" * 200_000, CheckpointError),
    ("sd1", "merges.txt", "a b c", CheckpointError),
    ("sd1", "merges.txt", "a b\n\nc d", CheckpointError),
    ("sd1", "special_tokens_map.json", '{"pad_token": "<none>"}', CheckpointError),
    ("sd1", "special_tokens_map.json", '{"pad_token": {}}', CheckpointError),
    ("sd1", "special_tokens_map.json", '{"pad_token": 3}', CheckpointError),
    ("concept", "added_tokens.json", '{"<toy>": 5}', CheckpointError),
    ("concept", "added_tokens.json", '{"<toy>": null}', CheckpointError),
    ("v5", "tokenizer.json", "{", CheckpointError),
    ("v5", "tokenizer.json", '{"model": {"vocab": {"a": 0}}}', CheckpointError),
    ("v5", "tokenizer.json", '{"model": {"vocab": {"a": 0}, "merges": []}}', ConfigError),
]


@pytest.mark.parametrize(("layout", "name", "content", "error"), DAMAGE)
def test_damage_is_named(tmp_path: Path, layout: str, name: str, content: str, error: type[Exception]) -> None:
    LAYOUTS[layout](tmp_path)
    (tmp_path / name).write_text(content)
    with pytest.raises(error, match=re.escape(str(tmp_path))):
        ClipTokenizer.from_pretrained(tmp_path)


@pytest.mark.parametrize("name", ["vocab.json", "merges.txt", "tokenizer_config.json"])
def test_missing_files_are_named(tmp_path: Path, name: str) -> None:
    layout_sd1(tmp_path)
    (tmp_path / name).unlink()
    with pytest.raises(CheckpointError, match=name):
        ClipTokenizer.from_pretrained(tmp_path)


def test_huge_files_are_not_read(tmp_path: Path) -> None:
    layout_sd1(tmp_path)
    with (tmp_path / "vocab.json").open("wb") as file:
        file.truncate(LARGEST_FILE + 1)
    with pytest.raises(CheckpointError, match="expected at most"):
        ClipTokenizer.from_pretrained(tmp_path)


@pytest.mark.parametrize(
    "change",
    [{"model_max_length": 10**30}, {"model_max_length": None}, {"padding_side": "left"}, {"truncation_side": "left"},
     {"split_special_tokens": True}],
)  # fmt: skip
def test_settings_that_are_not_served(tmp_path: Path, change: dict[str, Any]) -> None:
    layout_sd1(tmp_path)
    config = tmp_path / "tokenizer_config.json"
    write(config, {**json.loads(config.read_text()), **change})
    with pytest.raises(ConfigError, match=next(iter(change))):
        ClipTokenizer.from_pretrained(tmp_path)
