"""What is concluded from results: which samples count, what compares how, what a start costs."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from anamorph.benchmarks import environment, parity, plots, report
from anamorph.benchmarks.comparing import broken, changes
from anamorph.benchmarks.growth import growing, growth
from anamorph.benchmarks.records import Measured, Result, read
from anamorph.benchmarks.scenarios import Cell
from anamorph.benchmarks.summary import break_even, in_turn, line
from anamorph.errors import InputError


def test_no_result_is_read_from_other_files(tmp_path: Path) -> None:
    path = tmp_path / "r.jsonl"
    with pytest.raises(InputError, match="cannot be read"):
        read(path)
    path.write_text('{"schema": 99, "kind": "run"}\n')
    with pytest.raises(InputError, match="schema 99"):
        read(path)
    path.write_text('{"schema": 1, "kind": "cell"}\n')
    with pytest.raises(InputError, match="does not begin with a run"):
        read(path)


def test_samples_count_while_the_machine_runs_at_its_usual_speed() -> None:
    found = known(1.0, processes=3)
    (cell,) = found.cells.values()
    cell.bursts[0]["samples"][1]["sentinel"] = [1.0, 1.2]
    cell.bursts[0]["samples"][2]["sentinel"] = [0.8, 1.0]
    cell.bursts[1]["samples"] = [{**one, "sentinel": [1.5, 1.5]} for one in cell.bursts[1]["samples"]]
    cell.bursts[2]["samples"][0]["sentinel"] = [1.05, 0.95]
    found.weigh(cell.cell.work)
    assert cell.usual == 1.0
    assert [len(burst) for burst in cell.samples()] == [3, 5]
    assert line(cell, {}).void == 7
    assert "drifted" in str(line(replace(cell, bursts=cell.bursts[1:2], usual=1.0, drift=0.1), {}).refusal)


def test_a_burst_beside_busy_processes_does_not_count() -> None:
    assert environment.disturbed(0.01) is environment.disturbed(None) is None
    assert "other processes took 30%" in str(environment.disturbed(0.3))


def test_parity_compares_what_both_have(tmp_path: Path) -> None:
    reference, other = tmp_path / "a", tmp_path / "b"
    for folder in (reference, other):
        folder.mkdir()
    np.save(reference / "text.npy", np.ones(100))
    np.save(other / "text.npy", np.ones(100) * (1 + 3e-3))
    assert parity.compared(reference, other, "float32")["passed"] is False
    assert parity.compared(reference, other, "bfloat16")["passed"] is True
    np.save(other / "text.npy", np.full(100, np.nan))
    assert "not finite" in parity.compared(reference, other, "bfloat16")["note"]
    np.save(other / "text.npy", np.ones(99))
    assert "shape" in parity.compared(reference, other, "bfloat16")["note"]
    (other / "text.npy").unlink()
    np.save(reference / "picture.npy", np.full((8, 8, 3), 0.5))
    for away, passed in ((0.001, True), (0.1, False)):
        np.save(other / "picture.npy", np.full((8, 8, 3), 0.5 + away))
        assert parity.compared(reference, other, "float32")["passed"] is passed
    (other / "picture.npy").unlink()
    assert parity.compared(reference, other, "float32")["passed"] is False


def burst(*totals: float, cache: str = "cold", export: float = 0.0) -> dict[str, Any]:
    return {"void": None, "samples": [{"total": total, "sentinel": [1.0, 1.0]} for total in totals], "cache": cache,
            "first": {"total": 2.0}, "phases": {"import_s": 1.0, "export_s": export, "load_s": 1.0}, "memory": {},
            "placement": []}  # fmt: skip


def test_a_start_ends_with_the_first_step() -> None:
    """What the first step takes beyond a usual one is the start's: its model is compiled within it."""
    found = Measured(Cell(), parity={"passed": True, "note": "", "stages": {}})
    for text, step in ((0.2, 1.5), (0.3, 1.4), (0.4, 1.6)):
        row = burst(2.0)
        row["first"] = {"total": 4.0, "text": text, "steps": [step, 0.4]}
        row["samples"][0]["steps"] = [0.4, 0.4]
        found.bursts.append(row)
    assert line(found, {}).starts["cold"]["step_s"] == pytest.approx(2.0 + 0.3 + 1.0)  # the middle one
    assert "step_s" not in line(next(iter(known(1.0).cells.values())), {}).starts["cold"]


def test_memory_is_that_of_a_process_which_exports_nothing_where_there_is_one() -> None:
    found = Measured(Cell(), parity={"passed": True, "note": "", "stages": {}})
    found.bursts = [{**burst(2.0), "memory": {"rss_mib": 900.0}}]
    assert line(found, {}).memory == {"rss_mib": 900.0}
    found.bursts += [{**burst(2.0, cache="warm"), "memory": {"rss_mib": mib}} for mib in (300.0, 310.0)]
    assert line(found, {}).memory == {"rss_mib": 310.0}


def known(scale: float, processes: int = 6, seed: int = 0, engine: str = "eager") -> Result:
    random = np.random.default_rng(seed)
    found = Measured(Cell(engine=engine), parity={"passed": True, "note": "", "stages": {}})
    found.bursts = [burst(*(scale * random.lognormal(0, 0.01, 5))) for _ in range(processes)]
    about = dict.fromkeys(("processor", "instruction_sets", "cores", "affinity", "versions", "gpu"), "same")
    return Result({"environment": about, "plan": {"drift": 0.1}}, {found.cell.key: found})


def beside(turns: list[tuple[list[float], list[float]]], together: bool = True) -> Result:
    """Two arms whose calls took turns."""
    sides = [Measured(Cell(engine=name), parity={"passed": True, "note": "", "stages": {}}) for name in ("a", "b")]
    for side, found in enumerate(sides):
        found.bursts = [{**burst(*turn[side]), "turn": number} for number, turn in enumerate(turns)]
    about = {"drift": 0.1, "together": together}
    result = Result({"plan": about}, {found.cell.key: found for found in sides})
    result.weigh(sides[0].cell.work)
    return result


def test_calls_in_turn_are_compared_pair_by_pair() -> None:
    """A machine that gets four times as slow leaves the ratios of neighbours as they are, but not the medians."""
    speed = np.linspace(1, 4, 41)
    found = beside([(list(speed), list(1.1 * speed)), (list(speed[:9]), list(1.2 * speed[:9]))])
    old, new = (measured.cell for measured in found.cells.values())
    pairs = in_turn(found, old, new)
    assert pairs is not None
    assert (pairs.ratio, pairs.count) == (pytest.approx(1.1), 50)
    assert pairs.interval is not None
    assert 1.1 - 1e-12 <= pairs.interval[0] <= pairs.interval[1] <= 1.2 + 1e-12
    assert report.in_turns(found, [line(one, {}) for one in found.cells.values()])[0].startswith(
        "call by call b float32 takes 1.100 times as long as a float32"
    )
    assert in_turn(beside([([1.0], [1.1])], together=False), old, new) is None


def test_pairs_are_beside_the_arm_without_rewrites_where_there_is_one() -> None:
    found = beside([([2.0] * 9, [2.2] * 9)])
    first, second = found.cells.values()
    for measured, rewrites in ((first, "keys-once"), (second, "none")):
        measured.cell = replace(measured.cell, rewrites=rewrites)
    slowest = Measured(replace(second.cell, rewrites="row-norms"), parity=second.parity)
    slowest.bursts = [{**burst(*[4.4] * 9), "turn": 0}]
    slowest.usual = second.usual
    third = Result(found.run, {one.cell.key: one for one in (first, second, slowest)})
    said = report.in_turns(third, [line(one, {}) for one in third.cells.values()])
    assert [sentence.split(" (")[0] for sentence in said] == [
        "call by call b float32 none takes 1.100 times as long as a float32 keys-once",
        "call by call b float32 none takes 0.500 times as long as b float32 row-norms",
    ]


def test_pairs_are_of_one_turn_and_count_where_the_machine_drifted() -> None:
    found = beside([([1.0, 2.0, 1.0], [1.5, 3.0]), ([1.0], [7.0])])  # the second arm failed in between
    first, second = found.cells.values()
    second.bursts[0]["samples"][1]["sentinel"] = [1.0, 2.0]
    first.bursts[1] = {**first.bursts[1], "void": "others"}
    pairs = in_turn(found, first.cell, second.cell)
    assert pairs is not None
    assert (pairs.ratio, pairs.interval, pairs.count) == (1.5, None, 2)
    (sentence,) = report.in_turns(found, [line(one, {}) for one in found.cells.values()])
    assert sentence.endswith("(2 pairs of calls, too few for an interval)")
    second.bursts = []
    assert in_turn(found, first.cell, second.cell) is None


@pytest.mark.parametrize(("ratio", "verdict"), [(1.05, "slower"), (0.9, "faster"), (1.0, "same"), (1.015, "unclear")])
def test_compare_says_what_changed(ratio: float, verdict: str) -> None:
    (found,) = changes(known(1.0), known(ratio, seed=1), 0.02)
    assert found.verdict == verdict
    assert found.contrast is not None
    assert found.contrast.ratio == pytest.approx(ratio, rel=0.02)


def test_compare_decides_nothing_from_too_little_or_elsewhere() -> None:
    (few,) = changes(known(1.0), known(2.0, processes=2), 0.02)
    assert "3 a side are needed" in few.verdict
    old, new = known(1.0), known(1.0)
    new.run = {"environment": {**new.environment, "processor": "another"}}
    with pytest.raises(InputError, match="different processor"):
        changes(old, new, 0.02)
    with pytest.raises(InputError, match="no cell in common"):
        changes(old, known(1.0, engine="else"), 0.02)
    lost = known(1.0)
    next(iter(lost.cells.values())).failed = "it fell over"
    assert broken(old, lost) == [f"{next(iter(lost.cells))}: failed: it fell over"]


def test_a_slower_start_pays_after_so_many_pictures() -> None:
    def one(engine: str, seconds: float, export: float) -> Any:
        found = Measured(Cell(engine=engine), parity={"passed": True, "note": "", "stages": {}})
        found.bursts = [burst(seconds, seconds, export=export)]
        return line(found, {})

    eager, exported = one("eager", 2.0, 0.0), one("openvino", 1.0, 10.0)
    assert break_even(eager, exported) == pytest.approx(11.0)  # 10 s to export, 1 s more for its first picture
    assert break_even(exported, eager) is None


def test_times_are_read_easily() -> None:
    shown: Callable[[float | None], str] = report.seconds
    assert [shown(value) for value in (12.345, 0.0123, 4e-6, None, 1234.5)] == [
        "12.3 s", "12.3 ms", "4 µs", "-", "1234 s",
    ]  # fmt: skip


def test_an_approximation_is_judged_by_its_picture(tmp_path: Path) -> None:
    exact = np.linspace(0, 1, 48, dtype=np.float32).reshape(1, 4, 4, 3)
    for name, picture, stage in (("reference", exact, 1.0), ("near", exact + 0.05, 2.0), ("far", exact + 0.2, 1.0)):
        (tmp_path / name).mkdir()
        np.save(tmp_path / name / "picture.npy", picture)
        np.save(tmp_path / name / "denoiser.npy", np.array([stage]))
    results = [
        parity.compared(tmp_path / "reference", tmp_path / name, "float32", near)
        for name in ("near", "far")
        for near in (True, False)
    ]
    assert [result["passed"] for result in results] == [True, False, False, True]
    assert results[0]["psnr_db"] == pytest.approx(20 * np.log10(1 / 0.05), abs=0.1)
    assert results[2]["note"] == "the picture is 13.98 dB from eager in float32, 20 dB are asked"


def test_a_picture_decides_where_the_denoiser_shows_nothing(tmp_path: Path) -> None:
    """As a graph that goes on to the next samples by itself."""
    exact = np.random.default_rng(0).random((1, 8, 8, 3))
    for name, picture in (("reference", exact), ("near", exact + 1e-5), ("far", exact + 0.05)):
        (tmp_path / name).mkdir()
        np.save(tmp_path / name / "picture.npy", picture)
        np.save(tmp_path / name / "vae.npy", np.ones(3))
    np.save(tmp_path / "reference" / "denoiser.npy", np.ones(3))
    near, far = (parity.compared(tmp_path / "reference", tmp_path / name, "float32") for name in ("near", "far"))
    assert (near["passed"], near["stages"], far["passed"]) == (True, {"vae": 0.0}, False)
    assert "the picture is 26.02 dB from eager" in far["note"]


def measured(seconds: float, batch: int, **cell: Any) -> Measured:
    """A picture of 2 steps, for which the reference counted 5 operations a batch."""
    found = Measured(Cell(steps=2, batch=batch, **cell), parity={"passed": True, "note": "", "stages": {}})
    found.counts = {
        "flops": {"text": batch, "denoiser": batch, "vae": 2 * batch},
        "exponentials": {"text": 0, "denoiser": batch**2, "vae": 0},
    }
    found.bursts = [burst(seconds)]
    return found


def test_time_that_grows_with_a_power_of_the_work_shows_that_power() -> None:
    cells = [measured(3.0 * batch**1.2, batch) for batch in (1, 2, 4, 8)]
    (found,) = growth([line(one, {}) for one in cells]).values()
    assert (found.exponent, found.worst) == (pytest.approx(1.2), pytest.approx(8**0.2))
    assert (found.count, found.least, found.most) == (4, 5.0, 40.0)
    (sentence,) = growing([line(one, {}) for one in cells])
    assert "to the power 1.20 (4 sizes and batches" in sentence


def test_exponentials_count_where_their_rate_is_known() -> None:
    """5 b operations at 10 a second and 2 b^2 exponentials at 4 a second: b (1 + b) / 2 seconds at the peaks."""
    peak = {"float32": {"gflops": 10e-9, "softmax": 4e-9}}
    cells = [measured(7.0 * batch * (1 + batch) / 2, batch) for batch in (1, 2, 4, 8)]
    done = [line(one, peak) for one in cells]
    assert [one.least for one in done] == pytest.approx([1.0, 3.0, 10.0, 36.0])
    (found,) = growth(done, lambda one: one.least).values()
    assert (found.exponent, found.worst) == (pytest.approx(1.0), pytest.approx(1.0))
    products, both = growing(done)
    assert "operations of its products to the power 1.72 (4 sizes and batches" in products
    assert "exponentials take at the measured peaks to the power 1.00 (4 sizes and batches, 1 to 36 s" in both


def test_no_growth_is_told_of_few_figures_or_of_approximations() -> None:
    assert not growth([line(measured(1.0, batch), {}) for batch in (1, 2, 4)])
    assert not growth([line(measured(1.0, batch, caching=2), {}) for batch in (1, 2, 4, 8)])


def test_the_calls_of_a_control_net_are_a_phase_of_their_own() -> None:
    found = measured(10.0, 1, task="control")
    found.bursts[0]["samples"] = [
        {"total": 10.0, "text": 1.0, "steps": [2.0, 2.5], "control": 3.0, "vae": 1.0, "sentinel": [1.0, 1.0]}
    ]
    assert line(found, {}).phases == {
        "text": 1.0, "encode": 0.0, "denoiser": 4.5, "control": 3.0, "vae": 1.0, "post": 0.0, "host": 0.5,
    }  # fmt: skip


def test_an_axis_of_differences_shows_two_powers_of_ten() -> None:
    assert plots._decades([2e-3, 3e-3]) == [-3.1, pytest.approx(-1.9)]
    assert plots._decades([1e-8, 3e-3]) == [-8.1, pytest.approx(-1.9)]
