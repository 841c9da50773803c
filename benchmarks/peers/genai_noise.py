"""Noise for openvino-genai, in whose environment this runs, without anamorph."""

from collections.abc import Iterable
from typing import Any

import openvino_genai


class Given(openvino_genai.Generator):  # type: ignore[misc]
    """A source of noise that hands out given numbers, one by one."""

    def __init__(self, values: Any) -> None:
        openvino_genai.Generator.__init__(self)
        numbers: Iterable[float] = values.ravel().tolist()
        self.values = iter(numbers)

    def next(self) -> float:
        """The next number."""
        return next(self.values)
