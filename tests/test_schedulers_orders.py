"""How fast each solver's error falls on a Gaussian, whose exact flow is known, and what one bad number does to it."""

import dataclasses
from typing import Any

import pytest

from anamorph.benchmarks.schedulers import ORDERS, SMOOTH, measured
from anamorph.schedulers import SCHEDULERS, EulerDiscreteScheduler, HeunDiscreteScheduler, Table


def label(value: Any) -> str | None:
    if isinstance(value, dict):
        return ",".join(f"{key}={value[key]}" for key in ("solver_order", "skip_prk_steps") if key in value) or "-"
    return None


@pytest.mark.parametrize(("name", "config", "theory"), ORDERS, ids=label)
def test_order_is_that_of_theory(name: str, config: dict[str, Any], theory: float) -> None:
    order, coarse, fine = measured(name, config)
    assert fine < coarse < 0.2
    # A start of lower order costs some; a tenth of the error at the ends of the schedule is not yet asymptotic.
    assert theory - 0.5 < order < theory + 0.8


def test_a_coefficient_off_by_a_hundredth_costs_the_order(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = HeunDiscreteScheduler.table

    def spoiled(self: HeunDiscreteScheduler, steps: int) -> Table:
        table = whole(self, steps)
        rows = [row._replace(b=(row.b[0] * 1.01, *row.b[1:])) for row in table.rows]
        return dataclasses.replace(table, rows=tuple(rows))

    assert measured("HeunDiscreteScheduler", SMOOTH)[0] > 1.5
    monkeypatch.setattr(HeunDiscreteScheduler, "table", spoiled)
    assert measured("HeunDiscreteScheduler", SMOOTH)[0] < 1.0


def test_every_deterministic_family_is_measured() -> None:
    assert {name for name, _, _ in ORDERS} <= set(SCHEDULERS)
    assert EulerDiscreteScheduler.__name__ in {name for name, _, _ in ORDERS}
