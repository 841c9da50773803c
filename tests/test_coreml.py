"""Core ML packages, as far as they can be proven without a Mac: what they hold, and what they compute."""

import functools
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import coremltools
import numpy as np
import pytest
import torch
from coremltools.converters.mil.mil import types
from exported import once, shared_place
from mil_programs import Interpreted, operations, program
from parity import relative

from anamorph import DiffusionPipeline
from anamorph.artifact import read_artifact
from anamorph.backends import coreml
from anamorph.backends.coreml import CoreMl as Engine
from anamorph.backends.coreml import CoreMlProgram, open_part
from anamorph.checkpoint import Source, open_checkpoint
from anamorph.cli import main
from anamorph.errors import ArtifactError, BackendUnavailable, InputError
from anamorph.exporters.folder import read_components
from anamorph.exporters.references import load
from anamorph.exporters.trace import probe
from anamorph.exporting import CoreMl, ExportOptions
from anamorph.models import MODELS
from anamorph.plugins import get_backend, get_exporter
from anamorph.rewrites import SPLIT_EINSUM

BOUND = 1e-5
"""Relative L2 difference of a program, run in float32, from the model with the same weights."""
HALF = 2e-3
"""The same for a picture of which everything that goes from part to part is rounded to float16."""
PARTS = ("text_encoder", "unet", "vae_encoder", "vae_decoder")
HOSTED = {"cast", "mul", "sin", "cos", "reshape", "squeeze", "expand_dims", "transpose", "identity"}
"""What may be float32: the angles of a time, a few numbers before everything else."""


@pytest.fixture(autouse=True)
def _no_mac(monkeypatch: pytest.MonkeyPatch) -> None:
    """PyTorch runs the packages in Core ML's place."""
    monkeypatch.setattr(coreml, "load", Interpreted)


@functools.cache
def exported(checkpoint: Path, name: str, **wishes: Any) -> Path:
    """An export that several tests read."""
    return once(shared_place() / f"coreml-{checkpoint.name}-{name}", lambda out: write(checkpoint, out, **wishes))


def write(checkpoint: Path, out: Path, **wishes: Any) -> list[str]:
    """Export; returns what was reported."""
    said: list[str] = []
    options = ExportOptions(size=wishes.pop("size", None), coreml=CoreMl(**wishes) if wishes else None)
    exporter, source = get_exporter(["coreml"]), open_checkpoint(Source(str(checkpoint)))
    assert exporter.export(source, out, options, said.append) == []
    return said


def split(checkpoint: Path) -> Path:
    return exported(checkpoint, "split")


def original(checkpoint: Path) -> Path:
    return exported(checkpoint, "original", attention="original")


def packages(folder: Path, part: str = "unet") -> list[Path]:
    return sorted((folder / part).glob("*.mlpackage"))


def opened(folder: Path, part: str) -> CoreMlProgram:
    return open_part(read_artifact(folder), part, "ALL")


def rounded(checkpoint: Path, part: str) -> Any:
    """The PyTorch model of a part, with the weights that float16 holds."""
    component = next(c for c in read_components(open_checkpoint(Source(str(checkpoint)))) if part in c.parts)
    module = load(component).half().float()
    return getattr(module, module.method(part))


def difference(folder: Path, checkpoint: Path, part: str, rows: int = 3) -> float:
    """How far a part of an export is from PyTorch, at worst of its outputs, on numbers that float16 holds."""
    session = opened(folder, part).session()
    sizes = {name: axis.minimum for name, axis in session.interface.axes.items()} | {"batch": rows}
    inputs = {
        name: value if value.dtype == np.int64 or value.ndim == 0 else value.astype(np.float16).astype(np.float32)
        for name, value in probe(session.interface, sizes).items()
    }
    with torch.no_grad():
        expected = rounded(checkpoint, part)(*map(torch.from_numpy, inputs.values()))
    found = session(inputs)
    ports = [port.name for port in session.interface.outputs]
    return max(relative(np.asarray(found[name]), value.numpy()) for name, value in zip(ports, expected, strict=True))


@pytest.mark.parametrize("kind", [split, original])
@pytest.mark.parametrize("part", PARTS)
def test_programs_compute_what_the_models_compute(sd1: Path, part: str, kind: Callable[[Path], Path]) -> None:
    assert difference(kind(sd1), sd1, part) <= BOUND


@pytest.mark.parametrize("part", ["text_encoder", "text_encoder_2", "unet"])
def test_those_of_sdxl_too(sdxl: Path, part: str) -> None:
    assert difference(split(sdxl), sdxl, part) <= BOUND


def test_another_model_would_be_seen(sd1: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    known = rounded(sd1, "unet")
    with torch.no_grad():
        known.__self__.mid_block.attentions[0].transformer_blocks[0].attn2.to_v.weight.mul_(1.01)
    monkeypatch.setattr("test_coreml.rounded", lambda *_: known)
    assert difference(split(sd1), sd1, "unet") > 10 * BOUND


@pytest.mark.parametrize("name", ["sd1", "sd2", "sdxl"])
def test_split_attention_is_the_models_own(name: str, request: pytest.FixtureRequest) -> None:
    unet = MODELS["UNet2DConditionModel"].from_pretrained(request.getfixturevalue(name), subfolder="unet")
    random = torch.Generator().manual_seed(0)
    states = torch.randn(2, 9, unet.config.cross_attention_dim, generator=random)
    added = {"text_embeds": torch.randn(2, 24, generator=random), "time_ids": torch.full((2, 6), 64.0)}
    further = {"added_cond_kwargs": added} if name == "sdxl" else {}
    sample = torch.randn(2, 4, 16, 8, generator=random)
    mask = torch.tensor([[1.0] * 9, [1.0] * 4 + [0.0] * 5])
    with torch.no_grad():
        plain = unet(sample, 31.5, states, encoder_attention_mask=mask, **further).sample.numpy()
        unet.rewrite([SPLIT_EINSUM])
        other = unet(sample, 31.5, states, encoder_attention_mask=mask, **further).sample.numpy()
    assert 0 < relative(other, plain) <= BOUND  # not zero: it was computed in another way


@pytest.mark.parametrize("kind", [split, original])
@pytest.mark.parametrize("part", PARTS)
def test_nothing_on_the_way_is_refused_by_the_neural_engine(sd1: Path, part: str, kind: Callable[[Path], Path]) -> None:
    (package,) = packages(kind(sd1), part)
    exact = [op for op in operations(package) if op.outputs[0].dtype == types.fp32]
    assert {op.op_type for op in exact} <= HOSTED
    assert bool(exact) == (part == "unet")
    places = [op for op in operations(package) if op.outputs[0].dtype in (types.int32, types.bool)]
    assert not places or part == "text_encoder"
    for op in operations(package):
        for var in op.outputs:
            assert var.dtype in (types.fp16, types.fp32, types.int32, types.bool), op.name
            assert var.rank <= 5
            assert all(isinstance(size, int) for size in var.shape), "sizes are fixed"


def test_split_attention_is_one_small_product_per_head_of_channels_first(sd1: Path) -> None:
    kinds = [op.op_type for op in operations(packages(split(sd1))[0])]
    unet = rounded(sd1, "unet").__self__
    heads = sum(layer.heads for layer in unet.modules() if type(layer).__name__ == "Attention")
    assert kinds.count("einsum") == 2 * heads
    assert "matmul" not in kinds
    assert kinds.count("linear") < 20, "only the time goes through linear layers"
    norms = [op for op in operations(packages(split(sd1))[0]) if op.op_type == "layer_norm"]
    assert {tuple(int(axis) for axis in op.axes.val) for op in norms} == {(1,)}
    kinds = [op.op_type for op in operations(packages(original(sd1))[0])]
    assert "einsum" not in kinds
    assert kinds.count("matmul") > 0


def test_names_types_and_layouts_are_apples(sd1: Path) -> None:
    folder = exported(sd1, "apple", version="some/model", chunked=True)
    assert not any(path.suffix == ".mlpackage" for path in folder.glob("*/*"))
    found = {path.name: path for path in folder.glob("*.mlpackage")}
    stem = "Stable_Diffusion_version_some_model_{}.mlpackage"
    parts = ("text_encoder", "unet_chunk1", "unet_chunk2", "vae_decoder", "vae_encoder")
    assert sorted(found) == [stem.format(part) for part in parts]
    inputs = {"sample": [2, 4, 8, 8], "timestep": [2], "encoder_hidden_states": [2, 32, 1, 77]}
    assert described(found[stem.format("unet_chunk1")])[0] == {name: (65552, shape) for name, shape in inputs.items()}
    assert described(found[stem.format("unet_chunk2")])[1] == ["noise_pred"]
    given, made = described(found[stem.format("text_encoder")])
    assert given == {"input_ids": (65568, [1, 77])}
    assert made[:2] == ["last_hidden_state", "pooled_outputs"]
    assert described(found[stem.format("vae_decoder")]) == ({"z": (65552, [1, 4, 8, 8])}, ["image"])
    assert described(found[stem.format("vae_encoder")]) == ({"x": (65552, [1, 3, 64, 64])}, ["latent"])


def described(package: Path) -> tuple[dict[str, tuple[int, list[int]]], list[str]]:
    """Inputs with type and shape, and names of outputs, from where apple/ml-stable-diffusion reads them."""
    description = coremltools.utils.load_spec(str(package)).description
    arrays = {port.name: port.type.multiArrayType for port in description.input}
    return {name: (each.dataType, list(each.shape)) for name, each in arrays.items()}, [
        p.name for p in description.output
    ]


def test_our_own_keep_fractions_of_timesteps(sd1: Path) -> None:
    assert described(packages(split(sd1))[0])[0]["timestep"] == (65568, [2])


def test_chunks_hand_on_what_the_whole_computes(sd1: Path) -> None:
    folder = exported(sd1, "apple", version="some/model", chunked=True)
    program = opened(folder, "unet")
    weights = [(package / "Data/com.apple.CoreML/weights/weight.bin").stat().st_size for package in program.packages]
    assert len(weights) == 2
    assert 0.4 < weights[0] / sum(weights) < 0.6
    whole = [(package / "Data/com.apple.CoreML/weights/weight.bin").stat().st_size for package in packages(split(sd1))]
    assert sum(weights) < 1.05 * whole[0], "no weight is in both"
    assert difference(folder, sd1, "unet") <= BOUND


def test_several_sizes_share_their_weights(sd1: Path) -> None:
    folder = exported(sd1, "sizes", size=(64, 64), sizes=((64, 128), (128, 64)))
    (several,), (one,) = (packages(place) for place in (folder, split(sd1)))
    sizes = [(place / "Data/com.apple.CoreML/weights/weight.bin").stat().st_size for place in (several, one)]
    assert sizes[0] < 1.02 * sizes[1]
    assert set(program(several).functions) == {"size_8x8", "size_8x16", "size_16x8"}
    session = opened(folder, "unet").session()
    for height, width in ((8, 8), (8, 16), (16, 8)):
        inputs = probe(session.interface, {"batch": 2, "latent_height": height, "latent_width": width, "sequence": 77})
        inputs = {name: value.astype(np.float16).astype(np.float32) for name, value in inputs.items()}
        with torch.no_grad():
            (expected,) = rounded(sd1, "unet")(*map(torch.from_numpy, inputs.values()))
        assert relative(np.asarray(session(inputs)["out_sample"]), expected.numpy()) <= BOUND
    wrong = probe(session.interface, {"batch": 2, "latent_height": 16, "latent_width": 16, "sequence": 77})
    with pytest.raises(InputError, match=r"was made for latent_height 8, latent_width 8; .* take a size of these"):
        session(wrong)


@pytest.mark.parametrize("bits", [4, 6])
def test_palettes_hold_few_values_near_the_weights(sd1: Path, bits: int) -> None:
    (package,) = packages(exported(sd1, f"palette{bits}", palette=bits))
    tables = [op for op in operations(package) if op.op_type == "constexpr_lut_to_dense"]
    plain = {op.outputs[0].name: op.outputs[0].val for op in constants(packages(split(sd1))[0])}
    assert len(tables) > 50
    for op in tables:
        dense = op.outputs[0].val
        assert len(np.unique(dense)) <= 2**bits
        weight = plain[op.outputs[0].name.removesuffix("_palettized")]
        assert relative(dense.astype(np.float64), weight.astype(np.float64)) < {4: 0.15, 6: 0.04}[bits]
    assert read_artifact(package.parents[1]).parts["unet"].storage == f"palette{bits}"
    error = difference(package.parents[1], sd1, "unet")
    assert BOUND < error < {4: 0.3, 6: 0.08}[bits]


def constants(package: Path) -> Iterator[Any]:
    (function,) = program(package).functions.values()
    return (op for op in function.operations if op.op_type == "const")


@pytest.mark.parametrize("kind", [split, original])
def test_pictures_are_those_of_eager(sd1: Path, kind: Callable[[Path], Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Engine, "unavailable", lambda _: None)
    call: dict[str, Any] = {"num_inference_steps": 3, "seed": [3, 4], "guidance_scale": 5.0, "output_type": "np"}
    ours = DiffusionPipeline.from_pretrained(kind(sd1), backend="coreml", device="CPU_AND_NE")
    eager = DiffusionPipeline.from_pretrained(sd1, backend="eager")
    prompts = ["a photo of a red cat", "a dog"]
    assert relative(ours(prompts, **call).images, eager(prompts, **call).images) <= HALF
    placed = ours.placement["unet"]
    assert (placed.engine, placed.device, placed.precision) == ("coreml", "CPU_AND_NE", "float16")
    with pytest.raises(InputError, match="latent_height is 12, expected 8"):
        ours("a cat", height=96, width=96, **call | {"seed": 0})


def test_elsewhere_it_says_why_it_cannot_run(sd1: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(BackendUnavailable, match=r"Core ML runs on macOS alone, and this is Linux; .* on a Mac$"):
        get_backend("coreml")
    artifact = read_artifact(split(sd1))
    for part in artifact.parts.values():
        assert part.status.startswith("unverified: no engine can open a coreml here")
    assert artifact.image["status"].startswith("unverified")
    arguments = ["export", str(sd1), str(tmp_path / "out"), "--to", "coreml", "--attention", "original", "--json"]
    assert main([*arguments, "--static", "64x64"]) == 0
    printed = capsys.readouterr()
    assert json.loads(printed.out)["certificate"] == []
    assert "unverified: no engine can open a coreml here" in printed.err
    assert main(["generate", "a cat", "--model", str(tmp_path / "out")]) != 0
    assert "macOS alone" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--dtype", "fp32"], "compute in float16"),
        (["--signature", "native"], "portable signature"),
        (["--palettize", "5"], "indices of 5 bits"),
        (["--static", "64x64,96x96", "--apple-names", "v"], "packages of one size"),
        (["--static", "60x60"], "no positive multiple of 8"),
        (["--static", "64"], "not of the form HxW"),
    ],
)
def test_wrong_wishes_are_refused(
    sd1: Path, tmp_path: Path, options: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["export", str(sd1), str(tmp_path / "out"), "--to", "coreml", *options]) != 0
    assert said in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_other_formats_refuse_what_is_for_core_ml(
    sd1: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["export", str(sd1), str(tmp_path / "out"), "--to", "onnx", "--palettize", "4"]) != 0
    assert "options of coreml" in capsys.readouterr().err


def test_another_package_than_the_manifests_is_refused(sd1: Path, tmp_path: Path) -> None:
    write(sd1, tmp_path / "out")
    (package,) = packages(tmp_path / "out")
    artifact = read_artifact(tmp_path / "out")
    model = package / "Data/com.apple.CoreML/model.mlmodel"
    model.write_bytes(model.read_bytes()[:-1] + b"x")
    with pytest.raises(ArtifactError, match="SHA-256"):
        open_part(artifact, "unet", "ALL")
