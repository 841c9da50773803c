"""Checkpoints for benchmarks: as large as the published models, and opened by diffusers and by us."""

import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
import transformers

from anamorph import DiffusionPipeline
from anamorph.benchmarks import full_size
from anamorph.checkpoint import BUNDLED
from anamorph.models import MODELS

PUBLISHED = {
    "sd15": {"vae": 83_653_863, "text_encoder": 123_060_480, "unet": 859_520_964},
    "sd15-control": {
        "vae": 83_653_863, "text_encoder": 123_060_480, "unet": 859_520_964, "controlnet": 361_279_120,
    },
    "sd21": {"vae": 83_653_863, "text_encoder": 340_387_840, "unet": 865_910_724},
    "sdxl": {
        "vae": 83_653_863, "text_encoder": 123_060_480, "text_encoder_2": 694_659_840, "unet": 2_567_463_684,
    },
}  # fmt: skip
"""Parameters of the published checkpoints."""
SMALL: dict[str, dict[str, Any]] = {
    "vae": {"block_out_channels": (32,) * 4, "layers_per_block": 1, "sample_size": 64},
    "text_encoder": {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4},
    "unet": {"block_out_channels": (32,) * 4, "cross_attention_dim": 32, "layers_per_block": 1, "sample_size": 8},
}


@pytest.mark.parametrize("name", list(full_size.KINDS))
def test_they_are_as_large_as_the_published_models(name: str) -> None:
    for slot, (class_name, config) in full_size.KINDS[name].models.items():
        with torch.device("meta"):
            model = MODELS[class_name](**config)
        assert sum(parameter.numel() for parameter in model.parameters()) == PUBLISHED[name][slot], slot


@pytest.fixture(name="small")
def _small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Stable Diffusion 1.5 with layers that take no time."""
    kind = full_size.KINDS["sd15"]
    models = {slot: (name, {**config, **SMALL[slot]}) for slot, (name, config) in kind.models.items()}
    monkeypatch.setitem(full_size.KINDS, "sd15", replace(kind, models=models))


@pytest.mark.usefixtures("small")
def test_diffusers_and_we_open_what_was_made(tmp_path: Path) -> None:
    full_size.make(tmp_path / "one", "sd15")
    full_size.make(tmp_path / "two", "sd15")
    call = {"num_inference_steps": 2, "height": 64, "width": 64, "output_type": "np"}
    latents = np.random.default_rng(0).standard_normal((1, 4, 8, 8), np.float32)
    ours = [
        DiffusionPipeline.from_pretrained(tmp_path / which, backend="eager")("a cat", latents=latents, **call).images
        for which in ("one", "two")
    ]
    theirs = diffusers.StableDiffusionPipeline.from_pretrained(tmp_path / "one", safety_checker=None)
    theirs.set_progress_bar_config(disable=True)
    assert theirs.tokenizer.model_max_length == 77
    np.testing.assert_array_equal(ours[0], ours[1])  # seeded
    np.testing.assert_allclose(ours[0], theirs("a cat", latents=torch.from_numpy(latents), **call).images, atol=1e-4)


@pytest.mark.usefixtures("small")
def test_another_vocabulary_s_tokens_are_those_of_the_checkpoint(tmp_path: Path) -> None:
    words = transformers.CLIPTokenizer.from_pretrained(BUNDLED / "tokenizer")
    words.add_tokens(["<lighthouse>"])
    words.save_pretrained(tmp_path / "words")
    full_size.make(tmp_path / "made", "sd15", vocabulary=tmp_path / "words")
    theirs = transformers.CLIPTokenizer.from_pretrained(tmp_path / "made" / "tokenizer")
    assert theirs.encode("a <lighthouse>") == words.encode("a <lighthouse>")
    config = json.loads((tmp_path / "made" / "text_encoder" / "config.json").read_text(encoding="utf-8"))
    assert (config["bos_token_id"], config["eos_token_id"]) == (theirs.bos_token_id, theirs.eos_token_id)


def test_vocabularies_that_are_none_or_too_large_end_in_a_sentence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for folder, size, says in ((tmp_path, 49408, "tokenizer_config.json"), (BUNDLED / "tokenizer", 9, "expected 9")):
        kind = full_size.KINDS["sd15"]
        models = {**kind.models, "text_encoder": ("CLIPTextModel", {**full_size.CLIP_L, "vocab_size": size})}
        monkeypatch.setitem(full_size.KINDS, "sd15", replace(kind, models=models))
        monkeypatch.setattr(sys, "argv", ["full_size", str(tmp_path / "made"), "--tokenizer", str(folder)])
        with pytest.raises(SystemExit, match=says):
            full_size.main()
        assert not (tmp_path / "made").exists()
