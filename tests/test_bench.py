"""The benchmark harness: scenarios, processes, gates, going on, reports. Its arms compute nothing here."""

import itertools
import json
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from anamorph.benchmarks import environment, parity, peers, plots, report, runner, turns
from anamorph.benchmarks.arm import Engine
from anamorph.benchmarks.operations import Operations, counted
from anamorph.benchmarks.peers.serve import Clock
from anamorph.benchmarks.process import Process
from anamorph.benchmarks.records import Result, read
from anamorph.benchmarks.scenarios import Cell, Plan, Scenario
from anamorph.benchmarks.summary import lines
from anamorph.cli import DIFFERENT, OK, USAGE, main
from anamorph.errors import BackendError, InputError

QUICK = Plan(processes=3, most=3, seconds=20, burst_s=0.0, fewest=3, timeout_s=20, within=0.5)
PEAK = {"float32": {"gflops": 100.0, "by": "numpy"}}
FAKE = Path(__file__).parent / "fake_arm.py"
SERVE = str(Path(peers.__file__).parent)


def fake(behaviour: str) -> list[str]:
    code = (
        f"import sys; sys.path.insert(0, {SERVE!r}); sys.argv = ['', {behaviour!r}]; exec(open({str(FAKE)!r}).read())"
    )
    return [sys.executable, "-c", code]


@pytest.fixture(name="quiet")
def _quiet(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fakes for arms, peaks and the watch over the machine, which is busy with tests."""
    monkeypatch.setattr(
        turns, "command", lambda cell: fake({"eager": "good", "openvino": "good"}.get(cell.engine, cell.engine))
    )
    monkeypatch.setattr(runner, "run_python", lambda *_: {"peak": PEAK, "torch_build": []})
    monkeypatch.setattr(turns, "disturbed", lambda _: None)
    monkeypatch.setattr(environment.Sentinel, "measure", lambda _: 1.0)


def scenario(*engines: str, plan: Plan = QUICK, **cell: Any) -> Scenario:
    return Scenario("test", tuple(Cell(engine=engine, steps=2, **cell) for engine in engines), plan)


def measured(place: Path, *engines: str, **options: Any) -> Result:
    runner.Run(scenario(*engines, **options), place, lambda _: None).all()
    return read(place)


@pytest.mark.usefixtures("quiet")
def test_exports_are_made_before_anything_is_measured_where_the_plan_says_so(tmp_path: Path) -> None:
    measured(tmp_path / "r.jsonl", "eager", "openvino", plan=replace(QUICK, prepare=True))
    rows = [json.loads(text) for text in (tmp_path / "r.jsonl").read_text().splitlines()]
    found = [(row["key"].split("-")[0], row["cache"]) for row in rows if row["kind"] == "burst"]
    assert found == [("eager", "cold"), ("openvino", "warm"), *[("eager", "warm"), ("openvino", "warm")] * 2]


@pytest.mark.usefixtures("quiet")
def test_second_starts_follow_one_of_their_arm_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    started: list[str] = []
    real = turns.command
    monkeypatch.setattr(turns, "command", lambda cell: (started.append(cell.engine), real(cell))[1])
    result = measured(tmp_path / "r.jsonl", "good", "openvino", plan=replace(QUICK, second=True, processes=2, most=2))
    assert started == ["eager", "good", "openvino", "good", "good", "openvino", "openvino"]
    assert [[burst["cache"] for burst in one.bursts] for one in result.cells.values()] == [["cold", "warm"]] * 2
    assert "each warm start follows another of the same arm" in report.environment_text(result)


@pytest.mark.usefixtures("quiet")
def test_a_first_start_is_announced_before_it_takes_its_time(tmp_path: Path) -> None:
    said: list[str] = []
    plan = replace(QUICK, processes=2, most=2)
    runner.Run(scenario("good", plan=plan), tmp_path / "r.jsonl", said.append).all()
    told = [line.partition(": ")[2].split(",")[0] for line in said]
    assert told == ["starts for the first time", "cold", "warm"]


@pytest.mark.usefixtures("quiet")
def test_engines_that_start_slowly_come_when_the_others_are_settled(tmp_path: Path) -> None:
    plan = replace(QUICK, prepare=True, last="openvino,silent")
    measured(tmp_path / "r.jsonl", "openvino", "eager", plan=plan)
    rows = [json.loads(text) for text in (tmp_path / "r.jsonl").read_text().splitlines()]
    found = [(row["key"].split("-")[0], row["cache"]) for row in rows if row["kind"] == "burst"]
    assert found == [("eager", "cold"), *[("eager", "warm")] * 2, ("openvino", "cold"), *[("openvino", "warm")] * 2]


@pytest.mark.usefixtures("quiet")
def test_a_scenario_ends_when_its_time_is_spent(tmp_path: Path) -> None:
    found = lines(measured(tmp_path / "r.jsonl", "eager", "good", plan=replace(QUICK, total_s=-1.0)))
    assert [one.refusal for one in found] == ["failed: not run: the -1 s of the scenario were spent"] * 2


@pytest.mark.usefixtures("quiet")
def test_arms_take_turns_in_fresh_processes_and_start_cold_once(tmp_path: Path) -> None:
    result = measured(tmp_path / "r.jsonl", "eager", "good")
    rows = [json.loads(text) for text in (tmp_path / "r.jsonl").read_text().splitlines()]
    bursts = [(row["key"].split("-")[0], row["cache"]) for row in rows if row["kind"] == "burst"]
    assert bursts == [("eager", "cold"), ("good", "cold")] + [("eager", "warm"), ("good", "warm")] * 2
    assert all(row["memory"]["pss_mib"] < row["memory"]["rss_mib"] < 200 for row in rows if row["kind"] == "burst")
    eager, good = lines(result)
    assert eager.refusal is good.refusal is None
    assert (eager.processes, eager.samples, good.fidelity) == (3, 9, "identical")
    totals = [sample["total"] for row in rows if row.get("key") == eager.cell.key for sample in row.get("samples", ())]
    assert eager.median == pytest.approx(np.median(totals))
    assert eager.gflops == pytest.approx(1000 / 0.001 / 1e9)  # of the published model
    assert result.cells[good.cell.key].counts == {"flops": {"denoiser": 1000}, "exponentials": {"denoiser": 10}}
    assert eager.starts["cold"]["export_s"] == 0.05
    assert eager.starts["warm"]["export_s"] == 0.0
    assert [eager.phases[name] for name in ("text", "denoiser", "vae")] == [0.0, 0.002, 0.001]
    assert not (tmp_path / "r.jsonl.work").exists()
    assert all(0 < row["overhead_s"] < 20 for row in rows if row["kind"] == "burst")


@pytest.mark.usefixtures("quiet")
def test_what_fails_or_differs_is_a_row_without_a_speed(tmp_path: Path) -> None:
    plan = replace(QUICK, timeout_s=3, most=1, processes=1)
    found = lines(measured(tmp_path / "r.jsonl", "good", "wrong", "lying", "crashing", "hungry", "silent", plan=plan))
    refusals = {one.cell.engine: one.refusal or "" for one in found}
    assert refusals["good"] == ""
    assert "denoiser is 1.0e-02 from eager in float32, 1e-04 is allowed" in refusals["wrong"]
    assert "it runs in bfloat16 where float32 was asked for" in refusals["lying"]
    assert "code 1" in refusals["crashing"]
    assert "the engine fell over" in refusals["crashing"]
    assert "MemoryError" in refusals["hungry"]
    assert "more than 3 s" in refusals["silent"]
    assert all(one.median is None for one in found if one.refusal)


@pytest.mark.usefixtures("quiet")
def test_arms_that_are_open_together_take_turns_call_by_call(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    readings = itertools.count(1)
    monkeypatch.setattr(environment.Sentinel, "measure", lambda _: float(next(readings)))
    plan = replace(QUICK, most=1, processes=1, together=True, drift=1e9)
    found = measured(tmp_path / "r.jsonl", "eager", "good", "crashing", plan=plan)
    eager, good, crashing = lines(found)
    assert eager.refusal is good.refusal is None
    assert (eager.samples, good.samples) == (3, 3)
    assert "the engine fell over" in (crashing.refusal or "")
    first, second = (found.cells[one.cell.key].bursts[0]["samples"] for one in (eager, good))
    found_in_turn = [sample["sentinel"] for pair in zip(first, second, strict=True) for sample in pair]
    begin = found_in_turn[0][0]
    assert found_in_turn == [[begin + n, begin + n + 1] for n in range(6)]


@pytest.mark.usefixtures("quiet")
def test_a_batch_that_does_not_fit_ends_the_larger_ones(tmp_path: Path) -> None:
    plan = replace(QUICK, most=1, processes=1)
    cells = tuple(Cell(engine="refusing", steps=2, batch=batch) for batch in (1, 2, 4))
    runner.Run(Scenario("test", cells, plan), tmp_path / "r.jsonl", lambda _: None).all()
    found = lines(read(tmp_path / "r.jsonl"))
    assert [one.refusal is None for one in found] == [True, False, False]
    assert "batch 2 does not fit" in str(found[1].refusal)
    assert "not run: batch 2 failed before" in str(found[2].refusal)
    assert "Throughput by batch" in plots.page(read(tmp_path / "r.jsonl"), found)


@pytest.mark.usefixtures("quiet")
def test_a_stopped_run_goes_on_where_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "r.jsonl"
    whole = turns.Group._turn
    taken: list[str] = []

    def stopping(group: turns.Group, cells: Sequence[Cell]) -> None:
        if len(taken) == 5:  # the first arm has all its processes, the second lacks one
            raise KeyboardInterrupt
        taken.extend(cell.engine for cell in cells)
        whole(group, cells)

    monkeypatch.setattr(turns.Group, "_turn", stopping)
    with pytest.raises(KeyboardInterrupt):
        measured(path, "eager", "good")
    path.write_text(path.read_text() + '{"schema": 1, "kind": "bu')  # killed while it wrote
    monkeypatch.setattr(turns.Group, "_turn", whole)
    result = measured(path, "eager", "good")
    assert [one.processes for one in lines(result)] == [3, 3]
    before = path.read_text()
    measured(path, "eager", "good")
    assert path.read_text() == before
    with pytest.raises(InputError, match="another scenario"):
        measured(path, "eager")


def test_a_process_that_ends_early_says_why() -> None:
    with pytest.raises(BackendError, match="code 3: last words"):
        Process([sys.executable, "-c", "import sys; print('last words', file=sys.stderr); sys.exit(3)"], {}, 20)


def test_arms_write_their_bytecode_whatever_the_shell_says(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONDONTWRITEBYTECODE", "1")
    said = 'import sys; print(\'{"versions": {"silent": "%s"}}\' % sys.dont_write_bytecode, flush=True)'
    with Process([sys.executable, "-c", said], {}, 20) as process:
        assert process.versions == {"silent": "False"}


def test_a_clock_tells_phases_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    times = iter([0.0, 1.0, 2.0, 2.0, 5.0, 5.0, 9.0, 10.0, 12.0, 15.0])
    monkeypatch.setattr("time.perf_counter", lambda: next(times))
    clock = Clock()
    text, step, vae = (clock.timed(name, lambda: None) for name in ("text", "denoiser", "vae"))
    found = clock.measure(lambda: [text(), step(), step(), vae()])
    assert found == {"total": 15.0, "text": 1.0, "steps": [3.0, 4.0], "vae": 2.0, "post": 3.0}


def test_a_clock_adds_a_hundredth_of_a_millisecond_at_most() -> None:
    clock = Clock()
    timed = clock.timed("denoiser", lambda: None)
    taken = []
    for _ in range(200):
        started = time.perf_counter()
        for _ in range(10):
            timed()
        taken.append((time.perf_counter() - started) / 10)
    assert min(taken) < 1e-5  # a thousandth of the fastest call of the bundled model's denoiser


@pytest.mark.usefixtures("quiet")
def test_the_command_compares_and_reports(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path, slow = tmp_path / "r.jsonl", tmp_path / "slow.jsonl"
    measured(path, "eager", "good", "crashing")
    for place, factor in ((path, 1.0), (slow, 1.5)):
        rows = [json.loads(text) for text in path.read_text().splitlines()]
        for row in (row for row in rows if row["kind"] == "burst"):
            for number, sample in enumerate(row["samples"]):
                sample["total"] = factor * (1 + 0.001 * number + 0.002 * row["turn"])
        place.write_text("\n".join(map(json.dumps, rows)) + "\n")
    assert main(["bench", "compare", str(path), str(path)]) == OK
    assert main(["bench", "compare", str(path), str(slow)]) == DIFFERENT
    assert "slower, +50.0%" in capsys.readouterr().out
    assert main(["bench", "compare", str(path), str(tmp_path / "none")]) == USAGE
    assert main(["bench", "report", str(path)]) == OK
    page = path.with_suffix(".html").read_text()
    assert "crashing float32: no speed shown; failed" in page
    assert "https://" not in page.replace(page[page.index("<script>") : page.index("</script>")], "").replace(
        "https://plot", ""
    )
    assert "| good float32 |" in path.with_suffix(".md").read_text()
    assert path.with_suffix(".csv").read_text().count("\n") == 4


@pytest.mark.parametrize("masked", [False, True])
def test_operations_of_attention_count(masked: bool) -> None:
    """Both of its products, 2 m n k operations each, and a score for each pair; a processor's kernels, too."""
    query, key, value = torch.randn(2, 3, 10, 8), torch.randn(2, 3, 7, 8), torch.randn(2, 3, 7, 8)
    mask = torch.zeros(10, 7) if masked else None
    with counted() as found:
        torch.nn.functional.scaled_dot_product_attention(query, key, value, mask)
        query.flatten(0, 2) @ torch.randn(8, 5)
    assert found == Operations(2 * 3 * (2 * 10 * 7 * 8 + 2 * 10 * 7 * 8) + 2 * 60 * 8 * 5, 2 * 3 * 10 * 7)


@pytest.mark.parametrize("rewrites", ["default", "default,step-scope"])
def test_a_denoiser_that_goes_on_by_itself_is_compared_by_pictures(tmp_path: Path, rewrites: str) -> None:
    cell = Cell(engine="eager", steps=2, scheduler="DDIMScheduler", rewrites=rewrites)
    checkpoint = parity.checkpoint_of(cell.model)
    height, width = parity.sized(cell, checkpoint)
    parity.write_inputs(cell, checkpoint, tmp_path, cell.steps)
    engine = Engine("eager")
    asked = {"cell": asdict(replace(cell, height=height, width=width)), "folder": str(checkpoint.folder), "threads": 2}
    engine.open({**asked, "scheduler": parity.scheduler_config(cell, checkpoint)})
    found = engine.stages(tmp_path, tmp_path)["stages"]
    assert set(found) == {"text", "vae", "picture", *(["denoiser"] if rewrites == "default" else [])}


def test_exponentials_of_softmax_count() -> None:
    with counted() as found:
        torch.softmax(torch.randn(2, 10, 7), -1)
    assert found == Operations(0, 2 * 10 * 7)
