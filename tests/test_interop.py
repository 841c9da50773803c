"""Folders that other tools read and write; what needs their own environments is in `make interop`."""

import ast
import json
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import openvino
import openvino_tokenizers  # noqa: F401 - OpenVINO knows its operations from now on
import pytest
from exported import exported
from hypothesis import given, settings
from hypothesis import strategies as st

from anamorph import DiffusionPipeline, StableDiffusionPipeline
from anamorph.backends.numpy_program import GraphPort, agreed
from anamorph.benchmarks import peers
from anamorph.benchmarks.interop.__main__ import PEERS, Row, table
from anamorph.checkpoint import BUNDLED, Source, open_checkpoint
from anamorph.cli import main
from anamorph.errors import ArtifactError, InputError
from anamorph.exporters import openvino_tokenizer
from anamorph.foreign import foreign_format
from anamorph.interface import Axis, Interface, Port
from anamorph.tokenizer import ClipTokenizer

LISTS = Path(peers.__file__).parent
CALL: dict[str, Any] = {"num_inference_steps": 2, "height": 32, "width": 64, "seed": 3, "output_type": "np"}


@pytest.fixture(scope="module")
def tokenizer() -> ClipTokenizer:
    return ClipTokenizer.from_pretrained(BUNDLED / "tokenizer")


@pytest.fixture(scope="module")
def graph(tokenizer: ClipTokenizer, tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder = tmp_path_factory.mktemp("tokenizer")
    openvino_tokenizer.write(tokenizer, folder)
    return openvino.Core().compile_model(folder / "openvino_tokenizer.xml", "CPU")


def same_tokens(tokenizer: ClipTokenizer, graph: Any, text: str) -> None:
    ids = graph([text])["input_ids"][0]
    padded = np.full(tokenizer.model_max_length, tokenizer.pad_token_id)
    padded[: len(ids)] = ids
    np.testing.assert_array_equal(padded, tokenizer([text]).input_ids[0])


@pytest.mark.parametrize(
    "text",
    ["", "  a Red  APPLE\n", "don't we'll 1984!!!", "a " * 60, "café e\u0301 Å", "日本語の本", "😀 smile", "a\u00a0b"],
)
def test_the_tokenizers_graph_gives_the_tokenizers_ids(tokenizer: ClipTokenizer, graph: Any, text: str) -> None:
    same_tokens(tokenizer, graph, text)


# NumPy's strings lose zeros at their end, "<" may begin a special token, and the graph folds the micro sign to mu.
@settings(max_examples=60, deadline=None)
@given(st.text(st.characters(codec="latin-1", exclude_characters="\0<µ"), max_size=80))
def test_the_tokenizers_graph_agrees_on_western_texts(tokenizer: ClipTokenizer, graph: Any, text: str) -> None:
    same_tokens(tokenizer, graph, text)


def foreign(folder: Path, out: Path, class_name: str = "StableDiffusionPipeline") -> Path:
    """A copy of an artifact of ours as another tool would have left it: without a manifest."""
    shutil.copytree(folder, out)
    (out / "anamorph.json").unlink()
    index = json.loads((out / "model_index.json").read_text())
    (out / "model_index.json").write_text(json.dumps({**index, "_class_name": class_name}))
    return out


@pytest.mark.parametrize(("engine", "prefix"), [("onnxruntime", "ORT"), ("openvino", "OV")])
def test_a_folder_without_manifest_draws_the_same_picture(sd1: Path, tmp_path: Path, engine: str, prefix: str) -> None:
    own = exported(sd1, engine)
    other = foreign(own, tmp_path / "other", f"{prefix}StableDiffusionPipeline")
    opened = open_checkpoint(Source(str(other)))
    assert opened.artifact is not None
    assert all(part.status.startswith("unverified: ") for part in opened.artifact.parts.values())
    pipes = [DiffusionPipeline.from_pretrained(folder, backend=engine) for folder in (own, other)]
    ours, theirs = (pipe("a cat", **CALL).images for pipe in pipes)
    np.testing.assert_array_equal(theirs, ours)
    with pytest.raises(InputError, match="expected a multiple of 4"):
        pipes[1]("a cat", **{**CALL, "height": 40})


def test_a_graph_of_one_size_takes_no_other(sd1: Path, tmp_path: Path) -> None:
    folder = foreign(exported(sd1, "openvino"), tmp_path / "static")
    file = folder / "unet" / "openvino_model.xml"
    model = openvino.Core().read_model(file)
    model.reshape({"sample": [2, 4, 4, 8], "timestep": [1], "encoder_hidden_states": [2, 77, 32]})
    openvino.save_model(model, tmp_path / "model.xml", compress_to_fp16=False)
    del model
    for suffix in (".xml", ".bin"):
        (tmp_path / "model").with_suffix(suffix).replace(file.with_suffix(suffix))
    pipe = StableDiffusionPipeline.from_pretrained(folder, backend="openvino")
    full = StableDiffusionPipeline.from_pretrained(exported(sd1, "openvino"), backend="openvino")
    np.testing.assert_allclose(pipe("a cat", **CALL).images, full("a cat", **CALL).images, atol=1e-4)
    for change, refusal in (
        ({"width": 96}, "latent_width is 12, expected 8"),
        ({"height": 64}, "latent_height is 8, expected 4"),
        ({"guidance_scale": 1.0}, "batch is 1, expected 2"),
    ):
        with pytest.raises(InputError, match=refusal):
            pipe("a cat", **{**CALL, **change})


def test_a_changed_file_is_refused(sd1: Path, tmp_path: Path) -> None:
    folder = foreign(exported(sd1, "onnxruntime"), tmp_path / "other")
    opened = open_checkpoint(Source(str(folder)))
    assert opened.artifact is not None
    weights = folder / "unet" / "model.onnx_data"
    weights.write_bytes(bytes(weights.stat().st_size))
    with pytest.raises(ArtifactError, match="SHA-256"):
        opened.artifact.open_part("unet")


def test_what_is_another_tools_folder(tmp_path: Path) -> None:
    def touch(name: str) -> None:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()

    assert foreign_format(tmp_path) is None
    touch("unet/openvino_model.xml")
    touch("safety_checker/model.safetensors")
    assert foreign_format(tmp_path) == "openvino"
    touch("vae_decoder/model.onnx")
    with pytest.raises(ArtifactError, match="onnx and openvino"):
        foreign_format(tmp_path)
    touch("unet/diffusion_pytorch_model.fp16.safetensors")  # a checkpoint that comes with graphs, as some on the hub
    assert foreign_format(tmp_path) is None


def test_an_unfinished_export_is_no_other_tools_folder(sd1: Path, tmp_path: Path) -> None:
    folder = foreign(exported(sd1, "onnxruntime"), tmp_path / "draft")
    (folder / "anamorph.draft.json").touch()
    assert open_checkpoint(Source(str(folder))).artifact is None


def test_verify_says_that_there_is_nothing_to_repeat(
    sd1: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = foreign(exported(sd1, "onnxruntime"), tmp_path / "other")
    assert main(["verify", str(folder)]) != 0
    assert "another tool" in capsys.readouterr().err


SIDE = Axis("side", 4, 4)
INTERFACE = Interface(
    "unet",
    (Port("sample", (Axis("batch"), 3, SIDE)), Port("timestep", ()), Port("residual", (SIDE,), optional=True)),
    (Port("out", (Axis("batch"), SIDE)), Port("states", (SIDE,), optional=True)),
)
GRAPH = {"sample": GraphPort("float32", (None, 3, None)), "timestep": GraphPort("float32", ())}


def test_a_graph_narrows_its_interface() -> None:
    narrowed = agreed(Path("x"), INTERFACE, GRAPH, {"out"})
    assert [port.name for port in (*narrowed.inputs, *narrowed.outputs)] == ["sample", "timestep", "out"]
    assert narrowed.axes == {"batch": Axis("batch"), "side": SIDE}
    fixed = agreed(Path("x"), INTERFACE, {**GRAPH, "sample": GraphPort("float32", (2, 3, 8))}, {"out", "states"})
    assert fixed.axes == {"batch": Axis("batch", 1, 2, 2), "side": Axis("side", 4, 8, 8)}
    assert fixed.outputs[1].axes == (Axis("side", 4, 8, 8),)


@pytest.mark.parametrize(
    ("change", "outputs", "message"),
    [
        ({"timestep": GraphPort("int64", ())}, {"out"}, "timestep is int64"),
        ({"timestep": GraphPort("float32", (1,))}, {"out"}, "1 dimensions, expected float32 with 0"),
        ({"sample": GraphPort("float32", (None, 4, None))}, {"out"}, "a dimension 4, expected 3"),
        ({"sample": GraphPort("float32", (None, 3, 6))}, {"out"}, "one size only, and side is 6"),
        ({"mask": GraphPort("float32", ())}, {"out"}, "wants mask"),
        ({}, {"states"}, "has no out"),
    ],
)
def test_a_graph_that_does_not_fit_is_refused(change: dict[str, GraphPort], outputs: set[str], message: str) -> None:
    with pytest.raises(ArtifactError, match=message):
        agreed(Path("x"), INTERFACE, {**GRAPH, **change}, outputs)


@pytest.mark.parametrize(
    ("decibels", "passed"), [((), False), ((41.0, 40.0), True), ((50.0, 39.9), False), ((50.0, float("nan")), False)]
)
def test_the_table_fails_what_is_too_far_away(decibels: tuple[float, ...], passed: bool) -> None:
    row = Row("ours, onnx", "peer 1.0", "64x64", True, decibels)
    assert row.passed is passed
    assert ("FAILED" in table([row])) is not passed


def test_environments_are_pinned_in_full_and_for_the_processor() -> None:
    lists = sorted(LISTS.glob("*.txt"))
    assert {peer.name for peer in PEERS} <= {path.stem for path in lists}
    for path in lists:
        lines = [line for line in path.read_text().splitlines() if not line.startswith("#")]
        assert all(re.fullmatch(r"[\w.-]+==[\w.]+", line) for line in lines)
        assert not [line for line in lines if re.match("nvidia|cuda|triton|torchvision", line)]


def test_scripts_for_other_environments_import_nothing_of_ours() -> None:
    scripts = list(LISTS.glob("[a-z]*.py"))
    assert {peer.script[0] for peer in PEERS} <= {script.name for script in scripts}
    for script in scripts:
        nodes = list(ast.walk(ast.parse(script.read_text())))
        names = [alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names]
        names += [node.module or "" for node in nodes if isinstance(node, ast.ImportFrom)]
        assert names
        assert not [name for name in names if name.split(".")[0] == "anamorph"]
