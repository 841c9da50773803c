"""A denoiser whose graph goes on to the next sample: guidance and the scheduler's row are weights of sums in it.

    model input   scale x
    guidance      o  = sum_k g_k out_k                                          over the branches
    step          v  = (x, o, noise, h_1 .. h_K)
                  x' = sum_j W_0j v_j,   h'_i = sum_j W_ij v_j                  W of a table's row, `pipelines.stepping`

An engine whose arrays stay on a device then needs a few numbers and the noise from the host. No PyTorch here.
"""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from anamorph.interface import Axis, Port

SCOPE = "step-scope"
"""The rewrite's name."""
HELD = 6
"""States that a graph remembers from step to step: as many as the solvers that pipelines come with need."""
SCALE, GUIDANCE, WEIGHTS, HISTORY, NOISE = "input_scale", "guidance_weights", "step_weights", "history", "step_noise"
REMEMBERED = "next_history"
"""What the graph hands out beside the next sample: what it takes as HISTORY in the step after."""


def step_ports(sample: Port, branches: Axis) -> tuple[Port, ...]:
    """What the graph takes beside a denoiser's own inputs.

    Shapes: [1], [branches, 1], [1 + K, 3 + K], [K, N, C, h, w] and [N, C, h, w]. The last two may be missing: before
    the first step, and where a row adds no noise.
    """
    return (
        Port(SCALE, (1,), exact=True),
        Port(GUIDANCE, (branches, 1), exact=True),
        Port(WEIGHTS, (1 + HELD, 3 + HELD), exact=True),
        Port(HISTORY, (HELD, *sample.axes), optional=True, exact=True),
        Port(NOISE, sample.axes, optional=True, exact=True),
    )


def scope_unmet(config: Mapping[str, Any]) -> str | None:
    """Why a UNet's predictions are no directions for its own samples, or None."""
    taken, made = config["in_channels"], config["out_channels"]
    if taken != made:
        return f"it sees {taken} channels and predicts {made}: samples are joined with others before each step"
    return None


def sample_ports(sample: Port) -> tuple[Port, Port]:
    """The samples as the graph takes them, and the states that it remembers as it hands them out."""
    return replace(sample, exact=True), Port(REMEMBERED, (HELD, *sample.axes))
