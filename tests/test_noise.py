"""Noise without PyTorch, compared with PyTorch's own."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from anamorph.errors import InputError
from anamorph.noise import SeededNoise, Stream, TorchNoise

CLOSE = 1e-6


@given(st.integers(0, 2**64 - 1), st.lists(st.integers(1, 300), min_size=1, max_size=5))
def test_any_sequence_of_draws_equals_torch(seed: int, counts: list[int]) -> None:
    stream, generator = Stream(seed), torch.Generator().manual_seed(seed)
    for count in counts:
        theirs = torch.randn(count, generator=generator).numpy()
        assert np.abs(stream.normal((count,)) - theirs).max() <= CLOSE


@pytest.mark.parametrize("shape", [(1, 4, 64, 64), (3, 5), (2, 3, 3), (4, 4), (17,)])
def test_shapes_equal_torch(shape: tuple[int, ...]) -> None:
    theirs = torch.randn(shape, generator=torch.Generator().manual_seed(7)).numpy()
    ours = Stream(7).normal(shape)
    assert ours.dtype == np.float32
    assert np.abs(ours - theirs).max() <= CLOSE


def test_each_picture_has_its_own_stream() -> None:
    together = SeededNoise([5, 9]).normal((4, 4))
    assert np.array_equal(together[1], Stream(9).normal((4, 4)))
    assert not np.array_equal(together[0], together[1])


def test_generators_are_drawn_from_as_diffusers_does() -> None:
    from diffusers.utils.torch_utils import randn_tensor

    one = TorchNoise(torch.Generator().manual_seed(3), 2).normal((4, 8, 8))
    assert np.array_equal(one, randn_tensor((2, 4, 8, 8), generator=torch.Generator().manual_seed(3)).numpy())
    several = [torch.Generator().manual_seed(seed) for seed in (3, 4)]
    again = [torch.Generator().manual_seed(seed) for seed in (3, 4)]
    assert np.array_equal(TorchNoise(several, 2).normal((4, 8, 8)), randn_tensor((2, 4, 8, 8), generator=again).numpy())


@pytest.mark.parametrize("seed", [-1, 2**64])
def test_seeds_outside_the_range_are_refused(seed: int) -> None:
    with pytest.raises(InputError, match=str(seed)):
        Stream(seed)


def test_a_wrong_number_or_kind_of_generators_is_refused() -> None:
    with pytest.raises(InputError, match="2 generators for 3 pictures"):
        TorchNoise([torch.Generator(), torch.Generator()], 3)
    with pytest.raises(InputError, match="use seed="):
        TorchNoise(42, 1)
