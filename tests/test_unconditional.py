"""Pipelines without CLIP, compared with diffusers step by step in float32 and on every engine."""

import functools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
import transformers
from checkpoints import UNET, VAE, noisy
from diffusers.pipelines.latent_diffusion.pipeline_latent_diffusion import LDMBertConfig, LDMBertModel
from exported import ENGINES, exported, once, shared_place
from parity import IMAGE_BOUND, LATENT_BOUND, Agrees, listened, ours, worst
from test_models_autoencoders import VQ
from test_models_pictures import BERT
from test_models_unconditional import DIT
from test_models_unconditional import UNET as PLAIN

from anamorph import BertTokenizer, DDIMPipeline, DDPMPipeline, DiffusionPipeline, DiTPipeline, LDMTextToImagePipeline
from anamorph.errors import ConfigError, InputError

WORDS = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "red", "cat", "dog", "photo", "of", "##s", ",", "do")
EIGHT: dict[str, Any] = {
    "block_out_channels": (16, 16, 16, 32), "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
}  # fmt: skip


def ddpm(folder: Path, **scheduler: Any) -> None:
    unet = noisy(diffusers.UNet2DModel(**{**PLAIN, "sample_size": 16}), 1)
    diffusers.DDPMPipeline(unet, diffusers.DDPMScheduler(**scheduler)).save_pretrained(folder)


def dit(folder: Path) -> None:
    model = noisy(diffusers.DiTTransformer2DModel(**{**DIT, "num_embeds_ada_norm": 1000}), 1)
    scheduler = diffusers.DDIMScheduler(clip_sample=False)
    vae = noisy(diffusers.AutoencoderKL(**VAE), 2)
    diffusers.DiTPipeline(model, vae, scheduler).save_pretrained(folder)
    index = json.loads((folder / "model_index.json").read_text(encoding="utf-8"))
    index["id2label"] = {"3": "tabby, tabby cat", "999": "toilet tissue"}  # as in the published files
    (folder / "model_index.json").write_text(json.dumps(index), encoding="utf-8")


def words(folder: Path) -> transformers.BertTokenizer:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "vocab.txt").write_text("\n".join(WORDS) + "\n", encoding="utf-8")
    return transformers.BertTokenizer.from_pretrained(folder)


def ldm(folder: Path) -> None:
    bert = noisy(LDMBertModel(LDMBertConfig(**BERT)), 2)
    vae = noisy(diffusers.VQModel(**{**VQ, **EIGHT}), 3)
    unet = noisy(diffusers.UNet2DConditionModel(**{**UNET, "in_channels": 3, "out_channels": 3}), 4)
    tokenizer = words(folder / "tokenizer")
    scheduler = diffusers.DDIMScheduler(clip_sample=False, beta_schedule="scaled_linear")
    diffusers.LDMTextToImagePipeline(vae, bert, tokenizer, unet, scheduler).save_pretrained(folder)


MAKERS: dict[str, Callable[[Path], None]] = {"ddpm": ddpm, "dit": dit, "ldm": ldm}
CALLS: dict[str, dict[str, Any]] = {
    "DDPMPipeline": {"batch_size": 2, "num_inference_steps": 6},
    "DDIMPipeline": {"batch_size": 2, "num_inference_steps": 6},
    "DiTPipeline": {"class_labels": [3, 17], "num_inference_steps": 5, "guidance_scale": 3.0},
    "LDMTextToImagePipeline": {"prompt": ["a red cat", "dogs"], "num_inference_steps": 5, "guidance_scale": 3.0},
}
KINDS = {"DDPMPipeline": "ddpm", "DDIMPipeline": "ddpm", "DiTPipeline": "dit", "LDMTextToImagePipeline": "ldm"}


@pytest.fixture(scope="session")
def folders() -> dict[str, Path]:
    return {name: once(shared_place() / name, make) for name, make in MAKERS.items()}


@functools.cache
def opened(kind: str, folder: Path, engine: str = "eager") -> Any:
    return getattr(__import__("anamorph"), kind).from_pretrained(folder, backend=engine)


CHANGES: list[tuple[str, dict[str, Any]]] = [
    ("DDPMPipeline", {}),
    ("DDPMPipeline", {"batch_size": 1, "seeds": (5,)}),
    ("DDIMPipeline", {}),
    ("DDIMPipeline", {"eta": 0.6}),
    ("DDIMPipeline", {"use_clipped_model_output": True, "eta": 0.3}),
    ("DiTPipeline", {}),
    ("DiTPipeline", {"guidance_scale": 1.0}),
    ("LDMTextToImagePipeline", {}),
    ("LDMTextToImagePipeline", {"guidance_scale": 0.5, "height": 72, "width": 64}),
    ("LDMTextToImagePipeline", {"guidance_scale": 1.0}),
]


@pytest.mark.parametrize(("kind", "changes"), CHANGES, ids=str)
def test_every_step_equals_diffusers(
    agrees: Agrees, folders: dict[str, Path], kind: str, changes: dict[str, Any]
) -> None:
    folder, call = folders[KINDS[kind]], {**CALLS[kind], **changes}
    seeds = call.pop("seeds", (3, 4))
    agrees(kind, worst(ours(opened(kind, folder), seeds, **call), listened(kind, folder, seeds, **call)))


WRONG: list[tuple[str, dict[str, Any]]] = [
    ("DDIMPipeline", {"eta": 0.001}),
    ("DDIMPipeline", {"use_clipped_model_output": True}),
    ("DiTPipeline", {"guidance_scale": 3.01}),
    ("DiTPipeline", {"class_labels": [3, 18]}),
    ("LDMTextToImagePipeline", {"guidance_scale": 3.5}),  # its codebook hides less
]


@pytest.mark.parametrize(("kind", "changes"), WRONG, ids=str)
def test_the_comparison_notices_a_slightly_different_call(
    folders: dict[str, Path], kind: str, changes: dict[str, Any]
) -> None:
    folder, call, seeds = folders[KINDS[kind]], CALLS[kind], (3, 4)
    expected = listened(kind, folder, seeds, **call)
    latents, pixels = worst(ours(opened(kind, folder), seeds, **{**call, **changes}), expected)
    assert latents > LATENT_BOUND
    assert pixels > IMAGE_BOUND


def test_noise_of_a_learned_variance_equals_diffusers(agrees: Agrees, tmp_path: Path) -> None:
    unet = noisy(diffusers.UNet2DModel(**{**PLAIN, "sample_size": 16, "out_channels": 6}), 1)
    scheduler = diffusers.DDPMScheduler(variance_type="learned_range")
    diffusers.DDPMPipeline(unet, scheduler).save_pretrained(tmp_path)
    call = CALLS["DDPMPipeline"]
    expected = listened("DDPMPipeline", tmp_path, (3, 4), **call)
    agrees("DDPMPipeline", worst(ours(opened("DDPMPipeline", tmp_path), (3, 4), **call), expected))


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("kind", ["DDPMPipeline", "DiTPipeline", "LDMTextToImagePipeline"])
def test_every_engine_draws_the_same(agrees: Agrees, folders: dict[str, Path], kind: str, engine: str) -> None:
    folder, seeds = folders[KINDS[kind]], (3, 4)
    pipe = DiffusionPipeline.from_pretrained(exported(folder, engine), backend=engine)
    assert type(pipe).__name__ == kind
    assert {placed.engine for placed in pipe.placement.values()} == {engine}
    eager = ours(opened(kind, folder), seeds, **CALLS[kind])
    agrees(kind, worst(ours(pipe, seeds, **CALLS[kind]), eager), engine)


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_saved_loads_in_diffusers(folders: dict[str, Path], kind: str, tmp_path: Path) -> None:
    pipe = opened(kind, folders[KINDS[kind]])
    pipe.save_pretrained(tmp_path)
    call = CALLS[kind]
    images = listened(kind, tmp_path, (3, 4), **call).images
    assert np.abs(ours(pipe, (3, 4), **call).images - images).max() <= IMAGE_BOUND


def test_classes_have_names(folders: dict[str, Path]) -> None:
    theirs = diffusers.DiTPipeline.from_pretrained(folders["dit"])
    pipe = opened("DiTPipeline", folders["dit"])
    assert pipe.labels == theirs.labels == {"tabby": 3, "tabby cat": 3, "toilet tissue": 999}
    assert pipe.get_label_ids("tabby cat") == pipe.get_label_ids(["tabby"]) == [3]
    with pytest.raises(InputError, match="no class 'lynx'"):
        pipe.get_label_ids(["tabby", "lynx"])


@pytest.mark.parametrize(
    "text",
    ["A red CAT", "cats, dogs", "Café, RÉD", "狗 dog", "a\u0000b  red\tcat", "unknown words", "", "[MASK] dog [SEP]",
     "a " * 100, "dogs" * 40],
)  # fmt: skip
def test_word_pieces_equal_transformers(text: str, tmp_path: Path) -> None:
    theirs = words(tmp_path)
    mine = BertTokenizer.from_pretrained(tmp_path).limited(12)
    expected = theirs([text], padding="max_length", max_length=12, truncation=True)["input_ids"]
    encoding = mine([text])
    assert encoding.input_ids.tolist() == expected
    assert bool(encoding.truncated[0]) == (len(theirs(text)["input_ids"]) > 12)


REFUSED: list[tuple[str, dict[str, Any], str]] = [
    ("DDPMPipeline", {"batch_size": 0}, "batch_size is 0, expected 1 or more"),
    ("DDPMPipeline", {"num_inference_steps": 0}, "num_inference_steps is 0"),
    ("DDIMPipeline", {"eta": 1.5}, "eta is 1.5"),
    ("DDIMPipeline", {"seed": 1, "generator": torch.Generator()}, "give either seed or generator"),
    ("DiTPipeline", {"class_labels": [1000]}, "class_labels hold 1000, expected 0 to 999"),
    ("DiTPipeline", {"class_labels": [-1]}, "class_labels hold -1"),
    ("DiTPipeline", {"class_labels": ["cat"]}, "expected whole numbers"),
    ("DiTPipeline", {"class_labels": None}, "class_labels is missing"),
    ("LDMTextToImagePipeline", {"height": 36}, "height is 36, expected a positive multiple of 8"),
    ("LDMTextToImagePipeline", {"prompt": None}, "give either prompt"),
]


@pytest.mark.parametrize(("kind", "changes", "words"), REFUSED, ids=[case[2] for case in REFUSED])
def test_wrong_arguments_are_named(folders: dict[str, Path], kind: str, changes: dict[str, Any], words: str) -> None:
    pipe = opened(kind, folders[KINDS[kind]], "null")
    with pytest.raises(InputError, match=words):
        pipe(**{**CALLS[kind], **changes})


def test_a_denoiser_that_wants_a_class_is_refused(tmp_path: Path) -> None:
    unet = diffusers.UNet2DModel(**{**PLAIN, "sample_size": 16, "num_class_embeds": 4})
    diffusers.DDPMPipeline(unet, diffusers.DDPMScheduler()).save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match="wants class_labels, which DDPMPipeline does not feed"):
        DDPMPipeline.from_pretrained(tmp_path, backend="null")


def test_ddim_takes_over_other_schedulers(folders: dict[str, Path]) -> None:
    assert type(opened("DDIMPipeline", folders["ddpm"], "null").scheduler).__name__ == "DDIMScheduler"
    assert issubclass(DDIMPipeline, DiffusionPipeline)
    assert DiTPipeline.DENOISER == "transformer"
    assert LDMTextToImagePipeline.VAE == "vqvae"
