"""Reading folders of strangers: what is missing, damaged, foreign or malicious gets one clear sentence."""

import json
import pickle
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from anamorph import DiffusionPipeline, StableDiffusionPipeline
from anamorph.checkpoint import Source, open_checkpoint
from anamorph.errors import AnamorphError, CheckpointError, ConfigError, InputError
from anamorph.weights import safetensors_entries

UNET = "unet/diffusion_pytorch_model.safetensors"


@pytest.fixture
def copy(sd1: Path, tmp_path: Path) -> Path:
    """A checkpoint to damage."""
    return Path(shutil.copytree(sd1, tmp_path / "copy"))


def edit(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def reweigh(path: Path, change: Callable[[dict[str, Any]], None]) -> None:
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path)


def cut(path: Path, keep: int) -> None:
    path.write_bytes(path.read_bytes()[:keep])


DAMAGES: dict[str, tuple[Callable[[Path], Any], type[AnamorphError], str]] = {
    "no index": (lambda f: (f / "model_index.json").unlink(), CheckpointError, "has no model_index.json"),
    "index no json": (lambda f: (f / "model_index.json").write_text("{"), CheckpointError, "cannot be read as JSON"),
    "index a list": (lambda f: (f / "model_index.json").write_text("[]"), CheckpointError, "expected a JSON object"),
    "other pipeline": (
        lambda f: edit(f / "model_index.json", _class_name="FluxPipeline"),
        ConfigError,
        "is a FluxPipeline, which this version does not have",
    ),
    "extra component": (
        lambda f: edit(f / "model_index.json", text_encoder_2=["transformers", "CLIPTextModel"]),
        ConfigError,
        "has text_encoder_2, which StableDiffusionPipeline does not take",
    ),
    "no unet slot": (lambda f: edit(f / "model_index.json", unet=[None, None]), CheckpointError, "has no unet"),
    "other class": (
        lambda f: edit(f / "model_index.json", unet=["diffusers", "UNet3DConditionModel"]),
        ConfigError,
        "unet of .* is a UNet3DConditionModel",
    ),
    "no folder": (lambda f: shutil.rmtree(f / "vae"), CheckpointError, "has no folder 'vae'"),
    "no weights": (lambda f: (f / UNET).unlink(), CheckpointError, "it holds no weights"),
    "truncated": (lambda f: cut(f / UNET, 100_000), CheckpointError, "is truncated: tensor"),
    "header cut": (lambda f: cut(f / UNET, 50), CheckpointError, "cut off or corrupt"),
    "empty file": (lambda f: cut(f / UNET, 0), CheckpointError, "cut off or corrupt"),
    "garbage": (lambda f: (f / UNET).write_bytes(b"\xff" * 999), CheckpointError, "cut off or corrupt"),
    "missing weight": (
        lambda f: reweigh(f / UNET, lambda t: t.pop("conv_in.bias")),
        CheckpointError,
        "missing weights: conv_in.bias",
    ),
    "extra weight": (
        lambda f: reweigh(f / UNET, lambda t: t.update(spare=t["conv_in.bias"])),
        CheckpointError,
        "extra weights: spare",
    ),
    "wrong shape": (
        lambda f: reweigh(f / UNET, lambda t: t.update({"conv_in.bias": t["conv_in.bias"][:3]})),
        CheckpointError,
        r"wrong shapes: conv_in.bias is \[3\], expected \[32\]",
    ),
    "unknown key": (lambda f: edit(f / "unet/config.json", colour=3), ConfigError, "key 'colour'"),
    "misspelt key": (lambda f: edit(f / "vae/config.json", latent_chanels=4), ConfigError, "mean 'latent_channels'"),
    "unknown scheduler": (
        lambda f: edit(f / "scheduler/scheduler_config.json", _class_name="MagicScheduler"),
        ConfigError,
        "MagicScheduler",
    ),
    "scheduler key": (
        lambda f: edit(f / "scheduler/scheduler_config.json", beta_begin=1),
        ConfigError,
        "beta_begin",
    ),
}


@pytest.mark.parametrize("name", DAMAGES)
def test_damage_is_named(copy: Path, name: str) -> None:
    damage, error, words = DAMAGES[name]
    damage(copy)
    with pytest.raises(error, match=words):
        DiffusionPipeline.from_pretrained(copy, backend="eager")


def test_missing_folders_and_files_in_their_place(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="there is no folder"):
        DiffusionPipeline.from_pretrained(tmp_path / "nowhere")
    (tmp_path / "model.ckpt").write_text("")
    with pytest.raises(CheckpointError, match="is a file"):
        DiffusionPipeline.from_pretrained(tmp_path / "model.ckpt")


def test_a_hub_id_is_taken_from_the_cache_or_refused(sd1: Path, tmp_path: Path) -> None:
    commit = "0" * 40
    root = tmp_path / "models--someone--tiny"
    (root / "refs").mkdir(parents=True)
    (root / "refs" / "main").write_text(commit)
    shutil.copytree(sd1, root / "snapshots" / commit)
    place = {"cache_dir": str(tmp_path), "local_files_only": True}
    assert DiffusionPipeline.from_pretrained("someone/tiny", backend="null", **place).origin is not None
    with pytest.raises(CheckpointError, match="someone/other is neither a local folder nor"):
        DiffusionPipeline.from_pretrained("someone/other", backend="null", **place)


def test_a_safety_checker_is_not_dropped_in_silence(copy: Path, caplog: pytest.LogCaptureFixture) -> None:
    edit(copy / "model_index.json", safety_checker=["stable_diffusion", "StableDiffusionSafetyChecker"])
    with pytest.raises(CheckpointError, match="has no folder 'safety_checker'"):
        DiffusionPipeline.from_pretrained(copy, backend="null")
    edit(copy / "model_index.json", safety_checker=[None, None], requires_safety_checker=True)
    with caplog.at_level("WARNING", "anamorph"):
        DiffusionPipeline.from_pretrained(copy, backend="null")
    assert "pictures are not screened" in caplog.text


def test_a_variant_is_taken_where_it_is_stored(copy: Path) -> None:
    plain = copy / UNET
    (copy / "unet" / "diffusion_pytorch_model.fp16.safetensors").write_bytes(plain.read_bytes())
    plain.unlink()
    pipe = DiffusionPipeline.from_pretrained(copy, backend="eager", variant="fp16")
    assert pipe.components["unet"].component.variant == "fp16"
    assert pipe.components["vae"].component.variant is None
    with pytest.raises(CheckpointError, match="no component has weights of variant 'ema'"):
        DiffusionPipeline.from_pretrained(copy, backend="eager", variant="ema")


def test_a_component_with_another_variant_alone_is_named_before_anything_is_opened(copy: Path) -> None:
    for slot, variant in (("unet", "fp16"), ("vae", "non_ema")):
        plain = copy / slot / "diffusion_pytorch_model.safetensors"
        plain.rename(plain.with_name(f"diffusion_pytorch_model.{variant}.safetensors"))
    with pytest.raises(CheckpointError, match=r"^vae has neither weights of variant 'fp16' nor plain ones"):
        DiffusionPipeline.from_pretrained(copy, backend="null", variant="fp16")
    with pytest.raises(CheckpointError, match=r"^unet has neither weights of variant 'non_ema' nor plain ones"):
        DiffusionPipeline.from_pretrained(copy, backend="null", variant="non_ema")


def test_folders_of_the_first_versions_are_understood(copy: Path) -> None:
    # As the first checkpoints have it: keys that have gone since, and none of those that came later.
    old = {"_class_name": "DDPMScheduler", "_diffusers_version": "0.2.2", "beta_end": 0.012, "beta_start": 0.00085,
           "beta_schedule": "scaled_linear", "predict_epsilon": False, "tensor_format": "pt", "timestep_values": None,
           "trained_betas": None, "clip_sample": False}  # fmt: skip
    (copy / "scheduler" / "scheduler_config.json").write_text(json.dumps(old))
    first = ("act_fn", "attention_head_dim", "block_out_channels", "cross_attention_dim", "down_block_types",
             "in_channels", "latent_channels", "layers_per_block", "norm_num_groups", "out_channels", "sample_size",
             "up_block_types")  # fmt: skip
    for slot in ("vae", "unet"):
        values = json.loads((copy / slot / "config.json").read_text())
        kept = {key: value for key, value in values.items() if key.startswith("_") or key in first}
        (copy / slot / "config.json").write_text(json.dumps(kept))
    pipe = StableDiffusionPipeline.from_pretrained(copy, backend="eager")
    assert isinstance(pipe, StableDiffusionPipeline)
    assert np.isfinite(pipe("a cat", num_inference_steps=1, output_type="np", seed=0).images).all()
    assert pipe.scheduler.config["prediction_type"] == "sample"
    assert pipe.components["vae"].config["scaling_factor"] == 0.18215
    (copy / "scheduler" / "scheduler_config.json").write_text(json.dumps({**old, "predict_epsilon": True}))
    again = DiffusionPipeline.from_pretrained(copy, backend="null")
    assert again.scheduler.config["prediction_type"] == "epsilon"


def test_pickles_are_refused_where_safetensors_are_asked_for(copy: Path) -> None:
    StableDiffusionPipeline.from_pretrained(copy, backend="null", use_safetensors=True)
    with pytest.raises(InputError, match="use_safetensors=False asks for pickles"):
        StableDiffusionPipeline.from_pretrained(copy, backend="null", use_safetensors=False)
    (copy / UNET).rename((copy / UNET).with_suffix(".bin"))
    with pytest.raises(CheckpointError, match="unet holds pickles and no safetensors"):
        StableDiffusionPipeline.from_pretrained(copy, backend="null", use_safetensors=True)


def test_a_pickle_that_runs_code_is_refused_unrun(copy: Path, tmp_path: Path) -> None:
    class Bomb:
        def __reduce__(self) -> Any:
            return Path.touch, (tmp_path / "exploded",)

    (copy / UNET).unlink()
    (copy / "unet" / "diffusion_pytorch_model.bin").write_bytes(pickle.dumps({"conv_in.bias": Bomb()}))
    with pytest.raises(CheckpointError, match="cannot be loaded as plain weights"):
        DiffusionPipeline.from_pretrained(copy, backend="eager")
    assert not (tmp_path / "exploded").exists()


def test_an_index_cannot_point_out_of_its_folder(copy: Path) -> None:
    (copy / UNET).unlink()
    index = {"weight_map": {"conv_in.bias": "../../secret.safetensors"}}
    (copy / "unet" / "diffusion_pytorch_model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match="which is not a file beside it"):
        DiffusionPipeline.from_pretrained(copy, backend="eager")


@pytest.mark.parametrize(
    "entry",
    [
        {"dtype": "F32", "shape": [1 << 40], "data_offsets": [0, 4]},
        {"dtype": "F32", "shape": [-1], "data_offsets": [0, 4]},
        {"dtype": "F32", "shape": [1], "data_offsets": [-8, -4]},
        {"dtype": "Q7", "shape": [1], "data_offsets": [0, 4]},
        {"shape": [1]},
        [],
    ],
)
def test_headers_that_lie_are_refused_before_memory_is_taken(tmp_path: Path, entry: Any) -> None:
    header = json.dumps({"w": entry}).encode()
    (tmp_path / "m.safetensors").write_bytes(struct.pack("<Q", len(header)) + header + b"\0" * 4)
    with pytest.raises(CheckpointError, match="corrupt"):
        safetensors_entries(tmp_path / "m.safetensors")


def test_offsets_lead_to_the_bytes(copy: Path) -> None:
    tensors = load_file(copy / UNET)
    entries = safetensors_entries(copy / UNET)
    assert set(entries) == set(tensors)
    entry = entries["conv_in.bias"]
    assert (copy / UNET).read_bytes()[entry.begin : entry.end] == tensors["conv_in.bias"].tobytes()
    assert entry.shape == tensors["conv_in.bias"].shape


def test_the_digest_changes_with_any_weight(copy: Path) -> None:
    def digest() -> str:
        return open_checkpoint(Source(str(copy))).digest()

    before = digest()
    assert digest() == before
    reweigh(copy / UNET, lambda t: t.update({"conv_in.bias": t["conv_in.bias"] + 1}))
    assert digest() != before
