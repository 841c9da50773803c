"""Checkpoints in one file of the original layout: names, values, configurations, and what else a pipeline needs."""

import functools
import json
import pickle
import shutil
import tempfile
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from checkpoints import tiny_tokenizer
from original_layout import FAMILIES, UNET, Made, make
from parity import IMAGE_BOUND
from pictures import mask, picture
from safetensors.torch import load_file, save_file

from anamorph import AutoencoderKL, ClipTokenizer, DiffusionPipeline, StableDiffusionPipeline, UNet2DConditionModel
from anamorph.errors import AnamorphError, CheckpointError, ConfigError, InputError
from anamorph.original.folder import Wishes, as_folder
from anamorph.original.kinds import recognise
from anamorph.original.reading import find_file, open_original


@functools.cache
def made(name: str) -> Made:
    return make(Path(tempfile.mkdtemp(prefix="anamorph-tests-")), name)


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("ANAMORPH_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def stored_names(model: Any, slot: str) -> dict[str, torch.Tensor]:
    """diffusers' weights by the names of its files; transformers' file of CLIP has the prefix text_model."""
    state = model.state_dict()
    prefixed = slot.startswith("text_encoder") and not any(name.startswith("text_model.") for name in state)
    return {f"text_model.{name}" if prefixed else name: value for name, value in state.items()}


@pytest.mark.parametrize("name", FAMILIES)
def test_every_weight_and_configuration_is_that_of_the_model_the_file_was_made_of(name: str) -> None:
    kind = recognise(open_original(made(name).file))
    assert {model.slot for model in kind.models} == set(made(name).models)
    for model in kind.models:
        theirs = made(name).models[model.slot]
        expected = stored_names(theirs, model.slot)
        assert set(model.tensors) == {key for key in expected if not key.endswith("position_ids")}
        for key, value in model.tensors.items():
            assert np.array_equal(value.values, expected[key].numpy()), key
        config = theirs.config.to_dict() if hasattr(theirs.config, "to_dict") else dict(theirs.config)
        for key, value in model.config.items():
            if key not in ("_class_name", "architectures", "pad_token_id"):
                known = config[key]
                assert value == (list(known) if isinstance(known, tuple) else known), key


CLASSES = {
    "sd1": ("StableDiffusionPipeline", "PNDMScheduler", "epsilon"),
    "sd1-inpaint": ("StableDiffusionInpaintPipeline", "PNDMScheduler", "epsilon"),
    "sd1-edit": ("StableDiffusionInstructPix2PixPipeline", "PNDMScheduler", "epsilon"),
    "sd2": ("StableDiffusionPipeline", "DDIMScheduler", "v_prediction"),
    "sd2-inpaint": ("StableDiffusionInpaintPipeline", "PNDMScheduler", "epsilon"),
    "sdxl": ("StableDiffusionXLPipeline", "EulerDiscreteScheduler", "epsilon"),
    "sdxl-inpaint": ("StableDiffusionXLInpaintPipeline", "EulerDiscreteScheduler", "epsilon"),
    "sdxl-refiner": ("StableDiffusionXLImg2ImgPipeline", "EulerDiscreteScheduler", "epsilon"),
}


@pytest.mark.parametrize("name", FAMILIES)
def test_diffusers_opens_the_converted_folder(name: str) -> None:
    folder = as_folder(made(name).file, Wishes())
    pipe: Any = diffusers.DiffusionPipeline.from_pretrained(folder)
    scheduler = pipe.scheduler
    assert (type(pipe).__name__, type(scheduler).__name__, scheduler.config.prediction_type) == CLASSES[name]
    for slot, model in made(name).models.items():
        state = getattr(pipe, slot).state_dict()
        assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())
    if name.startswith(("sd2", "sdxl")):
        second = pipe.tokenizer if name.startswith("sd2") else pipe.tokenizer_2
        assert second.pad_token == "!"
    if name == "sdxl":
        assert pipe.tokenizer.pad_token == "<|endoftext|>"


@pytest.mark.parametrize("name", ["sd1", "sd2", "sdxl"])
def test_the_weights_are_those_that_diffusers_reads_from_the_file(name: str) -> None:
    folder, file = as_folder(made(name).file, Wishes()), made(name).file
    theirs: Any = diffusers.UNet2DConditionModel.from_single_file(file, config=str(folder), subfolder="unet")
    ours = UNet2DConditionModel.from_single_file(file)
    assert all(torch.equal(value, ours.state_dict()[key]) for key, value in theirs.state_dict().items())
    vae: Any = diffusers.AutoencoderKL.from_single_file(file, config=str(folder), subfolder="vae")
    ours_vae = AutoencoderKL.from_single_file(file, config=folder)
    assert all(torch.equal(value, ours_vae.state_dict()[key]) for key, value in vae.state_dict().items())


def test_a_picture_is_the_one_that_diffusers_draws_from_the_file() -> None:
    file = made("sd1").file
    ours = StableDiffusionPipeline.from_single_file(file, backend="eager")
    assert isinstance(ours, StableDiffusionPipeline)
    assert ours.origin is not None
    theirs: Any = diffusers.StableDiffusionPipeline.from_single_file(
        file, config=str(ours.origin.folder), safety_checker=None, requires_safety_checker=False
    )
    theirs.set_progress_bar_config(disable=True)
    call: dict[str, Any] = {"num_inference_steps": 3, "height": 32, "width": 32, "output_type": "np"}
    expected = theirs("a red cat", generator=torch.Generator().manual_seed(0), **call).images
    drawn = ours("a red cat", generator=torch.Generator().manual_seed(0), **call).images
    assert np.abs(drawn - expected).max() <= IMAGE_BOUND
    averaged = StableDiffusionPipeline.from_single_file(file, backend="eager", extract_ema=True)
    assert isinstance(averaged, StableDiffusionPipeline)
    other = averaged("a red cat", generator=torch.Generator().manual_seed(0), **call).images
    assert np.abs(other - expected).max() > 100 * IMAGE_BOUND


SOURCES: dict[str, dict[str, Any]] = {
    "sd2": {}, "sdxl": {},
    "sd1-edit": {"image": picture(32, 32)},
    **{f"{name}-inpaint": {"image": picture(32, 32), "mask_image": mask(32, 32)} for name in ("sd1", "sd2", "sdxl")},
}  # fmt: skip


@pytest.mark.parametrize("name", SOURCES)
def test_other_files_draw_what_diffusers_draws_from_their_folder(name: str) -> None:
    ours: Any = DiffusionPipeline.from_single_file(made(name).file, backend="eager")
    theirs: Any = diffusers.DiffusionPipeline.from_pretrained(ours.origin.folder)
    theirs.set_progress_bar_config(disable=True)
    size = {"height": 32, "width": 32} if "height" in ours.TAKES.all else {}
    call: dict[str, Any] = {"num_inference_steps": 2, **size, **SOURCES[name], "output_type": "np"}
    images = [pipe("a red cat", generator=torch.Generator().manual_seed(0), **call).images for pipe in (ours, theirs)]
    assert np.abs(images[0] - images[1]).max() <= IMAGE_BOUND


def test_averages_are_taken_when_they_are_asked_for() -> None:
    plain, averaged = (
        UNet2DConditionModel.from_single_file(made("sd1").file, extract_ema=ema) for ema in (False, True)
    )
    assert all(torch.equal(2 * value, averaged.state_dict()[key]) for key, value in plain.state_dict().items())
    with pytest.raises(CheckpointError, match="holds no averaged weights"):
        UNet2DConditionModel.from_single_file(made("sd2").file, extract_ema=True)


def test_a_training_state_gives_the_same_as_its_weights(tmp_path: Path) -> None:
    state = load_file(made("sd2").file)
    for step, predicts in ((875000, "epsilon"), (110000, "v_prediction")):
        content = {"state_dict": state, "global_step": step, "optimizer_states": [{"lr": 0.1}]}
        torch.save(content, tmp_path / "model.ckpt")
        kind = recognise(open_original(tmp_path / "model.ckpt"))
        assert kind.scheduler["prediction_type"] == predicts
        unet = next(model for model in kind.models if model.slot == "unet")
        assert unet.config["sample_size"] == {"epsilon": 64, "v_prediction": 96}[predicts]
        expected = made("sd2").models["unet"].state_dict()
        assert all(np.array_equal(value.values, expected[key]) for key, value in unet.tensors.items())
    assert recognise(open_original(made("sd2").file), prediction="epsilon").scheduler["prediction_type"] == "epsilon"


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_the_stored_type_is_kept_in_the_folder_and_converted_on_loading(tmp_path: Path, dtype: torch.dtype) -> None:
    narrow = make(tmp_path, "sd1", dtype)
    folder = as_folder(narrow.file, Wishes())
    kept = load_file(folder / "unet" / "diffusion_pytorch_model.safetensors")
    expected = narrow.models["unet"].state_dict()
    assert all(torch.equal(value, expected[key].to(dtype)) for key, value in kept.items())
    loaded = UNet2DConditionModel.from_single_file(narrow.file, torch_dtype=torch.float32).state_dict()
    assert all(torch.equal(value, expected[key].to(dtype).float()) for key, value in loaded.items())


def test_the_folder_is_made_once_and_again_when_the_file_or_a_wish_changes(tmp_path: Path, cache: Path) -> None:
    for entry in made("sd1").file.parent.iterdir():
        (shutil.copytree if entry.is_dir() else shutil.copy)(entry, tmp_path / entry.name)
    file = tmp_path / "sd1.safetensors"
    first = as_folder(file, Wishes())
    stamp = (first / "unet" / "diffusion_pytorch_model.safetensors").stat().st_mtime_ns
    assert as_folder(file, Wishes()) == first
    assert (first / "unet" / "diffusion_pytorch_model.safetensors").stat().st_mtime_ns == stamp
    assert as_folder(file, Wishes(extract_ema=True)) != first
    assert as_folder(file, Wishes(prediction_type="v_prediction")) != first
    save_file({**load_file(file), "betas": torch.ones(9)}, file)
    assert as_folder(file, Wishes()) != first
    assert not list(cache.rglob("*.partial"))


def test_a_configuration_counts_before_what_shapes_tell(tmp_path: Path) -> None:
    folder = shutil.copytree(as_folder(made("sd1").file, Wishes()), tmp_path / "config")
    path = folder / "unet" / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "attention_head_dim": 4}))
    scheduler = folder / "scheduler" / "scheduler_config.json"
    scheduler.write_text(json.dumps({"_class_name": "LMSDiscreteScheduler", "beta_start": 0.001}))
    pipe = StableDiffusionPipeline.from_single_file(made("sd1").file, config=folder, backend="null")
    assert pipe.components["unet"].config["attention_head_dim"] == 4
    assert (type(pipe.scheduler).__name__, pipe.scheduler.config["beta_start"]) == ("LMSDiscreteScheduler", 0.001)
    assert UNet2DConditionModel.from_single_file(made("sd1").file, config=path.parent).config["attention_head_dim"] == 4


def test_a_model_alone_is_read_from_a_file_without_prefixes(tmp_path: Path) -> None:
    state = load_file(made("sd1").file)
    for prefix, kind in (("first_stage_model.", AutoencoderKL), ("model.diffusion_model.", UNet2DConditionModel)):
        alone = {name.removeprefix(prefix): value for name, value in state.items() if name.startswith(prefix)}
        save_file(alone, tmp_path / "alone.safetensors")
        ours, whole = kind.from_single_file(tmp_path / "alone.safetensors"), kind.from_single_file(made("sd1").file)
        assert all(torch.equal(value, ours.state_dict()[key]) for key, value in whole.state_dict().items())
    with pytest.raises(CheckpointError, match="holds no AutoencoderKL in the original layout; its models are: UNet2D"):
        AutoencoderKL.from_single_file(tmp_path / "alone.safetensors")


def test_tokenizers_are_given_configured_or_beside_the_file(tmp_path: Path) -> None:
    file = Path(shutil.copy(made("sdxl").file, tmp_path / "model.safetensors"))
    with pytest.raises(CheckpointError, match=r"has no tokenizer beside it.*put a folder tokenizer with vocab\.json"):
        as_folder(file, Wishes(local_files_only=True))
    shutil.copytree(made("sdxl").file.parent / "tokenizer", tmp_path / "model" / "tokenizer")
    folder = as_folder(file, Wishes(local_files_only=True))
    first, second = (ClipTokenizer.from_pretrained(folder / name) for name in ("tokenizer", "tokenizer_2"))
    assert first.special["pad_token"] == "<|endoftext|>"
    reference = ClipTokenizer.from_pretrained(made("sdxl").file.parent / "tokenizer_2")
    text = ["a red cat! of dogs"]
    assert np.array_equal(second(text).input_ids, reference(text).input_ids)
    assert not np.array_equal(second(text).input_ids, first(text).input_ids)
    (tmp_path / "own").mkdir()
    tiny_tokenizer(tmp_path / "own").save_pretrained(tmp_path / "own")
    own = ClipTokenizer.from_pretrained(tmp_path / "own")
    lonely = Path(shutil.copy(made("sd1").file, tmp_path / "own" / "lonely.safetensors"))
    pipe = DiffusionPipeline.from_single_file(lonely, tokenizer=own, backend="null")
    assert pipe.tokenizer.vocab_size == own.vocab_size


def test_files_of_the_hub_come_from_its_cache(tmp_path: Path) -> None:
    commit = "1" * 40
    root = tmp_path / "hub" / "models--someone--turbo"
    (root / "refs").mkdir(parents=True)
    (root / "refs" / "main").write_text(commit)
    (root / "snapshots" / commit).mkdir(parents=True)
    shutil.copy(made("sd1").file, root / "snapshots" / commit / "turbo.safetensors")
    place = {"cache_dir": str(tmp_path / "hub"), "local_files_only": True}
    for form in ("https://huggingface.co/someone/turbo/blob/main/", "hf.co/someone/turbo/resolve/main/"):
        assert find_file(f"{form}turbo.safetensors", **place).name == "turbo.safetensors"
    with pytest.raises(CheckpointError, match="could not be had from the hub or its cache"):
        find_file("https://huggingface.co/someone/turbo/blob/main/other.safetensors", **place)


class Trap:
    def __init__(self, place: Path) -> None:
        self.place = place

    def __reduce__(self) -> Any:
        return Path.mkdir, (self.place,)


def test_files_that_are_no_checkpoint_are_refused_in_a_sentence(tmp_path: Path, cache: Path) -> None:
    def refused(content: Any, match: str, kind: type[AnamorphError] = CheckpointError, name: str = "m.ckpt") -> None:
        path = tmp_path / name
        if name.endswith(".ckpt"):
            torch.save(content, path)
        else:
            save_file(content, path)
        with pytest.raises(kind, match=match):
            as_folder(path, Wishes(local_files_only=True))
        assert not cache.exists(), "something was written"

    state = load_file(made("sd1").file)
    refused({"state_dict": state, "hook": Trap(tmp_path / "run")}, "cannot be loaded as plain weights: it refers to")
    assert not (tmp_path / "run").exists()
    refused([1, 2], "holds a list, expected tensors by name")
    refused({"state_dict": 3}, "holds a int as state_dict")
    lora = {"lora_unet_down.weight": torch.ones(2, 2)}
    refused(lora, "holds no UNet and no autoencoder and no text encoder .* begins with lora_unet", name="m.safetensors")
    cut = {name: value for name, value in state.items() if not name.startswith("first_stage")}
    refused(cut, "holds no autoencoder of Stable", name="m.safetensors")
    strange = {**state, "model.diffusion_model.control.weight": torch.ones(2)}
    refused(strange, r"the UNet holds control\.weight, which no Stable Diffusion model has", name="m.safetensors")
    missing = {name: value for name, value in state.items() if name != "model.diffusion_model.out.2.weight"}
    refused(missing, r"the file has no out\.2\.weight", name="m.safetensors")
    first = "model.diffusion_model.input_blocks.0.0.weight"
    refused({**state, first: torch.ones(64, 5, 3, 3)}, "holds a UNet of 5 channels", ConfigError, "m.safetensors")
    (tmp_path / "raw.ckpt").write_bytes(pickle.dumps({"state_dict": Trap(tmp_path / "run")}))
    with pytest.raises(CheckpointError, match="cannot be loaded as plain weights"):
        open_original(tmp_path / "raw.ckpt")
    assert not (tmp_path / "run").exists()
    with pytest.raises(InputError, match="prediction_type is 'x'"):
        recognise(open_original(made("sd1").file), prediction="x")
    for name, match in (("nowhere.ckpt", "there is no file"), ("x.onnx", "ends in .onnx"), ("", "is a folder")):
        if name.endswith("onnx"):
            (tmp_path / name).touch()
        with pytest.raises(CheckpointError, match=match):
            find_file(tmp_path / name)


def test_the_families_differ_where_the_loader_must_tell_them_apart() -> None:
    assert len({json.dumps(family.unet, sort_keys=True) for family in FAMILIES.values()}) == len(FAMILIES)
    assert UNET["attention_head_dim"] != UNET["block_out_channels"][0] // 64
