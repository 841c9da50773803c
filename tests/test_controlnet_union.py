"""One ControlNet for pictures of several kinds: its model and pipelines beside diffusers', on every engine."""

from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from checkpoints import noisy
from exported import FORMATS, exported, once, shared_place
from parity import Agrees, Trace, generator, ours, reference, relative, worst
from test_cli_controls import draw
from test_controlnet import CALL, IMG2IMG, MASKED, picture

import anamorph
from anamorph import ControlNetUnionModel, DiffusionPipeline
from anamorph.artifact import NATIVE
from anamorph.errors import ConfigError, InputError
from anamorph.image import read_request

KIND = "StableDiffusionXLControlNetUnionPipeline"
WIDTH = {"num_trans_channel": 32, "num_proj_channel": 32, "num_trans_head": 4, "num_trans_layer": 2}


def union(unet: Path, seed: int) -> Any:
    """diffusers' net for a denoiser; what reads the picture and its kind has values of order one."""
    model = diffusers.UNet2DConditionModel.from_pretrained(unet)
    made = diffusers.ControlNetUnionModel.from_unet(
        model, load_weights_from_unet=False, conditioning_embedding_out_channels=(8, 16)
    )
    config = {key: value for key, value in made.config.items() if key[0] != "_"}
    net = noisy(diffusers.ControlNetUnionModel(**{**config, **WIDTH}), seed)
    with torch.no_grad():
        for name, parameter in net.controlnet_cond_embedding.named_parameters():
            parameter.mul_(1.0 if name.endswith("bias") else parameter[0].numel() ** -0.5)
    return net


def united(place: Path, sdxl: Path, nets: int) -> None:
    made = [union(sdxl / "unet", 20 + number) for number in range(nets)]
    kind = diffusers.StableDiffusionXLControlNetUnionPipeline
    kind.from_pretrained(sdxl, controlnet=made if nets > 1 else made[0]).save_pretrained(place)


@pytest.fixture(scope="session")
def united_xl(sdxl: Path) -> Path:
    """The random checkpoint of SDXL's kind with a net for several kinds of pictures."""
    return once(shared_place() / "united-xl", lambda place: united(place, sdxl, 1))


@pytest.fixture(scope="session")
def twice_united_xl(sdxl: Path) -> Path:
    """The same with two nets."""
    return once(shared_place() / "twice-united-xl", lambda place: united(place, sdxl, 2))


def compared(folder: Path, kind: str, agrees: Agrees, seeds: Any = 0, **call: Any) -> None:
    pipe = getattr(anamorph, kind).from_pretrained(folder, backend="eager")
    agrees(kind, worst(ours(pipe, seeds, **call), reference(folder, None, seeds, kind, **call)))


ONE: dict[str, Any] = {"control_image": picture(0, 16, 24), "control_mode": 3}
TWO: dict[str, Any] = {"control_image": [picture(0, 16, 24), picture(1, 16, 24)], "control_mode": [1, 4]}
SEVERAL = {
    **TWO, "controlnet_conditioning_scale": [0.6, 1.3], "control_guidance_start": [0.0, 0.3],
    "control_guidance_end": [0.5, 0.8],
}  # fmt: skip


@pytest.mark.parametrize("turn", [
    ONE, {**ONE, "controlnet_conditioning_scale": 0.4, "control_guidance_end": 0.7}, TWO, SEVERAL,
    {**SEVERAL, "guess_mode": True, "guidance_scale": 1.0},  # guided, diffusers has a shape too many
])  # fmt: skip
def test_pictures_of_some_kinds_are_followed(turn: dict[str, Any], united_xl: Path, agrees: Agrees) -> None:
    compared(united_xl, KIND, agrees, **CALL, **turn)


@pytest.mark.parametrize(("kind", "call"), [
    ("Img2Img", {**IMG2IMG, **ONE}), ("Img2Img", {**IMG2IMG, **SEVERAL}),
    ("Inpaint", {**MASKED, **TWO, "strength": 0.9}),
    ("Inpaint", {**MASKED, **ONE, "guess_mode": True, "guidance_scale": 1.0}),
])  # fmt: skip
def test_other_tasks_follow_them(kind: str, call: dict[str, Any], united_xl: Path, agrees: Agrees) -> None:
    compared(united_xl, KIND.replace("Pipeline", f"{kind}Pipeline"), agrees, **CALL, **call)


def test_several_prompts_have_pictures_of_their_own_that_meet(united_xl: Path, agrees: Agrees) -> None:
    pair = torch.rand(2, 2, 3, 16, 24, generator=torch.Generator().manual_seed(5))
    call = {**CALL, "prompt": ["a cat", "a dog"], "num_inference_steps": 2, "control_image": list(pair),
            "control_mode": [0, 5], "num_images_per_prompt": 2, "height": 16, "width": 24}  # fmt: skip
    compared(united_xl, KIND, agrees, [1, 2, 3, 4], **call)


@pytest.mark.parametrize("turn", [
    {}, {"controlnet_conditioning_scale": [0.4, 1.2], "control_guidance_end": [0.5, 1.0]},
])  # fmt: skip
def test_several_nets_follow_a_picture_each(
    turn: dict[str, Any], sdxl: Path, twice_united_xl: Path, agrees: Agrees
) -> None:
    nets = [diffusers.ControlNetUnionModel.from_pretrained(twice_united_xl / name)
            for name in ("controlnet", "controlnet_1")]  # fmt: skip
    theirs: Any = getattr(diffusers, KIND).from_pretrained(sdxl, controlnet=nets)  # it stores several, and reads one
    theirs.set_progress_bar_config(disable=True)
    call, latents = {**CALL, **TWO, **turn}, []

    def keep(_pipe: Any, _step: int, _time: Any, values: dict[str, Any]) -> dict[str, Any]:
        latents.append(values["latents"].numpy().copy())
        return {}

    images = theirs(**call, generator=generator(0), output_type="np", callback_on_step_end=keep).images
    mine: Any = DiffusionPipeline.from_pretrained(twice_united_xl, backend="eager")
    agrees(KIND, worst(ours(mine, 0, **call), Trace(latents, images)))


@pytest.mark.parametrize("engine", FORMATS)
def test_engines_follow_as_eager_does(engine: str, united_xl: Path, agrees: Agrees) -> None:
    kind = getattr(anamorph, KIND)
    places = {"eager": united_xl, engine: exported(united_xl, engine, NATIVE)}
    pair = [kind.from_pretrained(place, backend=name) for name, place in places.items()]
    for call in (ONE, SEVERAL):
        agrees(KIND, worst(*(ours(pipe, 0, **CALL, **call) for pipe in reversed(pair))), engine)


def test_the_model_alone_is_that_of_diffusers(sdxl: Path, tmp_path: Path) -> None:
    theirs = union(sdxl / "unet", 7)
    theirs.save_pretrained(tmp_path / "theirs")
    mine = ControlNetUnionModel.from_pretrained(tmp_path / "theirs")
    random = torch.Generator().manual_seed(0)
    inputs: dict[str, Any] = {
        "sample": torch.randn(2, 4, 8, 12, generator=random), "timestep": 301,
        "encoder_hidden_states": torch.randn(2, 7, 72, generator=random),
        "controlnet_cond": list(torch.rand(2, 2, 3, 16, 24, generator=random)), "control_type_idx": [2, 4],
        "control_type": torch.tensor([[0.0, 0.0, 1.0, 0.0, 1.0, 0.0]] * 2), "conditioning_scale": [0.5, 0.8],
        "added_cond_kwargs": {"text_embeds": torch.randn(2, 24, generator=random), "time_ids": torch.ones(2, 6)},
    }  # fmt: skip
    alone = {**inputs, "controlnet_cond": inputs["controlnet_cond"][:1], "control_type_idx": [2],
             "conditioning_scale": 0.5}  # fmt: skip
    for call in (inputs, alone, {**inputs, "guess_mode": True}, {**inputs, "from_multi": True}):
        with torch.no_grad():
            pairs = [(*one.down_block_res_samples, one.mid_block_res_sample) for one in (mine(**call), theirs(**call))]
        assert all(relative(a.numpy(), b.numpy()) <= 1e-5 for a, b in zip(*pairs, strict=True))
    with pytest.raises(InputError, match="2 pictures, 2 kinds and 1 weights"):
        mine(**{**inputs, "conditioning_scale": [1.0]})
    mine.save_pretrained(tmp_path / "mine")
    again = diffusers.ControlNetUnionModel.from_pretrained(tmp_path / "mine")
    assert all(torch.equal(value, again.state_dict()[name]) for name, value in theirs.state_dict().items())
    with pytest.raises(ConfigError, match="num_proj_channel"):
        ControlNetUnionModel(**{**mine.config, "num_proj_channel": 64})


def test_a_net_begins_as_a_copy_of_a_unet_and_adds_nothing(sdxl: Path) -> None:
    unet = anamorph.UNet2DConditionModel.from_pretrained(sdxl, subfolder="unet")
    net = ControlNetUnionModel.from_unet(unet, conditioning_embedding_out_channels=(8, 16))
    known = unet.state_dict()
    assert all(torch.equal(value, known[name]) for name, value in net.state_dict().items() if name in known)
    theirs = diffusers.ControlNetUnionModel.from_config(dict(net.config))
    assert {name: tuple(value.shape) for name, value in theirs.state_dict().items()} == {
        name: tuple(value.shape) for name, value in net.state_dict().items()
    }
    pipe: Any = getattr(anamorph, KIND).from_pretrained(sdxl, controlnet=net, backend="eager")
    plain: Any = DiffusionPipeline.from_pretrained(sdxl, backend="eager")
    found = ours(pipe, 0, **CALL, **TWO).latents[-1]
    assert relative(found, ours(plain, 0, **CALL, height=16, width=24).latents[-1]) <= 1e-6


WRONG: list[tuple[dict[str, Any], str]] = [
    ({"control_mode": None}, "control_mode is None, expected a kind of picture from 0 to 5"),
    ({"control_mode": 6}, "from 0 to 5"),
    ({"control_mode": [1, 2]}, "holds 2 kinds for 1 pictures"),
    ({"control_image": [picture(0, 16, 24)] * 2}, "holds 1 kinds for 2 pictures"),
    ({"control_image": []}, "holds 0 pictures"),
    ({"controlnet_conditioning_scale": [1.0, 1.0]}, "2 numbers for 1"),
]


@pytest.mark.parametrize(("changes", "said"), WRONG)
def test_what_is_wrong_is_said_in_a_sentence(changes: dict[str, Any], said: str, united_xl: Path) -> None:
    pipe: Any = DiffusionPipeline.from_pretrained(united_xl, backend="null")
    with pytest.raises(InputError, match=said):
        pipe.job(**{**CALL, **ONE, **changes})


def test_classes_are_chosen_by_the_net(sdxl: Path, united_xl: Path, twice_united_xl: Path, controlled_xl: Path) -> None:
    net = united_xl / "controlnet"
    auto = anamorph.AutoPipelineForText2Image.from_pretrained(sdxl, controlnet=net, backend="null")
    assert type(auto).__name__ == KIND
    masked = anamorph.AutoPipelineForInpainting.from_pipe(auto)
    assert type(masked) is anamorph.StableDiffusionXLControlNetUnionInpaintPipeline
    plain = anamorph.AutoPipelineForText2Image.from_pipe(auto, controlnet=None)
    assert type(plain) is anamorph.StableDiffusionXLPipeline
    pipe: Any = DiffusionPipeline.from_pretrained(twice_united_xl, backend="eager")
    assert isinstance(pipe.controlnet, anamorph.MultiControlNetUnionModel)
    other = anamorph.AutoPipelineForImage2Image.from_pipe(plain, controlnet=pipe.controlnet)
    assert type(other) is anamorph.StableDiffusionXLControlNetUnionImg2ImgPipeline
    with pytest.raises(ConfigError, match="is a ControlNetUnionModel, expected ControlNetModel"):
        anamorph.StableDiffusionXLControlNetPipeline.from_pretrained(sdxl, controlnet=net, backend="null")
    with pytest.raises(ConfigError, match="is a ControlNetModel, expected ControlNetUnionModel"):
        getattr(anamorph, KIND).from_pretrained(sdxl, controlnet=controlled_xl / "controlnet", backend="null")


def test_the_command_line_names_kinds(
    sdxl: Path, united_xl: Path, twice_united_xl: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    edges, out = tmp_path / "edges.png", tmp_path / "cat.png"
    picture(0, 16, 24).save(edges)
    net = ["--controlnet", f"all={united_xl / 'controlnet'}"]
    assert draw(sdxl, out, *net, "--control", f"4={edges}:0.5", "--control", f"1={edges}") == 0
    recorded = read_request(out)
    assert recorded["request"]["control_mode"] == [4, 1]
    assert recorded["request"]["controlnet_conditioning_scale"] == [0.5, 1.0]
    pair = [f"--controlnet={name}={twice_united_xl / folder}"
            for name, folder in (("a", "controlnet"), ("b", "controlnet_1"))]  # fmt: skip
    assert draw(sdxl, out, *pair, "--control", f"b.2={edges}", "--control", f"a.0={edges}") == 0
    assert read_request(out)["request"]["control_mode"] == [0, 2]
    for options, said in (
        (net, "all has 0 pictures; give one for a kind, as in --control 0=FILE"),
        ([*net, "--control", f"7={edges}"], "is for 7, but the nets are 0, 1, 2"),
        ([*pair, "--control", f"b.2={edges}"], "a has 0 pictures; give one for a kind, as in --control a.0=FILE"),
    ):
        assert draw(sdxl, out, *options) == 2
        assert said in capsys.readouterr().err
