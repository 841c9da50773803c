"""The safety checker with the inputs and outputs that apple/ml-stable-diffusion feeds and reads besides the scores."""

from collections.abc import Mapping

import numpy as np
from coremltools.converters.mil.mil import Builder, Var

from anamorph.safety import STRICTER

ZERO = np.float16(0)


def filtered(scores: Mapping[str, Var], images: Var, adjustment: Var) -> dict[str, Var]:
    """Pictures [B, H, W, 3] with those held back as zeros, whether they are [B, 1, 1, 1], and the concepts' scores.

    A picture near to special concepts is held back sooner; `adjustment` [1] is added to how near it is to these. As
    there, scores are not rounded before they are compared with zero.
    """
    special = _any_above(Builder.add(x=scores["special"], y=adjustment))
    concepts = Builder.add(x=scores["concepts"], y=Builder.mul(x=special, y=np.float16(STRICTER)))
    held = Builder.expand_dims(x=_any_above(concepts), axes=[2, 3])
    kept = Builder.mul(x=images, y=Builder.sub(x=np.float16(1), y=held))
    return {"filtered_images": kept, "has_nsfw_concepts": held, "concept_scores": concepts}


def _any_above(scores: Var) -> Var:
    """1 for each row that holds a number above 0, else 0: [B, N] -> [B, 1]."""
    above = Builder.cast(x=Builder.greater(x=scores, y=ZERO), dtype="fp16")
    return Builder.reduce_max(x=above, axes=[1], keep_dims=True)
