"""Scenarios of the benchmark: named sets, matrices, and what an arm and its work are."""

from dataclasses import replace
from pathlib import Path

import pytest
from diffusers import EulerDiscreteScheduler

from anamorph.benchmarks import parity, scenarios
from anamorph.cli import OK, main
from anamorph.errors import InputError

ENGINES = {"eager": ["float32", "bfloat16"], "onnxruntime": ["float32"]}


def test_every_named_set_expands_and_says_what_it_holds(capsys: pytest.CaptureFixture[str]) -> None:
    for name in scenarios.named():
        cells = scenarios.read(name, ENGINES, {}).cells
        assert len({cell.key for cell in cells}) == len(cells) > 0
    with pytest.raises(SystemExit):
        main(["bench", "run", "--help"])
    shown = "".join(capsys.readouterr().out.split())  # lines end at hyphens, too
    assert f"{','.join(scenarios.named())},oraTOMLfile" in shown
    quick = scenarios.read("quick", ENGINES, {}).cells
    assert [cell.arm for cell in quick] == ["eager float32", "eager bfloat16", "onnxruntime float32"]


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
     ("[defaults]\ntask = 'sing'", "task"), ("not toml", "TOML"), ("[defaults]\nbatch = true", "expected a int"),
     ("[defaults]\nspacing = 'trailing'", "a scheduler by name"),
     ("[defaults]\nscheduler = 'DDIM'\nspacing = 'wide'", "leading, linspace")],
)  # fmt: skip
def test_what_a_scenario_must_not_say_is_named(tmp_path: Path, text: str, says: str) -> None:
    path = tmp_path / "bad.toml"
    path.write_text(text)
    with pytest.raises(InputError, match=says):
        scenarios.read(str(path), ENGINES, {})
    with pytest.raises(InputError, match="no cell"):
        scenarios.filtered(scenarios.read("quick", ENGINES, {}), ["engine=warp"])


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


def test_a_spacing_changes_the_scheduler_that_all_arms_take() -> None:
    cell = scenarios.Cell(steps=4, scheduler="EulerDiscreteScheduler", spacing="trailing")
    assert cell.what.endswith("4 steps/EulerDiscreteScheduler trailing")
    checkpoint = parity.checkpoint_of(cell.model)
    config = parity.scheduler_config(cell, checkpoint)
    assert config is not None
    scheduler = EulerDiscreteScheduler.from_config(config)
    scheduler.set_timesteps(4)
    assert scheduler.timesteps.tolist() == [999, 749, 499, 249]  # Lin et al. 2023 (arXiv:2305.08891), table 2
    with pytest.raises(InputError, match="no timestep_spacing"):
        parity.scheduler_config(replace(cell, scheduler="IPNDMScheduler"), checkpoint)


def test_the_bundled_model_may_be_named(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "run", "quick", "--list"]) == OK
    unnamed = capsys.readouterr().out
    assert main(["bench", "run", "quick", "--model", "bundled", "--list"]) == OK
    assert capsys.readouterr().out == unnamed
