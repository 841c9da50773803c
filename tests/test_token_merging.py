"""Token merging beside the paper's steps, written out token by token, and through every engine."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from checkpoints import UNET
from exported import FORMATS, exported
from numpy.typing import NDArray
from parity import relative

from anamorph import DiffusionPipeline, StableDiffusionPipeline
from anamorph.artifact import NATIVE, read_artifact
from anamorph.errors import InputError
from anamorph.exporting import LINKED
from anamorph.models import MODELS
from anamorph.models.merging import merged
from anamorph.rewrites import MERGING, REWRITES

CALL: dict[str, Any] = {"prompt": "a cat", "num_inference_steps": 2, "guidance_scale": 5.0, "seed": 0}


def written_out(tokens: NDArray[Any], height: int, width: int) -> tuple[NDArray[Any], NDArray[Any]]:
    """The tokens that are left of one picture, receivers first, and the one that stands for each of the original."""
    receivers = [row * width + column for row in range(0, height, 2) for column in range(0, width, 2)]
    cells = [(row, column) for row in range(0, height, 2) for column in range(0, width, 2)]
    others = [(r + dr) * width + c + dc for r, c in cells for dr, dc in ((0, 1), (1, 0), (1, 1))]
    unit = tokens / np.linalg.norm(tokens, axis=-1, keepdims=True)
    closeness = unit[others] @ unit[receivers].T
    nearest, best = closeness.argmax(1), closeness.max(1)
    joining = np.argsort(best)[len(receivers) :]  # two thirds of the others: half of all tokens
    groups = [[tokens[place]] for place in receivers]
    stands = np.zeros(len(tokens), int)
    stands[receivers] = np.arange(len(receivers))
    for other in joining:
        groups[nearest[other]].append(tokens[others[other]])
        stands[others[other]] = nearest[other]
    left = [np.mean(group, 0) for group in groups]
    for other in np.argsort(best)[: len(receivers)]:
        stands[others[other]] = len(left)
        left.append(tokens[others[other]])
    return np.stack(left), stands


@pytest.mark.parametrize(("height", "width"), [(2, 2), (4, 6), (8, 4)])
def test_the_papers_steps(height: int, width: int) -> None:
    tokens = np.random.default_rng(0).standard_normal((3, height * width, 5))
    found = merged(torch.from_numpy(tokens), height, width)
    assert found.tokens.shape == (3, height * width // 2, 5)
    for picture in range(3):
        left, stands = written_out(tokens[picture], height, width)
        assert np.allclose(found.tokens[picture], left, rtol=1e-12)
        assert np.array_equal(found.places[picture], stands)
        assert np.allclose(found.apart(found.tokens)[picture], left[stands], rtol=1e-12)


def latents(folder: Path, **loading: Any) -> NDArray[Any]:
    pipe = DiffusionPipeline.from_pretrained(folder, **loading)
    assert isinstance(pipe, StableDiffusionPipeline)
    return np.asarray(pipe(**CALL, output_type="latent").images)


@pytest.mark.parametrize("engine", FORMATS)
def test_every_engine_merges_the_same_tokens(sd2: Path, engine: str) -> None:
    place = exported(sd2, engine, NATIVE, storage=LINKED, rewrites=MERGING)
    artifact = read_artifact(place)
    assert artifact.parts["unet"].rewrites == (MERGING,)
    expected = latents(sd2, backend="eager", rewrites=MERGING)
    assert relative(latents(place), expected) <= 1e-5
    assert relative(latents(sd2, backend="eager"), expected) > 1e-3, "nothing was merged"


def test_merging_is_never_on_by_itself() -> None:
    assert not REWRITES[MERGING].exact
    assert not REWRITES[MERGING].on


def test_it_applies_at_the_highest_resolution_that_has_transformers() -> None:
    down, up = ("DownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"), ("UpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D")
    config = {"block_out_channels": (32,) * 3, "down_block_types": down, "up_block_types": up}
    model = MODELS["UNet2DConditionModel"](**{**UNET, **config})
    found = [name for name, layer in model.named_modules() if getattr(layer, "REWRITE", "") == MERGING]
    assert found == ["down_blocks.1.attentions.0", "up_blocks.1.attentions.0", "up_blocks.1.attentions.1"]
    unmet = REWRITES[MERGING].unmet
    assert unmet("unet", "UNet2DConditionModel", {**config, "only_cross_attention": (False, True, False)}) is not None
    assert unmet("unet", "UNet2DConditionModel", {**config, "up_block_types": ("UpBlock2D",) * 3}) is not None
    assert unmet("vae_decoder", "AutoencoderKL", {}) is not None


def test_where_it_does_not_apply(sdxl: Path) -> None:
    with pytest.raises(InputError, match="unet: latents may have odd sides where its transformers are"):
        DiffusionPipeline.from_pretrained(sdxl, backend="eager", rewrites=MERGING)
    with pytest.raises(InputError, match=r"3x4; draw a size of even latents"):
        merged(torch.zeros(1, 12, 5), 3, 4)
