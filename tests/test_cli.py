"""The command line, as a person and as a program use it."""

import hashlib
import json
import resource
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from safetensors.numpy import load_file, save_file

from anamorph.checkpoint import BUNDLED, Source, open_checkpoint
from anamorph.cli import DIFFERENT, FAILED, INTERRUPTED, OK, USAGE, main
from anamorph.cli.demo import PROMPTS
from anamorph.image import read_request, write_png

Capture = pytest.CaptureFixture[str]


@pytest.fixture
def picture(sd1: Path, tmp_path: Path, capsys: Capture) -> Path:
    """A picture of the random checkpoint, made by the command line."""
    out = tmp_path / "cat.png"
    arguments = ["generate", "a cat", "--model", str(sd1), "--seed", "5", "--steps", "3", "--out", str(out)]
    assert main(arguments) == OK
    capsys.readouterr()
    return out


def failure(capsys: Capture, arguments: list[str]) -> tuple[int, str]:
    """Exit code and message of a command that must fail with one sentence."""
    code = main(arguments)
    captured = capsys.readouterr()
    assert captured.err.startswith("anamorph: ")
    assert "Traceback" not in captured.err
    assert captured.err.count("\n") == 1
    return code, captured.err


@pytest.mark.parametrize("named", [[], ["--model", "bundled"]])
def test_the_bundled_model_is_used_by_its_name_or_none(named: list[str], tmp_path: Path, capsys: Capture) -> None:
    out = tmp_path / "apple.png"
    assert main(["generate", "red apple", *named, "--seed", "0", "--steps", "2", "--out", str(out)]) == OK
    assert "apple.png" in capsys.readouterr().out
    recorded = read_request(out)
    assert recorded["model"] == {"name": None, "sha256": open_checkpoint(Source(str(BUNDLED))).digest()}
    assert recorded["request"]["guidance_scale"] == 4.0
    assert Image.open(out).size == (64, 64)


def test_several_pictures_are_numbered_and_carry_their_own_request(sd1: Path, tmp_path: Path, capsys: Capture) -> None:
    out = tmp_path / "x.png"
    arguments = ["generate", "a cat", "a dog", "--model", str(sd1), "--count", "2", "--seed", "7", "--steps", "1",
                 "--negative", "blue", "--scheduler", "EulerDiscrete", "--out", str(out), "--json"]  # fmt: skip
    assert main(arguments) == OK
    printed = json.loads(capsys.readouterr().out)
    assert [(row["prompt"], row["seed"]) for row in printed["images"]] == [
        ("a cat", 7), ("a cat", 8), ("a dog", 9), ("a dog", 10)]  # fmt: skip
    third = read_request(tmp_path / "x-3.png")
    assert third["request"]["prompt"] == ["a dog"]
    assert third["request"]["seeds"] == [9]
    assert third["scheduler"]["_class_name"] == "EulerDiscreteScheduler"


def test_replay_makes_the_same_picture(picture: Path, capsys: Capture) -> None:
    assert main(["replay", str(picture), "--json"]) == OK
    result = json.loads(capsys.readouterr().out)
    assert result["identical"] is True
    assert Path(result["file"]).name == "cat-replay.png"
    assert np.array_equal(np.asarray(Image.open(result["file"])), np.asarray(Image.open(picture)))


def test_replay_in_another_precision_says_how_close_it_came(picture: Path, capsys: Capture) -> None:
    arguments = ["replay", str(picture), "--dtype", "bf16", "--json"]
    assert main([*arguments, "--min-psnr", "99"]) == DIFFERENT
    result = json.loads(capsys.readouterr().out)
    assert 15 < result["psnr_db"] < 99
    assert result["largest_difference"] > 0
    assert main([*arguments, "--min-psnr", "15"]) == OK


def test_replay_refuses_another_model(picture: Path, sd2: Path, capsys: Capture) -> None:
    code, message = failure(capsys, ["replay", str(picture), "--model", str(sd2)])
    assert code == USAGE
    assert "was made with another model" in message


def changed(picture: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    recorded = read_request(picture)
    change(recorded)
    write_png(Image.open(picture).copy(), picture, recorded)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda r: r.update(schema=99), "schema 99"),
        (lambda r: r.pop("scheduler"), "no scheduler"),
        (lambda r: r["request"].update(seeds=None), "only seeded pictures"),
        (lambda r: r["request"].update(height="wide"), "height is 'wide'"),
        (lambda r: r["request"].update(height=1 << 30), "height is"),
        (lambda r: r["request"].update(surprise=1), "surprise"),
        (lambda r: r["request"].update(seeds=[-4]), "seed -4"),
        (lambda r: r["request"].update(guidance_scale=None), "damaged"),
    ],
)
def test_a_strangers_request_is_checked(
    picture: Path, capsys: Capture, change: Callable[[dict[str, Any]], Any], words: str
) -> None:
    changed(picture, change)
    _, message = failure(capsys, ["replay", str(picture)])
    assert words in message


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (["--model", "/no/such/folder"], FAILED, "there is no folder"),
        (["--backend", "abacus"], FAILED, "no engine 'abacus'"),
        (["--backend", "unet=eager,,"], USAGE, "is no list like"),
        (["--backend", "unet=null,moon=eager"], USAGE, "backend names moon"),
        (["--scheduler", "Magic"], FAILED, "MagicScheduler"),
        (["--device", "cuda:9"], FAILED, "no device 'cuda:9'"),
        (["--dtype", "fp16"], FAILED, "does not run in float16"),
        (["--dtype", "fp7"], USAGE, "precision 'fp7'"),
        (["--steps", "0"], USAGE, "num_inference_steps is 0"),
        (["--size", "wide"], USAGE, "not of the form HxW"),
        (["--size", "63x64"], USAGE, "height is 63"),
        (["--guidance", "nan"], USAGE, "guidance_scale is nan"),
        (["--count", "0"], USAGE, "num_images_per_prompt is 0"),
        (["--seed", "-1"], USAGE, "seed -1"),
        (["--out", "picture.jpg"], USAGE, "does not end in .png"),
        (["--variant", "fp15"], FAILED, "no component has weights of variant 'fp15'"),
    ],
)
def test_wrong_arguments_get_one_sentence(
    sd1: Path, tmp_path: Path, capsys: Capture, arguments: list[str], code: int, words: str
) -> None:
    base = ["generate", "a cat", "--model", str(sd1), "--steps", "1", "--out", str(tmp_path / "x.png")]
    got, message = failure(capsys, [*base, *arguments])
    assert words in message
    assert got == code
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_is_one_sentence_and_leaves_nothing(sd1: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "anamorph", "generate", "a cat", "--model", str(sd1), "--backend", "eager",
               "--steps", "1", "--out", str(tmp_path / "x.png")]  # fmt: skip
    done = subprocess.run(
        command,
        capture_output=True,
        text=True,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (2000, 2000)),
    )
    assert done.returncode == FAILED
    assert "cannot write" in done.stderr
    assert "Traceback" not in done.stderr
    assert list(tmp_path.iterdir()) == []


def test_an_output_folder_that_cannot_be_made_is_one_sentence(sd1: Path, tmp_path: Path, capsys: Capture) -> None:
    (tmp_path / "file").write_text("")
    out = tmp_path / "file" / "x.png"
    arguments = ["generate", "a", "--model", str(sd1), "--backend", "null", "--steps", "1", "--out", str(out)]
    code, message = failure(capsys, arguments)
    assert code == FAILED
    assert "cannot write" in message


def test_an_interrupt_while_generating_stops_cleanly(sd1: Path, tmp_path: Path) -> None:
    code = (
        "import os, signal, sys\n"
        "from anamorph.pipelines import denoising\n"
        "from anamorph.cli import main\n"
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"  # a job in the background ignores it
        "plain = denoising.advance\n"
        "def advance(table, n, *rest):\n"
        "    if n == 1: os.kill(os.getpid(), signal.SIGINT)\n"
        "    return plain(table, n, *rest)\n"
        "denoising.advance = advance\n"
        "sys.exit(main(sys.argv[1:]))\n"
    )
    arguments = ["generate", "a", "--model", str(sd1), "--backend", "null", "--steps", "5", "--out"]
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments, str(tmp_path / "x.png")], capture_output=True, text=True
    )
    assert done.returncode == INTERRUPTED
    assert done.stderr == "anamorph: interrupted; nothing more was written\n"
    assert list(tmp_path.iterdir()) == []


def test_nan_is_one_sentence(sd1: Path, tmp_path: Path, capsys: Capture) -> None:
    broken = Path(shutil.copytree(sd1, tmp_path / "broken"))
    path = broken / "text_encoder" / "model.safetensors"
    save_file({name: tensor * np.float32("nan") for name, tensor in load_file(path).items()}, path)
    out = tmp_path / "x.png"
    code, message = failure(capsys, ["generate", "a", "--model", str(broken), "--steps", "1", "--out", str(out)])
    assert code == FAILED
    assert "text_encoder returned NaN" in message
    assert not out.exists()


def test_backends_lists_engines_for_people_and_programs(capsys: Capture) -> None:
    assert main(["backends"]) == OK
    people = capsys.readouterr().out
    assert main(["backends", "--json"]) == OK
    program = json.loads(capsys.readouterr().out)
    names = [row["name"] for row in program["backends"]]
    assert {"eager", "compile", "null", "gaussian"} <= set(names)
    assert all(any(line.startswith(name) for line in people.splitlines()) for name in names)
    assert program["auto"] in names


def test_demo_compares_every_engine_and_writes_a_sheet(
    tmp_path: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    from anamorph.backends.eager import Eager

    monkeypatch.setattr("anamorph.cli.demo.list_backends", lambda: {"eager": Eager()})
    out = tmp_path / "demo.png"
    assert main(["demo", "--steps", "1", "--out", str(out), "--json"]) == OK
    rows = json.loads(capsys.readouterr().out)
    assert [(row["engine"], row["precision"]) for row in rows] == [("eager", "float32"), ("eager", "bfloat16")]
    assert rows[0]["psnr_db"] is None
    assert rows[1]["psnr_db"] > 30
    assert rows[0]["images"] == len(PROMPTS)
    assert Image.open(out).width > 1000


def test_demo_names_an_engine_that_lacks_its_exporter(monkeypatch: pytest.MonkeyPatch) -> None:
    from anamorph.backends.onnxruntime import OnnxRuntime
    from anamorph.cli.demo import unable
    from anamorph.plugins import installed

    assert unable(OnnxRuntime()) is None
    monkeypatch.setattr(type(installed().exporters["onnx"]), "unavailable", lambda _self: "run pip install onnx")
    assert unable(OnnxRuntime()) == "exporting to onnx is not available: run pip install onnx"


def test_help_teaches_and_a_bare_call_shows_it(capsys: Capture) -> None:
    assert main([]) == USAGE
    text = capsys.readouterr().out
    assert 'anamorph generate "red apple"' in text
    assert "exit codes" in text
    with pytest.raises(SystemExit) as leave:
        main(["generate", "--help"])
    assert leave.value.code == OK
    assert "unet=compile,vae=eager" in capsys.readouterr().out


def test_the_version_is_that_of_the_package(capsys: Capture) -> None:
    import importlib.metadata

    assert main(["--version"]) == OK
    assert capsys.readouterr().out.strip() == importlib.metadata.version("anamorph")


@pytest.fixture
def inputs(tmp_path: Path) -> list[str]:
    """Options that name a picture and a mask."""
    values = np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)
    Image.fromarray(values).save(tmp_path / "in.png")
    Image.fromarray(np.where(np.arange(64) < 40, 255, 0)[None].repeat(64, 0).astype(np.uint8)).save(tmp_path / "m.png")
    return ["--image", str(tmp_path / "in.png"), "--mask", str(tmp_path / "m.png")]


@pytest.mark.parametrize("masked", [False, True])
def test_a_picture_from_a_picture_is_replayed_from_the_same_file(
    sd1: Path, tmp_path: Path, inputs: list[str], masked: bool, capsys: Capture
) -> None:
    given = inputs if masked else inputs[:2]
    out = tmp_path / "out.png"
    arguments = ["a cat", "--model", str(sd1), "--steps", "4", "--seed", "5", "--backend", "eager", "--out", str(out)]
    assert main(["generate", *arguments, *given, "--strength", "0.5"]) == OK
    stored = read_request(out)
    assert stored["request"]["strength"] == 0.5
    assert stored["inputs"]["image"]["file"] == "in.png"
    assert stored["inputs"]["image"]["sha256"] == hashlib.sha256((tmp_path / "in.png").read_bytes()).hexdigest()
    assert ("mask_image" in stored["inputs"]) is masked
    capsys.readouterr()
    assert main(["replay", str(out), *given, "--json"]) == OK
    assert json.loads(capsys.readouterr().out)["identical"] is True
    code, message = failure(capsys, ["replay", str(out)])
    assert code == USAGE
    assert "started from in.png; name that file with --image to replay it" in message
    code, message = failure(capsys, ["replay", str(out), "--image", inputs[3], *given[2:]])
    assert code == USAGE
    assert "is not the file that" in message


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--strength", "0.5"], "--strength without --image"),
        (["--mask", "m.png"], "--mask without --image"),
        (["--image", "no.png"], "--image: there is no file no.png"),
        (["--image", __file__], "cannot be read as a picture"),
        (["--image", "no.png", "--size", "64x64"], "--size does not go with --image"),
    ],
)
def test_wrong_pictures_get_one_sentence(arguments: list[str], words: str, capsys: Capture) -> None:
    code, message = failure(capsys, ["generate", "a cat", "--backend", "null", *arguments])
    assert code == USAGE
    assert words in message
