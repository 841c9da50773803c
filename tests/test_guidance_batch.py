"""Branches of guidance in calls of their own: the pictures of one call for all, on every engine."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from exported import FORMATS, exported
from parity import IMAGE_BOUND, LATENT_BOUND, Agrees, Trace, ours, reference, worst
from pictures import picture
from test_conditioned import call, checkpoint
from test_native import CALL
from test_step_caching import REWRITES

import anamorph
from anamorph import DiffusionPipeline
from anamorph.artifact import NATIVE, PORTABLE
from anamorph.benchmarks.scenarios import Cell
from anamorph.benchmarks.tune import QUALITIES, refinements
from anamorph.checkpoint import Source, open_checkpoint
from anamorph.cli import main
from anamorph.errors import InputError
from anamorph.guard import HeldSession
from anamorph.memory import APART, JOINT
from anamorph.pipelines import denoising
from anamorph.profiles import Profile, store

SEEDS = (3, 4)


@contextmanager
def rows_of_calls() -> Iterator[list[int]]:
    """How many samples each call of the denoiser predicts."""
    rows: list[int] = []
    plain = HeldSession.__call__

    def counting(session: HeldSession, inputs: Any) -> Any:
        found = plain(session, inputs)
        if session.interface.component in ("unet", "transformer"):
            *leading, _, _, _ = found["out_sample"].shape
            rows.append(leading[0] * (leading[1] if len(leading) > 1 else 1))
        return found

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(HeldSession, "__call__", counting)
        yield rows


def drawn(
    place: Path, batch: str, engine: str = "eager", kind: Any = DiffusionPipeline, **call: Any
) -> tuple[Trace, list[int]]:
    rewrites = REWRITES if "step_caching" in call else None
    pipe = kind.from_pretrained(place, backend=engine, guidance_batch=batch, rewrites=rewrites)
    assert pipe.guidance_batch == batch
    with rows_of_calls() as rows:
        return ours(pipe, SEEDS, **call), rows


@pytest.mark.parametrize(
    ("engine", "signature"), [("eager", NATIVE), *((one, NATIVE) for one in FORMATS), ("onnxruntime", PORTABLE)]
)
def test_every_engine_draws_the_same_branch_by_branch(sd1: Path, engine: str, signature: str, agrees: Agrees) -> None:
    place = exported(sd1, engine, signature)
    apart, rows = drawn(place, APART, engine, **CALL)
    agrees("StableDiffusionPipeline", worst(apart, reference(sd1, None, SEEDS, **CALL)), engine)
    assert rows == [2] * 2 * CALL["num_inference_steps"]
    joint, rows = drawn(place, JOINT, engine, **CALL)
    assert rows == [4] * CALL["num_inference_steps"]
    assert worst(apart, joint)[0] <= LATENT_BOUND


def test_branches_that_change_places_would_be_seen(sd1: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plain = denoising.branch_by_branch

    def turned(denoiser: Any, times: Any, told: Any, branches: int, refresh: Any) -> Any:
        other = {name: value.roll(len(value) // branches, 0) for name, value in told.items()}
        return plain(denoiser, times, other, branches, refresh)

    exact, _ = drawn(sd1, JOINT, **CALL)
    monkeypatch.setattr(denoising, "branch_by_branch", turned)
    assert worst(drawn(sd1, APART, **CALL)[0], exact)[0] > 1e-2


@pytest.mark.parametrize("kind", ["StableDiffusionInstructPix2PixPipeline", "StableDiffusionUpscalePipeline"])
def test_samples_that_differ_between_branches_come_apart(kind: str) -> None:
    place, made, given = checkpoint(kind), getattr(anamorph, kind), call(kind)
    apart, rows = drawn(place, APART, kind=made, **given)
    joint, whole = drawn(place, JOINT, kind=made, **given)
    assert worst(apart, joint)[0] <= LATENT_BOUND
    branches = 3 if "Pix2Pix" in kind else 2
    assert [branches * count for count in rows[::branches]] == whole


@pytest.mark.parametrize("more", [{"guidance_interval": (0.3, 0.7)}, {"step_caching": 2}, {"guidance_rescale": 0.7}])
def test_other_options_of_guidance_hold_for_each_branch(sd1: Path, more: dict[str, Any]) -> None:
    apart, rows = drawn(sd1, APART, **CALL, **more)
    joint, _ = drawn(sd1, JOINT, **CALL, **more)
    assert worst(apart, joint)[0] <= LATENT_BOUND
    assert set(rows) == {2}


def test_residuals_of_a_controlnet_reach_their_branch(controlled_sd2: Path) -> None:
    given = {"prompt": ["a cat", "a dog"], "num_inference_steps": 3, "image": picture(16, 24)}
    apart, _ = drawn(controlled_sd2, APART, **given, guess_mode=True)
    joint, _ = drawn(controlled_sd2, JOINT, **given, guess_mode=True)
    assert worst(apart, joint)[0] <= LATENT_BOUND
    assert worst(drawn(controlled_sd2, JOINT, **given)[0], joint)[0] > 1e-3


def test_texts_that_a_callback_replaces_reach_their_branch(sd1: Path) -> None:
    def half(_pipe: Any, step: int, _time: Any, values: dict[str, Any]) -> dict[str, Any]:
        return {"prompt_embeds": 0.5 * values["prompt_embeds"]} if step == 1 else {}

    watched = {"callback_on_step_end": half, "callback_on_step_end_tensor_inputs": ["prompt_embeds"]}
    pictures = []
    for batch in (APART, JOINT):
        pipe: Any = DiffusionPipeline.from_pretrained(sd1, backend="eager", guidance_batch=batch)
        pictures.append(pipe(**CALL, **watched, seed=[3, 4], output_type="np").images)
    assert abs(pictures[0] - pictures[1]).max() <= IMAGE_BOUND


def test_it_stays_with_the_components_of_a_pipeline_and_is_checked(sd1: Path) -> None:
    pipe = DiffusionPipeline.from_pretrained(sd1, backend="eager", guidance_batch=APART)
    assert anamorph.StableDiffusionPipeline.from_pipe(pipe).guidance_batch == APART
    assert DiffusionPipeline.from_pretrained(sd1, backend="null").guidance_batch == JOINT
    with pytest.raises(InputError, match="guidance_batch is 'split', expected joint or apart"):
        DiffusionPipeline.from_pretrained(sd1, backend="null", guidance_batch="split")


def test_the_command_line_takes_it(sd1: Path, tmp_path: Path) -> None:
    given = ["generate", "a cat", "--model", str(sd1), "--backend", "eager", "--steps", "2"]
    with rows_of_calls() as rows:
        assert main([*given, "--guidance-batch", APART, "--out", str(tmp_path / "cat.png")]) == 0
    assert rows == [1] * 4


def test_tuning_tries_it_and_pipelines_take_what_it_found(
    sd1: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cell = Cell(engine="openvino")
    assert [one.guidance_batch for one in refinements(cell, QUALITIES["lossless"])] == [APART]
    assert refinements(cell, QUALITIES["fast"])[0].arm == "openvino float32 guidance apart"
    assert not refinements(cell, QUALITIES["lossless"])[0].near
    monkeypatch.setenv("ANAMORPH_CACHE", str(tmp_path))
    opened = open_checkpoint(Source(str(sd1)))
    store(opened, Profile("eager", "float32", 0.1, "now", "lossless", guidance_batch=APART))
    assert DiffusionPipeline.from_pretrained(sd1).guidance_batch == APART
    assert DiffusionPipeline.from_pretrained(sd1, guidance_batch=JOINT).guidance_batch == JOINT
    assert DiffusionPipeline.from_pretrained(sd1, backend="eager").guidance_batch == JOINT
