"""Token ids compared with transformers' CLIPTokenizer."""

import json
from pathlib import Path

import pytest
import transformers
from checkpoints import tiny_tokenizer
from hypothesis import given
from hypothesis import strategies as st

from anamorph.checkpoint import BUNDLED
from anamorph.errors import CheckpointError, ConfigError
from anamorph.tokenizer import ClipTokenizer

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
    ["a Photo of 3 CATS, isn't it?", "  two   spaces\tand\nlines ", "naïve café ＡＢＣ", "日本語 🐈‍⬛!!", "x" * 300, "", "A<|endoftext|>b", "😀" * 90],
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
