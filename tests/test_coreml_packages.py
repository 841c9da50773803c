"""What packages for Core ML hold, read back from their files: operations, layouts, names, weights."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import coremltools
import numpy as np
import pytest
from coreml_exports import BOUND, PARTS, alone, apples, difference, inputs_of, opened, rounded, split
from coremltools.converters.mil.mil import types
from mil_programs import OPERATIONS, arguments, operations, program
from parity import relative

from anamorph.artifact import read_artifact
from anamorph.backends.coreml import CoreMlProgram, open_part
from anamorph.errors import ArtifactError, InputError
from anamorph.exporting import CoreMl
from anamorph.guard import Held
from anamorph.rewrites import SPLIT_EINSUM

pytestmark = pytest.mark.usefixtures("no_mac")
HOSTED = {"cast", "mul", "sin", "cos", "reshape", "squeeze", "expand_dims", "transpose", "identity"}
"""What may be float32: the angles of a time, a few numbers before everything else."""
WEIGHTS = "Data/com.apple.CoreML/weights/weight.bin"


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
        Held(several, "coreml").session()(wrong)


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
