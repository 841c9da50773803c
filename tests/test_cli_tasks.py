"""Every task from the command line: what it makes is what the pipeline makes, and can be replayed."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import test_conditioned
import test_depth
import test_unconditional
from exported import once, shared_place
from pictures import picture
from PIL import Image

from anamorph import DiffusionPipeline
from anamorph.cli import OK, USAGE, main, parser
from anamorph.image import read_request
from anamorph.pipelines.auto import ALONE, FAMILIES, TASKS

Capture = pytest.CaptureFixture[str]
PROMPT = ["a red cat"]


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A picture to start from, and a grey one of its depth beside it."""
    folder = tmp_path_factory.mktemp("sources")
    picture(16, 20).save(folder / "in.png")
    Image.fromarray(np.tile(np.arange(20, dtype=np.uint8) * 9, (16, 1))).save(folder / "depth.png")
    return folder


def conditioned(kind: str) -> Callable[[pytest.FixtureRequest], Path]:
    return lambda _: test_conditioned.checkpoint(f"StableDiffusion{kind}Pipeline")


def unconditional(kind: str) -> Callable[[pytest.FixtureRequest], Path]:
    name = test_unconditional.KINDS[kind]
    return lambda _: once(shared_place() / name, test_unconditional.MAKERS[name])


def shared(name: str) -> Callable[[pytest.FixtureRequest], Path]:
    return lambda request: request.getfixturevalue(name)


IMAGE = ["--image", "in.png"]
CASES: dict[str, tuple[Callable[[pytest.FixtureRequest], Path], list[str], dict[str, Any]]] = {
    "xl": (shared("sdxl"), [*PROMPT, "--prompt-2", "a dog", "--negative", "blue", "--negative-2", "of"],
           {"prompt": PROMPT, "prompt_2": "a dog", "negative_prompt": "blue", "negative_prompt_2": "of"}),
    "distilled": (shared("lcm"), [*PROMPT, "--guidance", "3"],
                  {"prompt": PROMPT, "num_inference_steps": 4, "guidance_scale": 3.0}),
    "image": (shared("sd2"), [*PROMPT, "--task", "image-to-image", *IMAGE, "--strength", "0.5"],
              {"prompt": PROMPT, "image": "in.png", "strength": 0.5}),
    "depth": (lambda _: test_depth.checkpoint(), [*PROMPT, "--task", "depth", *IMAGE],
              {"prompt": PROMPT, "image": "in.png"}),
    "given depth": (conditioned("Depth2Img"), [*PROMPT, *IMAGE, "--depth-map", "depth.png"],
                    {"prompt": PROMPT, "image": "in.png", "depth_map": "depth.png"}),
    "edit": (conditioned("InstructPix2Pix"), [*PROMPT, "--task", "edit", *IMAGE, "--image-guidance", "1.2"],
             {"prompt": PROMPT, "image": "in.png", "image_guidance_scale": 1.2}),
    "upscale": (conditioned("Upscale"), [*PROMPT, "--task", "upscale", *IMAGE, "--noise-level", "30"],
                {"prompt": PROMPT, "image": "in.png", "noise_level": 30}),
    "upscale by two": (conditioned("LatentUpscale"), [*PROMPT, *IMAGE], {"prompt": PROMPT, "image": "in.png"}),
    "text": (unconditional("LDMTextToImagePipeline"), [*PROMPT, "--task", "text-to-image"], {"prompt": PROMPT}),
    "unconditional": (unconditional("DDPMPipeline"), ["--task", "unconditional", "--count", "2"], {"batch_size": 2}),
    "class": (unconditional("DiTPipeline"), ["--task", "class", "--class-label", "3", "1", "--count", "2"],
              {"class_labels": [3, 3, 1, 1]}),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_it_makes_what_the_pipeline_makes_and_replays_it(
    name: str, request: pytest.FixtureRequest, source: Path, tmp_path: Path, capsys: Capture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    find, options, call = CASES[name]
    folder = find(request)
    monkeypatch.chdir(source)
    out = tmp_path / "out.png"
    steps = [] if name == "distilled" else ["--steps", "3"]
    common = ["--model", str(folder), "--backend", "eager", "--seed", "5", "--json"]
    assert main(["generate", *options, *common, *steps, "--out", str(out)]) == OK
    made = json.loads(capsys.readouterr().out)["images"]
    arguments: dict[str, Any] = {"num_inference_steps": 3, **call}
    if "image" in arguments:
        arguments["image"] = Image.open(arguments["image"])
    if "depth_map" in arguments:
        arguments["depth_map"] = np.asarray(Image.open(arguments["depth_map"]), np.float32)
    recorded = read_request(Path(made[0]["file"]))
    kind = DiffusionPipeline.registry[recorded["pipeline"]]
    pipe: Any = kind.from_pretrained(folder, backend="eager")
    if name == "xl":
        arguments["guidance_scale"] = 5.0
    expected = pipe(**arguments, seed=5).images
    assert len(made) == len(expected)
    for row, image in zip(made, expected, strict=True):
        assert np.array_equal(np.asarray(Image.open(row["file"])), np.asarray(image))
    last = made[-1]["file"]
    sources = [*IMAGE, *(["--depth-map", "depth.png"] if "depth_map" in call else [])] if "image" in call else []
    assert main(["replay", last, *sources, "--json", "--out", str(tmp_path / "again.png")]) == OK
    # Pictures of one batch and alone are computed by other kernels.
    assert json.loads(capsys.readouterr().out)["largest_difference"] <= (0 if len(made) == 1 else 1)


REFUSED: list[tuple[Callable[[pytest.FixtureRequest], Path], list[str], str]] = [
    (shared("sd1"), [*PROMPT, "--task", "depth"],
     "a checkpoint of StableDiffusionPipeline does not serve depth; it serves text-to-image, image-to-image, inpaint"),
    (shared("lcm"), [*PROMPT, "--task", "inpainting", *IMAGE], "does not serve inpainting; it serves text-to-image"),
    (shared("sd1"), [*PROMPT, "--prompt-2", "a dog"], "--prompt-2 does not go with StableDiffusionPipeline, which"),
    (shared("sd1"), [], "the prompt is missing; StableDiffusionPipeline draws what a text says"),
    (shared("sd1"), [*PROMPT, "--class-label", "3"], "--class-label does not go with StableDiffusionPipeline"),
    (shared("inpaint"), [*PROMPT, "--task", "text-to-image"], "which is a model for inpainting"),
    (conditioned("Depth2Img"), [*PROMPT, *IMAGE], "image without depth_map; this task starts from image and depth_map"),
    (conditioned("Depth2Img"), [*PROMPT, *IMAGE, "--depth-map", "in.png"], "has mode RGB, expected grey"),
    (conditioned("InstructPix2Pix"), [*PROMPT], "image is missing; this task starts from image"),
    (conditioned("LatentUpscale"), [*PROMPT, *IMAGE, "--count", "2"], "--count does not go with StableDiffusionLatent"),
    (unconditional("DDPMPipeline"), [*PROMPT], "a prompt does not go with DDPMPipeline"),
    (unconditional("DDPMPipeline"), IMAGE, "--image does not go with DDPMPipeline"),
    (unconditional("DDPMPipeline"), ["--count", "0"], "batch_size is 0"),
    (unconditional("DiTPipeline"), [], "class_labels is missing"),
    (unconditional("DiTPipeline"), ["--class-label", "moon"], "there is no class 'moon'"),
]  # fmt: skip


@pytest.mark.parametrize(("find", "options", "words"), REFUSED, ids=[words[:40] for _, _, words in REFUSED])
def test_what_a_checkpoint_does_not_serve_is_one_sentence(
    find: Callable[[pytest.FixtureRequest], Path], options: list[str], words: str, request: pytest.FixtureRequest,
    source: Path, tmp_path: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.chdir(source)
    out, folder = tmp_path / "out.png", str(find(request))
    capsys.readouterr()
    code = main(["generate", *options, "--model", folder, "--backend", "eager", "--out", str(out)])
    said = capsys.readouterr().err
    assert words in said
    assert said.count("\n") == 1
    assert code == (1 if "model for inpainting" in words else USAGE)
    assert not list(tmp_path.iterdir())


def test_every_task_of_every_class_can_be_named() -> None:
    (command,) = (action for action in parser()._actions if action.dest == "command")
    assert command.choices is not None
    (option,) = (action for action in command.choices["generate"]._actions if action.dest == "task")  # type: ignore[call-overload]
    assert set(option.choices) == {task.replace(" ", "-") for task in (*TASKS, *ALONE.values())}
    named = {*ALONE, *(name for family in FAMILIES for name in family if name)}
    assert named == {
        name for name, kind in DiffusionPipeline.registry.items() if kind.__module__.startswith("anamorph.")
    }


def test_a_request_that_contradicts_its_picture_is_refused(
    sd2: Path, source: Path, tmp_path: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    from anamorph.image import write_png

    monkeypatch.chdir(source)
    out = tmp_path / "out.png"
    options = [*IMAGE, "--model", str(sd2), "--backend", "eager", "--steps", "2", "--seed", "1", "--out", str(out)]
    assert main(["generate", *PROMPT, *options]) == OK
    recorded = read_request(out)
    recorded["request"]["height"] = 999
    write_png(Image.open(out).copy(), out, recorded)
    capsys.readouterr()
    assert main(["replay", str(out), *IMAGE]) == USAGE
    assert "the recorded request is damaged: height is 999, but" in capsys.readouterr().err
