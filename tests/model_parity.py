"""One model of ours beside the reference's, with the same configuration and weights."""

from typing import Any

import diffusers
import torch
from checkpoints import noisy
from torch import Tensor

from anamorph.models import MODELS

TOLERANCE = 1e-5
"""Largest difference, in units of the reference's largest value (float32)."""


def error(ours: Tensor, theirs: Tensor) -> float:
    assert ours.shape == theirs.shape
    assert theirs.std() > 0.05 * theirs.abs().mean(), "a reference without variation would hide differences"
    return float((ours - theirs).abs().max() / theirs.abs().max())


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def pair(name: str, config: dict[str, Any], seed: int = 3) -> tuple[Any, Any]:
    """Ours and diffusers' model of that class; every weight is random, and all of theirs are ours."""
    theirs = noisy(getattr(diffusers, name)(**config), seed)
    ours = MODELS[name](**config).eval()
    ours.load_state_dict(theirs.state_dict())
    return ours, theirs
