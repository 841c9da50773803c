"""int8: which layers are left in float32, what the exported denoiser computes, and what its certificate says."""

import json
import re
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
import onnx
import openvino
import pytest
from exported import FORMATS, export, one_process
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from anamorph import DiffusionPipeline, StableDiffusionImg2ImgPipeline
from anamorph.artifact import read_artifact
from anamorph.cli import main
from anamorph.errors import InputError
from anamorph.exporters import quantization
from anamorph.exporters.calibration import Sample, draw, psnr
from anamorph.exporters.quantization import Layers, group_of, keep, relative, settle
from anamorph.exporting import INT8, LINKED, Quantization

PROMPTS = ("a red cat", "a dog")
WISHES = Quantization(PROMPTS, steps=2, samples=4, error=0.2)


@given(st.dictionaries(st.text(min_size=1), st.floats(0, 1), min_size=1), st.floats(1e-6, 2))
def test_the_fewest_groups_stay_in_float32(alone: dict[str, float], allowed: float) -> None:
    kept = keep(alone, allowed)
    rest = [error for name, error in alone.items() if name not in kept]
    assert sum(error**2 for error in rest) <= allowed**2 or not rest
    assert all(alone[name] >= max(rest, default=0) for name in kept)
    if kept:  # without the last of them it would have been too much
        assert sum(error**2 for error in [*rest, alone[kept[-1]]]) > allowed**2


class Shifted(Layers):
    """Each group adds its error to one number of its own, and `together` times it to one that all share."""

    def __init__(self, errors: Sequence[float], together: float) -> None:
        self.errors, self.together = errors, together
        self.groups = {str(index): [str(index)] for index in range(len(errors))}

    def run(self, quantized: Iterable[str], samples: Sequence[Sample]) -> list[NDArray[np.float64]]:
        chosen = [int(name) for name in quantized]
        out = np.zeros(len(self.errors) + 1)
        out[chosen] = [self.errors[index] for index in chosen]
        out[-1] = 1 + self.together * sum(self.errors[index] for index in chosen)
        return [out for _ in samples]


def test_errors_are_measured_and_not_only_added_up() -> None:
    errors = [0.03, 0.04, 0.01]
    samples = [Sample({}, np.array([0.0, 0.0, 0.0, 1.0]))]
    kept, error, alone = settle(Shifted(errors, 0.0), samples, 0.05)
    assert (kept, error) == (["1"], pytest.approx(np.hypot(0.03, 0.01)))
    assert list(alone.values()) == pytest.approx(errors)
    assert settle(Shifted(errors, 0.0), samples, 0.06)[:2] == ([], pytest.approx(np.sqrt(0.0026)))
    kept, error, _ = settle(Shifted(errors, 1.0), samples, 0.06)  # they also add up: 0.0566 alone, 0.08 together
    assert kept == ["1"]
    assert error == pytest.approx(np.sqrt(0.03**2 + 0.01**2 + 0.04**2))


def test_layers_are_grouped_by_block() -> None:
    names = {
        "down_blocks.0.attentions.1.transformer_blocks.0.attn1.to_q": "down_blocks.0.attentions.1",
        "mid_block.resnets.0.conv1": "mid_block.resnets.0",
        "up_blocks.2.upsamplers.0.conv": "up_blocks.2.upsamplers.0",
        "conv_in": "conv_in",
        "time_embedding.linear_1": "time_embedding",
    }
    assert {layer: group_of(layer) for layer in names} == names


@pytest.fixture(scope="module", params=FORMATS, name="int8")
def _int8(sd2: Path, tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest) -> Path:
    out = tmp_path_factory.mktemp("int8") / "sd2"
    with one_process(), pytest.MonkeyPatch.context() as patch:
        patch.setattr(quantization, "GROUP", re.compile(r"\w+"))  # a few large groups are tried sooner
        export(sd2, request.param, out, storage=LINKED, signature="native", quantize=WISHES)
    return out


def whole_numbers(folder: Path) -> int:
    """How many tensors of eight bits a denoiser multiplies by."""
    if (path := folder / "unet" / "model.onnx").exists():
        tensors = onnx.load(path).graph.initializer
        return sum(tensor.data_type == onnx.TensorProto.INT8 and len(tensor.dims) > 1 for tensor in tensors)
    model = openvino.Core().read_model(folder / "unet" / "openvino_model.xml")
    constants = (node for node in model.get_ordered_ops() if node.get_type_name() == "Constant")
    kinds = (node.get_element_type().to_string() for node in constants if len(node.get_output_shape(0)) > 1)
    return sum(kind == "i8" for kind in kinds)


def test_weights_are_whole_numbers_of_eight_bits(int8: Path) -> None:
    assert whole_numbers(int8) > 50
    part = read_artifact(int8).parts["unet"]
    assert part.storage == INT8
    assert not part.linked
    assert part.status == "verified"


def test_pictures_are_as_near_as_the_manifest_says(sd2: Path, int8: Path) -> None:
    record = json.loads((int8 / "anamorph.json").read_text())["image"][INT8]
    assert record["part"] == "unet"
    assert record["prompts"] == list(PROMPTS)
    assert 0 < record["error"] <= WISHES.error
    pipes = [DiffusionPipeline.from_pretrained(place, **engine) for place, engine in (
        (sd2, {"backend": "eager"}), (int8, {}),
    )]  # fmt: skip
    exact, rounded = (draw(pipe, WISHES, None) for pipe in pipes)
    distances = [psnr(*pair) for pair in zip(exact, rounded, strict=True)]
    assert distances == pytest.approx(record["psnr_db"], abs=0.1)  # the float export differs by less than a shade
    assert min(distances) > 20
    assert max(distances) < 60  # rounding is seen: these are not the pictures of float32


def test_only_prompts_calibrate(sd1: Path) -> None:
    pipe = StableDiffusionImg2ImgPipeline.from_pretrained(sd1, backend="eager")
    with pytest.raises(InputError, match="StableDiffusionImg2ImgPipeline does not draw from prompts alone"):
        draw(pipe, WISHES, None)


def test_relative_distance() -> None:
    assert relative([np.array([3.0, 4.0])], [np.array([0.0, 4.0])]) == pytest.approx(0.75)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["--calibrate", "x"], "--calibrate has no meaning without --quantize int8; leave it out"),
        (["--quantize", "int8"], "--quantize needs --calibrate FILE"),
        (["--quantize", "int8", "--calibrate", "missing.txt"], "missing.txt cannot be read"),
        (["--quantize", "int8", "--calibrate", "empty.txt"], "calibration has no prompts"),
        (["--quantize", "int8", "--calibrate", "p.txt", "--quantize-error", "0"], "must be positive"),
    ],
)
def test_wrong_wishes_are_refused(
    options: list[str], says: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("empty.txt").write_text("\n \n")
    Path("p.txt").write_text("a cat\n")
    code = main(["export", "bundled", "out", "--to", "openvino", *options])
    assert code != 0
    assert says in capsys.readouterr().err
    assert not Path("out").exists()


def test_a_format_without_int8_says_so() -> None:
    assert quantization.unavailable("coreml") == "coreml has no int8 here; export to openvino or onnx"
