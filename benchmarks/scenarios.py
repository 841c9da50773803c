"""What is measured, as data: TOML files whose matrix expands to cells.

A file (those that ship are in `sets/`) holds

    [defaults]           # every key of a cell that does not vary
    [[matrix]]           # each table adds the product of its lists; "*" is every engine here, in each of its precisions
    [[exclude]]          # cells that match all of a table's keys are left out
    [plan]               # how long: see `Plan`
"""

import hashlib
import itertools
import json
import re
import tomllib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

from anamorph.checkpoint import BUNDLED_GUIDANCE, BUNDLED_NAME
from anamorph.errors import InputError
from anamorph.memory import APART, JOINT
from anamorph.pipelines.denoiser import Refresh
from anamorph.pipelines.request import as_refresh
from anamorph.rewrites import inexact
from anamorph.rewrites import named as rewrites_named

SETS = Path(__file__).parent / "sets"
PICTURES = ("text-to-image", "image-to-image", "inpaint", "control")
TASKS = (*PICTURES, "denoiser", "decode")
"""Whole pictures, one call of the denoiser with both branches of guidance, one decoding of latents."""
ALL = "*"
ADAPTER = re.compile(r"(hot|fused)-[1-9]\d*")
SPACINGS = ("leading", "linspace", "trailing")
INTERVAL = re.compile(r"\d(\.\d+)?-\d(\.\d+)?")


def guidance_for(model: str) -> float:
    """The guidance scale for whole pictures of a model whose own is not asked for."""
    return BUNDLED_GUIDANCE if model == BUNDLED_NAME else Cell.guidance


@dataclass(frozen=True)
class Cell:
    """One thing to measure: an arm (an engine of ours or a peer, in one precision) and what it shall do.

    `height` and `width` of 0 are the model's own size; `scheduler` is a class name or "own", the checkpoint's;
    `spacing` is a named scheduler's `timestep_spacing`, and by default what the checkpoint says.
    `static`: the arm takes an export for this size and batch alone. What follows is asked of our own engines alone:
    `rewrites` are names with commas, "all" or "none", and by default those that are on by themselves; `interval`,
    such as 0.2-0.8, is the share of the steps that are guided; `quantize` is "int8" for a denoiser of such layers;
    `caching` is the `step_caching` of calls, 0 for none; `lora` is "hot-16" or "fused-16" for an adapter of that rank
    in all attention and feed-forward layers of the denoiser, which changes nothing, so that arms stay comparable;
    `guidance_batch` is "apart" where branches of guidance have calls of their own.
    """

    model: str = BUNDLED_NAME
    task: str = "text-to-image"
    engine: str = "eager"
    precision: str = "float32"
    height: int = 0
    width: int = 0
    batch: int = 1
    steps: int = 20
    scheduler: str = "own"
    spacing: str = ""
    guidance: float = 7.5
    static: bool = False
    rewrites: str = ""
    interval: str = ""
    quantize: str = ""
    caching: float = 0
    lora: str = ""
    guidance_batch: str = ""

    def __post_init__(self) -> None:
        if self.task not in TASKS:
            raise InputError(f"task is {self.task!r}, expected one of {', '.join(TASKS)}")
        for name in ("batch", "steps"):
            if getattr(self, name) < 1:
                raise InputError(f"{name} is {getattr(self, name)}, expected 1 or more")
        if min(self.height, self.width) < 0 or (self.height == 0) != (self.width == 0):
            raise InputError(f"{self.height}x{self.width} is no size; give height and width, or neither")
        if self.spacing and (self.scheduler == "own" or self.spacing not in SPACINGS):
            raise InputError(f"spacing is {self.spacing!r}, expected {', '.join(SPACINGS)}, and a scheduler by name")
        if self.interval and not INTERVAL.fullmatch(self.interval):
            raise InputError(f"interval is {self.interval!r}, expected two shares of the steps, such as 0.2-0.8")
        as_refresh(self.refresh)
        if self.quantize not in ("", "int8"):
            raise InputError(f"quantize is {self.quantize!r}, expected int8, or nothing")
        if self.guidance_batch not in ("", JOINT, APART):
            raise InputError(f"guidance_batch is {self.guidance_batch!r}, expected {JOINT} or {APART}, or nothing")
        if self.lora and not ADAPTER.fullmatch(self.lora):
            raise InputError(f"lora is {self.lora!r}, expected a mode and a rank, such as hot-16 or fused-16")

    @property
    def near(self) -> bool:
        """Whether it asks for an approximation, which is compared by its picture alone."""
        names = rewrites_named(self.rewrites or None)
        return bool(self.interval or self.quantize or self.caching or inexact(names))

    @property
    def guided(self) -> tuple[float, float] | None:
        """`interval` as two numbers."""
        if not self.interval:
            return None
        start, end = self.interval.split("-")
        return float(start), float(end)

    @property
    def refresh(self) -> Refresh | None:
        """`caching` as calls take it."""
        if not self.caching:
            return None
        return int(self.caching) if self.caching >= 1 else self.caching

    @property
    def arm(self) -> str:
        """Engine, precision and what is asked of it, as people read it."""
        asked = [
            self.quantize, f"guided {self.interval}" * bool(self.interval),
            f"cached {self.caching:g}" * bool(self.caching), self.lora and f"lora {self.lora}",
            f"guidance {self.guidance_batch}" * bool(self.guidance_batch), self.rewrites.replace(",", "+"),
        ]  # fmt: skip
        return " ".join([f"{self.engine}{' static' * self.static} {self.precision}", *filter(None, asked)])

    @property
    def work(self) -> "Cell":
        """The same work without its arm: cells of equal work are compared with one another."""
        return replace(
            self,
            engine="",
            precision="",
            static=False,
            rewrites="",
            interval="",
            quantize="",
            caching=0,
            lora="",
            guidance_batch="",
        )

    @property
    def key(self) -> str:
        """Its name in results."""
        return f"{self.arm.replace(' ', '-')}/{self.what}"

    @property
    def what(self) -> str:
        """The work, as people read it."""
        size = f"{self.height}x{self.width}" if self.height else "own size"
        parts = [Path(self.model).name, self.task, size, f"batch {self.batch}", f"guidance {self.guidance:g}"]
        steps = [f"{self.steps} steps", f"{self.scheduler} {self.spacing}".strip()]
        return "/".join(parts + steps * (self.task in PICTURES))


@dataclass(frozen=True)
class Plan:
    """How long to measure: until the interval of the median is within a share of it, or the time is spent.

    An arm is settled when, after `processes` or more, the interval is `within` that share; it ends unsettled after
    `most` processes or `seconds`. A process warms up `warmup` times, then measures for `burst_s` and `fewest` times.
    """

    processes: int = 3
    most: int = 12
    within: float = 0.03
    seconds: float = 600.0
    burst_s: float = 10.0
    fewest: int = 3
    warmup: int = 1
    timeout_s: float = 1800.0
    total_s: float = 604800.0
    """Seconds for the whole scenario, after which no turn begins."""
    drift: float = 0.1
    """Share by which the sentinel beside a sample may be slower or faster than usual."""
    shared_exports: bool = False
    """Whether arms of one format share their export, which is then cold for the first alone."""
    prepare: bool = False
    """Whether exports are made first, for several engines at once, so that no cold start of these is measured."""
    last: str = ""
    """Engines, by commas, that are measured in what time is left when the others are settled; nothing is prepared for
    them. For those that start for longer than they are measured."""
    second: bool = False
    """Whether each process with filled caches starts as soon as another one of its arm has drawn and ended. Otherwise
    its files and the memory may have rested for as long as the other arms took, and some machines take back what rests.
    """
    parity_steps: int = 3
    together: bool = False
    """Whether arms of equal work are open at once and take turns call by call, so that a machine whose speed changes
    slows all of them alike. They must fit into memory beside one another."""


@dataclass(frozen=True)
class Scenario:
    """A name, its cells and its plan."""

    name: str
    cells: tuple[Cell, ...]
    plan: Plan

    @property
    def digest(self) -> str:
        """What a result must have been made from to be continued."""
        text = json.dumps([[asdict(cell) for cell in self.cells], asdict(self.plan)], sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()


def named() -> list[str]:
    """The sets that ship."""
    return sorted(path.stem for path in SETS.glob("*.toml"))


def read(name: str, engines: Mapping[str, Sequence[str]], changes: Mapping[str, Any]) -> Scenario:
    """A named set or a TOML file as a scenario; `engines` maps those that are here to their precisions.

    `changes` take the place of defaults. Raises InputError: no such set, or an entry is unknown or of a wrong type.
    """
    path = SETS / f"{name}.toml" if name in named() else Path(name)
    try:
        values = tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise InputError(f"there is no scenario {name}; sets are {', '.join(named())}, or name a TOML file") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise InputError(f"{path} is not TOML: {error}") from None
    if strange := set(values) - {"defaults", "matrix", "exclude", "plan"}:
        raise InputError(f"{path} has {', '.join(sorted(strange))}; expected defaults, matrix, exclude, plan")
    plan = Plan(**checked(Plan, values.get("plan", {}), path))
    defaults = {**values.get("defaults", {}), **changes}
    cells: list[Cell] = []
    for table in values.get("matrix", [{}]):
        varying = {key: value for key, value in table.items() if key not in changes}
        cells += expanded({**defaults, **varying}, engines, path)
    excluded = [checked(Cell, table, path) for table in values.get("exclude", [])]
    kept = [cell for cell in dict.fromkeys(cells) if not any(matches(cell, table) for table in excluded)]
    return Scenario(path.stem, tuple(kept), plan)


def expanded(table: Mapping[str, Any], engines: Mapping[str, Sequence[str]], path: Path) -> list[Cell]:
    """The product of a table's lists."""
    lists = {key: value if isinstance(value, list) else [value] for key, value in table.items()}
    if lists.get("engine") == [ALL]:
        lists["engine"] = list(engines)
    cells = []
    for values in itertools.product(*lists.values()):
        one = dict(zip(lists, values, strict=True))
        precisions = [one.get("precision", "float32")]
        if precisions == [ALL]:
            precisions = list(engines.get(one.get("engine", "eager"), ("float32", "bfloat16")))
        cells += [Cell(**checked(Cell, {**one, "precision": precision}, path)) for precision in precisions]
    return cells


def checked(kind: type, table: Mapping[str, Any], path: Path) -> dict[str, Any]:
    """The entries of a table, found to be fields of `kind` and of their types; raises InputError."""
    types: dict[str, Any] = {field.name: field.type for field in fields(kind)}
    result = {}
    for key, value in table.items():
        if key not in types:
            raise InputError(f"{path} has {key!r}; expected {', '.join(types)}")
        if types[key] is float and isinstance(value, int) and not isinstance(value, bool):
            value = float(value)
        if not isinstance(value, types[key]) or (isinstance(value, bool) and types[key] is not bool):
            raise InputError(f"{path}: {key} is {value!r}, expected a {types[key].__name__}")
        result[key] = value
    return result


def matches(cell: Cell, table: Mapping[str, Any]) -> bool:
    """Whether a cell has all values of a table."""
    return all(getattr(cell, key) == value for key, value in table.items())


def filtered(scenario: Scenario, filters: Iterable[str]) -> Scenario:
    """The cells that pass filters such as `engine=openvino,eager` or `batch=1`, all of them.

    Raises InputError: a filter names no key of a cell, or nothing is left.
    """
    cells = list(scenario.cells)
    for text in filters:
        key, _, wanted = text.partition("=")
        if key not in {field.name for field in fields(Cell)} or not wanted:
            raise InputError(f"filter {text!r} is not of the form KEY=VALUE[,VALUE], KEY a key of a scenario")
        cells = [cell for cell in cells if str(getattr(cell, key)) in wanted.split(",")]
    if not cells:
        raise InputError(f"no cell of {scenario.name} is left; it has {_variety(scenario.cells)}")
    return replace(scenario, cells=tuple(cells))


def _variety(cells: Sequence[Cell]) -> str:
    names = (field.name for field in fields(Cell))
    return "; ".join(f"{name}: {', '.join(sorted({str(getattr(cell, name)) for cell in cells}))}" for name in names)
