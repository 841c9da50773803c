"""ControlNets on every engine: exported once, called no oftener than they must be, and alone or beside a UNet."""

from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from checkpoints import tiny_controlnet
from exported import FORMATS, export, exported
from parity import Agrees, ours, relative, worst
from test_controlnet import CALL, picture

import anamorph
from anamorph import ControlNetModel, DiffusionPipeline
from anamorph.arrays import Array
from anamorph.artifact import NATIVE
from anamorph.errors import BackendError, ConfigError, InputError
from anamorph.pipelines.loaded import Loaded
from anamorph.rewrites import NONE


def test_a_whole_pipeline_follows_as_eager_does(controlled_sd1: Path, agrees: Agrees) -> None:
    """The UNet of both pictures is one: with nets, and without."""
    call = {**CALL, "num_inference_steps": 3, "image": [picture(1, 64, 32), picture(2, 64, 32)],
            "controlnet_conditioning_scale": [0.5, 1.0], "control_guidance_end": [0.5, 1.0]}  # fmt: skip
    engine = "onnxruntime"
    eager: Any = DiffusionPipeline.from_pretrained(controlled_sd1, backend="eager")
    with pytest.raises(InputError, match="native signature"):
        exported(controlled_sd1, engine)
    pipe: Any = DiffusionPipeline.from_pretrained(exported(controlled_sd1, engine, NATIVE), backend=engine)
    assert {placed.engine for placed in pipe.placement.values()} == {engine}
    agrees("StableDiffusionControlNetPipeline", worst(ours(pipe, 0, **call), ours(eager, 0, **call)), engine)
    guessing = {**call, "guess_mode": True, "prompt": ["a cat", "a dog"]}
    seeds = [1, 2]
    agrees(
        "StableDiffusionControlNetPipeline",
        worst(ours(pipe, seeds, **guessing), ours(eager, seeds, **guessing)),
        engine,
    )
    plain = {**CALL, "num_inference_steps": 3, "height": 64, "width": 32}
    pair = [anamorph.StableDiffusionPipeline.from_pipe(one) for one in (pipe, eager)]
    agrees("StableDiffusionPipeline", worst(*(ours(one, 0, **plain) for one in pair)), engine)


def test_sdxl_follows_as_eager_does(controlled_xl: Path, agrees: Agrees) -> None:
    call = {**CALL, "num_inference_steps": 3, "image": picture(0, 16, 24), "strength": 0.9,
            "control_image": picture(1, 16, 24)}  # fmt: skip
    kind, engine = anamorph.StableDiffusionXLControlNetImg2ImgPipeline, "openvino"
    places = {"eager": controlled_xl, engine: exported(controlled_xl, engine, NATIVE)}
    pair = [kind.from_pretrained(place, backend=name) for name, place in places.items()]
    agrees(kind.__name__, worst(*(ours(pipe, 0, **call) for pipe in reversed(pair))), engine)


@pytest.mark.parametrize("engine", FORMATS)
def test_a_net_alone_joins_a_unet_that_was_exported_without_it(
    engine: str, sd2: Path, controlled_sd2: Path, tmp_path: Path, agrees: Agrees
) -> None:
    export(controlled_sd2 / "controlnet", engine, tmp_path / "net", signature="native")
    net = ControlNetModel.from_pretrained(tmp_path / "net")
    kind: Any = anamorph.StableDiffusionControlNetPipeline
    call = {**CALL, "image": picture(0, 16, 24)}
    eager = ours(kind.from_pretrained(controlled_sd2, backend="eager"), 0, **call)
    with pytest.raises(InputError, match="takes no down_block_additional_residuals"):  # a portable UNet
        kind.from_pretrained(exported(sd2, engine), controlnet=net, backend=engine).plan(
            kind.from_pretrained(controlled_sd2, backend="null").job(**call)
        )
    # From checkpoints: both are exported once, into the cache, apart from one another.
    place = controlled_sd2 / "controlnet"
    pipe = kind.from_pretrained(sd2, controlnet=str(place), backend=engine)
    assert {placed.engine for placed in pipe.placement.values()} == {engine}
    for one in (pipe, kind.from_pipe(pipe, controlnet=net)):
        agrees("StableDiffusionControlNetPipeline", worst(ours(one, 0, **call), eager), engine)
    module = ControlNetModel.from_pretrained(place)
    assert kind.from_pipe(pipe, controlnet=module).placement["controlnet"].engine == engine
    with torch.no_grad():
        module.conv_in.weight += 1
    with pytest.raises(BackendError, match="is a module"):
        kind.from_pipe(pipe, controlnet=module)


class Counting:
    """A program that counts its calls."""

    def __init__(self, program: Any, part: str, calls: Counter[str]) -> None:
        self.program, self.part, self.calls = program, part, calls

    def __getattr__(self, name: str) -> Any:
        return getattr(self.program, name)

    def session(self) -> Any:
        session = self.program.session()

        def call(inputs: Mapping[str, Array]) -> dict[str, Array]:
            self.calls[self.part] += 1
            return session(inputs)

        return call


def counting(pipe: Any, calls: Counter[str]) -> Any:
    """The same pipeline over programs that count."""
    parts = {
        name: Loaded(one.component, {part: Counting(program, part, calls) for part, program in one.programs.items()})
        .placed(name) if isinstance(one, Loaded) else one
        for name, one in pipe.components.items()
    }  # fmt: skip
    return type(pipe)(**parts, **pipe.options)


@pytest.mark.parametrize("rewrites", [None, NONE])
def test_pictures_are_read_once_and_nets_rest_outside_their_interval(
    rewrites: str | None, controlled_sd1: Path
) -> None:
    calls: Counter[str] = Counter()
    pipe = counting(DiffusionPipeline.from_pretrained(controlled_sd1, backend="eager", rewrites=rewrites), calls)
    call = {"prompt": ["a cat", "a dog"], "image": [picture(1, 64, 48), picture(2, 64, 48)], "num_inference_steps": 8}
    pipe(**call, seed=0, output_type="latent", control_guidance_start=[0.0, 0.5], control_guidance_end=[0.25, 1.0])
    assert (calls["unet"], calls["controlnet"], calls["controlnet_1"]) == (8, 2, 4)
    assert calls["controlnet_hint"] == calls["controlnet_1_hint"] == 1
    prepared = 0 if rewrites == NONE else 1
    assert calls["controlnet_prepare"] == calls["controlnet_1_prepare"] == prepared
    calls.clear()
    pipe(**call, seed=0, output_type="latent", controlnet_conditioning_scale=[0.0, 1.0])
    assert (calls["controlnet"], calls["controlnet_prepare"], calls["controlnet_1"]) == (0, 0, 8)


def test_nets_are_stored_where_diffusers_finds_them(controlled_sd1: Path, tmp_path: Path) -> None:
    pipe: Any = DiffusionPipeline.from_pretrained(controlled_sd1, backend="eager")
    assert isinstance(pipe.controlnet, anamorph.MultiControlNetModel)
    pipe.save_pretrained(tmp_path / "pipe")
    theirs = diffusers.StableDiffusionControlNetPipeline.from_pretrained(tmp_path / "pipe", safety_checker=None)
    assert len(theirs.controlnet.nets) == 2
    for mine, other in zip(pipe.controlnet.nets, theirs.controlnet.nets, strict=True):
        state = mine.state_dict()
        assert all(torch.equal(state[name], value) for name, value in other.state_dict().items())
    pipe.controlnet = pipe.controlnet.nets[1]
    assert set(pipe.placement) & {"controlnet", "controlnet_1"} == {"controlnet"}
    other = anamorph.MultiControlNetModel.from_pretrained(controlled_sd1 / "controlnet")
    assert len(other.nets) == 2


def test_a_net_begins_as_a_copy_of_a_unet_and_adds_nothing(sd2: Path, tmp_path: Path) -> None:
    unet = anamorph.UNet2DConditionModel.from_pretrained(sd2, subfolder="unet")
    net = ControlNetModel.from_unet(unet, conditioning_embedding_out_channels=(8, 16))
    theirs = diffusers.ControlNetModel.from_unet(
        diffusers.UNet2DConditionModel.from_pretrained(sd2, subfolder="unet"),
        conditioning_embedding_out_channels=(8, 16),
    )
    assert {key: value for key, value in net.config.items() if key[0] != "_"} == {
        key: tuple(value) if isinstance(value, list) else value for key, value in theirs.config.items() if key[0] != "_"
    }
    copied = [name for name in theirs.state_dict() if not name.startswith("controlnet_cond")]
    assert all(torch.equal(net.state_dict()[name], theirs.state_dict()[name]) for name in copied)
    pipe: Any = anamorph.StableDiffusionControlNetPipeline.from_pretrained(sd2, controlnet=net, backend="eager")
    plain: Any = DiffusionPipeline.from_pretrained(sd2, backend="eager")
    found = ours(pipe, 0, **CALL, image=picture(0, 16, 24))
    assert relative(found.latents[-1], ours(plain, 0, **CALL, height=16, width=24).latents[-1]) <= 1e-6
    net.save_pretrained(tmp_path)
    assert diffusers.ControlNetModel.from_pretrained(tmp_path).config.conditioning_embedding_out_channels == [8, 16]


def test_a_compiled_net_draws_the_same(controlled_sd2: Path) -> None:
    pipe: Any = anamorph.StableDiffusionControlNetPipeline.from_pretrained(controlled_sd2, backend="eager")
    call = {**CALL, "image": picture(0, 16, 24), "num_inference_steps": 3}
    expected, net = ours(pipe, 0, **call), pipe.controlnet
    pipe.controlnet = torch.compile(net, backend="eager", fullgraph=True)
    assert pipe.placement["controlnet"].details["calling"] == "OptimizedModule"
    assert max(worst(ours(pipe, 0, **call), expected)) <= 1e-5
    with torch.no_grad():
        net.conv_in.weight *= 1.1
    assert worst(ours(pipe, 0, **call), expected)[0] > 1e-3  # it is that net, and no copy
    with torch.no_grad():
        net.conv_in.weight /= 1.1
    pipe.controlnet = torch.compile(net, backend="eager", fullgraph=True)
    pipe.unet = torch.compile(pipe.unet, backend="eager", fullgraph=True)
    with torch._dynamo.config.patch(recompile_limit=1):  # each of both is one program: they are not counted together
        assert max(worst(ours(pipe, 0, **call), expected)) <= 1e-5
    with pytest.raises(InputError, match="takes either controlnet_cond, a picture, or the hint"):
        net(torch.zeros(1, 4, 8, 12), 1, torch.zeros(1, 5, 32), None)
    with pytest.raises(InputError, match="controlnet is a Identity, expected a model of anamorph"):
        pipe.controlnet = torch.nn.Identity()


@pytest.mark.parametrize("changes", [
    {"global_pool_conditions": True}, {"controlnet_conditioning_channel_order": "bgr"},
])  # fmt: skip
def test_rarer_settings(changes: dict[str, Any], sd2: Path, agrees: Agrees) -> None:
    net = tiny_controlnet(sd2 / "unet", 1, 33)
    net.register_to_config(**changes)
    theirs = diffusers.StableDiffusionControlNetPipeline.from_pretrained(sd2, controlnet=net, safety_checker=None)
    theirs.set_progress_bar_config(disable=True)
    mine: Any = anamorph.StableDiffusionControlNetPipeline.from_pretrained(sd2, controlnet=net, backend="eager")
    call = {**CALL, "image": picture(0, 16, 24), "num_inference_steps": 3}
    expected = theirs(**call, generator=torch.Generator().manual_seed(0), output_type="latent").images.numpy()
    assert relative(ours(mine, 0, **call).latents[-1], expected) <= 1e-5
    del agrees


def test_a_class_is_chosen_by_what_is_given(sd2: Path, controlled_sd2: Path) -> None:
    net = controlled_sd2 / "controlnet"
    auto = anamorph.AutoPipelineForText2Image.from_pretrained(sd2, controlnet=net, backend="null")
    assert type(auto) is anamorph.StableDiffusionControlNetPipeline
    masked = anamorph.AutoPipelineForInpainting.from_pipe(auto)
    assert type(masked) is anamorph.StableDiffusionControlNetInpaintPipeline
    assert type(anamorph.AutoPipelineForText2Image.from_pipe(auto, controlnet=None)) is anamorph.StableDiffusionPipeline
    plain: Any = DiffusionPipeline.from_pretrained(sd2, backend="null")
    twice = anamorph.StableDiffusionControlNetImg2ImgPipeline.from_pipe(plain, controlnet=[str(net)] * 2)
    assert {"controlnet_hint", "controlnet_1_hint"} <= set(twice.placement)


def test_nets_that_do_not_fit_are_refused(sd2: Path, sdxl: Path, controlled_sd2: Path, controlled_sd1: Path) -> None:
    kind: Any = anamorph.StableDiffusionControlNetPipeline
    many = controlled_sd1 / "controlnet"
    for net, said in ((many, "7 residuals, the unet takes 5"), (sd2 / "unet", "no model_index"), ([], "empty list")):
        with pytest.raises((ConfigError, InputError, anamorph.errors.CheckpointError), match=said):
            kind.from_pretrained(sd2, controlnet=net, backend="null")
    with pytest.raises(ConfigError, match=r"told other things|wide"):
        anamorph.StableDiffusionXLControlNetPipeline.from_pretrained(
            sdxl, controlnet=controlled_sd2 / "controlnet", backend="null"
        )


WRONG: list[tuple[dict[str, Any], str]] = [
    ({"image": None}, "image is missing"),
    ({"image": picture(1, 64, 48)}, "no list for 2"),
    ({"image": [picture(1, 64, 48)]}, "1 pictures for 2"),
    ({"image": [picture(1, 64, 48), picture(2, 48, 48)]}, "48x48 pixels where 64x48"),
    ({"image": [[picture(1, 64, 48)] * 2, picture(2, 64, 48)]}, "2 of image for 1 prompts"),
    ({"controlnet_conditioning_scale": [1.0]}, "1 numbers for 2"),
    ({"controlnet_conditioning_scale": "strong"}, "expected a finite number"),
    ({"control_guidance_start": [0.1, 0.2, 0.3]}, "3 numbers for 2"),
    ({"control_guidance_start": 0.7, "control_guidance_end": 0.5}, "0 <= start < end <= 1"),
    ({"control_guidance_end": 1.5}, "0 <= start < end <= 1"),
    ({"guess_mode": 1}, "True or False"),
]


@pytest.mark.parametrize(("changes", "said"), WRONG)
def test_what_is_wrong_is_said_in_a_sentence(changes: dict[str, Any], said: str, controlled_sd1: Path) -> None:
    pipe: Any = DiffusionPipeline.from_pretrained(controlled_sd1, backend="null")
    call = {**CALL, "image": [picture(1, 64, 48), picture(2, 64, 48)], **changes}
    with pytest.raises(InputError, match=said):
        pipe.job(**call)
