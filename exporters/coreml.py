"""Core ML packages of ML programs, for macOS 13 and iOS 16 on, with the names of apple/ml-stable-diffusion."""

import importlib.util
import io
import logging
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from anamorph.errors import BackendUnavailable, InputError
from anamorph.exporters.folder import FolderExporter
from anamorph.exporters.formats import Format, Writing
from anamorph.exporters.static import each_size
from anamorph.exporters.trace import with_scalars
from anamorph.exporting import CoreMl, Exporter, ExportOptions, palette
from anamorph.interface import Interface
from anamorph.plugins import hookimpl

if TYPE_CHECKING:
    from anamorph.exporters.storing import Written

PIECES = 2
"""Into how many packages a denoiser is cut, as Apple's tools do it."""
NAME = "model{chunk}.mlpackage"
APPLE = "Stable_Diffusion_version_{version}_{part}{chunk}.mlpackage"
MANIFEST = "Manifest.json"
"""The file at the root of a package that names the others."""
ONE = "main"
"""What the function of a package with one size is called."""
PALETTE = "compression::palettize_weights"
CLEANING = ("common::const_deduplication", "common::dead_code_elimination")
"""What is left of coremltools' passes: the graph is written as it shall be."""


def write(writing: Writing) -> "Written":
    """Write a part as a package with a function for each size, or a denoiser as packages that run one after another."""
    from anamorph.exporters.storing import Written

    with _quiet():
        import coremltools
        from coremltools.converters.mil.mil import Program
        from coremltools.converters.mil.mil.passes import pass_pipeline as passes

        from anamorph.exporters.mil import Weights
        from anamorph.exporters.mil_program import Face, Writer, share_weights

        wishes, weights = _wishes(writing.options), Weights()
        programs: list[Program] = []
        bits = None if writing.wide else wishes.palette
        sizes = list(each_size(writing.interface))
        target = coremltools.target.iOS18 if len(sizes) > 1 else coremltools.target.iOS16
        cut = PIECES if wishes.chunked and writing.interface.outputs[0].name == "out_sample" else 1
        for each in sizes:
            pictures = (1, *_wanted_size(writing.options), 3)
            face = Face(each, wishes.version is not None, pictures, writing.wide)
            program = writing.trace(with_scalars(each, (each.axes["batch"].minimum,)))
            functions = Writer(program, face, weights, target).functions(cut)
            programs = programs or [Program() for _ in functions]
            for one, function in zip(programs, functions, strict=True):
                one.add_function(_function_name(each) if len(sizes) > 1 else ONE, function)
        packages = [_place(writing, wishes, place if cut > 1 else None) for place in range(len(programs))]
        for one, package in zip(programs, packages, strict=True):
            one.default_function_name = next(iter(one.functions))
            one.export_as_multifunction = len(sizes) > 1
            passes.PassPipelineManager.apply_pipeline(one, _pipeline(coremltools, bits))
            if len(sizes) > 1:
                share_weights(one)
            coremltools.convert(
                one, convert_to="mlprogram", minimum_deployment_target=target, skip_model_load=True,
                pass_pipeline=coremltools.PassPipeline.EMPTY, package_dir=str(package),
            )  # fmt: skip
    storage = "float32" if writing.wide else None if bits is None else palette(bits)
    return Written(str(packages[0] / MANIFEST), {}, {}, tuple(packages), storage)


def _wishes(options: ExportOptions) -> CoreMl:
    assert options.coreml is not None
    return options.coreml


def _wanted_size(options: ExportOptions) -> tuple[int, int]:
    assert options.size is not None  # static formats settle it before they write
    return options.size


def _function_name(interface: Interface) -> str:
    """What the function for one size is called."""
    sides = (axis.minimum for name, axis in interface.axes.items() if name.endswith(("height", "width")))
    return "size_" + "x".join(map(str, sides))


def _place(writing: Writing, wishes: CoreMl, chunk: int | None) -> Path:
    """Where a package goes: into the part's folder, or beside all others at the root under Apple's name."""
    suffix = "" if chunk is None else f"_chunk{chunk + 1}"
    if wishes.version is None:
        return writing.folder / NAME.format(chunk=suffix)
    version = wishes.version.replace("/", "_")
    return writing.folder.parent / APPLE.format(version=version, part=writing.interface.component, chunk=suffix)


def _pipeline(coremltools: Any, bits: int | None) -> Any:
    pipeline = coremltools.PassPipeline.EMPTY
    if bits is not None:
        optimize = coremltools.optimize.coreml
        config = optimize.OpPalettizerConfig(mode="kmeans", nbits=bits)
        pipeline.append_pass(PALETTE)
        pipeline.set_options(PALETTE, {"config": optimize.OptimizationConfig(global_config=config)})
    for name in CLEANING:
        pipeline.append_pass(name)
    return pipeline


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep back what coremltools says of other frameworks' versions and of its own progress."""
    log = logging.getLogger("coremltools")
    before = log.level
    log.setLevel(logging.ERROR)
    try:
        with redirect_stderr(io.StringIO()):
            yield
    finally:
        log.setLevel(before)


def settle(options: ExportOptions) -> ExportOptions:
    """Options as this format serves them: float16, the inputs that other tools feed, a batch of fixed size.

    Raises InputError: our own signature or int8 is asked for. Raises BackendUnavailable: palettes cannot be made here.
    """
    if options.signature != "portable" or options.rewrites not in (None, "none"):
        raise InputError(
            "Core ML's packages take the portable signature and no rewrites; use anamorph export --to coreml"
        )
    if options.quantize is not None:
        raise InputError("Core ML's weights are brought to fewer bits by palettes; leave int8 out")
    palettes = options.coreml is not None and options.coreml.palette is not None
    if palettes and importlib.util.find_spec("sklearn") is None:
        raise BackendUnavailable(
            "palettes need scikit-learn, which is not installed; run: pip install 'anamorph[coreml]'"
        )
    wishes = options.coreml or CoreMl()
    return replace(options, storage=options.storage or "float16", batch=options.batch or 1, coreml=wishes)


def unavailable() -> str | None:
    """None, or what is missing."""
    missing = [name for name in ("torch", "coremltools") if not importlib.util.find_spec(name)]
    return f"{' and '.join(missing)} not installed; run: pip install 'anamorph[torch,coreml]'" if missing else None


@hookimpl
def anamorph_exporters() -> list[Exporter]:
    packages = ("torch", "coremltools")
    kind = Format("coreml", packages, write, unavailable, ("float16",), static=True, settle=settle)
    return [FolderExporter(kind)]
