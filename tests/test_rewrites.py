"""Rewrites: the same values with less work, through every engine, and refusals where they do not apply."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from checkpoints import UNET
from exported import FORMATS, export, exported
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray
from parity import relative
from torch import nn
from torch.nn import functional as F

from anamorph import DiffusionPipeline, StableDiffusionPipeline
from anamorph.artifact import NATIVE, PORTABLE, read_artifact
from anamorph.checkpoint import Checkpoint, Source, open_checkpoint
from anamorph.cli import main
from anamorph.errors import ArtifactError, InputError
from anamorph.exporting import LINKED, ExportOptions, cached_export
from anamorph.models import MODELS, blocks, phases, row_norm
from anamorph.models.attention import Attention
from anamorph.models.attention_kernels import ONE
from anamorph.models.blocks import Upsample2D
from anamorph.models.row_norm import GroupNorm
from anamorph.rewrites import (
    ATTENTION,
    CHUNKS,
    MERGING,
    ONEDNN,
    PHASES,
    REWRITES,
    ROWS,
    SPLIT_EINSUM,
    Wish,
    fitting,
    wanted,
)
from anamorph.stepping import SCOPE

BOUND = 1e-5
"""Largest relative L2 difference of an exact rewrite (float32)."""
CALL: dict[str, Any] = {"num_inference_steps": 2, "seed": 0, "guidance_scale": 5.0, "height": 48, "width": 32}


def doubling(channels_in: int, channels_out: int, seed: int = 0) -> nn.Conv2d:
    torch.manual_seed(seed)
    return nn.Conv2d(channels_in, channels_out, 3, padding=1).double()


@pytest.mark.parametrize("way", [phases.by_phases, phases.transposed])
@pytest.mark.parametrize("size", [(1, 1), (1, 4), (2, 3), (5, 7)])
def test_phases_are_the_convolution_of_doubled_pixels(size: tuple[int, int], way: Callable[..., torch.Tensor]) -> None:
    conv, x = doubling(3, 5), torch.randn(2, 3, *size, dtype=torch.float64)
    expected = conv(F.interpolate(x, scale_factor=2.0))
    assert torch.allclose(way(x, conv), expected, rtol=1e-12, atol=1e-12)


def test_each_place_has_its_way(monkeypatch: pytest.MonkeyPatch) -> None:
    taken: list[str] = []
    for name in ("by_phases", "transposed"):
        way = getattr(phases, name)
        monkeypatch.setattr(phases, name, lambda *given, name=name, way=way: (taken.append(name), way(*given))[1])
    layer = Upsample2D(4)
    layer.rewritten = True
    small, large = torch.randn(1, 4, 1, 3), torch.randn(1, 4, 2, 2)
    with torch.no_grad():
        assert torch.equal(layer(small), layer.conv(F.interpolate(small, scale_factor=2.0)))
        assert taken == []
        layer(large)
        assert taken == ["transposed"]
        torch.export.export(layer, (large,), strict=False)
    assert taken == ["transposed", "by_phases"]


def test_a_wrong_sum_of_taps_would_be_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    conv, x = doubling(3, 5), torch.randn(2, 3, 4, 4, dtype=torch.float64)
    summed = phases._summed
    monkeypatch.setattr(phases, "_summed", lambda weight, axis: summed(weight, axis)[::-1])
    assert (
        relative(phases.by_phases(x, conv).detach().numpy(), conv(F.interpolate(x, scale_factor=2.0)).detach().numpy())
        > 0.1
    )


def test_a_size_of_its_own_keeps_the_plain_form() -> None:
    layer, x = Upsample2D(4), torch.randn(1, 4, 3, 5)
    plain = layer(x, (5, 9))
    layer.rewritten = True
    assert torch.equal(layer(x, (5, 9)), plain)


def normed(channels: int, groups: int) -> GroupNorm:
    torch.manual_seed(0)
    layer = GroupNorm(groups, channels, eps=1e-6).double()
    layer.load_state_dict({name: torch.randn(channels, dtype=torch.float64) for name in ("weight", "bias")})
    return layer


@given(
    size=st.tuples(*(st.integers(1, 9),) * 2), groups=st.integers(1, 5), inner=st.integers(1, 4),
    offset=st.floats(-1e3, 1e3), spread=st.floats(1e-3, 1e3),
)  # fmt: skip
def test_rows_are_the_group_norm(size: tuple[int, int], groups: int, inner: int, offset: float, spread: float) -> None:
    layer = normed(groups * inner, groups)
    x = offset + spread * torch.randn(2, groups * inner, *size, dtype=torch.float64)
    expected = layer(x)
    layer.rewritten = True
    # Both subtract the mean, scaled by 1 / sqrt(eps) = 1000 where nothing is left beside it.
    assert (layer(x) - expected).abs().max() <= 1e-11 * (1 + x.abs().max())


@pytest.mark.parametrize("offset", [0.0, 3.0, 30.0])
def test_rows_lose_no_more_to_rounding_than_groups_do(offset: float) -> None:
    layer = normed(16, 4)
    x = offset + torch.randn(1, 16, 64, 64, dtype=torch.float64)
    exact = layer(x)
    plain = (layer.float()(x.float()) - exact).abs().max()
    layer.rewritten = True
    assert (layer(x.float()) - exact).abs().max() <= 3 * plain


@given(
    size=st.tuples(*(st.integers(1, 9),) * 2), batch=st.integers(2, 3), groups=st.integers(1, 5),
    inner=st.integers(1, 4), offset=st.floats(-1e3, 1e3), summed=st.integers(1, 30),
)  # fmt: skip
def test_pixels_are_the_group_norm(
    size: tuple[int, int], batch: int, groups: int, inner: int, offset: float, summed: int
) -> None:
    layer = normed(groups * inner, groups)
    x = offset + torch.randn(batch, groups * inner, *size, dtype=torch.float64)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(row_norm, "SUMMED", summed)  # so that few pixels have several parts, the last of them shorter
        found = row_norm.by_pixels(x.contiguous(memory_format=torch.channels_last), layer)
    assert (found - layer(x)).abs().max() <= 1e-11 * (1 + x.abs().max())


@torch.inference_mode()
@pytest.mark.parametrize("offset", [0.0, 3.0, 30.0])
def test_channels_side_by_side_lose_no_more_to_rounding(offset: float) -> None:
    layer = normed(32, 8)
    x = offset + torch.randn(1, 32, 256, 256, dtype=torch.float64)
    exact = layer(x)
    plain = (layer.float()(x.float()) - exact).norm()
    found = layer(x.float().contiguous(memory_format=torch.channels_last))
    assert (found - exact).norm() <= 3 * plain
    assert found.is_contiguous(memory_format=torch.channels_last)


def test_rows_hold_in_half_precision_what_its_squares_do_not() -> None:
    """A deviation of 2000, squared, is no float16."""
    layer, x = normed(8, 2), 2e3 * torch.randn(1, 8, 16, 16, dtype=torch.float64)
    exact = layer(x)
    layer.rewritten = True
    assert relative(layer.half()(x.half()).detach().double().numpy(), exact.detach().numpy()) <= 4e-3


def test_norms_of_rows_of_tokens_stay_as_they_are() -> None:
    layer, x = normed(8, 2), torch.randn(1, 8, 16, dtype=torch.float64)
    plain = layer(x)
    layer.rewritten = True
    assert torch.equal(layer(x), plain)


@pytest.mark.parametrize("name", ["unet", "vae"])
def test_a_rewritten_model_keeps_its_weights_and_values(sd2: Path, name: str) -> None:
    model = MODELS[{"unet": "UNet2DConditionModel", "vae": "AutoencoderKL"}[name]].from_pretrained(sd2, subfolder=name)
    inputs: tuple[Any, ...] = (torch.randn(2, 4, 8, 12),)
    if name == "unet":
        inputs = (*inputs, torch.tensor(31.0), torch.randn(2, 7, 32))
    names = list(model.state_dict())
    call = model.pixels if name == "vae" else model
    with torch.no_grad():
        plain = call(*inputs)[0].numpy()
        model.rewrite([PHASES, ROWS])
        other = call(*inputs)[0].numpy()
        model.rewrite(())
        assert np.array_equal(call(*inputs)[0].numpy(), plain)
    assert 0 < relative(other, plain) <= BOUND  # not zero: it was computed in another way
    assert list(model.state_dict()) == names


def native(checkpoint: Path, engine: str) -> Path:
    """The checkpoint's artifact with the rewrites that are on by themselves."""
    return exported(checkpoint, engine, NATIVE, storage=LINKED)


def load(folder: Path, **arguments: Any) -> StableDiffusionPipeline:
    pipe = DiffusionPipeline.from_pretrained(folder, **arguments)
    assert isinstance(pipe, StableDiffusionPipeline)
    return pipe


def decoded(pipe: StableDiffusionPipeline) -> NDArray[Any]:
    latents = np.random.default_rng(0).standard_normal((2, 4, 5, 6), np.float32)
    return np.asarray(pipe.decode(latents, "np"))


@pytest.mark.parametrize("engine", [*FORMATS, "eager"])
def test_every_engine_computes_the_same_by_rewrites(sd2: Path, engine: str) -> None:
    plain = load(sd2, backend="eager", rewrites="none")
    pipe = load(native(sd2, engine)) if engine in FORMATS else load(sd2, backend=engine, rewrites="all")
    assert PHASES in pipe.placement["unet"].details["rewrites"].split()
    told = pipe.placement["vae_decoder"].details["rewrites"].split()
    assert PHASES in told
    assert (ROWS in told) == (engine != "onnxruntime")  # on where it was measured to be faster
    assert relative(decoded(pipe), decoded(plain)) <= BOUND
    latents = [np.asarray(one("a cat", **CALL, output_type="latent").images) for one in (pipe, plain)]
    assert relative(*latents) <= BOUND
    assert "rewrites" not in plain.placement["unet"].details


@pytest.mark.parametrize("name", ["vae_decoder", "unet"])
def test_a_graph_holds_no_doubled_picture_and_its_weights_stay_linked(sd2: Path, name: str) -> None:
    artifact = read_artifact(native(sd2, "onnxruntime"))
    part = artifact.parts[name]
    graph = onnx.load(artifact.folder / part.file, load_external_data=False).graph
    assert artifact.parts["vae_encoder"].rewrites == (ATTENTION,)
    assert "Resize" not in {node.op_type for node in graph.node}
    up = [constant for name, constant in part.constants.items() if "upsamplers" in name and name.endswith("weight")]
    assert len(up) == 1
    assert all(constant.linked for constant in up)


@pytest.mark.parametrize(("name", "layers"), [("unet", 8), ("vae_decoder", 1)])
def test_a_graph_names_attention_as_one_operation(sd2: Path, name: str, layers: int) -> None:
    """No scores of all pixels are in it, and folders for other readers hold standard operations alone."""
    portable = nodes(exported(sd2, "onnxruntime", PORTABLE), name)
    assert nodes(native(sd2, "onnxruntime"), name).count("MultiHeadAttention") == portable.count("Softmax") == layers
    assert "MultiHeadAttention" not in portable


def nodes(folder: Path, part: str) -> list[str]:
    artifact = read_artifact(folder)
    return [node.op_type for node in onnx.load(folder / artifact.parts[part].file, load_external_data=False).graph.node]


def test_attention_as_one_operation_is_attention() -> None:
    torch.manual_seed(0)
    layer, x = Attention(32, 4).double(), torch.randn(2, 9, 32, dtype=torch.float64)
    plain = layer(x)
    layer.rewritten = True
    assert layer.way == ONE
    assert torch.equal(layer(x), plain)
    layer.at_once = 2  # the user's wish to save memory comes first
    assert layer.way is True


@pytest.mark.parametrize("place", ["openvino", "eager", "coreml"])
def test_a_rewrite_that_only_one_format_has_is_refused_elsewhere(place: str) -> None:
    assert ATTENTION not in wanted("all", place)
    with pytest.raises(InputError, match=f"fused-attention is for onnx, and {place} does not have it"):
        wanted("default,fused-attention", place)


def test_a_certificate_compares_with_the_model_as_it_was(
    sd2: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("exported._traces", {})
    monkeypatch.setattr(blocks, "doubled", lambda x, conv: 1.01 * phases.doubled(x, conv))
    with pytest.raises(ArtifactError, match="differs from PyTorch"):
        export(sd2, "onnxruntime", tmp_path / "out", signature=NATIVE, rewrites=[PHASES])


def test_compiles_as_one_graph(sd2: Path) -> None:
    model = MODELS["AutoencoderKL"].from_pretrained(sd2, subfolder="vae")
    model.rewrite([PHASES])
    torch._dynamo.reset()
    compiled = torch.compile(model.pixels, fullgraph=True, backend="eager", dynamic=False)
    latents = torch.randn(1, 4, 5, 7)
    with torch.no_grad():
        assert torch.allclose(compiled(latents)[0], model.pixels(latents)[0], atol=1e-5)


def test_preconditions() -> None:
    unmet = REWRITES[PHASES].unmet
    unet = MODELS["UNet2DConditionModel"].complete(UNET)
    assert unmet("unet", "UNet2DConditionModel", unet) is None
    assert unmet("text_encoder", "CLIPTextModel", {"hidden_size": 8}) is not None
    resnets = {**UNET, "up_block_types": ("ResnetUpsampleBlock2D", "CrossAttnUpBlock2D")}
    assert unmet("unet", "UNet2DConditionModel", MODELS["UNet2DConditionModel"].complete(resnets)) is not None
    vae = MODELS["AutoencoderKL"].complete({})  # one level
    assert unmet("vae_decoder", "AutoencoderKL", vae) is not None
    assert fitting([PHASES], "vae_encoder", "AutoencoderKL", {"block_out_channels": (16, 32)}) == ()
    assert fitting([PHASES], "vae_decoder", "AutoencoderKL", {"block_out_channels": (16, 32)}) == (PHASES,)


def test_what_a_wish_means() -> None:
    assert wanted("none", "onnx") == ()
    exact = [name for name, rewrite in REWRITES.items() if rewrite.exact and name != SCOPE]  # not every scheduler
    own = {"onnx": ATTENTION, "openvino": CHUNKS, "coreml": SPLIT_EINSUM, "eager": ONEDNN}
    for place, name in own.items():
        assert wanted("all", place) == tuple(each for each in exact if each == name or each not in own.values())
    assert wanted(None, "null") == ()
    assert wanted("default,token-merging", "eager") == (*wanted(None, "eager"), MERGING)
    assert wanted(f" {PHASES} ", "eager") == wanted([PHASES], "eager") == (PHASES,)
    with pytest.raises(InputError, match="no rewrite 'phases'; expected all, none, default, phase-conv"):
        wanted("phases", "onnx")


def test_wishes_that_cannot_be_met_are_refused(sd2: Path, smallest: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="native"):
        ExportOptions(rewrites=[PHASES])
    with pytest.raises(InputError, match="no rewrite 'faster'"):
        load(sd2, backend="eager", rewrites="faster")
    with pytest.raises(InputError, match="as it was exported"):
        load(native(sd2, "onnxruntime"), rewrites="none")
    with pytest.raises(InputError, match=r"applies to no part .*takes models as they are"):
        load(sd2, backend="null", rewrites=PHASES)
    with pytest.raises(InputError, match=r"applies to no part .*unet: nothing in it doubles"):
        export(smallest, "onnxruntime", tmp_path / "out", signature=NATIVE, rewrites=PHASES)
    assert not (tmp_path / "out").exists()


class Copying:
    """An exporter that copies a finished export and remembers what was asked for."""

    format = "onnx"
    storages = ("float32", LINKED)

    def __init__(self, finished: Path) -> None:
        self.finished, self.asked = finished, list[Wish]()

    def unavailable(self) -> None:
        return None

    def fingerprint(self) -> dict[str, str]:
        return {}

    def export(self, _checkpoint: Checkpoint, folder: Path, options: ExportOptions, *_: Any) -> list[Any]:
        self.asked.append(options.rewrites)
        shutil.copytree(self.finished, folder)
        return []

    def verify(self, *_: Any) -> list[Any]:
        return []


def test_each_choice_of_rewrites_is_an_export_of_its_own(
    sd2: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ANAMORPH_CACHE", str(tmp_path))
    exporter, checkpoint = Copying(native(sd2, "onnxruntime")), open_checkpoint(Source(str(sd2)))
    wishes: list[Wish] = [None, "none", ",".join(wanted(None, "onnx")), wanted(None, "onnx")]
    folders = [cached_export(checkpoint, exporter, wish).folder for wish in wishes]
    assert exporter.asked == [None, "none"]
    assert folders == [folders[0], folders[1], folders[0], folders[0]] != [folders[0]] * 4


def test_the_command_line_takes_rewrites(sd2: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    native = ["export", str(sd2), str(out), "--to", "onnx", "--signature", "native"]
    assert main([*native, "--rewrites", "faster"]) == 2
    assert "no rewrite 'faster'" in capsys.readouterr().err
    assert main([*native, "--rewrites", "none"]) == 0
    assert all(part["rewrites"] == [] for part in json.loads((out / "anamorph.json").read_text())["parts"].values())


def test_models_are_not_shared_between_different_rewrites(sd2: Path) -> None:
    plain = load(sd2, backend="eager", rewrites="none")
    other = load(sd2, backend="eager", rewrites=PHASES)
    assert plain.unet.rewrites == ()
    assert other.unet.rewrites == (PHASES,)
    assert open_checkpoint(Source(str(sd2))).digest() == plain.origin.digest()  # type: ignore[union-attr]
