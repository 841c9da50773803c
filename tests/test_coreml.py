"""Core ML packages, as far as they can be proven without a Mac: what they hold, and what they compute."""

import functools
import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import coremltools
import numpy as np
import pytest
import torch
from checkpoints import noisy
from coremltools.converters.mil.mil import types
from exported import once, shared_place, trace_once
from mil_programs import OPERATIONS, Interpreted, arguments, operations, program
from parity import relative

from anamorph import DiffusionPipeline
from anamorph.artifact import NATIVE, Artifact, FileRecord, Part, read_artifact
from anamorph.backends import coreml
from anamorph.backends.coreml import CoreMl as Engine
from anamorph.backends.coreml import CoreMlProgram, open_part
from anamorph.checkpoint import Source, open_checkpoint
from anamorph.cli import main
from anamorph.components import Component
from anamorph.denoiser_interfaces import even
from anamorph.errors import ArtifactError, BackendError, BackendUnavailable, InputError
from anamorph.exporters import coreml as exporter
from anamorph.exporters.formats import Writing
from anamorph.exporters.references import check_rewritten, load
from anamorph.exporters.settling import read_components
from anamorph.exporters.static import fixed, joined
from anamorph.exporters.storing import Storing
from anamorph.exporters.trace import trace as plain_trace
from anamorph.exporting import CoreMl, ExportOptions
from anamorph.interface import Axis, Interface, Port
from anamorph.models import MODELS
from anamorph.plugins import get_backend, get_exporter
from anamorph.probes import probe
from anamorph.rewrites import SPLIT_EINSUM
from anamorph.safety import CONCEPTS, SPECIAL

EXACT = 1e-5
"""Relative L2 difference of attention that was rewritten (float32)."""
BOUND = 1e-4
"""The same of a program run in float32: numbers such as 1 / sqrt(d) are float16 in it, as the weights are."""
HANDED = 1e-3
"""The same of a program in two pieces: what the first hands over is float16."""
HALF = 5e-3
"""The same of a picture: what goes from part to part is float16, too."""
PARTS = ("text_encoder", "unet", "vae_encoder", "vae_decoder")
HOSTED = {"cast", "mul", "sin", "cos", "reshape", "squeeze", "expand_dims", "transpose", "identity"}
"""What may be float32: the angles of a time, a few numbers before everything else."""
WEIGHTS = "Data/com.apple.CoreML/weights/weight.bin"
VERSION = "some/model"


@pytest.fixture(autouse=True)
def _no_mac(monkeypatch: pytest.MonkeyPatch) -> None:
    """PyTorch runs the packages in Core ML's place."""
    monkeypatch.setattr(coreml, "load", Interpreted)


def split(checkpoint: Path) -> Path:
    """An export as it is by default."""

    def make(out: Path) -> None:
        source = open_checkpoint(Source(str(checkpoint)))
        assert get_exporter(["coreml"]).export(source, out, ExportOptions(), lambda _: None) == []

    return once(shared_place() / f"coreml-{checkpoint.name}", make)


def apples(checkpoint: Path) -> Path:
    """An export for Apple's tools, by command."""

    def make(out: Path) -> None:
        wishes = ["--attention", "original", "--chunk-unet", "--apple-names", VERSION]
        assert main(["export", str(checkpoint), str(out), "--to", "coreml", *wishes, "--json"]) == 0

    return once(shared_place() / f"coreml-apples-{checkpoint.name}", make)


def component_of(checkpoint: Path, part: str) -> Component:
    return next(c for c in read_components(open_checkpoint(Source(str(checkpoint)))) if part in c.parts)


@functools.cache
def alone(checkpoint: Path, part: str, wishes: CoreMl, *sizes: tuple[int, int]) -> CoreMlProgram:
    """One part, written for these sizes of latents and opened."""
    component = component_of(checkpoint, part)
    rewrites = (SPLIT_EINSUM,) if part == "unet" and wishes.attention == "split_einsum" else ()
    interface = even(component.interface(part), component.config).required
    interface = joined([fixed(interface.limited(_axes(size))) for size in sizes or [(8, 8)]])
    place = shared_place() / f"coreml-{checkpoint.name}-{part}-{wishes.palette}-{len(sizes)}" / part

    def make(out: Path) -> None:
        module = load(component)
        module.rewrite(rewrites)
        out.mkdir(parents=True)
        trace = functools.partial(trace_once, module, module.method(part))
        exporter.write(Writing(interface, trace, out, Storing("float16"), ExportOptions(size=(64, 64), coreml=wishes)))

    return made(once(place, make), interface)


def _axes(size: tuple[int, int]) -> dict[str, Axis]:
    named = zip(("latent_height", "latent_width", "batch"), (*size, 2), strict=True)
    return {name: Axis(name, 1, count, count) for name, count in named}


def made(place: Path, interface: Interface) -> CoreMlProgram:
    """What lies in a part's folder, opened."""
    name = interface.component
    files = {p.relative_to(place.parent).as_posix(): FileRecord.of(p) for p in place.rglob("*") if p.is_file()}
    first = min(file for file in files if file.endswith("Manifest.json"))
    part = Part(name, first, files, interface, "float16", "unverified")
    return open_part(Artifact(place.parent, "coreml", NATIVE, {name: part}, {}, {}, {}), name, "ALL")


def opened(folder: Path, part: str) -> CoreMlProgram:
    return open_part(read_artifact(folder), part, "ALL")


def rounded(checkpoint: Path, part: str) -> Any:
    """The PyTorch model of a part, with the weights that float16 holds."""
    module = load(component_of(checkpoint, part)).half().float()
    return getattr(module, module.method(part))


def inputs_of(interface: Interface, *, whole: bool = False, **sizes: int) -> dict[str, Any]:
    """Inputs that float16 holds; only of whole timesteps for Apple's tools."""
    least = {name: axis.minimum for name, axis in interface.axes.items()}
    given = probe(interface, {**least, **sizes})
    kept = () if whole else ("timestep",)
    return {
        name: value if value.dtype == np.int64 or name in kept else value.astype(np.float16).astype(np.float32)
        for name, value in given.items()
    }


def difference(session: CoreMlProgram, model: Any, inputs: Mapping[str, Any]) -> float:
    """How far a program is from PyTorch, at worst of its outputs."""
    with torch.no_grad():
        expected = model(*map(torch.from_numpy, inputs.values()))
    found = session(inputs)
    pairs = zip(session.interface.outputs, expected, strict=True)
    return max(relative(np.asarray(found[port.name]), value.numpy()) for port, value in pairs)


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


@pytest.mark.parametrize("part", PARTS)
def test_nothing_on_the_way_is_refused_by_the_neural_engine(sd2: Path, part: str) -> None:
    found = [op for package in opened(split(sd2), part).packages for op in operations(package)]
    exact = [op for op in found if op.outputs[0].dtype == types.fp32]
    assert {op.op_type for op in exact} <= HOSTED
    assert len(exact) < 10
    assert bool(exact) == (part == "unet")
    assert part == "text_encoder" or not [op for op in found if op.outputs[0].dtype in (types.int32, types.bool)]
    for var in (var for op in found for var in op.outputs):
        assert var.dtype in (types.fp16, types.fp32, types.int32, types.bool), var.name
        assert var.rank <= 5
        assert all(isinstance(size, int) for size in var.shape), "sizes are fixed"


def test_split_attention_is_a_small_product_per_head_of_channels_first(sd2: Path) -> None:
    (package,) = opened(split(sd2), "unet").packages
    found = operations(package)
    kinds = [op.op_type for op in found]
    layers = [layer for layer in rounded(sd2, "unet").__self__.modules() if type(layer).__name__ == "Attention"]
    assert kinds.count("einsum") == 2 * sum(layer.heads for layer in layers)
    assert "matmul" not in kinds
    assert kinds.count("linear") < 20, "only the time goes through linear layers"
    assert {tuple(int(axis) for axis in op.axes.val) for op in found if op.op_type == "layer_norm"} == {(1,)}
    kinds = [op.op_type for package in opened(apples(sd2), "unet").packages for op in operations(package)]
    assert "einsum" not in kinds
    assert kinds.count("matmul") == 2 * len(layers)


def test_names_types_and_layouts_are_apples(sd2: Path) -> None:
    folder = apples(sd2)
    assert not list(folder.glob("*/*.mlpackage"))
    found = {path.name: path for path in folder.glob("*.mlpackage")}
    stem = "Stable_Diffusion_version_some_model_{}.mlpackage"
    parts = ("text_encoder", "unet_chunk1", "unet_chunk2", "vae_decoder", "vae_encoder")
    assert sorted(found) == [stem.format(part) for part in parts]
    inputs = {"sample": [2, 4, 8, 8], "timestep": [2], "encoder_hidden_states": [2, 32, 1, 77]}
    assert described(found[stem.format("unet_chunk1")])[0] == {name: (65552, shape) for name, shape in inputs.items()}
    assert described(found[stem.format("unet_chunk2")])[1] == ["noise_pred"]
    given, returned = described(found[stem.format("text_encoder")])
    assert given == {"input_ids": (65568, [1, 77])}
    assert {"last_hidden_state", "pooled_outputs", "hidden_embeds"} <= set(returned)
    assert described(found[stem.format("vae_decoder")]) == ({"z": (65552, [1, 4, 8, 8])}, ["image"])
    assert described(found[stem.format("vae_encoder")]) == ({"x": (65552, [1, 3, 16, 16])}, ["latent"])
    (ours,) = opened(split(sd2), "unet").packages
    assert described(ours)[0]["timestep"] == (65568, [2])  # keeps fractions


def described(package: Path) -> tuple[dict[str, tuple[int, list[int]]], list[str]]:
    """Inputs with type and shape, and names of outputs, from where apple/ml-stable-diffusion reads them."""
    description = coremltools.utils.load_spec(str(package)).description
    arrays = {port.name: port.type.multiArrayType for port in description.input}
    outputs = [port.name for port in description.output]
    return {name: (each.dataType, list(each.shape)) for name, each in arrays.items()}, outputs


def weights(program: CoreMlProgram) -> list[int]:
    return [(package / WEIGHTS).stat().st_size for package in program.packages]


def test_no_weight_is_in_both_chunks(sd2: Path) -> None:
    halves, whole = weights(opened(apples(sd2), "unet")), weights(opened(split(sd2), "unet"))
    assert len(halves) == 2
    assert 0.4 < halves[0] / sum(halves) < 0.6
    assert sum(halves) < 1.05 * sum(whole)


def test_several_sizes_share_their_weights(sd2: Path) -> None:
    several = alone(sd2, "unet", CoreMl(), (8, 8), (8, 16), (16, 8))
    assert sum(weights(several)) < 1.02 * sum(weights(alone(sd2, "unet", CoreMl())))
    assert set(program(several.packages[0]).functions) == {"size_8x8", "size_8x16", "size_16x8"}
    for height, width in ((8, 16), (16, 8)):
        inputs = inputs_of(several.interface, latent_height=height, latent_width=width)
        assert difference(several, rounded(sd2, "unet"), inputs) <= BOUND
    wrong = inputs_of(several.interface, latent_height=16, latent_width=16)
    with pytest.raises(InputError, match=r"was made for latent_height 8, latent_width 8; .* take a size of these"):
        several(wrong)


def test_palettes_hold_few_values_near_the_weights(sd2: Path) -> None:
    palettes = alone(sd2, "unet", CoreMl(palette=4))
    (package,) = palettes.packages
    (plain,) = alone(sd2, "unet", CoreMl()).packages
    known = {op.outputs[0].name: op.outputs[0].val for op in functions(plain) if op.op_type == "const"}
    tables = [op for op in functions(package) if op.op_type == "constexpr_lut_to_dense"]
    assert len(tables) > 30
    for op in tables:
        dense = OPERATIONS[op.op_type](**arguments(op)).numpy()
        assert len(np.unique(dense)) <= 16
        assert relative(dense, known[op.outputs[0].name.removesuffix("_palettized")].astype(np.float32)) < 0.15
    error = difference(palettes, rounded(sd2, "unet"), inputs_of(palettes.interface))
    assert 10 * BOUND < error < 1


def functions(package: Path) -> list[Any]:
    (function,) = program(package).functions.values()
    return list(function.operations)


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


def test_other_files_than_the_manifests_are_refused(sd2: Path) -> None:
    artifact = read_artifact(split(sd2))
    part = artifact.parts["unet"]
    files = {name: replace(record, sha256="0" * 64) for name, record in part.files.items()}
    changed = replace(artifact, parts={"unet": replace(part, files=files)})
    with pytest.raises(ArtifactError, match="SHA-256"):
        open_part(changed, "unet", "ALL")
    renamed = replace(artifact, parts={"unet": replace(part, interface=artifact.parts["vae_decoder"].interface)})
    with pytest.raises(ArtifactError, match="which nothing feeds"):
        open_part(renamed, "unet", "ALL")


def test_the_manifest_is_plain_json(sd2: Path) -> None:
    values = json.loads((split(sd2) / "anamorph.json").read_text())
    assert values["format"] == "coreml"
    assert values["parts"]["unet"]["rewrites"] == [SPLIT_EINSUM]
    assert values["parts"]["unet"]["storage"] == "float16"
