"""Loading and saving of the models in every layout that diffusers and transformers write."""

import json
import pickle
import shutil
import zipfile
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
import transformers
from checkpoints import CLIP, noisy
from safetensors.torch import load_file, save_file
from torch import Tensor

from anamorph.errors import CheckpointError, ConfigError
from anamorph.models import MODELS, AutoencoderKL, CLIPTextModel, CLIPTextModelWithProjection, UNet2DConditionModel

SLOTS = {"unet": "UNet2DConditionModel", "vae": "AutoencoderKL", "text_encoder": "CLIPTextModel"}
LIBRARIES = {"unet": diffusers, "vae": diffusers, "text_encoder": transformers}
INPUTS: dict[str, tuple[Tensor, ...]] = {
    "unet": (
        torch.linspace(-2, 2, 4 * 64).reshape(1, 4, 8, 8),
        torch.tensor(9),
        torch.linspace(-1, 1, 96).view(1, 3, 32),
    ),
    "vae": (torch.linspace(-1, 1, 3 * 16 * 16).reshape(1, 3, 16, 16),),
    "text_encoder": (torch.tensor([[523, 320, 522, 524]]),),
}


def same(ours: torch.nn.Module, theirs: torch.nn.Module, slot: str) -> bool:
    with torch.no_grad():
        mine, other = ours(*INPUTS[slot])[0], theirs(*INPUTS[slot])[0]
    return bool((mine - other).abs().max() <= 1e-5 * other.abs().max())


def weights_of(folder: Path) -> Path:
    return next(folder.glob("*.safetensors"))


@pytest.fixture
def unet(sd2: Path, tmp_path: Path) -> Path:
    """A copy of a UNet's folder that a test may damage."""
    return Path(shutil.copytree(sd2 / "unet", tmp_path / "unet"))


@pytest.mark.parametrize("slot", SLOTS)
@pytest.mark.parametrize("checkpoint", ["sd1", "sd2"])
def test_loads_what_diffusers_saved_and_back(
    slot: str, checkpoint: str, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    folder = request.getfixturevalue(checkpoint)
    ours = MODELS[SLOTS[slot]].from_pretrained(folder, subfolder=slot)
    peer = getattr(LIBRARIES[slot], SLOTS[slot])
    assert not ours.training
    assert same(ours, peer.from_pretrained(folder / slot), slot)
    ours.save_pretrained(tmp_path)
    again = peer.from_pretrained(tmp_path)
    assert all(torch.equal(value, again.state_dict()[name]) for name, value in ours.state_dict().items())
    assert same(ours, again, slot)


@pytest.mark.parametrize("prefix", ["", "text_model."])
def test_text_encoder_reads_both_spellings_and_writes_the_prefixed(sd1: Path, tmp_path: Path, prefix: str) -> None:
    folder = Path(shutil.copytree(sd1 / "text_encoder", tmp_path / "in"))
    plain = {name.removeprefix("text_model."): value for name, value in load_file(weights_of(folder)).items()}
    stored = {prefix + name: value for name, value in plain.items()}
    stored[f"{prefix}embeddings.position_ids"] = torch.arange(77)[None]
    save_file(stored, weights_of(folder))
    ours = CLIPTextModel.from_pretrained(folder)
    assert same(ours, transformers.CLIPTextModel.from_pretrained(sd1 / "text_encoder"), "text_encoder")
    ours.save_pretrained(tmp_path / "out")
    assert set(load_file(tmp_path / "out" / "model.safetensors")) == {f"text_model.{name}" for name in plain}


def test_text_projection_reads_what_transformers_saved(tmp_path: Path) -> None:
    config = transformers.CLIPTextConfig(vocab_size=50, eos_token_id=49, **CLIP)
    theirs = noisy(transformers.CLIPTextModelWithProjection(config), 2)
    theirs.save_pretrained(tmp_path)
    ours = CLIPTextModelWithProjection.from_pretrained(tmp_path)
    ids = torch.tensor([[48, 5, 49]])
    with torch.no_grad():
        assert torch.allclose(ours(ids).text_embeds, theirs(ids).text_embeds, atol=1e-5)


@pytest.mark.parametrize("dimensions", [2, 4])
def test_vae_reads_the_old_names_of_its_attention(sd1: Path, tmp_path: Path, dimensions: int) -> None:
    folder = Path(shutil.copytree(sd1 / "vae", tmp_path / "vae"))
    state = load_file(weights_of(folder))
    for old, new in (("query", "to_q"), ("key", "to_k"), ("value", "to_v"), ("proj_attn", "to_out.0")):
        for name in [name for name in state if f".{new}." in name]:
            value = state.pop(name)
            shape = value.shape + (1, 1) * (dimensions == 4 and value.ndim == 2)
            state[name.replace(f".{new}.", f".{old}.")] = value.reshape(shape)
    assert any(".proj_attn.weight" in name for name in state)
    save_file(state, weights_of(folder))
    assert same(AutoencoderKL.from_pretrained(folder), diffusers.AutoencoderKL.from_pretrained(sd1 / "vae"), "vae")


@pytest.mark.parametrize(
    "options", [{"max_shard_size": "1MB"}, {"safe_serialization": False}, {"variant": "ema"}], ids=str
)
def test_reads_shards_pickles_and_variants(sd2: Path, tmp_path: Path, options: dict[str, Any]) -> None:
    theirs = diffusers.UNet2DConditionModel.from_pretrained(sd2 / "unet")
    theirs.save_pretrained(tmp_path, **options)
    if "max_shard_size" in options:
        assert len(list(tmp_path.glob("*.safetensors"))) > 1
    ours = UNet2DConditionModel.from_pretrained(tmp_path, variant=options.get("variant"))
    assert same(ours, theirs, "unet")


def test_torch_dtype_converts_every_weight(sd2: Path) -> None:
    half = UNet2DConditionModel.from_pretrained(sd2, subfolder="unet", torch_dtype=torch.bfloat16)
    assert {value.dtype for value in half.state_dict().values()} == {torch.bfloat16}
    assert half.dtype == torch.bfloat16
    assert half.device == torch.device("cpu")


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("conv_in.bias", None, "missing weights: conv_in.bias"),
        ("conv_in.scale", torch.ones(3), "extra weights: conv_in.scale"),
        ("conv_in.bias", torch.ones(3), r"wrong shapes: conv_in.bias is \[3\], expected \[32\]"),
    ],
)
def test_weights_that_do_not_fit(unet: Path, name: str, value: Tensor | None, message: str) -> None:
    state = {key: kept for key, kept in load_file(weights_of(unet)).items() if key != name}
    save_file(state if value is None else {**state, name: value}, weights_of(unet))
    with pytest.raises(CheckpointError, match=message):
        UNet2DConditionModel.from_pretrained(unet)


def test_truncated_file(unet: Path) -> None:
    file = weights_of(unet)
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(CheckpointError, match="is truncated: tensor"):
        UNet2DConditionModel.from_pretrained(unet)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"block_out_chanels": [32]}, "'block_out_chanels'"),
        ({"class_embed_type": "class"}, "class_embed_type='class'"),
    ],
)
def test_configurations_that_are_refused(unet: Path, change: dict[str, Any], message: str) -> None:
    config = json.loads((unet / "config.json").read_text())
    (unet / "config.json").write_text(json.dumps({**config, **change}))
    with pytest.raises(ConfigError, match=message):
        UNet2DConditionModel.from_pretrained(unet)


def test_pickles_of_all_ages_are_read_and_bombs_are_not(unet: Path) -> None:
    expected = load_file(weights_of(unet))
    weights_of(unet).unlink()
    target = unet / "diffusion_pytorch_model.bin"
    for archive in (False, True):
        torch.save(expected, target, _use_new_zipfile_serialization=archive)
        loaded = UNet2DConditionModel.from_pretrained(unet).state_dict()
        assert all(torch.equal(value, loaded[name]) for name, value in expected.items())
    with pytest.raises(CheckpointError, match="holds pickles and no safetensors; leave out use_safetensors"):
        UNet2DConditionModel.from_pretrained(unet, use_safetensors=True)
    with zipfile.ZipFile(target) as archive_file:
        members = {name: archive_file.read(name) for name in archive_file.namelist()}
    with zipfile.ZipFile(target, "w") as bomb:
        for name, content in members.items():
            grown = name.endswith("/0")
            bomb.writestr(name, b"\0" * (64 << 20) if grown else content, zipfile.ZIP_DEFLATED if grown else None)
    assert target.stat().st_size < 8 << 20
    with pytest.raises(CheckpointError, match=r"compressed from 67108864 to .* so it is refused"):
        UNet2DConditionModel.from_pretrained(unet)


class Trap:
    """Makes a folder when it is unpickled."""

    def __init__(self, place: Path) -> None:
        self.place = place

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.mkdir, (self.place,)


def test_malicious_pickle_is_refused_without_running(unet: Path, tmp_path: Path) -> None:
    weights_of(unet).unlink()
    target = unet / "diffusion_pytorch_model.bin"
    for place, write in (
        (tmp_path / "a", torch.save),
        (tmp_path / "b", lambda value, path: path.write_bytes(pickle.dumps(value))),
    ):
        write({"conv_in.bias": Trap(place)}, target)
        with pytest.raises(CheckpointError, match="cannot be loaded as plain weights"):
            UNet2DConditionModel.from_pretrained(unet)
        assert not place.exists()
    torch.save({"conv_in.bias": torch.zeros(1).expand(1 << 40)}, target)
    with pytest.raises(CheckpointError, match=r"claims 4398046511104 bytes for conv_in\.bias and stores 4"):
        UNet2DConditionModel.from_pretrained(unet)
    torch.save({"conv_in.bias": "text"}, target)
    with pytest.raises(CheckpointError, match=r"conv_in\.bias is a str"):
        UNet2DConditionModel.from_pretrained(unet)
