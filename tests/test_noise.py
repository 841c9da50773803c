"""Seeded noise against PyTorch's own generator."""

import subprocess
import sys

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from anamorph.errors import InputError
from anamorph.noise import SeededNoise, Stream, TorchNoise

CLOSE = 1e-6


def generator(seed: int) -> torch.Generator:
    return torch.Generator("cpu").manual_seed(seed)


@settings(max_examples=80, deadline=None)
@given(
    seed=st.integers(0, 2**64 - 1) | st.integers(0, 50),
    sizes=st.lists(st.integers(0, 40) | st.sampled_from([64, 100, 1000, 4 * 16 * 16]), min_size=1, max_size=6),
)
def test_draws_in_a_row_continue_torchs_stream(seed: int, sizes: list[int]) -> None:
    stream, reference = Stream(seed), generator(seed)
    for size in sizes:
        expected = torch.randn(size, generator=reference).numpy()
        np.testing.assert_allclose(stream.normal((size,)), expected, rtol=0, atol=CLOSE)


@pytest.mark.parametrize("shape", [(), (3,), (2, 7), (2, 4, 8, 8), (1, 4, 64, 64), (3, 5, 7)])
def test_shapes(shape: tuple[int, ...]) -> None:
    drawn = Stream(7).normal(shape)
    assert drawn.dtype == np.float32
    assert drawn.shape == shape
    np.testing.assert_allclose(drawn, torch.randn(shape, generator=generator(7)).numpy(), rtol=0, atol=CLOSE)


def test_the_second_value_of_a_pair_survives_a_block() -> None:
    stream, reference = Stream(3), generator(3)
    for size in (1, 32, 1, 2, 17, 1):
        np.testing.assert_allclose(
            stream.normal((size,)), torch.randn(size, generator=reference).numpy(), rtol=0, atol=CLOSE
        )


def test_a_million_numbers() -> None:
    drawn = Stream(2024).normal((1_000_003,))
    expected = torch.randn(1_000_003, generator=generator(2024)).numpy()
    assert np.abs(drawn - expected).max() <= 2e-6  # the tails reach 5 sigma, where one rounding is 5e-7


@pytest.mark.parametrize("seed", [-1, 2**64, 1.5, "1", True, None])
def test_seeds_outside_the_range_are_refused(seed: object) -> None:
    with pytest.raises(InputError, match=f"seed {seed!r} is no whole number"):
        Stream(seed)  # type: ignore[arg-type]


def test_numpy_integers_are_seeds() -> None:
    np.testing.assert_array_equal(Stream(int(np.int64(5))).normal((20,)), Stream(np.int64(5)).normal((20,)))  # type: ignore[arg-type]


def test_an_image_does_not_depend_on_its_batch() -> None:
    together, alone = SeededNoise([4, 9]), SeededNoise([9])
    for shape in ((4, 4, 4), (3,), (4, 4, 4)):
        both = together.normal(shape)
        assert both.shape == (2, *shape)
        np.testing.assert_array_equal(both[1:], alone.normal(shape))
        assert not np.array_equal(both[0], both[1])


def test_seeds_equal_a_list_of_generators_on_the_cpu() -> None:
    ours, theirs = SeededNoise([0, 1, 2]), TorchNoise([generator(0), generator(1), generator(2)], 3)
    for _ in range(3):
        np.testing.assert_allclose(ours.normal((4, 8, 8)), theirs.normal((4, 8, 8)), rtol=0, atol=CLOSE)


@pytest.mark.parametrize("several", [False, True])
def test_generators_draw_as_in_diffusers(several: bool) -> None:
    from diffusers.utils.torch_utils import randn_tensor

    ours = [generator(5), generator(6)] if several else generator(5)
    theirs = [generator(5), generator(6)] if several else generator(5)
    noise = TorchNoise(ours, 2)
    for _ in range(2):
        expected = randn_tensor((2, 4, 6, 6), generator=theirs, device=torch.device("cpu"), dtype=torch.float32)
        np.testing.assert_array_equal(noise.normal((4, 6, 6)), expected.numpy())


def test_wrong_generators() -> None:
    with pytest.raises(InputError, match="1 generators for 2 pictures"):
        TorchNoise([generator(0)], 2)
    with pytest.raises(InputError, match=r"generator is a int.*use seed="):
        TorchNoise(3, 1)
    with pytest.raises(InputError, match="generator is a str"):
        TorchNoise([generator(0), "x"], 2)
    with pytest.raises(InputError, match="no seeds"):
        SeededNoise([])


def test_seeded_noise_leaves_torch_alone() -> None:
    code = "import sys, anamorph.noise as n; n.SeededNoise([1]).normal((4, 4)); print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"
