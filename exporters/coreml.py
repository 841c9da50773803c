"""Core ML packages of ML programs, for macOS 13 and iOS 16 on, with the names of apple/ml-stable-diffusion."""

import contextlib
import importlib.util
import io
import logging
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from anamorph.exporters.folder import FolderExporter, Format
from anamorph.exporters.static import each_size
from anamorph.exporting import CoreMl, Exporter
from anamorph.interface import Interface
from anamorph.pipelines.slots import Tokenizer
from anamorph.plugins import hookimpl

if TYPE_CHECKING:
    from anamorph.exporters.folder import Writing
    from anamorph.exporters.storing import Written

PIECES = 2
"""Into how many pieces a denoiser is cut, as Apple's tools cut it."""
APPLE = "Stable_Diffusion_version_{version}_{part}.mlpackage"
PALETTE = "compression::palettize_weights"


def write(writing: "Writing", interface: Interface, folder: Path) -> "Written":
    """Write a part as one package with a function for each size, or a denoiser as two that run after one another."""
    with _quiet():
        from coremltools.converters.mil.mil import Program

        from anamorph.exporters.mil import Weights
        from anamorph.exporters.mil_program import Face, Writer

        wishes = writing.options.coreml or CoreMl()
        sizes, target, weights = list(each_size(interface)), _target(interface), Weights()
        programs: list[Program] = []
        for each in sizes:
            face = Face(each, wishes.version is not None)
            pieces = PIECES if wishes.chunked and interface.outputs[0].name == "out_sample" else 1
            for place, function in enumerate(Writer(writing.trace(each), face, weights, target).functions(pieces)):
                if place == len(programs):
                    programs.append(Program())
                programs[place].add_function(_function_name(each) if len(sizes) > 1 else "main", function)
        packages = _places(programs, interface.component, folder, wishes.version)
        for program, package in zip(programs, packages, strict=True):
            _save(program, package, target, wishes)
    return writing.written(packages)
