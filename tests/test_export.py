"""Exported folders: their layout, their certificates, and what is refused."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import openvino
import pytest
from exported import FORMATS, export, exported
from perturbed import record_again
from safetensors.numpy import load_file as load_numpy
from safetensors.torch import load_file, save_file

import anamorph
from anamorph import StableDiffusionPipeline
from anamorph.artifact import interface_from_dict, interface_to_dict, read_artifact
from anamorph.backends.openvino import OpenVino
from anamorph.checkpoint import Source, open_checkpoint
from anamorph.cli import main
from anamorph.errors import ArtifactError, InputError
from anamorph.exporters import certifying, fitting
from anamorph.exporters.plain_files import copy_rest
from anamorph.exporters.settling import read_components
from anamorph.exporting import ExportOptions
from anamorph.image import psnr
from anamorph.plugins import get_exporter

TEXT = ["last_hidden_state", "pooler_output", "hidden_states.0", "hidden_states.1", "hidden_states.2"]
PORTS = {
    "text_encoder": (["input_ids"], TEXT),
    "unet": (["sample", "timestep", "encoder_hidden_states"], ["out_sample"]),
    "vae_encoder": (["sample"], ["latent_parameters"]),
    "vae_decoder": (["latent_sample"], ["sample"]),
}


def test_onnx_folders_are_those_of_optimum(sd1: Path) -> None:
    place = exported(sd1, "onnxruntime")
    for part, (inputs, outputs) in PORTS.items():
        model = onnx.load(place / part / "model.onnx", load_external_data=False)
        onnx.checker.check_model(str(place / part / "model.onnx"), full_check=True)
        assert [port.name for port in model.graph.input] == inputs
        assert [port.name for port in model.graph.output] == outputs
        assert model.opset_import[0].version == 18
        assert (place / part / "model.onnx_data").is_file()
    unet = onnx.load(place / "unet" / "model.onnx", load_external_data=False)
    assert [len(port.type.tensor_type.shape.dim) for port in unet.graph.input] == [4, 0, 3]


def test_openvino_folders_are_those_of_optimum_and_genai(sd1: Path) -> None:
    place = exported(sd1, "openvino")
    assert json.loads((place / "openvino_config.json").read_text())["dtype"] == "fp32"
    for part, (inputs, outputs) in PORTS.items():
        model = openvino.Core().read_model(place / part / "openvino_model.xml")
        assert [port.any_name for port in model.inputs] == inputs
        assert [port.any_name for port in model.outputs] == outputs
    unet = openvino.Core().read_model(place / "unet" / "openvino_model.xml")
    timestep = unet.input("timestep")
    assert (timestep.element_type, timestep.partial_shape.rank) == (openvino.Type.i64, 1)
    kinds = {node.get_element_type() for node in unet.get_ops() if node.get_type_name() == "Constant"}
    assert openvino.Type.f16 not in kinds, "weights were compressed unasked"


@pytest.mark.parametrize("engine", FORMATS)
def test_what_surrounds_the_parts(sd1: Path, engine: str) -> None:
    place = exported(sd1, engine)
    index = json.loads((place / "model_index.json").read_text())
    assert index["vae"] == ["diffusers", "AutoencoderKL"]
    assert index["safety_checker"] == [None, None]
    for part in ("vae_encoder", "vae_decoder"):
        config = json.loads((place / part / "config.json").read_text())
        assert config["scaling_factor"] == 0.18215
        assert config["down_block_types"] == ["DownEncoderBlock2D"] * 4
    assert json.loads((place / "unet" / "config.json").read_text())["time_cond_proj_dim"] is None
    assert (place / "scheduler" / "scheduler_config.json").is_file()
    assert (place / "tokenizer" / "tokenizer.json").is_file()
    assert not list(place.parent.glob(f".{place.name}.*.partial"))


def test_a_vocabulary_without_tokenizer_json_gets_one(sd1: Path, tmp_path: Path) -> None:
    copy = tmp_path / "checkpoint"
    shutil.copytree(sd1, copy)
    (copy / "tokenizer" / "tokenizer.json").unlink()
    checkpoint = open_checkpoint(Source(str(copy)))
    copy_rest(checkpoint, read_components(checkpoint), tmp_path)
    from tokenizers import Tokenizer

    ids = Tokenizer.from_file(str(tmp_path / "tokenizer" / "tokenizer.json")).encode("a photo of a cat").ids
    expected = anamorph.ClipTokenizer.from_pretrained(sd1 / "tokenizer")(["a photo of a cat"]).input_ids[0]
    assert ids == expected[: len(ids)].tolist()


@pytest.mark.parametrize("engine", FORMATS)
def test_the_manifest_says_what_was_measured(sd2: Path, engine: str) -> None:
    artifact = read_artifact(exported(sd2, engine))
    assert artifact.source["sha256"] == open_checkpoint(Source(str(sd2))).digest()
    assert list(artifact.parts) == ["vae_encoder", "vae_decoder", "text_encoder", "unet"]
    for name, part in artifact.parts.items():
        assert part.status == "verified"
        assert set(part.errors) == set(PORTS[name][1])
        assert all(0 <= error.relative_l2 <= 1e-4 for error in part.errors.values())
        assert interface_from_dict(json.loads(json.dumps(interface_to_dict(part.interface)))) == part.interface
    unet = {axis.name: axis for axis in artifact.parts["unet"].interface.inputs[0].axes if not isinstance(axis, int)}  # type: ignore[union-attr]
    assert (unet["latent_height"].multiple, unet["latent_height"].maximum) == (2, None)  # type: ignore[union-attr]
    assert artifact.image["status"] == "verified"
    assert len(artifact.image["steps"]) == 4


def test_an_export_beyond_its_tolerance_leaves_nothing(
    smallest: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(certifying, "TOLERANCE", {"float32": (1e-12, 1e-12)})
    with pytest.raises(ArtifactError, match="differs from PyTorch"):
        export(smallest, "onnxruntime", tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_a_static_export_in_float16_takes_its_size_alone(sd2: Path, fixed: Path) -> None:
    place = fixed
    assert {part.status for part in read_artifact(place).parts.values()} == {"verified"}
    size = sum(path.stat().st_size for path in (place / "unet").iterdir())
    assert size < 0.6 * sum(path.stat().st_size for path in (exported(sd2, "onnxruntime") / "unet").iterdir())
    pipe = StableDiffusionPipeline.from_pretrained(place)
    eager = StableDiffusionPipeline.from_pretrained(sd2, backend="eager")
    call: dict[str, Any] = {"num_inference_steps": 3, "seed": 0, "output_type": "np", "guidance_scale": 5.0}
    drawn = pipe("a cat", height=16, width=24, **call).images
    assert psnr(eager("a cat", height=16, width=24, **call).images, drawn) >= 30
    with pytest.raises(InputError, match="latent_height is 16"):
        pipe("a cat", height=32, width=24, **call)
    with pytest.raises(InputError, match="batch is 4"):
        pipe(["a cat", "a dog"], height=16, width=24, **{**call, "seed": [0, 1]})


@pytest.mark.processes
def test_verify_names_the_part_that_differs(sd1: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    place = tmp_path / "artifact"
    shutil.copytree(exported(sd1, "onnxruntime"), place)
    assert main(["verify", str(place), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["first_difference"] is None
    path = place / "vae_decoder" / "model.onnx_data"
    np.memmap(path, np.float32, mode="r+")[:] *= 1.01
    record_again(place, "vae_decoder")
    assert main(["verify", str(place), "--model", str(sd1)]) == 3
    assert "the first to differ is vae_decoder" in capsys.readouterr().out


def test_verify_refuses_another_checkpoint(sd1: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    other = tmp_path / "other"
    shutil.copytree(sd1, other)
    file = other / "unet" / "diffusion_pytorch_model.safetensors"
    save_file({name: value * 2 for name, value in load_file(file).items()}, file)
    assert main(["verify", str(exported(sd1, "onnxruntime")), "--model", str(other)]) == 1
    assert "another checkpoint" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["export", "{sd1}", "{out}", "--to", "nothing"], 1, "known are aotinductor, coreml, onnx"),
        (["export", "{sd1}", "{out}", "--to", "onnx", "--static", "64"], 2, "form HxW"),
        (["export", "{sd1}", "{out}", "--to", "onnx", "--static", "40x64"], 2, "multiple of 4"),
        (["export", "{sd1}", "{out}", "--to", "onnx", "--batch", "0"], 2, "batch is 0"),
        (["export", "{sd1}", "{out}", "--to", "onnx", "--dtype", "int8"], 2, "'int8' is unknown"),
        (["export", "{sd1}", "{out}", "--to", "onnx", "--dtype", "fp16", "--link"], 2, "leave out --dtype or --link"),
        (["export", "{sd1}", "{sd1}", "--to", "onnx"], 2, "exists already"),
        (["export", "{artifact}", "{out}", "--to", "onnx"], 2, "exported folder already"),
        (["export", "/nowhere", "{out}", "--to", "onnx"], 1, "no folder"),
        (["export", "{sd1}", "/proc/nowhere/out", "--to", "onnx"], 1, "cannot write"),
        (["verify", "{sd1}"], 2, "no exported folder"),
    ],
)
def test_wrong_arguments_are_one_sentence(
    sd1: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], code: int, message: str
) -> None:
    places = {"sd1": sd1, "out": tmp_path / "out", "artifact": exported(sd1, "onnxruntime")}
    assert main([argument.format(**places) for argument in arguments]) == code
    error = capsys.readouterr().err.strip()
    assert message in error
    assert "Traceback" not in error
    assert not (tmp_path / "out").exists()


def test_doctor_knows_engines_and_exporters(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert {row["format"]: row["available"] for row in found["exporters"]} == dict.fromkeys(
        ("aotinductor", "coreml", "onnx", "openvino", "torchscript"), True
    )
    assert {"eager", "onnxruntime", "openvino"} <= {row["name"] for row in found["engines"]}
    assert found["packages"]["onnxruntime"]


def test_a_certificate_is_measured_in_bfloat16_where_float32_would_not_fit(
    sd2: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if "bfloat16" not in OpenVino().precisions("cpu"):
        pytest.skip("the processor has no bfloat16")
    monkeypatch.setattr(fitting, "free_memory", lambda: 2**20)
    opened = open_checkpoint(Source(str(sd2)))
    checks = get_exporter(("openvino",)).export(opened, tmp_path / "out", ExportOptions(), lambda _: None)
    numbers = sum(tensor.size for path in sd2.rglob("*.safetensors") for tensor in load_numpy(path).values())
    status = f"verified in bfloat16: float32 would take about {8 * numbers / 2**30:.0f} GiB of memory"
    assert {part.status for part in read_artifact(tmp_path / "out").parts.values()} == {status}
    assert {check.tolerance for check in checks} == {5e-2, 3e-1}
    assert max(check.difference.relative_l2 for check in checks) > 1e-3  # and not measured in float32
    assert fitting.fitting_precision(read_components(opened), "onnx") == ("float32", "")  # it has no bfloat16
