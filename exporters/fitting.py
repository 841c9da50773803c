"""In which precision a certificate can be measured here: float32, unless an engine's copies of it would not fit."""

import math
from collections.abc import Sequence

from anamorph.components import Component
from anamorph.guard import places_here
from anamorph.machine import free_memory
from anamorph.plugins import choose_backend
from anamorph.weights import find_weights

FLOAT32, BFLOAT16 = "float32", "bfloat16"


def fitting_precision(components: Sequence[Component], form: str) -> tuple[str, str]:
    """The precision in which the engine for a format runs these models here, and what the certificate says of it."""
    engine, _ = choose_backend(form)
    kinds = next(iter(places_here(engine).values()))
    if kinds[0] != FLOAT32:
        return kinds[0], ""
    needed = 4 * engine.costs.memory * sum(map(_parameters, components))
    free = free_memory()
    if free is None or needed <= free or BFLOAT16 not in kinds:
        return FLOAT32, ""
    return BFLOAT16, f" in {BFLOAT16}: float32 would take about {needed / 2**30:.0f} GiB of memory"


def _parameters(component: Component) -> int:
    weights = find_weights(component.stored, component.stem, component.variant)
    if weights.pickled:  # their headers do not tell; most hold four bytes a number
        return sum(path.stat().st_size for path in weights.files) // 4
    return sum(math.prod(entry.shape) for entry in weights.entries().values())
