"""Kill exports at many moments and look at what is left, in one process that has everything imported.

    python killed_exports.py CHECKPOINT PLACE TRIALS

prints one JSON line per trial. What runs in each trial is the exporter itself, in a process of its own; it starts its
own processes by forking instead of starting Python anew, and takes graphs that were traced before.
"""

import contextlib
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from exported import FORMATS, export, shared_traces

from anamorph import StableDiffusionPipeline
from anamorph.artifact import NATIVE, PORTABLE
from anamorph.checkpoint import Source, open_checkpoint
from anamorph.errors import AnamorphError, ArtifactError
from anamorph.exporters import certificate, certifying, folder, references
from anamorph.exporting import cached_export
from anamorph.plugins import get_exporter

MAINS = {"certificate": certificate.main, "references": references.main}


def forked(work: Callable[[], Any]) -> int:
    """Run `work` in a process of its own; returns its number. The process ends with 0, or with 1 where it failed."""
    if number := os.fork():
        return number
    code = 1
    try:
        work()
        code = 0
    except AnamorphError as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
    finally:
        sys.stdout.flush()
        os._exit(code)


def ended(number: int) -> int:
    """Wait for a process; returns how it ended, negative for a signal."""
    return os.waitstatus_to_exitcode(os.waitpid(number, 0)[1])


def run_child(failure: str, module: str, *arguments: str | Path) -> str:
    """As `exporters.children.run_child` does, by forking."""
    with tempfile.NamedTemporaryFile("r") as printed:

        def work() -> None:
            with Path(printed.name).open("w") as file, contextlib.redirect_stdout(file):
                if MAINS[module]([str(argument) for argument in arguments]):
                    raise ArtifactError(failure)

        if ended(forked(work)):
            raise ArtifactError(failure)
        return printed.read()


@contextlib.contextmanager
def prepared(checkpoint: Path) -> Iterator[None]:
    """Trace every part once for both signatures, without opening an engine: its threads would not survive a fork."""
    torch.set_num_threads(1)

    def stop(*_: Any) -> None:
        raise ArtifactError("traced")

    with pytest.MonkeyPatch.context() as patch, tempfile.TemporaryDirectory() as place, shared_traces():
        patch.setattr(certificate, "no_engine", lambda _: None)  # asking OpenVINO for its devices starts threads
        for module in (certifying, folder):
            patch.setattr(module, "fitting_precision", lambda *_: ("float32", ""))
        for module in (certificate, references):
            patch.setattr(module, "run_child", stop)
        for signature in (PORTABLE, NATIVE):
            with pytest.raises(ArtifactError, match="traced"):
                export(checkpoint, "onnxruntime", Path(place) / "out", signature=signature)
        for module in (certificate, references):
            patch.setattr(module, "run_child", run_child)
        yield


def opens(folder: Path) -> None:
    """Fails where the folder does not load."""
    StableDiffusionPipeline.from_pretrained(folder)


def verifies(folder: Path, checkpoint: Path) -> None:
    """Fails where the folder is no complete artifact that agrees with its checkpoint."""
    artifact, source = (open_checkpoint(Source(str(place))) for place in (folder, checkpoint))
    assert artifact.artifact is not None
    checks = get_exporter([artifact.artifact.format]).verify(artifact, source, lambda _: None)
    if not checks or not all(check.passed for check in checks):
        raise ArtifactError("it does not agree")


def trial(checkpoint: Path, place: Path, engine: str, moment: float) -> dict[str, Any]:
    """Kill one export after `moment` seconds and examine the folder."""
    out = place / "out"
    shutil.rmtree(out, ignore_errors=True)
    number = forked(lambda: export(checkpoint, engine, out))
    time.sleep(moment)
    os.kill(number, signal.SIGKILL)
    code = ended(number)
    left = [path for path in place.iterdir() if path.is_dir() and path != out]
    return {
        "engine": engine, "killed": code == -signal.SIGKILL, "complete": out.exists(),
        "verified": out.exists() and ended(forked(lambda: verifies(out, checkpoint))) == 0,
        "drafts": len(left), "files": sum(path.is_file() for folder in left for path in folder.rglob("*")),
        "loading": [str(path) for path in left if ended(forked(lambda path=path: opens(path))) == 0],
        "strange": [path.name for path in place.iterdir() if path != out and not path.name.startswith(".out.")],
    }  # fmt: skip


def main(checkpoint: Path, place: Path, trials: int) -> None:
    """All trials, in both formats; then one export in peace, and two at once into a cache."""
    chance = random.Random(3)
    with prepared(checkpoint):
        durations = {}
        for engine in FORMATS:
            begun = time.monotonic()
            assert ended(forked(lambda engine=engine: export(checkpoint, engine, place / engine))) == 0
            durations[engine] = time.monotonic() - begun
            shutil.rmtree(place / engine)
        for index in range(trials):
            engine = "openvino" if index % 4 == 3 else "onnxruntime"
            moment = durations[engine] * (index + chance.random()) / trials
            print(json.dumps(trial(checkpoint, place, engine, moment)), flush=True)
        shutil.rmtree(place / "out", ignore_errors=True)
        assert ended(forked(lambda: export(checkpoint, "onnxruntime", place / "out"))) == 0
        print(json.dumps({"left": sorted(path.name for path in place.iterdir())}), flush=True)
        print(json.dumps(two_at_once(checkpoint, place / "cache")), flush=True)


def two_at_once(checkpoint: Path, cache: Path) -> dict[str, Any]:
    """Two processes that want the same export: how they ended, and how often it was written."""
    os.environ["ANAMORPH_CACHE"] = str(cache)
    written = cache.parent / "written"

    def work() -> None:
        exporter = get_exporter(["onnx"])
        write = type(exporter)._write

        def counted(*arguments: Any) -> Any:
            with written.open("a") as file:
                file.write("once\n")
            return write(*arguments)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(type(exporter), "_write", counted)
            opened = cached_export(open_checkpoint(Source(str(checkpoint))), exporter)
        opens(opened.folder)

    numbers = [forked(work) for _ in range(2)]
    codes = [ended(number) for number in numbers]
    return {"codes": codes, "written": written.read_text().split(), "exports": len(list((cache / "exports").iterdir()))}


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3]))
