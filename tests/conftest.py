"""Checkpoints that many tests share, written once per run."""

import functools
import os
import shutil
import tempfile
from collections import defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["MKL_CBWR"] = "AUTO,STRICT"  # else products of MKL differ in their last bits by where their weights lie
if "PYTEST_XDIST_WORKER" in os.environ:  # as many processes as cores: more threads would only wait for one another
    os.environ.setdefault("OMP_NUM_THREADS", "1")
else:
    os.environ["ANAMORPH_TESTS"] = tempfile.mkdtemp(prefix="anamorph-tests-")  # the processes of a run share it

os.environ["ANAMORPH_CACHE"] = str(Path(os.environ["ANAMORPH_TESTS"]) / "cache")

import diffusers
from checkpoints import controlled, tiny_inpaint, tiny_lcm, tiny_refiner, tiny_sd1, tiny_sd2, tiny_sdxl, tiny_smallest
from exported import exported, once, one_process, shared_place, shared_traces
from parity import ENGINE_BOUND, IMAGE_BOUND, LATENT_BOUND, Agrees

PARITY = "parity"
"""The name of the property under which a test's report carries its row of the table."""


def pytest_sessionfinish() -> None:
    """What the processes of a run share is removed by the one that started them."""
    if "PYTEST_XDIST_WORKER" not in os.environ:
        shutil.rmtree(shared_place(), ignore_errors=True)


@pytest.fixture
def agrees(record_property: Callable[[str, object], None]) -> Agrees:
    """See `Agrees`."""

    def check(pipeline: str, found: tuple[float, float], engine: str = "eager") -> None:
        record_property(PARITY, (pipeline, engine, *found))
        latents, pixels = found
        assert latents <= (LATENT_BOUND if engine == "eager" else ENGINE_BOUND)
        assert pixels <= (IMAGE_BOUND if engine == "eager" else ENGINE_BOUND)

    return check


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """The worst differences of each pipeline on each engine, where tests compared some."""
    found: dict[tuple[str, str], list[tuple[float, float]]] = defaultdict(list)
    for report in terminalreporter.getreports("passed") + terminalreporter.getreports("failed"):
        for name, row in report.user_properties if report.when == "call" else ():
            if name == PARITY:
                found[row[0], row[1]].append((row[2], row[3]))
    if found:
        terminalreporter.section("parity: worst of all comparisons")
        line = "{:<40} {:<12} {:<10} {:>8} {:>19} {:>19}".format
        terminalreporter.write_line(
            line("pipeline", "engine", "against", "compared", "latents, rel. L2", "image, absolute")
        )
    for (pipeline, engine), rows in sorted(found.items()):
        latents, pixels = (f"{max(values):.1e}" for values in zip(*rows, strict=True))
        against = "diffusers" if engine == "eager" else "eager"
        terminalreporter.write_line(line(pipeline, engine, against, len(rows), latents, pixels))


@pytest.fixture(scope="session")
def sd1() -> Path:
    """A random checkpoint of the first Stable Diffusion's kind (epsilon, 8 pixels per latent)."""
    return once(shared_place() / "sd1", tiny_sd1)


@pytest.fixture(scope="session")
def sd2() -> Path:
    """A random checkpoint of the second kind (v-prediction, 2 pixels per latent)."""
    return once(shared_place() / "sd2", tiny_sd2)


@pytest.fixture(scope="session")
def smallest() -> Path:
    """A random checkpoint of one level and no attention to texts, for what hangs on no model (a pixel per latent)."""
    return once(shared_place() / "smallest", tiny_smallest)


@pytest.fixture(scope="session")
def fixed(sd2: Path) -> Path:
    """An artifact in ONNX format, stored in float16, that takes one picture of 16 x 24 pixels per call."""
    return exported(sd2, "onnxruntime", storage="float16", size=(16, 24), batch=1)


@pytest.fixture(scope="session")
def inpaint() -> Path:
    """A random checkpoint whose denoiser sees the mask and what stays."""
    return once(shared_place() / "inpaint", tiny_inpaint)


@pytest.fixture(scope="session")
def lcm() -> Path:
    """A random checkpoint of a latent consistency model."""
    return once(shared_place() / "lcm", tiny_lcm)


@pytest.fixture(scope="session")
def sdxl() -> Path:
    """A random checkpoint of SDXL's kind (two text encoders, 2 pixels per latent)."""
    return once(shared_place() / "sdxl", tiny_sdxl)


@pytest.fixture(scope="session")
def distilled() -> Path:
    """A random checkpoint of SDXL's kind whose denoiser takes the guidance as an input."""
    return once(shared_place() / "distilled", functools.partial(tiny_sdxl, time_cond_proj_dim=16))


@pytest.fixture(scope="session")
def refiner() -> Path:
    """A random checkpoint of the kind of SDXL's refiner."""
    return once(shared_place() / "refiner", tiny_refiner)


@pytest.fixture(scope="session")
def controlled_sd2(sd2: Path) -> Path:
    """The random checkpoint of the second kind with a ControlNet."""
    kind = diffusers.StableDiffusionControlNetPipeline
    return once(shared_place() / "controlled-sd2", lambda place: controlled(place, sd2, kind, 1))


@pytest.fixture(scope="session")
def controlled_sd1(sd1: Path) -> Path:
    """The random checkpoint of the first kind with two ControlNets."""
    kind = diffusers.StableDiffusionControlNetPipeline
    return once(shared_place() / "controlled-sd1", lambda place: controlled(place, sd1, kind, 3, 2))


@pytest.fixture(scope="session")
def controlled_xl(sdxl: Path) -> Path:
    """The random checkpoint of SDXL's kind with a ControlNet."""
    kind = diffusers.StableDiffusionXLControlNetPipeline
    return once(shared_place() / "controlled-xl", lambda place: controlled(place, sdxl, kind, 1))


@pytest.fixture
def no_mac(monkeypatch: pytest.MonkeyPatch) -> None:
    """PyTorch runs packages in Core ML's place."""
    from mil_programs import Interpreted

    from anamorph.backends import coreml

    monkeypatch.setattr(coreml, "load", Interpreted)


@pytest.fixture(autouse=True)
def _quick_exports(request: pytest.FixtureRequest) -> Iterator[None]:
    """Exports trace each model once and start no processes, unless a test is marked to be about those."""
    if request.node.get_closest_marker("processes"):
        yield
    else:
        with shared_traces(), one_process():
            yield


@pytest.fixture(autouse=True)
def _no_plugin_choice(monkeypatch: pytest.MonkeyPatch) -> None:
    """A variable of the person who runs the tests must not decide which engines they see."""
    monkeypatch.delenv("ANAMORPH_PLUGINS", raising=False)
