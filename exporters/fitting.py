"""In which precision a certificate can be measured here: float32, unless an engine's copies of it would not fit."""

import math
from collections.abc import Sequence

from anamorph.backends.memory import free_memory
from anamorph.components import Component
from anamorph.engine import Backend
from anamorph.plugins import choose_backend
from anamorph.weights import find_weights

COPIES = 2
"""Memory of an engine over its weights in float32: OpenVINO took 1.9 of Stable Diffusion 1.5's, with its own layout."""
FLOAT32, BFLOAT16 = "float32", "bfloat16"


def fitting_precision(components: Sequence[Component], form: str) -> tuple[str, str]:
    """The precision in which the engine for a format runs these models here, and what the certificate says of it."""
    needed = 4 * COPIES * sum(map(_parameters, components))
    free = free_memory()
    engine, _ = choose_backend(form)
    kinds = engine.precisions(processor(engine))
    if kinds[0] != FLOAT32:
        return kinds[0], ""
    if free is None or needed <= free or BFLOAT16 not in kinds:
        return FLOAT32, ""
    return BFLOAT16, f" in {BFLOAT16}: float32 would take about {needed / 2**30:.0f} GiB of memory"


def processor(engine: Backend) -> str:
    """The device that certificates are measured on: the processor, where an engine tells it from others."""
    devices = engine.devices()
    return "cpu" if "cpu" in devices else devices[0]


def _parameters(component: Component) -> int:
    weights = find_weights(component.stored, component.stem, component.variant)
    if weights.pickled:  # their headers do not tell; most hold four bytes a number
        return sum(path.stat().st_size for path in weights.files) // 4
    return sum(math.prod(entry.shape) for entry in weights.entries().values())
