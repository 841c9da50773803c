"""What is fastest for a model on this machine within a fidelity, kept for `backend="auto"`."""

import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import MappingProxyType

from anamorph.artifact import NATIVE
from anamorph.benchmarks.arm import CALIBRATION
from anamorph.benchmarks.records import Result
from anamorph.benchmarks.report import ranked, seconds
from anamorph.benchmarks.runner import Run
from anamorph.benchmarks.scenarios import Cell, Plan, Scenario, guidance_for
from anamorph.benchmarks.summary import Line, lines
from anamorph.cache import cache_folder
from anamorph.checkpoint import Checkpoint
from anamorph.components import CHECKPOINT
from anamorph.errors import BackendError
from anamorph.exporters.quantization import unavailable
from anamorph.exporting import LINKED, ExportOptions, Quantization
from anamorph.memory import APART
from anamorph.native import CACHING
from anamorph.plugins import get_backend, get_exporter
from anamorph.profiles import Profile, store
from anamorph.rewrites import DEFAULT, MERGING

PLAN = Plan(processes=2, most=3, seconds=600, burst_s=2, fewest=3, shared_exports=True, parity_steps=20)


@dataclass(frozen=True)
class Quality:
    """A fidelity: PSNR (dB) of a picture to eager in float32, and what may be tried to be faster."""

    psnr_db: float
    narrow: bool
    near: bool


QUALITIES: Mapping[str, Quality] = MappingProxyType(
    {"lossless": Quality(60.0, False, False), "high": Quality(35.0, True, True), "fast": Quality(25.0, True, True)}
)
REFRESHES = (2, 3, 5)
"""Steps from one full call to the next that are tried."""


def candidates(model: str, quality: Quality, engines: Mapping[str, Sequence[str]]) -> list[Cell]:
    """The full computation by every engine, in lower precisions where these are allowed."""
    return [
        Cell(model, engine=engine, precision=precision, guidance=guidance_for(model))
        for engine, precisions in engines.items()
        for precision in precisions
        if precision == "float32" or quality.narrow
    ]


def refinements(cell: Cell, quality: Quality) -> list[Cell]:
    """What may be faster than that cell: the same with branches of guidance apart, and approximations."""
    return [replace(cell, guidance_batch=APART), *(approximations(cell) if quality.near else [])]


def approximations(cell: Cell) -> list[Cell]:
    """What may be faster still by that engine: cached steps, merged tokens, int8, and the first with the last."""
    cached = [replace(cell, rewrites=f"{DEFAULT},{CACHING}", caching=every) for every in REFRESHES]
    merged = replace(cell, rewrites=f"{DEFAULT},{MERGING}")
    formats = get_backend(cell.engine).formats
    if CHECKPOINT in formats or unavailable(formats[0]) is not None:
        return [*cached, merged]
    return [*cached, merged, replace(cell, quantize="int8"), *(replace(one, quantize="int8") for one in cached)]


def measured(
    model: str, quality: str, engines: Mapping[str, Sequence[str]], out: Path, say: Callable[[str], None]
) -> Result:
    """Whole pictures by every candidate, then by the fastest with branches of guidance apart, and where allowed by its
    approximations.

    Those go to a second file beside `out`.
    """
    cells = candidates(model, QUALITIES[quality], engines)
    result = Run(Scenario(f"tune-{quality}", tuple(cells), PLAN), out, say).all()
    exact = _near(result, quality)
    if not exact:
        return result
    second = Scenario(f"tune-{quality}-less", tuple(refinements(exact[0].cell, QUALITIES[quality])), PLAN)
    further = Run(second, out.with_stem(f"{out.stem}-less"), say).all()
    return replace(further, cells={**result.cells, **further.cells})


def _near(result: Result, quality: str) -> list[Line]:
    """The cells that are as near as was asked, the fastest first."""
    asked = QUALITIES[quality].psnr_db
    return [one for one in ranked(lines(result)) if one.psnr_db is None or one.psnr_db >= asked]


def chosen(result: Result, quality: str) -> Line:
    """The fastest cell that is as near as was asked; raises BackendError: there is none."""
    if not (near := _near(result, quality)):
        asked = QUALITIES[quality].psnr_db
        reasons = "; ".join(f"{one.cell.arm}: {one.refusal or one.fidelity}" for one in lines(result))
        raise BackendError(f"nothing was measured to be within {asked:g} dB ({reasons}); ask for a lower quality")
    return near[0]


def answer(result: Result, quality: str, checkpoint: Checkpoint, say: Callable[[str], None]) -> str:
    """Keep what is fastest, and say why: every candidate with its time and fidelity."""
    best = chosen(result, quality)
    cell = best.cell
    assert best.median is not None
    folder = "" if not cell.quantize else str(_quantized(checkpoint, cell, say))
    profile = Profile(
        cell.engine, cell.precision, best.median / cell.batch, result.run["time"], quality, cell.rewrites, folder,
        cell.refresh, cell.guidance_batch,
    )  # fmt: skip
    place = store(checkpoint, profile)
    table = "\n".join(_told(one, QUALITIES[quality].psnr_db, one is best) for one in lines(result))
    return f"{table}\n{cell.arm}: {seconds(best.median)} a picture; backend=auto takes it from now on ({place})"


def _told(line: Line, asked: float, best: bool) -> str:
    if line.refusal is not None or line.median is None:
        why = line.refusal or "no figure"
    elif line.psnr_db is not None and line.psnr_db < asked:
        why = f"{seconds(line.median)}, but {line.fidelity} where {asked:g} dB are asked"
    else:
        why = f"{seconds(line.median)}, {line.fidelity}{', the fastest' * best}"
    return f"  {line.cell.arm}: {why}"


def _quantized(checkpoint: Checkpoint, cell: Cell, say: Callable[[str], None]) -> Path:
    """The export of the fastest arm, made again in the user's own cache, since that of the measurement is removed."""
    exporter = get_exporter(get_backend(cell.engine).formats)
    place = cache_folder() / "tuned" / f"{checkpoint.digest()[:32]}-{exporter.format}-{cell.quantize}"
    shutil.rmtree(place, ignore_errors=True)
    wish = cell.rewrites or None
    options = ExportOptions(LINKED, signature=NATIVE, quantize=Quantization(CALIBRATION), rewrites=wish)
    exporter.export(checkpoint, place, options, say)
    return place
