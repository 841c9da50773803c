"""Which sizes have a compiled model of their own, and which share one."""

import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from exported import exported
from parity import relative

from anamorph import StableDiffusionPipeline
from anamorph.backends import onnx_models
from anamorph.backends.buckets import COMPILED, Buckets, Sizes
from anamorph.errors import BackendError, InputError
from anamorph.memory import OwnSizes

CALL: dict[str, Any] = {"num_inference_steps": 2, "seed": 0, "guidance_scale": 5.0, "output_type": "np"}


@dataclass(frozen=True)
class Model:
    origin: str
    sizes: Sizes | None


def asked(height: int) -> Sizes:
    return Sizes({"sample": (1, height), "absent": (1, 1)}, ["sample"], {"height": height})


def test_the_first_size_has_its_own_model_and_others_share_one() -> None:
    buckets = Buckets(lambda sizes: Model(COMPILED, sizes), again=3)
    assert buckets.take(asked(8)).sizes == asked(8)
    assert buckets.take(asked(16)).sizes is None
    assert buckets.take(asked(24)) is buckets.take(asked(16))
    assert buckets.take(asked(8)).sizes == asked(8)
    assert buckets.history == [
        "height 8: compiled, for this size alone, the first that was called",
        "height 16: compiled, for all sizes",
    ]


def test_a_size_that_is_called_often_gets_its_own_and_the_longest_unused_leaves() -> None:
    buckets = Buckets(lambda sizes: Model(COMPILED, sizes), most=2, again=3)
    for height in (8, 16, 16, 16):
        assert buckets.take(asked(height)).sizes in (asked(8), None)
    assert buckets.take(asked(16)).sizes == asked(16)
    buckets.take(asked(8))
    for _ in range(4):
        made = buckets.take(asked(24))
    assert made.sizes == asked(24)
    assert set(buckets.own) == {asked(8).name, asked(24).name}  # 16 was not called for longest
    assert buckets.take(asked(16)).sizes is None
    buckets.spare(OwnSizes(0))
    assert buckets.take(asked(8)).sizes is None
    assert "called 3 times before" in "".join(buckets.history)


def test_models_of_single_sizes_leave_where_memory_is_short() -> None:
    buckets = Buckets(lambda sizes: Model(COMPILED, sizes), fits=lambda: False, again=1)
    assert buckets.take(asked(8)).sizes == asked(8)  # something must be compiled
    for _ in range(3):
        assert buckets.take(asked(16)).sizes is None
    assert not buckets.own


@pytest.mark.parametrize(("after", "said"), [(250_000_000, ", in 250 MB of its own"), (100_000, ""), (None, "")])
def test_the_memory_of_a_model_of_its_own_is_told(after: int | None, said: str) -> None:
    counts = iter([0, after, 0, after])
    buckets = Buckets(lambda sizes: Model(COMPILED, sizes), memory=lambda: next(counts))
    buckets.take(asked(8))
    buckets.take(asked(16))
    assert buckets.history == [
        f"height 8: compiled, for this size alone, the first that was called{said}",
        f"height 16: compiled, for all sizes{said}{'; models of this engine share no packed weights' if said else ''}",
    ]


def test_onnx_runtime_makes_a_model_for_a_size_that_is_called_often(sd1: Path) -> None:
    place = exported(sd1, "onnxruntime")
    eager = StableDiffusionPipeline.from_pretrained(sd1, backend="eager")
    pipe: Any = StableDiffusionPipeline.from_pretrained(place, backend_options={"own_sizes": 2})
    buckets = pipe.components["unet"].programs["unet"].program.buckets
    buckets.again = 3
    for height in (64, 64, 96, 64, 96):
        expected = np.asarray(eager("a cat", height=height, width=64, **CALL).images)
        assert relative(np.asarray(pipe("a cat", height=height, width=64, **CALL).images), expected) <= 1e-4
    (first, *others), reason = pipe.placement["unet"].history, "called 3 times before"
    assert ", for all sizes" in first
    assert [line.partition(", in ")[0] for line in others] == [
        f"batch 2, latent height {side}, latent width 8, sequence 77: {COMPILED}, for this size alone, {reason}"
        for side in (8, 12)
    ]
    assert {tuple(one.engine.get_inputs()[0].shape) for one in buckets.own.values()} == {(2, 4, 8, 8), (2, 4, 12, 8)}
    assert pipe.components["unet"].spare(OwnSizes(1)) is None
    assert [tuple(one.engine.get_inputs()[0].shape) for one in buckets.own.values()] == [(2, 4, 12, 8)]


def test_onnx_runtime_makes_none_unless_it_is_asked(sd1: Path) -> None:
    pipe: Any = StableDiffusionPipeline.from_pretrained(exported(sd1, "onnxruntime"))
    buckets = pipe.components["unet"].programs["unet"].program.buckets
    buckets.again = 1
    pipe("a cat", **{**CALL, "num_inference_steps": 3})
    assert not buckets.own
    for told in ("many", "-1"):
        with pytest.raises(BackendError, match=f"option own_sizes of onnxruntime is '{told}', expected a number"):
            StableDiffusionPipeline.from_pretrained(exported(sd1, "onnxruntime"), backend_options={"own_sizes": told})


def test_a_graph_whose_inputs_share_a_name_for_different_sizes_serves_all_of_them_alone() -> None:
    ports = [SimpleNamespace(name="x", shape=["n", 4]), SimpleNamespace(name="y", shape=["n"])]
    model = onnx_models.Model(SimpleNamespace(get_inputs=lambda: ports), COMPILED, "", Path(), {})
    assert model.dimensions(Sizes({"x": (2, 4), "y": (2,)}, ["x", "y"], {})) == {"n": 2}
    assert model.dimensions(Sizes({"x": (2, 4), "y": (1,)}, ["x", "y"], {})) is None


def test_threads_share_one_compilation() -> None:
    made: list[Model] = []

    def make(sizes: Sizes | None) -> Model:
        time.sleep(0.05)
        made.append(Model(COMPILED, sizes))
        return made[-1]

    buckets = Buckets(make)
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda _: buckets.take(asked(8)), range(8)))
    assert len(made) == 1
    assert all(one is made[0] for one in found)


def test_models_for_one_size_and_for_all_agree_with_eager(sd1: Path) -> None:
    """One pipeline for all; the wish for no models of single sizes leaves the model for all sizes alone."""
    eager = StableDiffusionPipeline.from_pretrained(sd1, backend="eager")
    pipe = StableDiffusionPipeline.from_pretrained(exported(sd1, "openvino"))
    for height, wish in ((64, None), (96, None), (64, OwnSizes(0))):
        if wish is not None:
            assert pipe.components["unet"].spare(wish) is None
        expected = np.asarray(eager("a cat", height=height, width=64, **CALL).images)
        assert relative(np.asarray(pipe("a cat", height=height, width=64, **CALL).images), expected) <= 1e-4
    history = pipe.placement["unet"].history
    assert [line.rpartition("for ")[2].partition(",")[0] for line in history[:2]] == ["this size alone", "all sizes"]
    assert "sizes with a model of their own do not apply" in str(eager.components["unet"].spare(OwnSizes(1)))
    with pytest.raises(InputError, match="expected 0 or more"):
        OwnSizes(-1)
