"""Checkpoints in one file, with the keys of the code that trained them (CompVis, Stability AI, OpenCLIP)."""

from collections.abc import Mapping

Shapes = Mapping[str, tuple[int, ...]]
"""Name of a tensor -> its shape."""
