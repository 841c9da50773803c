"""Our own engines keep the contract that plug-ins are asked to keep, and the README says what was found."""

from pathlib import Path

import pytest
from exported import ENGINES

from anamorph import testing
from anamorph.engine import Backend
from anamorph.errors import InputError
from anamorph.guard import places_here
from anamorph.plugins import get_backend, list_backends
from anamorph.testing.suite import FAILED, NOT_HERE, Result
from anamorph.testing.table import BEGIN, END, read, replaced, said, table

README = Path(__file__).parent.parent / "README.md"
PLACES = [(engine, precision) for engine in ("eager", "torchscript", *ENGINES) for precision in ("float32", "bfloat16")
          if precision in get_backend(engine).places["cpu"]]  # fmt: skip


@pytest.mark.parametrize(("engine", "precision"), PLACES)
def test_contract(engine: str, precision: str) -> None:
    if precision not in places_here(get_backend(engine))["cpu"]:
        pytest.skip(f"this processor has no {precision} for {engine}")
    results = testing.run(engine, testing.CHECKS, "cpu", precision)
    assert not [result for result in results if result.outcome == FAILED]
    assert read(README.read_text(encoding="utf-8"))[engine, "cpu", precision] == said(results)


def shown() -> list[Backend]:
    return [backend for backend in list_backends().values() if not backend.double]


def test_the_readme_shows_what_engines_declare() -> None:
    text = README.read_text(encoding="utf-8")
    assert replaced(text, table(shown(), read(text))) == text


def test_an_engine_that_breaks_the_contract_fails() -> None:
    """Zeros are not what eager computes."""
    results = testing.run("null", testing.CHECKS)
    broken = {result.check: result.reason for result in results if result.outcome == FAILED}
    assert {"values", "shows NaN", "picture"} <= set(broken)
    assert "deterministic" not in broken
    assert "differs from eager by" in broken["values"]


def test_cells_are_read_as_they_were_written() -> None:
    cells = {("eager", "cpu", "float32"): said([Result("eager", "values", "passed"), Result("eager", "x", FAILED)])}
    text = f"before\n{BEGIN}\n{table(shown(), cells)}\n{END}\nafter"
    assert read(text)["eager", "cpu", "float32"] == "1 of 2"
    assert read(text)["eager", "cuda", "float16"] == "untested"
    assert read(text)["eager", "cpu", "float16"] == ""
    assert said([Result("eager", "values", NOT_HERE)]) == "untested"
    with pytest.raises(InputError, match="has no lines"):
        read("no table")
