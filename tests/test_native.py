"""The native signature of a UNet: what is told once per picture, and samples that branches of guidance share."""

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from checkpoints import UNET, noisy
from exported import FORMATS, exported, opened, trace_once
from numpy.typing import NDArray
from parity import LATENT_BOUND, ours, reference, relative, worst
from torch import Tensor

from anamorph import DiffusionPipeline, UNet2DConditionModel
from anamorph.arrays import NumpyArrays
from anamorph.artifact import NATIVE, read_artifact
from anamorph.backends import offloading
from anamorph.backends.eager import TorchProgram
from anamorph.conditions import residual_ports
from anamorph.denoiser_interfaces import even, unet_interface
from anamorph.errors import InputError
from anamorph.interface import Interface
from anamorph.memory import Offload
from anamorph.native import KEYS, PREFIX, TIMES, preparing, shallow, split, text_width, time_width
from anamorph.pipelines import denoiser
from anamorph.pipelines.denoiser import Opened
from anamorph.rewrites import REWRITES

BOUND = 1e-5
EXACT = (KEYS, TIMES, PREFIX)
ENGINES = ("eager", *FORMATS)
CROSS, PLAIN = ("CrossAttnDownBlock2D", "DownBlock2D"), ("UpBlock2D", "CrossAttnUpBlock2D")
MODELS: Mapping[str, Mapping[str, Any]] = {
    "sd1": {},
    "linear": {"use_linear_projection": True, "attention_head_dim": (2, 4), "transformer_layers_per_block": 2},
    "deep": {
        "block_out_channels": (32, 64, 64), "layers_per_block": (1, 2, 1), "cross_attention_dim": 24,
        "down_block_types": ("CrossAttnDownBlock2D",) * 2 + ("DownBlock2D",),
        "up_block_types": ("UpBlock2D",) + ("CrossAttnUpBlock2D",) * 2, "transformer_layers_per_block": (1, 2, 3),
        "resnet_time_scale_shift": "scale_shift", "encoder_hid_dim": 16, "encoder_hid_dim_type": "text_proj",
    },
    "late": {
        "block_out_channels": (32, 32, 64), "down_block_types": ("DownBlock2D", *CROSS),
        "up_block_types": (*PLAIN, "UpBlock2D"), "layers_per_block": (2, 1, 1),
    },
    "xl": {
        "down_block_types": CROSS[::-1], "up_block_types": PLAIN[::-1], "transformer_layers_per_block": (1, 2),
        "addition_embed_type": "text_time", "addition_time_embed_dim": 8,
        "projection_class_embeddings_input_dim": 24 + 6 * 8,
    },
    "lcm": {"time_cond_proj_dim": 16},
    "classes": {"class_embed_type": "timestep", "class_embeddings_concat": True, "mid_block_type": "UNetMidBlock2D"},
    "pooled": {"addition_embed_type": "text", "addition_embed_type_num_heads": 4, "mid_block_type": None},
}  # fmt: skip
SHARING = ("sd1", "linear", "deep", "late")
"""Those whose time embedding depends on the time alone."""


def model(name: str) -> tuple[UNet2DConditionModel, Any]:
    """Our model and diffusers', with the same weights."""
    theirs = noisy(diffusers.UNet2DConditionModel(**{**UNET, **MODELS[name]}), 7)
    return UNet2DConditionModel.adopt(theirs, dict(theirs.config)), theirs


def combinations(name: str) -> list[tuple[str, ...]]:
    """Every choice of rewrites that the model admits, but for none."""
    admitted = [one for one in EXACT if one != PREFIX or name in SHARING]
    return [each for count in range(1, 4) for each in itertools.combinations(admitted, count)]


def normal(seed: int, *shape: int) -> NDArray[np.float32]:
    return np.random.default_rng(seed).standard_normal(shape, np.float32)


def conditions(unet: UNet2DConditionModel, batch: int) -> dict[str, NDArray[Any]]:
    sizes = {"batch": batch, "sequence": 5}
    ports = unet_interface(unet.config).required.inputs[2:]
    shapes = [Interface("", (), (port,)).output_shapes(sizes)[port.name] for port in ports]
    draws = [normal(11 + n, *shape) for n, shape in enumerate(shapes)]
    return {port.name: draw if port.dtype == "float32" else np.arange(batch) + 3
            for port, draw in zip(ports, draws, strict=True)}  # fmt: skip


def expected(theirs: Any, sample: NDArray[Any], t: float, told: Mapping[str, NDArray[Any]]) -> NDArray[Any]:
    """diffusers' prediction for samples [B, ...]."""
    given = {name: torch.from_numpy(value) for name, value in told.items()}
    text = given.pop("encoder_hidden_states")
    added = {name: given.pop(name) for name in ("text_embeds", "time_ids") if name in given}
    with torch.inference_mode():
        answer = theirs(torch.from_numpy(sample), t, text, added_cond_kwargs=added or None, **given)
    predicted: NDArray[Any] = answer.sample.numpy()
    return predicted


def on_eager(unet: UNet2DConditionModel, rewrites: Sequence[str]) -> Opened:
    """The model by these rewrites, as the eager engine opens it."""
    unet.rewrite(rewrites)
    programs = {
        name: TorchProgram(getattr(unet, unet.method(name)), unet, name, "eager", one, ())
        for name, one in split(unet_interface(unet.config), unet.config, rewrites).items()
    }
    return Opened.of(programs["unet"], programs.get(preparing("unet")), programs.get(shallow("unet")))


def on_graphs(engine: str, unet: UNet2DConditionModel, rewrites: Sequence[str], place: Path) -> Opened:
    """The model by these rewrites, traced, written and opened again."""
    unet.rewrite(rewrites)
    interfaces = split(unet_interface(unet.config), unet.config, rewrites)
    parts = {}
    for name, one in interfaces.items():
        taken = even(one, unet.config)
        parts[name] = (opened(engine, place / name, trace_once(unet, unet.method(name), taken), taken), taken)
    none = (None, None)
    beside = (*parts.get(preparing("unet"), none), *parts.get(shallow("unet"), none))
    return Opened(*parts["unet"], NumpyArrays(), engine, *beside)


def predictions(made: Opened, sample: NDArray[Any], told: Mapping[str, NDArray[Any]], branches: int) -> list[Any]:
    """At two steps, samples [N, ...] for every branch."""
    shared = branches if made.shares else 1
    put = made.arrays.put
    predict = made.prepare([801.0, 3.5], {name: put(value) for name, value in told.items()}, shared)
    seen = put(np.concatenate([sample] * (branches // shared)))
    return [made.arrays.get(predict(n, seen)) for n in (0, 1)]


@pytest.mark.parametrize("name", MODELS)
def test_every_choice_of_rewrites_predicts_as_diffusers_does(name: str) -> None:
    unet, theirs = model(name)
    sample, told = normal(1, 3, 4, 8, 12), conditions(unet, 6)
    exact = [expected(theirs, np.concatenate([sample] * 2), t, told) for t in (801.0, 3.5)]
    for rewrites in combinations(name):
        found = predictions(on_eager(unet, rewrites), sample, told, 2)
        assert all(relative(a, b) <= BOUND for a, b in zip(found, exact, strict=True)), rewrites
    other = {**told, "encoder_hidden_states": np.roll(told["encoder_hidden_states"], 1, 0)}
    found = predictions(on_eager(unet, combinations(name)[-1]), sample, other, 2)
    assert all(relative(a, b) > 1e-2 for a, b in zip(found, exact, strict=True))


@pytest.mark.parametrize(("name", "engine"), [("deep", "onnxruntime"), ("late", "openvino"), ("xl", "openvino")])
def test_graphs_predict_as_diffusers_does_at_every_size(name: str, engine: str, tmp_path: Path) -> None:
    unet, theirs = model(name)
    made = on_graphs(engine, unet, combinations(name)[-1], tmp_path)
    for count, branches, height, width in ((1, 1, 8, 4), (2, 2, 8, 12), (1, 3, 4, 8)):
        sample, told = normal(1, count, 4, height, width), conditions(unet, branches * count)
        exact = [expected(theirs, np.concatenate([sample] * branches), t, told) for t in (801.0, 3.5)]
        found = predictions(made, sample, told, branches)
        assert all(relative(a, b) <= BOUND for a, b in zip(found, exact, strict=True))


@pytest.mark.parametrize(("left_out", "engine"), [(KEYS, "onnxruntime"), (TIMES, "openvino"), (PREFIX, "onnxruntime")])
def test_graphs_do_without_any_of_the_rewrites(left_out: str, engine: str, tmp_path: Path) -> None:
    unet, theirs = model("sd1")
    made = on_graphs(engine, unet, [one for one in EXACT if one != left_out], tmp_path)
    sample, told = normal(1, 1, 4, 8, 4), conditions(unet, 2)
    exact = [expected(theirs, np.concatenate([sample] * 2), t, told) for t in (801.0, 3.5)]
    assert all(relative(a, b) <= BOUND for a, b in zip(predictions(made, sample, told, 2), exact, strict=True))


@pytest.mark.parametrize("engine", ENGINES)
def test_residuals_of_a_controlnet_may_differ_between_branches(engine: str, tmp_path: Path) -> None:
    unet, theirs = model("sd1")
    rewrites = (KEYS, TIMES, PREFIX)
    made = on_eager(unet, rewrites) if engine == "eager" else on_graphs(engine, unet, rewrites, tmp_path)
    sample, told = normal(1, 2, 4, 8, 12), conditions(unet, 4)
    sizes = {"batch": 2, "branches": 2, "latent_height": 8, "latent_width": 12}
    names = {port.name for port in residual_ports(unet.config)}
    ports = [port for port in made.interface.inputs if port.name in names]
    shapes = [Interface("", (), (port,)).output_shapes(sizes)[port.name] for port in ports]
    residuals = [normal(31 + n, *shape) for n, shape in enumerate(shapes)]
    *down, mid = (torch.from_numpy(one).flatten(0, 1) for one in residuals)
    doubled = torch.from_numpy(np.concatenate([sample] * 2))
    with torch.inference_mode():
        text = torch.from_numpy(told["encoder_hidden_states"])
        exact = theirs(
            doubled, 801.0, text, down_block_additional_residuals=down, mid_block_additional_residual=mid
        ).sample.numpy()
    plain = predictions(made, sample, told, 2)[0]
    named = {port.name: made.arrays.put(value) for port, value in zip(ports, residuals, strict=True)}
    step = made.step
    controlled = replace(made, step=lambda inputs: step({**inputs, **named}))
    assert relative(predictions(controlled, sample, told, 2)[0], exact) <= BOUND
    assert relative(predictions(made, sample, told, 2)[0], plain) == 0  # nothing of the last call is left
    assert relative(plain, exact) > 1e-2


@pytest.mark.parametrize("name", MODELS)
def test_widths_follow_from_the_configuration(name: str) -> None:
    unet, _ = model(name)
    assert time_width(unet.config) == sum(layer.width for layer in unet._timed)
    assert text_width(unet.config) == sum(layer.width for layer in unet._looking)


UNMET = {
    KEYS: {"encoder_hid_dim_type": "text_image_proj"},
    TIMES: {"down_block_types": ("SimpleCrossAttnDownBlock2D", "DownBlock2D")},
    PREFIX: {"num_class_embeds": 10},
}


@pytest.mark.parametrize("name", UNMET)
def test_preconditions_are_read_from_the_configuration(name: str) -> None:
    config = {**UNet2DConditionModel.DEFAULTS, **UNET}
    unmet = REWRITES[name].unmet
    assert unmet("unet", "UNet2DConditionModel", config) is None
    assert unmet("unet", "UNet2DConditionModel", {**config, **UNMET[name]}) is not None
    assert unmet("unet", "UNet2DModel", config) is not None


def test_branches_share_nothing_where_the_time_looks_at_the_text_or_no_block_does() -> None:
    config = {**UNet2DConditionModel.DEFAULTS, **UNET}
    for change in (
        {"addition_embed_type": "text_time"}, {"time_cond_proj_dim": 8}, {"class_embed_type": "timestep"},
        {"down_block_types": ("DownBlock2D",) * 2}, {"only_cross_attention": (True, False)},
    ):  # fmt: skip
        assert REWRITES[PREFIX].unmet("unet", "UNet2DConditionModel", {**config, **change}) is not None


CALL: dict[str, Any] = {
    "prompt": ["a red cat", "a photo of dogs"], "negative_prompt": ["", "blue"], "num_inference_steps": 5,
    "guidance_scale": 5.0, "height": 64, "width": 32,
}  # fmt: skip


@pytest.mark.parametrize("engine", ENGINES)
def test_pictures_in_windows_of_steps_equal_diffusers(sd1: Path, engine: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(denoiser, "WINDOW", 2)
    pipe = DiffusionPipeline.from_pretrained(exported(sd1, engine, NATIVE), backend=engine)
    assert {"unet", "unet_prepare"} <= set(pipe.placement)
    assert set(pipe.placement["unet"].details["rewrites"].split()) >= set(EXACT)
    latents, pixels = worst(ours(pipe, (3, 4), **CALL), reference(sd1, None, (3, 4), **CALL))
    assert latents <= LATENT_BOUND
    assert pixels <= 1e-4


@pytest.mark.parametrize("engine", ENGINES)
def test_texts_that_a_callback_replaces_are_prepared_again(sd1: Path, engine: str) -> None:
    seen: list[tuple[int, ...]] = []

    def replace(_pipe: Any, step: int, _time: Any, values: dict[str, Any]) -> dict[str, Any]:
        seen.append(tuple(values["prompt_embeds"].shape))
        return {"prompt_embeds": 0.5 * values["prompt_embeds"]} if step == 1 else {}

    watched = {"callback_on_step_end": replace, "callback_on_step_end_tensor_inputs": ["prompt_embeds"]}
    theirs = diffusers.StableDiffusionPipeline.from_pretrained(sd1, safety_checker=None)
    theirs.set_progress_bar_config(disable=True)
    draw = {**CALL, "output_type": "np", "generator": None}
    generator = [torch.Generator().manual_seed(seed) for seed in (3, 4)]
    exact = theirs(**{**draw, "generator": generator}, **watched).images
    pipe: Any = DiffusionPipeline.from_pretrained(exported(sd1, engine, NATIVE), backend=engine)
    plain = pipe(**{**draw, "seed": [3, 4]}).images
    found = pipe(**{**draw, "seed": [3, 4]}, **watched).images
    assert set(seen) == {(4, 77, 32)}
    assert np.abs(found - exact).max() <= 1e-4
    assert np.abs(plain - exact).max() > 1e-2


def test_masks_that_a_callback_replaces_may_differ_between_branches(inpaint: Path) -> None:
    picture = np.linspace(0, 1, 64 * 64 * 3, dtype=np.float32).reshape(64, 64, 3)
    mask = np.zeros((64, 64), np.float32)
    mask[:, 32:] = 1
    call = {"prompt": "a cat", "image": picture, "mask_image": mask, "num_inference_steps": 3, "seed": 0,
            "output_type": "np", "height": 64, "width": 64}  # fmt: skip

    def half(_pipe: Any, _step: int, _time: Any, values: dict[str, Any]) -> dict[str, Any]:
        changed = values["mask"].clone()
        changed[0] *= 0.5
        return {"mask": changed}

    watched = {"callback_on_step_end": half, "callback_on_step_end_tensor_inputs": ["mask"]}
    pictures = []
    for rewrites in (EXACT, "none"):
        pipe: Any = DiffusionPipeline.from_pretrained(inpaint, backend="eager", rewrites=rewrites)
        pictures.append(pipe(**call, **watched).images)
    assert np.abs(pictures[0] - pictures[1]).max() <= 1e-4
    assert np.abs(pipe(**call).images - pictures[1]).max() > 1e-3


def test_weights_and_hooks_of_the_shown_model_reach_the_pictures(sd1: Path) -> None:
    pipe: Any = DiffusionPipeline.from_pretrained(sd1, backend="eager")
    attention = pipe.unet.down_blocks[0].attentions[0].transformer_blocks[0].attn2
    call = {**CALL, "seed": [3, 4], "output_type": "np"}
    before = pipe(**call).images
    with torch.no_grad():
        attention.to_v.weight *= 3
        changed = pipe(**call).images
        attention.to_v.weight /= 3
    assert np.abs(changed - before).max() > 1e-3

    def tripled(_module: Any, _inputs: Any, output: Tensor) -> Tensor:
        return 3 * output

    handle = attention.to_v.register_forward_hook(tripled)
    hooked = pipe(**call).images
    handle.remove()
    assert np.abs(hooked - changed).max() <= 1e-4
    assert np.abs(pipe(**call).images - before).max() <= 1e-5


@pytest.mark.parametrize("engine", FORMATS)
def test_no_weight_is_stored_twice(sd1: Path, engine: str) -> None:
    artifact = read_artifact(exported(sd1, engine, NATIVE))
    once_made, step = (artifact.parts[name].constants for name in ("unet_prepare", "unet"))
    matrices = [{one.tensor for one in each.values() if len(one.shape) > 1} for each in (once_made, step)]
    assert not matrices[0] & matrices[1]
    stored = {name for name, value in UNet2DConditionModel.from_pretrained(sd1, subfolder="unet").state_dict().items()
              if value.ndim > 1}  # fmt: skip
    assert matrices[0] | matrices[1] == stored
    assert {name.rsplit(".", 2)[1] for name in matrices[0]} == {
        "to_k", "to_v", "time_emb_proj", "linear_1", "linear_2",
    }  # fmt: skip


def test_a_fixed_batch_fixes_the_branches(sd2: Path) -> None:
    pipe: Any = DiffusionPipeline.from_pretrained(exported(sd2, "onnxruntime", NATIVE, size=(16, 24), batch=1))
    call = {**CALL, "prompt": "a cat", "negative_prompt": None, "output_type": "np", "height": 16, "width": 24}
    axes = pipe.program("unet").interface.axes
    assert [(axes[name].minimum, axes[name].maximum) for name in ("batch", "branches")] == [(1, 1), (2, 2)]
    with pytest.raises(InputError, match="branches is 1, expected 2"):
        pipe(**{**call, "guidance_scale": 1.0})
    with pytest.raises(InputError, match="batch is 2, expected 1"):
        pipe(**call, num_images_per_prompt=2)


@pytest.mark.parametrize("kind", ["model", "sequential", "block_level", "leaf_level"])
def test_weights_that_wait_elsewhere_come_when_a_picture_is_prepared(
    kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    unet, _ = model("sd1")
    sample, told = normal(1, 1, 4, 8, 4), conditions(unet, 2)
    exact = predictions(on_eager(unet, EXACT), sample, told, 2)
    for weight in unet.parameters():
        weight.data = weight.data / 2
    monkeypatch.setattr(offloading, "copied", lambda weight, *_args, **_named: weight * 2)
    monkeypatch.setattr(offloading, "_turns", {})
    offloading.offload(unet, Offload(kind, "cpu:0", 1))
    found = predictions(on_eager(unet, EXACT), sample, told, 2)
    offloading.offload(unet, Offload(None))
    assert all(np.array_equal(a, b) for a, b in zip(found, exact, strict=True))
    assert relative(predictions(on_eager(unet, EXACT), sample, told, 2)[0], exact[0]) > 1e-2
