"""What is taken of a hub's repository, and everything that loads by its id from the cache alone."""

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from anamorph import ClipTokenizer, DDIMScheduler, DiffusionPipeline, UNet2DConditionModel
from anamorph.errors import CheckpointError
from anamorph.hub import Source, find_component, find_folder, needed

FILES = [
    "README.md", "model_index.json", "v1-5-pruned.ckpt", "v1-5-pruned.safetensors", "scheduler/scheduler_config.json",
    "tokenizer/vocab.json", "tokenizer/merges.txt", "unet/config.json", "unet/diffusion_pytorch_model.bin",
    "unet/diffusion_pytorch_model.safetensors", "unet/diffusion_pytorch_model.fp16.safetensors",
    "unet/diffusion_pytorch_model.non_ema.safetensors", "vae/diffusion_pytorch_model.bin",
    "vae/diffusion_pytorch_model.fp16.bin", "text_encoder/model-00001-of-00002.safetensors",
    "text_encoder/model-00002-of-00002.safetensors", "text_encoder/model.safetensors.index.json",
    "text_encoder/model.fp16-00001-of-00002.safetensors", "text_encoder/model.fp16-00002-of-00002.safetensors",
    "text_encoder/model.safetensors.index.fp16.json", "text_encoder/flax_model.msgpack", "vae_decoder/model.onnx",
    "vae_decoder/model.onnx_data", "other/openvino_model.xml", "other/openvino_model.bin",
]  # fmt: skip
WEIGHTS = (".safetensors", ".bin", ".ckpt", ".onnx", ".onnx_data", ".xml")


@pytest.mark.parametrize(
    ("variant", "expected"),
    [
        (None, {"unet/diffusion_pytorch_model.safetensors", "vae/diffusion_pytorch_model.bin",
                "text_encoder/model-00001-of-00002.safetensors", "text_encoder/model-00002-of-00002.safetensors"}),
        ("fp16", {"unet/diffusion_pytorch_model.fp16.safetensors", "vae/diffusion_pytorch_model.fp16.bin",
                  "text_encoder/model.fp16-00001-of-00002.safetensors",
                  "text_encoder/model.fp16-00002-of-00002.safetensors"}),
        ("non_ema", {"unet/diffusion_pytorch_model.non_ema.safetensors", "vae/diffusion_pytorch_model.bin",
                     "text_encoder/model-00001-of-00002.safetensors", "text_encoder/model-00002-of-00002.safetensors"}),
    ],
)  # fmt: skip
def test_one_form_of_each_component_is_downloaded(variant: str | None, expected: set[str]) -> None:
    graphs = {"vae_decoder/model.onnx", "vae_decoder/model.onnx_data", "other/openvino_model.xml",
              "other/openvino_model.bin"}  # fmt: skip
    taken = needed(FILES, variant)
    assert {name for name in taken if name.endswith(WEIGHTS)} == expected | graphs
    assert {name for name in FILES if name.endswith((".json", ".txt"))} <= set(taken)
    assert "README.md" not in taken


@pytest.fixture
def cache(sd2: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A hub's cache that holds one checkpoint under two revisions, of which "old" has another scheduler."""
    root = tmp_path / "models--someone--tiny"
    for name, commit in (("main", "a" * 40), ("old", "b" * 40)):
        (root / "refs").mkdir(parents=True, exist_ok=True)
        (root / "refs" / name).write_text(commit)
        shutil.copytree(sd2, root / "snapshots" / commit)
    config = root / "snapshots" / ("b" * 40) / "scheduler" / "scheduler_config.json"
    config.write_text(config.read_text().replace("v_prediction", "epsilon"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    return tmp_path


def test_everything_loads_by_its_id_from_the_cache(cache: Path, sd2: Path) -> None:
    place: dict[str, Any] = {"cache_dir": cache, "local_files_only": True}
    unet = UNet2DConditionModel.from_pretrained("someone/tiny", subfolder="unet", **place)
    expected = UNet2DConditionModel.from_pretrained(sd2, subfolder="unet").state_dict()
    assert all(torch.equal(value, expected[name]) for name, value in unet.state_dict().items())
    for revision, predicts in ((None, "v_prediction"), ("old", "epsilon"), ("b" * 40, "epsilon")):
        scheduler = DDIMScheduler.from_pretrained("someone/tiny", subfolder="scheduler", revision=revision, **place)
        assert scheduler.config["prediction_type"] == predicts
        pipe = DiffusionPipeline.from_pretrained("someone/tiny", revision=revision, backend="null", **place)
        assert pipe.scheduler.config["prediction_type"] == predicts
    assert ClipTokenizer.from_pretrained("someone/tiny", subfolder="tokenizer", **place).model_max_length == 77


def test_what_is_not_in_the_cache_is_refused_in_a_sentence(cache: Path) -> None:
    with pytest.raises(CheckpointError, match="someone/none is neither a local folder nor could it be had"):
        find_folder(Source("someone/none", cache_dir=cache))  # the tests run offline
    with pytest.raises(CheckpointError, match="someone/tiny is neither"):
        find_folder(Source("someone/tiny", "other", cache_dir=cache, local_files_only=True))
    with pytest.raises(CheckpointError, match="has no folder 'unet_2'"):
        find_component("someone/tiny", "unet_2", ("*.json",), cache_dir=cache, local_files_only=True)
    for name in ("nowhere", "a/b/c", "../up", ""):
        with pytest.raises(CheckpointError, match="no hub id of the form owner/name"):
            find_folder(Source(name or "-"))
