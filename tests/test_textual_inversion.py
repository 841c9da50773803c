"""Learned words: every form of file, several vectors, every engine, beside diffusers."""

from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from exported import FORMATS, exported
from parity import IMAGE_BOUND
from safetensors.torch import save_file

from anamorph import DiffusionPipeline, StableDiffusionImg2ImgPipeline, StableDiffusionPipeline
from anamorph.artifact import NATIVE
from anamorph.errors import CheckpointError, InputError

WORD = "<cat-toy>"
CALL: dict[str, Any] = {"num_inference_steps": 2, "output_type": "np"}
PROMPT = f"a photo of {WORD} and a <Cat-Toy> red dog"


def vectors(count: int, width: int = 32, seed: int = 7) -> torch.Tensor:
    return torch.randn(count, width, generator=torch.Generator().manual_seed(seed))


def drawn(pipe: Any, prompt: str = PROMPT) -> Any:
    return pipe(prompt, generator=torch.Generator().manual_seed(1), **CALL).images


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The same word of three vectors in every form."""
    folder, values = tmp_path_factory.mktemp("words"), vectors(3)
    torch.save({WORD: values}, folder / "learned_embeds.bin")
    save_file({WORD: values}, folder / "diffusers.safetensors")
    save_file({"emb_params": values.to(torch.float32)}, folder / "nameless.safetensors")
    content = {"string_to_token": {"*": 265}, "string_to_param": {"*": values}, "name": WORD, "step": 100,
               "sd_checkpoint": None, "sd_checkpoint_name": None}  # fmt: skip
    torch.save(content, folder / "automatic.pt")
    return {"folder": folder, **{path.stem: path for path in folder.iterdir()}}


@pytest.fixture(scope="module")
def expected(sd1: Path, files: dict[str, Path]) -> Any:
    """diffusers' picture with the word."""
    pipe: Any = diffusers.StableDiffusionPipeline.from_pretrained(sd1, safety_checker=None)
    pipe.set_progress_bar_config(disable=True)
    pipe.load_textual_inversion(files["folder"], weight_name="learned_embeds.bin")
    return drawn(pipe)


@pytest.mark.parametrize(
    "form", ["folder", "learned_embeds", "diffusers", "nameless", "automatic", "mapping", "tensor"]
)
def test_every_form_draws_what_diffusers_draws(sd1: Path, files: dict[str, Path], expected: Any, form: str) -> None:
    pipe: Any = StableDiffusionPipeline.from_pretrained(sd1, backend="eager")
    plain = drawn(pipe)
    if form in ("mapping", "tensor"):
        pipe.load_textual_inversion({WORD: vectors(3)} if form == "mapping" else vectors(3), token=WORD)
    else:
        pipe.load_textual_inversion(files[form], token=WORD if form == "nameless" else None)
    with_word = drawn(pipe)
    assert np.abs(with_word - expected).max() <= IMAGE_BOUND
    assert np.abs(plain - expected).max() > 100 * IMAGE_BOUND
    assert pipe.maybe_convert_prompt(f"a {WORD}!", pipe.tokenizer) == f"a {WORD} {WORD}_1 {WORD}_2!"
    assert np.array_equal(drawn(StableDiffusionPipeline(**pipe.components)), with_word)
    pipe.unload_textual_inversion()
    assert np.array_equal(drawn(pipe), plain)


@pytest.mark.parametrize("engine", FORMATS)
def test_other_engines_take_the_words_without_a_new_export(
    sd1: Path, files: dict[str, Path], expected: Any, engine: str
) -> None:
    pipe: Any = StableDiffusionPipeline.from_pretrained(exported(sd1, engine, NATIVE), backend=engine)
    plain = drawn(pipe)
    pipe.load_textual_inversion(files["folder"])
    assert np.abs(drawn(pipe) - expected).max() <= IMAGE_BOUND
    pipe.unload_textual_inversion(WORD)
    assert np.array_equal(drawn(pipe), plain)


def test_a_portable_export_refuses_them(sd1: Path, files: dict[str, Path]) -> None:
    pipe: Any = StableDiffusionPipeline.from_pretrained(exported(sd1, "onnxruntime"), backend="onnxruntime")
    with pytest.raises(InputError, match="text_encoder was exported without inputs for learned words"):
        pipe.load_textual_inversion(files["folder"])
    assert not pipe.tokenizer.learned


def test_several_words_are_loaded_and_forgotten_one_by_one(sd1: Path) -> None:
    theirs: Any = diffusers.StableDiffusionPipeline.from_pretrained(sd1, safety_checker=None)
    theirs.set_progress_bar_config(disable=True)
    theirs.load_textual_inversion([vectors(2), vectors(1, seed=8)], token=["<one>", "<two>"])
    prompt = "a <two> of <one><two> cats"
    pipe: Any = StableDiffusionPipeline.from_pretrained(sd1, backend="eager")
    pipe.load_textual_inversion([vectors(2), vectors(1, seed=8)], token=["<one>", "<two>"])
    assert np.abs(drawn(pipe, prompt) - drawn(theirs, prompt)).max() <= IMAGE_BOUND
    other = StableDiffusionImg2ImgPipeline.from_pipe(pipe)
    assert list(other.tokenizer.learned) == ["<one>", "<one>_1", "<two>"]
    pipe.unload_textual_inversion("<one>")
    theirs.unload_textual_inversion("<one>")
    assert list(pipe.tokenizer.learned) == ["<two>"]
    assert np.abs(drawn(pipe, prompt) - drawn(theirs, prompt)).max() <= IMAGE_BOUND
    weighed = pipe("a (<two>:1.5) cat", prompt_weighting=True, seed=0, **CALL).images
    assert np.abs(weighed - pipe("a <two> cat", seed=0, **CALL).images).max() > IMAGE_BOUND


def test_words_for_two_encoders(sdxl: Path, tmp_path: Path) -> None:
    wide, narrow = vectors(2, 32), vectors(2, 40, seed=8)
    save_file({"clip_l": wide, "clip_g": narrow}, tmp_path / "both.safetensors")
    theirs: Any = diffusers.StableDiffusionXLPipeline.from_pretrained(sdxl)
    theirs.set_progress_bar_config(disable=True)
    theirs.load_textual_inversion(wide, token=WORD, text_encoder=theirs.text_encoder, tokenizer=theirs.tokenizer)
    theirs.load_textual_inversion(narrow, token=WORD, text_encoder=theirs.text_encoder_2, tokenizer=theirs.tokenizer_2)
    expected = drawn(theirs)
    one: Any = DiffusionPipeline.from_pretrained(sdxl, backend="eager")
    plain = drawn(one)
    one.load_textual_inversion(tmp_path / "both.safetensors", token=WORD)
    other: Any = DiffusionPipeline.from_pretrained(sdxl, backend="eager")
    other.load_textual_inversion(wide, token=WORD)
    other.load_textual_inversion(narrow, token=WORD, text_encoder=other.text_encoder_2, tokenizer=other.tokenizer_2)
    for pipe in (one, other):
        assert np.abs(drawn(pipe) - expected).max() <= IMAGE_BOUND
    assert np.abs(plain - expected).max() > 10 * IMAGE_BOUND


class Trap:
    def __init__(self, place: Path) -> None:
        self.place = place

    def __reduce__(self) -> Any:
        return Path.mkdir, (self.place,)


def test_what_is_no_learned_word_is_refused_and_changes_nothing(sd1: Path, tmp_path: Path) -> None:
    pipe: Any = StableDiffusionPipeline.from_pretrained(sd1, backend="null")
    torch.save({WORD: Trap(tmp_path / "ran")}, tmp_path / "learned_embeds.bin")
    with pytest.raises(CheckpointError, match="cannot be loaded as plain weights: it refers to"):
        pipe.load_textual_inversion(tmp_path)
    assert not (tmp_path / "ran").exists()
    refused: list[tuple[Any, Any, str]] = [
        ({WORD: vectors(1, 24)}, None, "has vectors of 24 numbers, text_encoder takes 32"),
        (vectors(1), None, "the file does not name its word; pass token="),
        ({"a": vectors(1), "b": vectors(1)}, None, "one tensor, or one for each of clip_l, clip_g; this holds a, b"),
        ({WORD: "text"}, None, "a learned word is no tensor"),
        ({WORD: torch.full((1, 32), torch.nan)}, None, "expected finite vectors"),
        (vectors(1), "cat</w>", "has the word 'cat</w>' already"),
        ([vectors(1)], ["a", "b"], "there are 1 learned words and 2 tokens"),
        ({"clip_g": vectors(1)}, "<x>", "the word '<x>' is for tokenizer_2, which StableDiffusionPipeline"),
        ([vectors(1), vectors(1)], ["<x>", "<x>"], "has the word '<x>' already"),
    ]
    for source, token, match in refused:
        with pytest.raises(InputError, match=match):
            pipe.load_textual_inversion(source, token=token)
        assert not pipe.tokenizer.learned
    with pytest.raises(CheckpointError, match=r"has no other\.bin; name the file with weight_name="):
        pipe.load_textual_inversion(tmp_path, weight_name="other.bin")
    with pytest.raises(InputError, match="'<x>' is no learned word; learned are none"):
        pipe.unload_textual_inversion("<x>")
    with pytest.raises(InputError, match="must be of this pipeline"):
        pipe.load_textual_inversion(vectors(1), token="<x>", tokenizer=pipe.tokenizer.replace())
    pipe.load_textual_inversion(vectors(1), token="<x>", text_encoder=pipe.text_encoder)
    with pytest.raises(InputError, match="the tokenizer has learned <x>, which folders do not hold"):
        pipe.tokenizer.save_pretrained(tmp_path)
