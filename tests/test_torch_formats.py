"""TorchScript and AOTInductor: pictures beside eager's, and code of strangers that does not run."""

import os
import shutil
import zipfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from exported import COMPILED, once, shared_place
from parity import relative

from anamorph import DiffusionPipeline, StableDiffusionPipeline
from anamorph.artifact import NATIVE, VERIFIED, Artifact, FileRecord, Part
from anamorph.backends import aotinductor
from anamorph.backends.aotinductor import AotInductor
from anamorph.backends.torchscript import check_code
from anamorph.checkpoint import BUNDLED, Source, open_checkpoint
from anamorph.engine import Target
from anamorph.errors import ArtifactError, BackendError, InputError
from anamorph.exporters.aotinductor import write
from anamorph.exporters.storing import Storing
from anamorph.exporters.trace import trace
from anamorph.exporting import ExportOptions
from anamorph.guard import Held
from anamorph.interface import Axis, Interface, Port
from anamorph.machine import processor
from anamorph.plugins import get_exporter

BOUND = 1e-4
CALL: dict[str, Any] = {"prompt": "red apple", "num_inference_steps": 3, "guidance_scale": 4.0, "seed": 0}


def exported(checkpoint: Path, form: str) -> Path:
    def make(out: Path) -> None:
        options = ExportOptions(signature=NATIVE)
        get_exporter([form]).export(open_checkpoint(Source(str(checkpoint))), out, options, lambda _: None)

    return once(shared_place() / f"{checkpoint.name}-{form}", make)


def latents(pipe: DiffusionPipeline, **call: Any) -> list[Any]:
    return [np.asarray(state.latents).copy() for state in pipe.steps(**{**CALL, **call})]


@pytest.mark.parametrize("form", ["torchscript", *(["aotinductor"] if COMPILED in os.environ else [])])
def test_a_picture_is_what_eager_draws(form: str, sd2: Path) -> None:
    """On the bundled model where minutes may be spent, else on a tiny one."""
    checkpoint = BUNDLED if COMPILED in os.environ else sd2
    pipe = StableDiffusionPipeline.from_pretrained(exported(checkpoint, form), trust_remote_code=True)
    assert {placed.engine for placed in pipe.placement.values()} == {form}
    eager = StableDiffusionPipeline.from_pretrained(checkpoint, backend="eager")
    for size in ({"height": 32, "width": 32}, {"height": 48, "width": 80}):
        found, expected = latents(pipe, **size), latents(eager, **size)
        assert max(relative(a, b) for a, b in zip(found, expected, strict=True)) <= BOUND
    assert relative(latents(pipe, guidance_scale=4.01, **size)[-1], expected[-1]) > BOUND


@pytest.fixture
def archive(tmp_path: Path) -> Callable[[str], Path]:
    """A TorchScript archive whose code is replaced."""

    def make(code: str) -> Path:
        path, forged = tmp_path / "plain.pt", tmp_path / "forged.pt"
        torch.jit.trace(torch.nn.Linear(2, 2), torch.zeros(1, 2)).save(path)
        with zipfile.ZipFile(path) as plain, zipfile.ZipFile(forged, "w") as out:
            for info in plain.infolist():
                own = code.encode() if info.filename.endswith(".py") else plain.read(info)
                out.writestr(info.filename, own)
        return forged

    return make


FORWARD = "class Linear(Module):\n  def forward(self, x: Tensor) -> Tensor:\n    {}\n    return x\n"


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("ops.aten.save(x, 'stolen')", "calls ops.aten.save"),
        ("y = torch.from_file('/etc/passwd')", "calls torch.from_file"),
        ("y = ops.stranger.anything(x)", "calls ops.stranger.anything"),
        ("y = eval('1')", "calls eval"),
    ],
)
def test_torchscript_that_reaches_beyond_tensors_is_refused(
    archive: Callable[[str], Path], line: str, said: str
) -> None:
    with pytest.raises(ArtifactError, match=said):
        check_code(archive(FORWARD.format(line)))


def test_torchscript_that_runs_while_it_is_loaded_is_refused(archive: Callable[[str], Path], tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match="calls __setstate__"):
        check_code(
            archive("class Linear(Module):\n  def __setstate__(self, state: Tensor) -> None:\n    return None\n")
        )
    check_code(archive(FORWARD.format("y = torch.relu(x)")))
    (tmp_path / "none.pt").write_bytes(b"no archive")
    with pytest.raises(ArtifactError, match="is no TorchScript archive"):
        check_code(tmp_path / "none.pt")


def test_torchscript_stores_float32_alone(sd2: Path, tmp_path: Path) -> None:
    source = open_checkpoint(Source(str(sd2)))
    with pytest.raises(InputError, match="weights of torchscript are not stored as float16; expected float32"):
        get_exporter(["torchscript"]).export(source, tmp_path / "x", ExportOptions("float16"), lambda _: None)


BATCH, WIDTH = Axis("batch"), Axis("width", 2, 2)
INTERFACE = Interface(
    "unet", (Port("x", (BATCH, WIDTH)), Port("shift", (BATCH, WIDTH), optional=True)), (Port("y", (BATCH, WIDTH)),)
)


class Small(torch.nn.Module):
    """What compiles in seconds, with an optional input."""

    config = SimpleNamespace(to_json=lambda: "{}")

    def __init__(self) -> None:
        super().__init__()
        self.gain = torch.nn.Parameter(torch.tensor(3.0))

    def denoise(self, x: torch.Tensor, shift: torch.Tensor) -> tuple[torch.Tensor]:
        return ((self.gain * x).softmax(-1) + shift,)


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    place = tmp_path_factory.mktemp("aotinductor") / "unet"
    model = Small()
    write(trace(model, "denoise", INTERFACE), INTERFACE, place, Storing())
    files = {f"unet/{path.name}": FileRecord.of(path) for path in place.iterdir()}
    part = Part("unet", "unet/model.pt2", files, INTERFACE, "float32", VERIFIED)
    versions = {"torch": torch.__version__, "processor": processor()}
    return Artifact(place.parent, "aotinductor", NATIVE, {"unet": part}, {}, {}, versions)


def component(artifact: Artifact) -> Any:
    return SimpleNamespace(artifact=artifact, name="unet", content=artifact.format)


def test_aotinductor_computes_at_any_size_with_and_without_what_is_optional(compiled: Artifact) -> None:
    (program,) = AotInductor().open(component(compiled), ["unet"], Target(trusted=True)).values()
    session = Held(program, "aotinductor").session()
    random = np.random.default_rng(0)
    for batch, width in ((2, 8), (1, 2), (5, 34), (2, 8)):
        x, shift = (torch.from_numpy(random.standard_normal((batch, width), np.float32)) for _ in range(2))
        plain = torch.softmax(3 * x, -1)
        assert torch.allclose(session({"x": x})["y"], plain, atol=1e-6)
        assert torch.allclose(session({"x": x, "shift": shift})["y"], plain + shift, atol=1e-6)
    with pytest.raises(InputError, match="width is 7, expected a multiple of 2"):
        session({"x": torch.zeros(1, 7)})


def test_machine_code_runs_only_where_somebody_vouches_for_it(
    compiled: Artifact, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    with pytest.raises(ArtifactError, match=r"holds machine code .* trust_remote_code=True"):
        AotInductor().open(component(compiled), ["unet"], Target())
    monkeypatch.setattr(aotinductor, "cache_folder", lambda: tmp_path)
    exports = tmp_path / "exports"
    exports.mkdir()
    (exports / "linked").symlink_to(compiled.folder)  # a link that leads out of the cache is not in it
    with pytest.raises(ArtifactError, match="holds machine code"):
        AotInductor().open(component(replace(compiled, folder=exports / "linked")), ["unet"], Target())
    shutil.copytree(compiled.folder, exports / "own")
    own = replace(compiled, folder=exports / "own")
    assert AotInductor().open(component(own), ["unet"], Target())
    (exports / "own").chmod(0o777)
    with pytest.raises(ArtifactError, match="is not this user's own"):
        AotInductor().open(component(own), ["unet"], Target())


@pytest.mark.parametrize(("what", "value"), [("processor", "abacus 0"), ("torch", "1.0")])
def test_code_for_another_machine_is_refused(compiled: Artifact, what: str, value: str) -> None:
    other = replace(compiled, versions={**compiled.versions, what: value})
    with pytest.raises(ArtifactError, match=f"was compiled for {what} {value}, this is"):
        AotInductor().open(component(other), ["unet"], Target(trusted=True))


def test_what_inductor_cannot_compile_is_one_sentence(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise RuntimeError("no compiler\nand much more")

    monkeypatch.setattr(torch._inductor, "aoti_compile_and_package", fail)
    with pytest.raises(BackendError, match=r"^AOTInductor cannot compile unet: no compiler$"):
        write(trace(Small(), "denoise", INTERFACE), INTERFACE, tmp_path / "x", Storing())
