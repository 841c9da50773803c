"""Core ML packages, as far as they can be proven without a Mac: what they compute, and what is refused."""

import functools
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from checkpoints import noisy
from coreml_exports import (
    BOUND,
    EXACT,
    HANDED,
    PARTS,
    VERSION,
    apples,
    component_of,
    difference,
    inputs_of,
    opened,
    rounded,
    split,
)
from coremltools.converters.mil.mil import types
from exported import trace_once
from mil_programs import Interpreted, operations
from parity import relative

from anamorph import DiffusionPipeline
from anamorph.artifact import read_artifact
from anamorph.backends.coreml import CoreMl as Engine
from anamorph.cli import main
from anamorph.components import Component
from anamorph.errors import ArtifactError, BackendError, BackendUnavailable, InputError
from anamorph.exporters import coreml as exporter
from anamorph.exporters.formats import Writing
from anamorph.exporters.references import check_rewritten, load
from anamorph.exporters.static import fixed
from anamorph.exporters.storing import Storing
from anamorph.exporters.trace import trace as plain_trace
from anamorph.exporting import CoreMl, ExportOptions
from anamorph.interface import Axis, Interface, Port
from anamorph.models import MODELS
from anamorph.plugins import get_backend
from anamorph.rewrites import SPLIT_EINSUM
from anamorph.safety import CONCEPTS, SPECIAL

pytestmark = pytest.mark.usefixtures("no_mac")
HALF = 5e-3
"""The same of a picture: what goes from part to part is float16, too."""


@pytest.mark.parametrize("part", PARTS)
def test_programs_compute_what_the_models_compute(sd2: Path, part: str) -> None:
    for folder, whole in ((split(sd2), False), (apples(sd2), True)):
        session = opened(folder, part).session()
        bound = BOUND if len(session.packages) == 1 else HANDED
        inputs = inputs_of(session.interface, batch=3, whole=whole)
        assert difference(session, rounded(sd2, part), inputs) <= bound


@pytest.mark.parametrize("part", ["text_encoder_2", "unet"])
def test_those_of_sdxl_too(sdxl: Path, part: str) -> None:
    session = opened(split(sdxl), part).session()
    assert difference(session, rounded(sdxl, part), inputs_of(session.interface, batch=3)) <= BOUND


def test_an_autoencoder_that_overflows_computes_in_float32(sdxl: Path) -> None:
    decoder = opened(split(sdxl), "vae_decoder")
    (package,) = decoder.packages
    kinds = {op.outputs[0].dtype for op in operations(package) if op.op_type in ("conv", "matmul", "square", "linear")}
    assert kinds == {types.fp32}
    module = load(component_of(sdxl, "vae_decoder"))
    assert difference(decoder, module.pixels, inputs_of(decoder.interface)) <= EXACT
    assert decoder.placement.precision == "float32"


def test_another_model_would_be_seen(sd2: Path) -> None:
    model, session = rounded(sd2, "unet"), opened(split(sd2), "unet").session()
    with torch.no_grad():
        model.__self__.mid_block.attentions[0].transformer_blocks[0].attn2.to_v.weight.mul_(1.01)
    assert difference(session, model, inputs_of(session.interface)) > 2 * BOUND


@pytest.mark.parametrize("name", ["sd1", "sd2", "sdxl"])
def test_split_attention_is_the_models_own(name: str, request: pytest.FixtureRequest) -> None:
    unet = MODELS["UNet2DConditionModel"].from_pretrained(request.getfixturevalue(name), subfolder="unet")
    random = torch.Generator().manual_seed(0)
    states = torch.randn(2, 9, unet.config.cross_attention_dim, generator=random)
    added = {"text_embeds": torch.randn(2, 24, generator=random), "time_ids": torch.full((2, 6), 64.0)}
    further: dict[str, Any] = {"added_cond_kwargs": added} if name == "sdxl" else {}
    further["encoder_attention_mask"] = torch.tensor([[1.0] * 9, [1.0] * 4 + [0.0] * 5])
    sample = torch.randn(2, 4, 16, 8, generator=random)
    with torch.no_grad():
        plain = unet(sample, 31.5, states, **further).sample.numpy()
        unet.rewrite([SPLIT_EINSUM])
        other = unet(sample, 31.5, states, **further).sample.numpy()
    assert 0 < relative(other, plain) <= EXACT  # not zero: it was computed in another way


def test_an_export_checks_its_rewrites(sd2: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    component = component_of(sd2, "unet")
    assert 0 < check_rewritten(component, "unet", load(component), [SPLIT_EINSUM]) <= EXACT
    monkeypatch.setattr("anamorph.models.split_einsum._feed_forward", lambda _, x: x)
    with pytest.raises(ArtifactError, match="split-einsum differs from the model by"):
        check_rewritten(component, "unet", load(component), [SPLIT_EINSUM])


@pytest.mark.parametrize("name", ["sd2", "sdxl"])
def test_pictures_are_those_of_eager(
    name: str, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Engine, "unavailable", lambda _: None)
    checkpoint = request.getfixturevalue(name)
    call: dict[str, Any] = {"num_inference_steps": 3, "seed": [3, 4], "guidance_scale": 5.0, "output_type": "np"}
    prompts = ["a photo of a red cat", "a dog"]
    ours = DiffusionPipeline.from_pretrained(split(checkpoint), backend="coreml", device="CPU_AND_NE")
    eager = DiffusionPipeline.from_pretrained(checkpoint, backend="eager")
    assert relative(ours(prompts, **call).images, eager(prompts, **call).images) <= HALF
    placed = ours.placement["unet"]
    assert (placed.engine, placed.device, placed.precision) == ("coreml", "CPU_AND_NE", "float16")
    assert placed.details["rewrites"] == SPLIT_EINSUM
    with pytest.raises(InputError, match="latent_height is 12, expected 8"):
        ours("a cat", height=24, width=16)
    with pytest.raises(BackendError, match="was exported to compute in float16, not in float32; take float16"):
        DiffusionPipeline.from_pretrained(split(checkpoint), backend="coreml", torch_dtype="float32")


def test_elsewhere_it_says_why_it_cannot_run(sd2: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(BackendUnavailable, match=r"Core ML runs on macOS alone, and this is Linux; .* on a Mac$"):
        get_backend("coreml")
    artifact = read_artifact(split(sd2))
    for status in (artifact.image["status"], *(part.status for part in artifact.parts.values())):
        assert status.startswith("unverified: no engine can open a coreml here")
    assert main(["generate", "a cat", "--model", str(split(sd2))]) == 1
    assert "macOS alone" in capsys.readouterr().err


def test_apples_safety_checker_returns_pictures_too(tmp_path: Path) -> None:
    vision = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 4,
              "image_size": 8, "patch_size": 4}  # fmt: skip
    module = MODELS["StableDiffusionSafetyChecker"](vision_config=vision, projection_dim=16).eval()
    noisy(module, 5)
    pixels = np.random.default_rng(0).standard_normal((8, 3, 8, 8)).astype(np.float16)
    module.concept_embeds_weights.data.zero_()
    module.special_care_embeds_weights.data.fill_(2)
    with torch.no_grad():
        nearest = module.scores(torch.from_numpy(pixels.astype(np.float32)))[1].amax(1).sort().values
    module.concept_embeds_weights.data.fill_(float(nearest[3:5].mean()))  # half of the pictures are nearer
    component = Component("safety_checker", "StableDiffusionSafetyChecker", module.config)
    interface = fixed(component.interface("safety_checker"))
    trace = functools.partial(trace_once, module, "scores")
    (tmp_path / "safety_checker").mkdir()
    options = ExportOptions(size=(16, 24), coreml=CoreMl(version=VERSION))
    written = exporter.write(Writing(interface, trace, tmp_path / "safety_checker", Storing("float16"), options))
    model = Interpreted(written.roots[0], "ALL", None)
    held = []
    for one in pixels:
        images = np.random.default_rng(1).random((1, 16, 24, 3)).astype(np.float16)
        result = model.predict({"clip_input": one[None], "images": images, "adjustment": np.zeros(1, np.float16)})
        assert result["special"].shape == (1, SPECIAL)
        assert result["concept_scores"].shape == (1, CONCEPTS)
        expected = bool((result["concepts"] + 0.01 * (result["special"] > 0).any() > 0).any())
        assert bool(result["has_nsfw_concepts"].reshape(())) == expected
        assert np.array_equal(result["filtered_images"], images * (not expected))
        held.append(expected)
    assert len(set(held)) == 2, "pictures of both kinds"


@pytest.mark.parametrize(
    ("function", "said"),
    [
        (torch.erfinv, "has no rule for the operation aten.erfinv.default in Core ML"),
        (lambda x: torch.einsum("abcd,abcd->ab", x, x), "cannot compute aten.einsum.default here"),
        (lambda x: x + 1e6, "holds 1000000.0, beyond float16's range"),
    ],
)
def test_what_core_ml_cannot_compute_is_named(tmp_path: Path, function: Any, said: str) -> None:
    class Model(torch.nn.Module):
        def run(self, sample: torch.Tensor) -> tuple[torch.Tensor]:
            return (function(sample),)

    shape = (Axis("batch", 1, 1, 1), 2, 3, 4)
    interface = Interface("part", (Port("sample", shape),), (Port("out", shape),))
    trace = functools.partial(plain_trace, Model(), "run")
    writing = Writing(interface, trace, tmp_path, Storing("float16"), ExportOptions(size=(8, 8), coreml=CoreMl()))
    with pytest.raises(BackendError, match=said):
        exporter.write(writing)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--to", "coreml", "--dtype", "fp32"], "weights of coreml are not stored as float32; expected float16"),
        (["--to", "coreml", "--signature", "native"], "portable signature"),
        (["--to", "coreml", "--palettize", "5"], "indices of 5 bits"),
        (["--to", "coreml", "--static", "16x16,24x24", "--apple-names", "v"], "packages of one size"),
        (["--to", "coreml", "--static", "61x61"], "no positive multiple of 2"),
        (["--to", "coreml", "--static", "64"], "not of the form HxW"),
        (["--to", "onnx", "--palettize", "4"], "options of coreml"),
    ],
)
def test_wrong_wishes_are_refused(
    sd2: Path, tmp_path: Path, options: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["export", str(sd2), str(tmp_path / "out"), *options]) in (1, 2)
    assert said in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
