"""The benchmark harness: scenarios, processes, gates, going on, reports. Its arms compute nothing here."""

import itertools
import json
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from anamorph.benchmarks import environment, parity, peers, plots, report, runner, scenarios
from anamorph.benchmarks.comparing import broken, changes
from anamorph.benchmarks.peers.serve import Clock
from anamorph.benchmarks.process import Process
from anamorph.benchmarks.records import Measured, Result, read
from anamorph.benchmarks.scenarios import Cell, Plan, Scenario
from anamorph.benchmarks.summary import break_even, line, lines
from anamorph.cli import DIFFERENT, OK, USAGE, main
from anamorph.errors import BackendError, InputError

ENGINES = {"eager": ["float32", "bfloat16"], "onnxruntime": ["float32"]}
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
        runner, "command", lambda cell: fake({"eager": "good", "openvino": "good"}.get(cell.engine, cell.engine))
    )
    monkeypatch.setattr(runner, "run_python", lambda *_: {"peak": PEAK, "torch_build": []})
    monkeypatch.setattr(runner, "disturbed", lambda _: None)
    monkeypatch.setattr(environment.Sentinel, "measure", lambda _: 1.0)


def scenario(*engines: str, plan: Plan = QUICK, **cell: Any) -> Scenario:
    return Scenario("test", tuple(Cell(engine=engine, steps=2, **cell) for engine in engines), plan)


def measured(place: Path, *engines: str, **options: Any) -> Result:
    runner.Run(scenario(*engines, **options), place, lambda _: None).all()
    return read(place)


def test_every_named_set_expands_and_says_what_it_holds(capsys: pytest.CaptureFixture[str]) -> None:
    for name in scenarios.named():
        cells = scenarios.read(name, ENGINES, {}).cells
        assert len({cell.key for cell in cells}) == len(cells) > 0
    with pytest.raises(SystemExit):
        main(["bench", "run", "--help"])
    assert f"{', '.join(scenarios.named())}, or a TOML file" in " ".join(capsys.readouterr().out.split())
    quick = scenarios.read("quick", ENGINES, {}).cells
    assert [cell.arm for cell in quick] == ["eager float32", "eager bfloat16", "onnxruntime float32"]


@pytest.mark.usefixtures("quiet")
def test_exports_are_made_before_anything_is_measured_where_the_plan_says_so(tmp_path: Path) -> None:
    measured(tmp_path / "r.jsonl", "eager", "openvino", plan=replace(QUICK, prepare=True))
    rows = [json.loads(text) for text in (tmp_path / "r.jsonl").read_text().splitlines()]
    found = [(row["key"].split("-")[0], row["cache"]) for row in rows if row["kind"] == "burst"]
    assert found == [("eager", "cold"), ("openvino", "warm"), *[("eager", "warm"), ("openvino", "warm")] * 2]


@pytest.mark.usefixtures("quiet")
def test_a_scenario_ends_when_its_time_is_spent(tmp_path: Path) -> None:
    found = lines(measured(tmp_path / "r.jsonl", "eager", "good", plan=replace(QUICK, total_s=-1.0)))
    assert [one.refusal for one in found] == ["failed: not run: the -1 s of the scenario were spent"] * 2


def test_a_matrix_is_a_product_with_exclusions_and_filters(tmp_path: Path) -> None:
    path = tmp_path / "mine.toml"
    path.write_text(
        '[defaults]\nsteps = 4\nguidance = 1\n[[matrix]]\nengine = "*"\nprecision = "*"\nbatch = [1, 4]\n'
        '[[exclude]]\nengine = "eager"\nbatch = 4\n[plan]\nseconds = 9\n'
    )
    found = scenarios.read(str(path), ENGINES, {"model": "else"})
    assert [(cell.arm, cell.batch) for cell in found.cells] == [
        ("eager float32", 1), ("eager bfloat16", 1), ("onnxruntime float32", 1), ("onnxruntime float32", 4),
    ]  # fmt: skip
    assert {(cell.steps, cell.guidance, cell.model) for cell in found.cells} == {(4, 1.0, "else")}
    assert found.plan.seconds == 9.0
    assert len(scenarios.filtered(found, ["batch=1", "precision=float32"]).cells) == 2


@pytest.mark.parametrize(
    ("text", "says"),
    [("[defaults]\nsteps = 'many'", "expected a int"), ("[plan]\nhours = 3", "'hours'"), ("[other]", "other"),
     ("[defaults]\ntask = 'sing'", "task"), ("not toml", "TOML"), ("[defaults]\nbatch = true", "expected a int")],
)  # fmt: skip
def test_what_a_scenario_must_not_say_is_named(tmp_path: Path, text: str, says: str) -> None:
    path = tmp_path / "bad.toml"
    path.write_text(text)
    with pytest.raises(InputError, match=says):
        scenarios.read(str(path), ENGINES, {})
    with pytest.raises(InputError, match="no cell"):
        scenarios.filtered(scenarios.read("quick", ENGINES, {}), ["engine=warp"])


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
    assert eager.gflops == pytest.approx(1000 / 0.001 / 1e9)
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
    whole = runner.Group._turn
    turns: list[str] = []

    def stopping(group: runner.Group, cells: Sequence[Cell]) -> None:
        if len(turns) == 4:
            raise KeyboardInterrupt
        turns.extend(cell.engine for cell in cells)
        whole(group, cells)

    monkeypatch.setattr(runner.Group, "_turn", stopping)
    with pytest.raises(KeyboardInterrupt):
        measured(path, "eager", "good")
    path.write_text(path.read_text() + '{"schema": 1, "kind": "bu')  # killed while it wrote
    monkeypatch.setattr(runner.Group, "_turn", whole)
    result = measured(path, "eager", "good")
    assert [one.processes for one in lines(result)] == [3, 3]
    before = path.read_text()
    measured(path, "eager", "good")
    assert path.read_text() == before
    with pytest.raises(InputError, match="another scenario"):
        measured(path, "eager")


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


def test_a_process_that_ends_early_says_why() -> None:
    with pytest.raises(BackendError, match="code 3: last words"):
        Process([sys.executable, "-c", "import sys; print('last words', file=sys.stderr); sys.exit(3)"], {}, 20)


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


def known(scale: float, processes: int = 6, seed: int = 0, engine: str = "eager") -> Result:
    random = np.random.default_rng(seed)
    found = Measured(Cell(engine=engine), parity={"passed": True, "note": "", "stages": {}})
    found.bursts = [burst(*(scale * random.lognormal(0, 0.01, 5))) for _ in range(processes)]
    about = dict.fromkeys(("processor", "instruction_sets", "cores", "affinity", "versions", "gpu"), "same")
    return Result({"environment": about, "plan": {"drift": 0.1}}, {found.cell.key: found})


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


def test_wishes_belong_to_an_arm_and_not_to_the_work() -> None:
    plain = scenarios.Cell(engine="openvino", precision="bfloat16")
    wished = replace(plain, rewrites="phase-convolutions,token-merging", interval="0.2-0.8", quantize="int8")
    assert wished.work == plain.work
    assert wished.arm == "openvino bfloat16 int8 guided 0.2-0.8 phase-convolutions+token-merging"
    assert wished.guided == (0.2, 0.8)
    nears = {
        "": False,
        "all": False,
        "none": False,
        "phase-convolutions": False,
        "phase-convolutions,token-merging": True,
    }
    assert {wish: replace(plain, rewrites=wish).near for wish in nears} == nears
    assert replace(plain, interval="0-1").near
    assert replace(plain, quantize="int8").near
    for wrong in ({"interval": "half"}, {"quantize": "int4"}):
        with pytest.raises(InputError, match=next(iter(wrong))):
            replace(plain, **wrong)


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
