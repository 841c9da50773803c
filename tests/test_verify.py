"""`anamorph verify`: which step, part and block it names, and what its processes do."""

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from exported import FORMATS, export, exported
from perturbed import copied, scale_weight

from anamorph import StableDiffusionPipeline
from anamorph.artifact import NATIVE, Difference, read_artifact
from anamorph.checkpoint import Source, open_checkpoint
from anamorph.cli import main
from anamorph.cli.export import table
from anamorph.cli.verify import divergence
from anamorph.errors import ArtifactError
from anamorph.exporters import certificate, folder
from anamorph.exporters.certificate import UNTRUSTED
from anamorph.exporters.children import run_child
from anamorph.exporters.references import load, write_picture, write_probes
from anamorph.exporters.settling import read_components
from anamorph.exporters.taps import is_block
from anamorph.exporters.trial import trajectory
from anamorph.exporting import LINKED, PICTURE, Check

BOUND = 1e-4
ENGINES = tuple(FORMATS)


def block_differences(artifact: Path, checkpoint: Path, part: str, place: Path) -> Iterator[tuple[str, float]]:
    """Each block of an exported part and how far it is from PyTorch, in the order in which they are computed."""
    opened = read_artifact(artifact)
    components = read_components(open_checkpoint(Source(str(checkpoint))))
    component = next(component for component in components if part in component.parts)
    interface, taps = opened.parts[part].interface, opened.parts[part].taps
    write_probes(place, part, interface, load(component), taps)
    for row in certificate.compare_blocks(opened, place, [part]):
        yield row.output, row.difference.relative_l2


@pytest.mark.parametrize("engine", ENGINES)
def test_verify_names_block_part_and_step(
    sd2: Path, tmp_path: Path, engine: str, capsys: pytest.CaptureFixture[str]
) -> None:
    place = copied(exported(sd2, engine), tmp_path / "artifact")
    scale_weight(place, "unet", "up_blocks.0.resnets.1.conv1.weight")
    scale_weight(place, "vae_decoder", "decoder.up_blocks.1.resnets.0.conv2.weight")
    assert main(["verify", str(place), "--json"]) == 3
    first = json.loads(capsys.readouterr().out)["first_difference"]
    assert (first["part"], first["block"], first["step"]) == ("unet", "up_blocks.0.resnets.1", "step 1 of 3")
    assert min(first["relative_l2"], first["block_relative_l2"]) > BOUND


WEIGHTS = [
    ("onnxruntime", "text_encoder", "encoder.layers.1.mlp.fc1.weight.transposed", "encoder.layers.1"),
    ("onnxruntime", "text_encoder", "final_layer_norm.bias", "final_layer_norm"),
    ("onnxruntime", "unet", "mid_block.attentions.0.transformer_blocks.0.attn2.to_out.0.weight.transposed",
     "mid_block.attentions.0.transformer_blocks.0"),
    ("onnxruntime", "vae_encoder", "quant_conv.weight", "quant_conv"),
    ("onnxruntime", "vae_decoder", "post_quant_conv.weight", "post_quant_conv"),
    ("openvino", "text_encoder", "embeddings.position_embedding.weight", "embeddings"),
    ("openvino", "unet", "mid_block.resnets.1.conv2.weight", "mid_block.resnets.1"),
    ("openvino", "vae_decoder", "decoder.conv_out.weight", "decoder.conv_out"),
]  # fmt: skip


@pytest.mark.parametrize(("engine", "part", "weight", "block"), WEIGHTS)
def test_the_block_of_a_changed_weight_is_the_first_to_differ(
    sd2: Path, tmp_path: Path, engine: str, part: str, weight: str, block: str
) -> None:
    place = copied(exported(sd2, engine), tmp_path / "artifact")
    scale_weight(place, part, weight)
    rows = list(block_differences(place, sd2, part, tmp_path))
    names = [name for name, _ in rows]
    differing = {name for name, far in rows if far > BOUND}
    assert next(name for name in names if name in differing) == block
    assert names.index(block) == 0 or all(far <= BOUND for name, far in rows if names.index(name) < names.index(block))


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("part", ["vae_encoder", "vae_decoder", "text_encoder", "unet"])
def test_every_block_of_an_untouched_export_agrees(sd1: Path, tmp_path: Path, engine: str, part: str) -> None:
    rows = list(block_differences(exported(sd1, engine), sd1, part, tmp_path))
    assert max(far for _, far in rows) <= BOUND
    components = read_components(open_checkpoint(Source(str(sd1))))
    component = next(component for component in components if part in component.parts)
    kinds = ("resnets", "attentions", "transformer_blocks", "downsamplers", "upsamplers", "layers")
    side = {"vae_encoder": "encoder.", "vae_decoder": "decoder."}.get(part, "")
    paths = {path for path, _ in load(component).named_modules() if path.startswith(side) and is_block(path)}
    expected = {path for path in paths if path.rpartition(".")[0].rpartition(".")[2] in kinds}
    assert expected <= {block for block, _ in rows}, "a block has no tap point"


def test_blocks_are_members_of_lists_and_what_stands_outside_of_them() -> None:
    for path in ("conv_in", "down_blocks.0.resnets.1", "mid_block.attentions.0.transformer_blocks.0", "quant_conv"):
        assert is_block(path)
    for path in ("mid_block.resnets.0.conv1", "mid_block.attentions.0.transformer_blocks.0.attn1.to_out.0", "0"):
        assert not is_block(path)


def check(part: str, far: float, block: str | None = None, what: str = "x") -> Check:
    return Check(part, what, Difference(far, far), BOUND, block)


def test_the_first_divergence_follows_the_picture() -> None:
    rows = [check("vae_decoder", 1.0), check("text_encoder", 0.0), check("unet", 1.0), check("unet", 2.0, what="y"),
            check(PICTURE, 0.0, what="step 1"), check(PICTURE, 1.0, what="step 2"),
            check("vae_decoder", 1.0, "conv_in"), check("unet", 0.0, "conv_in"),
            check("unet", float("nan"), "mid_block")]  # fmt: skip
    found = divergence(rows)
    assert found.part == rows[2]
    assert found.block is rows[-1]
    assert found.step == rows[5]
    assert divergence(rows[:1]).first == rows[0]
    assert divergence([rows[1], rows[5]]).first == rows[5]
    assert divergence([rows[1], rows[4]]).first is None
    assert "begins in" not in str(divergence(rows[:4]))
    assert str(divergence([rows[1]])) == "equal within tolerance"


def test_a_picture_that_differs_alone_is_named_by_its_step(
    sd2: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    place = copied(exported(sd2, "onnxruntime"), tmp_path / "artifact")
    path = place / "scheduler" / "scheduler_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "beta_end": 0.013}))
    assert main(["verify", str(place), "--blocks"]) == 3
    said = capsys.readouterr().out.splitlines()
    assert "the first to differ is picture: step 1 of 3 (relative L2" in said[-1]
    assert sum("block up_blocks.1" in line for line in said) >= 4  # all blocks were compared, and agree
    assert not any("DIFFERS" in line for line in said if "block" in line)


@pytest.mark.parametrize("engine", ENGINES)
def test_an_export_whose_checkpoint_has_moved_is_verified_with_it(
    sd2: Path, tmp_path: Path, engine: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """Weights that stayed in the checkpoint are looked for where it lies now."""
    first, second = tmp_path / "first", tmp_path / "second"
    shutil.copytree(sd2, first)
    export(first, engine, tmp_path / "artifact", storage=LINKED, signature=NATIVE)
    first.rename(second)
    assert main(["verify", str(tmp_path / "artifact"), "--model", str(second), "--blocks", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["first_difference"] is None
    blocks = {(row["part"], row["block"]) for row in found["certificate"]}
    assert {("unet", "mid_block.resnets.1"), ("text_encoder", "encoder.layers.1")} <= blocks
    assert main(["verify", str(tmp_path / "artifact")]) == 1
    assert str(first) in capsys.readouterr().err


def test_an_export_beyond_its_tolerance_names_the_block(
    sd2: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    written = folder.write_probes

    def wrong(place: Path, part: str, interface: Any, module: Any, *rest: Any) -> None:
        """Let PyTorch compute something else than the exported graph from one block on."""
        if part == "unet":
            with torch.no_grad():
                module.mid_block.resnets[0].conv1.weight.mul_(1.05)
        written(place, part, interface, module, *rest)

    monkeypatch.setattr(folder, "write_probes", wrong)
    with pytest.raises(ArtifactError, match=r"first in its block mid_block\.resnets\.0 at batch 1") as caught:
        export(sd2, "onnxruntime", tmp_path / "out")
    assert "\n" not in str(caught.value)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.processes
def test_the_reference_picture_is_drawn_elsewhere_and_is_eager_s(
    sd2: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, artifact = open_checkpoint(Source(str(sd2))), read_artifact(exported(sd2, "onnxruntime"))
    with monkeypatch.context() as patch:
        patch.setattr(StableDiffusionPipeline, "__init__", None)  # this process opens no pipeline
        write_picture(tmp_path, source, artifact)
    expected = dict(trajectory(StableDiffusionPipeline.from_pretrained(sd2, backend="eager"), tmp_path))
    with np.load(tmp_path / "picture.npz") as stored:
        assert set(stored.files) == set(expected) == {*(f"step {step} of 3" for step in (1, 2, 3)), "picture"}
        for name, value in expected.items():
            np.testing.assert_allclose(stored[name], value, rtol=0, atol=1e-5)


@pytest.mark.parametrize(("module", "arguments", "reason"), [
    ("references", ("{place}", "", "{place}", "none"), "model_index.json"),
    ("certificate", ("{place}", "{place}", "{place}", "float32", UNTRUSTED), "model_index.json"),
    ("nothing", (), "No module named"),
])  # fmt: skip
def test_a_process_that_fails_is_one_sentence(
    tmp_path: Path, module: str, arguments: tuple[str, ...], reason: str
) -> None:
    with pytest.raises(ArtifactError, match=f"it failed: .*{reason}") as caught:
        run_child("it failed", module, *(argument.format(place=tmp_path) for argument in arguments))
    assert "\n" not in str(caught.value)


def test_a_stranger_s_file_in_the_working_folder_is_not_imported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "json.py").write_text("raise SystemExit('imported')")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ArtifactError, match=r"model_index\.json"):
        run_child("it failed", "certificate", tmp_path, tmp_path, tmp_path, "float32", UNTRUSTED)


def test_a_certificate_shows_the_worst_layer_and_each_that_differs() -> None:
    allowed, sizes = 1e-4, "at batch 1, sequence 77"
    distances = {"hidden_states.0": 2e-6, "hidden_states.1": 3e-6, "hidden_states.2": 0.5, "pooler_output": 1e-6}
    checks = [
        Check("text_encoder", f"{name} {sizes}", Difference(distance, 0.0), allowed)
        for name, distance in distances.items()
    ]
    lines = table(checks).splitlines()[1:]
    shown = [(line.split()[1], line.split()[4], line.endswith("DIFFERS")) for line in lines]
    assert shown == [
        ("3.0e-06", "hidden_states.*", False),
        ("5.0e-01", "hidden_states.2", True),
        ("1.0e-06", "pooler_output", False),
    ]
