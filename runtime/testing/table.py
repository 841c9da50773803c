"""The table of a README that says which engines keep the contract where, written from what they declare and from runs.

It stands between the two lines `BEGIN` and `END`; other text is left alone.
"""

from collections.abc import Iterator, Mapping, Sequence

from anamorph.engine import PRECISIONS, Backend
from anamorph.errors import InputError
from anamorph.testing.suite import FAILED, PASSED, Result

BEGIN = "<!-- written by: python -m anamorph.testing --readme README.md -->"
END = "<!-- end -->"
UNTRIED, UNSERVED = "untested", ""
Place = tuple[str, str, str]
"""Engine, kind of device, precision."""


def said(results: Sequence[Result]) -> str:
    """What a cell says of the results of its checks."""
    passed = sum(result.outcome == PASSED for result in results)
    failed = sum(result.outcome == FAILED for result in results)
    return f"{passed} of {passed + failed}" if passed + failed else UNTRIED


def rows(backends: Sequence[Backend], cells: Mapping[Place, str]) -> Iterator[str]:
    """A line for each engine and kind of device; a place that nobody tried is `UNTRIED`."""
    for backend in sorted(backends, key=lambda one: one.name):
        for kind in sorted(backend.places):
            served = (
                cells.get((backend.name, kind, name), UNTRIED) if name in backend.places[kind] else UNSERVED
                for name in PRECISIONS
            )  # fmt: skip
            yield f"| `{backend.name}` | {', '.join(backend.formats)} | {kind} | {' | '.join(served)} |"


def table(backends: Sequence[Backend], cells: Mapping[Place, str]) -> str:
    """The whole table."""
    heads = ("engine", "opens", "device", *PRECISIONS)
    return "\n".join([f"| {' | '.join(heads)} |", "|---" * len(heads) + "|", *rows(backends, cells)])


def read(text: str) -> dict[Place, str]:
    """The cells of the table in a text; raises InputError where it has none."""
    found: dict[Place, str] = {}
    for line in _inside(text)[1].splitlines()[2:]:
        engine, _, kind, *served = (cell.strip() for cell in line.strip().strip("|").split("|"))
        found |= {(engine.strip("`"), kind, name): cell for name, cell in zip(PRECISIONS, served, strict=True)}
    return found


def replaced(text: str, written: str) -> str:
    """The text with another table; raises InputError where it has none."""
    before, _, after = _inside(text)
    return f"{before}{BEGIN}\n{written}\n{END}{after}"


def _inside(text: str) -> tuple[str, str, str]:
    before, begin, rest = text.partition(BEGIN)
    inside, end, after = rest.partition(END)
    if not begin or not end:
        raise InputError(f"the text has no lines {BEGIN} and {END}; put them where the table shall stand")
    return before, inside.strip(), after
