"""The whole contract, and a batch that several devices share."""

from typing import Any

import numpy as np
import pytest

from anamorph import testing
from anamorph.errors import BackendError
from anamorph.testing.subject import call, tiny_checkpoint


@pytest.mark.parametrize("check", testing.CHECKS, ids=str)
def test_contract(check: testing.Check) -> None:
    check(testing.subject("jax"))


def sharded(shards: int) -> Any:
    from anamorph import StableDiffusionPipeline

    options = {"shards": shards}
    return StableDiffusionPipeline.from_pretrained(
        tiny_checkpoint().folder, backend="jax", backend_options=options, rewrites="none"
    )


def test_a_batch_is_dealt_out_to_all_devices() -> None:
    pipe = sharded(4)
    assert pipe.placement["unet"].details["shards"] == "4"
    program, subject = pipe.program("unet"), testing.subject("jax")
    inputs = subject.inputs("unet", {"batch": 8, "latent_height": 8, "latent_width": 8, "sequence": 32})
    arrays = program.arrays
    found = program.session()({name: arrays.put(value) for name, value in inputs.items()})["out_sample"]
    pieces = {shard.device.id: shard.data.shape for shard in found.addressable_shards}
    assert pieces == dict.fromkeys(range(4), (2, 4, 8, 8))
    expected = call(subject.reference.program("unet"), inputs)["out_sample"]
    assert np.linalg.norm(np.asarray(found) - expected) <= 1e-5 * np.linalg.norm(expected)


def test_pictures_are_those_of_one_device() -> None:
    arguments: dict[str, Any] = {"height": 16, "width": 16, "num_inference_steps": 2, "output_type": "np"}
    prompts, seeds = ["a cat"] * 4, [0, 1, 2, 3]
    found, expected = (sharded(n)(prompts, seed=seeds, **arguments).images for n in (4, 1))
    assert np.abs(found - expected).max() <= 1e-5


def test_more_shards_than_devices_are_refused() -> None:
    with pytest.raises(BackendError, match="shards of jax is '5', expected 1 to 4"):
        sharded(5)
