"""Prompts encoded without the encoder's last layers, on every kind of engine."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from exported import FORMATS, exported
from numpy.typing import NDArray

from anamorph import CLIPTextModel, StableDiffusionPipeline
from anamorph.pipelines.base import DiffusionPipeline

TEXTS = ["a red cat", "a photo of dogs"]


def by_hand(folder: Path, skip: int) -> NDArray[Any]:
    """The states before the last `skip` layers, through the model's own final norm."""
    model = CLIPTextModel.from_pretrained(folder, subfolder="text_encoder")
    ids = DiffusionPipeline.from_pretrained(folder, backend="null").tokenizer(TEXTS).input_ids
    with torch.no_grad():
        states = model(torch.from_numpy(ids), output_hidden_states=True).hidden_states[-1 - skip]
        result: NDArray[Any] = model.final_layer_norm(states).numpy()
    return result


@pytest.mark.parametrize("engine", ["eager", *FORMATS])
@pytest.mark.parametrize("skip", [1, 2])
def test_states_of_earlier_layers_are_normalised_by_the_last_norm(sd1: Path, engine: str, skip: int) -> None:
    folder = sd1 if engine == "eager" else exported(sd1, engine)
    pipe = StableDiffusionPipeline.from_pretrained(folder, backend=engine)
    assert isinstance(pipe, StableDiffusionPipeline)
    expected = by_hand(sd1, skip)
    assert np.abs(pipe.encode(TEXTS, skip) - expected).max() <= 1e-4
    assert np.abs(pipe.encode(TEXTS) - expected).max() > 0.1


def test_only_the_prompt_skips_layers_and_nothing_is_skipped_by_default(sd1: Path) -> None:
    # diffusers encodes the negative prompt with all layers.
    pipe = StableDiffusionPipeline.from_pretrained(sd1, backend="eager")
    call: dict[str, Any] = {"num_inference_steps": 3, "seed": 2, "output_type": "np"}
    skipped = pipe("a cat", negative_prompt="blue", clip_skip=1, **call).images
    embeds = {"prompt_embeds": pipe.encode(["a cat"], 1), "negative_prompt_embeds": pipe.encode(["blue"])}
    assert np.array_equal(skipped, pipe(**embeds, **call).images)
    plain = pipe("a cat", negative_prompt="blue", **call).images
    assert np.array_equal(plain, pipe("a cat", negative_prompt="blue", clip_skip=0, **call).images)
    assert np.abs(plain - skipped).max() > 0.01
