"""Where the constants of an exported graph come from, and graphs that leave their weights in the checkpoint."""

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import openvino
import pytest
import torch
from exported import FORMATS, export, exported
from numpy.typing import NDArray
from onnx import numpy_helper
from parity import relative
from perturbed import copied, rewrite_manifest
from safetensors.torch import load_file, save_file

from anamorph import DiffusionPipeline, StableDiffusionPipeline
from anamorph.artifact import NATIVE, Artifact, read_artifact
from anamorph.checkpoint import Source, open_checkpoint
from anamorph.errors import ArtifactError, CheckpointError, InputError
from anamorph.exporting import LINKED, ExportOptions
from anamorph.linked import Constant

CALL: dict[str, Any] = {"num_inference_steps": 2, "seed": 0, "guidance_scale": 5.0, "output_type": "latent"}


def stored(checkpoint: Path, component: str) -> dict[str, NDArray[Any]]:
    """All tensors of a component, as float32."""
    (file,) = (checkpoint / component).glob("*.safetensors")
    return {name: value.float().numpy() for name, value in load_file(file).items()}


def rebuilt(constant: Constant, tensors: dict[str, NDArray[Any]]) -> NDArray[Any]:
    """A constant as its provenance says."""
    value = tensors[constant.tensor].reshape(constant.shape)
    return value.T if constant.transform == "transposed" else value


@pytest.mark.parametrize("part", ["unet", "text_encoder", "vae_decoder"])
def test_provenance_rebuilds_every_weight_of_an_onnx_graph(sd1: Path, part: str) -> None:
    place = exported(sd1, "onnxruntime")
    record = read_artifact(place).parts[part]
    tensors = stored(sd1, record.component)
    model = onnx.load(place / record.file)
    values = {tensor.name: numpy_helper.to_array(tensor) for tensor in model.graph.initializer}
    assert len(record.constants) > 20
    for name, constant in record.constants.items():
        np.testing.assert_array_equal(values[name], rebuilt(constant, tensors))
    explained = sum(values[name].size for name in record.constants)
    assert explained / sum(value.size for value in values.values()) > 0.99


def test_provenance_rebuilds_every_weight_of_an_openvino_graph(sd1: Path) -> None:
    place = exported(sd1, "openvino")
    record = read_artifact(place).parts["unet"]
    tensors = stored(sd1, "unet")
    model = openvino.Core().read_model(place / record.file)
    held = {node.data.tobytes() for node in model.get_ops() if node.get_type_name() == "Constant"}
    large = [constant for constant in record.constants.values() if np.prod(constant.shape) > 256]
    assert len(large) > 20
    assert all(rebuilt(constant, tensors).tobytes() in held for constant in large)


def narrowed(source: Path, folder: Path, dtype: torch.dtype) -> Path:
    """The checkpoint with its UNet stored in another type."""
    shutil.copytree(source, folder)
    (file,) = (folder / "unet").glob("*.safetensors")
    save_file({name: value.to(dtype) for name, value in load_file(file).items()}, file, {"format": "pt"})
    return folder


@pytest.mark.parametrize(
    ("dtype", "engine"),
    [("float32", "onnxruntime"), ("float32", "openvino"), ("float16", "openvino"), ("bfloat16", "onnxruntime")],
)
def test_a_linked_graph_computes_what_eager_does_from_the_checkpoints_own_weights(
    sd2: Path, tmp_path: Path, dtype: str, engine: str
) -> None:
    checkpoint, place = narrowed(sd2, tmp_path / "checkpoint", getattr(torch, dtype)), tmp_path / "linked"
    checks = export(checkpoint, engine, place, storage=LINKED, signature=NATIVE)
    assert all(check.passed for check in checks)
    weights = sum(path.stat().st_size for path in checkpoint.rglob("*.safetensors"))
    # OpenVINO's .xml names operations and holds no weights; of a tiny model it is as large as they are.
    text = (".json", ".txt", ".xml")
    files = [path for path in place.rglob("*") if path.is_file() and path.suffix not in text]
    assert sum(path.stat().st_size for path in files) < 0.4 * weights
    assert read_artifact(place).parts["unet"].storage == LINKED
    drawn = StableDiffusionPipeline.from_pretrained(place)("a cat", **CALL).images
    assert relative(drawn, eager(checkpoint)) <= 1e-4


def eager(checkpoint: Path) -> NDArray[Any]:
    pipe = DiffusionPipeline.from_pretrained(checkpoint, backend="eager", torch_dtype="float32")
    assert isinstance(pipe, StableDiffusionPipeline)
    return np.asarray(pipe("a cat", **CALL).images)


def test_a_linked_graph_whose_checkpoint_changed_is_refused(sd2: Path, tmp_path: Path) -> None:
    source, place = tmp_path / "checkpoint", tmp_path / "linked"
    shutil.copytree(sd2, source)
    export(source, "onnxruntime", place, storage=LINKED, signature=NATIVE)
    (file,) = (source / "unet").glob("*.safetensors")
    whole = file.read_bytes()
    file.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    with pytest.raises(ArtifactError, match="SHA-256"):
        StableDiffusionPipeline.from_pretrained(place)
    file.write_bytes(whole[:-8])
    with pytest.raises(ArtifactError, match="records"):
        StableDiffusionPipeline.from_pretrained(place)
    shutil.rmtree(source)
    with pytest.raises((ArtifactError, CheckpointError), match="missing"):
        StableDiffusionPipeline.from_pretrained(place)


def test_links_cannot_leave_the_checkpoint(sd2: Path, tmp_path: Path) -> None:
    place = copied(exported(sd2, "onnxruntime", NATIVE, storage=LINKED), tmp_path / "linked")

    def change(values: dict[str, Any]) -> None:
        linked = values["parts"]["unet"]["linked"]
        linked["../../etc/passwd"] = linked.popitem()[1]

    rewrite_manifest(place, change)
    with pytest.raises(ArtifactError, match="outside its folder"):
        open_checkpoint(Source(str(place)))


def test_the_cache_takes_a_moved_checkpoint(sd2: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ANAMORPH_CACHE", str(tmp_path / "cache"))
    first, second = tmp_path / "first", tmp_path / "second"
    shutil.copytree(sd2, first)
    StableDiffusionPipeline.from_pretrained(first, backend="onnxruntime")
    first.rename(second)
    pipe = StableDiffusionPipeline.from_pretrained(second, backend="onnxruntime")
    assert len([path for path in (tmp_path / "cache" / "exports").iterdir() if path.is_dir()]) == 1
    assert relative(np.asarray(pipe("a cat", **CALL).images), eager(second)) <= 1e-4


def test_pickled_weights_are_copied_and_that_is_said(sd2: Path, tmp_path: Path) -> None:
    source, said = tmp_path / "checkpoint", []
    shutil.copytree(sd2, source)
    (file,) = (source / "unet").glob("*.safetensors")
    torch.save(load_file(file), file.with_suffix(".bin"))
    file.unlink()
    from anamorph.plugins import get_exporter

    options = ExportOptions(storage=LINKED, signature=NATIVE)
    get_exporter(["onnx"]).export(open_checkpoint(Source(str(source))), tmp_path / "out", options, said.append)
    artifact: Artifact = read_artifact(tmp_path / "out")
    assert artifact.parts["unet"].storage == "float32"
    assert artifact.parts["unet"].linked == {}
    assert artifact.parts["vae_decoder"].storage == LINKED
    assert any("pickles" in line for line in said)


def test_a_portable_folder_holds_its_weights() -> None:
    with pytest.raises(InputError, match="native"):
        ExportOptions(storage=LINKED)


@pytest.mark.parametrize("engine", FORMATS)
def test_bfloat16_halves_the_folder(sd2: Path, tmp_path: Path, engine: str) -> None:
    place = tmp_path / "narrow"
    checks = export(sd2, engine, place, storage="bfloat16")
    size = sum(path.stat().st_size for path in (place / "unet").iterdir())
    assert size < 0.65 * sum(path.stat().st_size for path in (exported(sd2, engine) / "unet").iterdir())
    unet = [check.difference.relative_l2 for check in checks if check.part == "unet"]
    assert 1e-4 < max(unet) < 5e-2  # it is narrower, and still the same model
