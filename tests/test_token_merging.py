"""Token merging beside the paper's steps, written out token by token, and through every engine."""

from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from anamorph.models.merging import merged


def written_out(tokens: NDArray[Any], height: int, width: int) -> tuple[NDArray[Any], NDArray[Any]]:
    """The tokens that are left of one picture, receivers first, and the one that stands for each of the original."""
    receivers = [row * width + column for row in range(0, height, 2) for column in range(0, width, 2)]
    cells = [(row, column) for row in range(0, height, 2) for column in range(0, width, 2)]
    others = [(r + dr) * width + c + dc for r, c in cells for dr, dc in ((0, 1), (1, 0), (1, 1))]
    unit = tokens / np.linalg.norm(tokens, axis=-1, keepdims=True)
    closeness = unit[others] @ unit[receivers].T
    nearest, best = closeness.argmax(1), closeness.max(1)
    joining = np.argsort(best)[len(receivers) :]  # two thirds of the others: half of all tokens
    groups = [[tokens[place]] for place in receivers]
    stands = np.zeros(len(tokens), int)
    stands[receivers] = np.arange(len(receivers))
    for other in joining:
        groups[nearest[other]].append(tokens[others[other]])
        stands[others[other]] = nearest[other]
    left = [np.mean(group, 0) for group in groups]
    for other in np.argsort(best)[: len(receivers)]:
        stands[others[other]] = len(left)
        left.append(tokens[others[other]])
    return np.stack(left), stands


@pytest.mark.parametrize(("height", "width"), [(2, 2), (4, 6), (8, 4)])
def test_the_papers_steps(height: int, width: int) -> None:
    tokens = np.random.default_rng(0).standard_normal((3, height * width, 5))
    found = merged(torch.from_numpy(tokens), height, width)
    assert found.tokens.shape == (3, height * width // 2, 5)
    for picture in range(3):
        left, stands = written_out(tokens[picture], height, width)
        assert np.allclose(found.tokens[picture], left, rtol=1e-12)
        assert np.array_equal(found.places[picture], stands)
        assert np.allclose(found.apart(found.tokens)[picture], left[stands], rtol=1e-12)
