"""Which pictures a safety checker holds back, from its scores. No PyTorch here."""

import numpy as np
from numpy.typing import NDArray

CONCEPTS, SPECIAL = 17, 3
"""How many concepts are held back, and how many make the check stricter."""
STRICTER = np.float32(0.01)
"""What a hit among the special concepts adds to the scores of the others."""
DECIMALS = 3
"""Scores are rounded before they are compared with zero."""


def flagged(special: NDArray[np.float32], scores: NDArray[np.float32]) -> NDArray[np.bool_]:
    """Whether each picture shows a concept that is held back, [B].

    Scores are cosine similarities less their thresholds: `special` [B, S] of concepts that make the check stricter,
    `scores` [B, C] of those that are held back. A picture is flagged where round(score + adjustment, 3) > 0 for any.
    Source: Rando et al. 2022 (arXiv:2210.04610), section 2.
    """
    careful = (special.round(DECIMALS) > 0).any(axis=1, keepdims=True)
    adjusted = np.where(careful, scores + STRICTER, scores).round(DECIMALS)
    return np.asarray((adjusted > 0).any(axis=1))
