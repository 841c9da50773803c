"""What several commands share: reading engine options, loading pipelines, recording requests."""

import argparse
import platform
import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, TypeVar

from anamorph.checkpoint import BUNDLED, BUNDLED_GUIDANCE, Checkpoint, model_named
from anamorph.errors import InputError
from anamorph.native import is_beside
from anamorph.pipelines import LatentDiffusion
from anamorph.pipelines.base import DiffusionPipeline
from anamorph.pipelines.request import Request
from anamorph.pipelines.wishes import Given, precision_name
from anamorph.profiles import applying
from anamorph.rewrites import named
from anamorph.schedulers import load_scheduler

SCHEMA = 1
"""Version of what a PNG records; a newer one is refused."""

T = TypeVar("T")
PACKAGES = ("anamorph", "numpy", "torch", "onnxruntime", "openvino")


def backend_option(value: str | None) -> str | dict[str, str]:
    """`eager`, or `unet=compile,vae=eager` as a mapping.

    Raises InputError: a part is not of the form name=engine.
    """
    if value is None:
        return "auto"
    if "=" not in value:
        return value
    pairs = [part.partition("=") for part in value.split(",")]
    if not all(name and engine for name, _, engine in pairs):
        raise InputError(f"--backend {value!r} is no list like unet=compile,vae=eager")
    return {name.strip(): engine.strip() for name, _, engine in pairs}


def folder_of(argument: str | None) -> str:
    """The model as `from_pretrained` takes it: one file is converted into a folder first."""
    model = model_named(argument)
    if not Path(model).expanduser().is_file():
        return model
    from anamorph.original.folder import Wishes, as_folder
    from anamorph.original.reading import find_file

    return str(as_folder(find_file(model), Wishes()))


def given(options: argparse.Namespace) -> Given:
    """The options of a command that say where and how a pipeline runs; raises InputError: one is no NAME=VALUE."""
    pairs = [text.partition("=") for text in options.backend_option]
    if strange := [name for name, equals, _ in pairs if not (name and equals)]:
        raise InputError(f"--backend-option {strange[0]!r} is not of the form NAME=VALUE")
    return Given(
        backend_option(options.backend), options.device, options.dtype, options.rewrites,
        {name: value for name, _, value in pairs} or None, options.trust_remote_code,
        options.guidance_batch,
    )  # fmt: skip


def open_pipeline(
    kind: type[DiffusionPipeline],
    model: str | None,
    options: argparse.Namespace,
    variant: str | None = None,
    **components: Any,
) -> DiffusionPipeline:
    """Open the checkpoint as a pipeline of `kind`, on the wished engine; says where a measurement chose it."""
    pipe = kind.from_pretrained(
        folder_of(model),
        **vars(given(options)),
        variant=variant,
        **components,
    )
    if options.backend is None and pipe.origin is not None:
        profile = applying(pipe.origin, precision_name(options.dtype) if options.dtype else None)
        if profile is not None and {placed.engine for placed in pipe.placement.values()} == {profile.engine}:
            print(f"anamorph: auto: {profile}", file=sys.stderr)
    return pipe


def load_pipeline(model: str | None, options: argparse.Namespace, variant: str | None = None) -> LatentDiffusion:
    """Open a text-to-image checkpoint on the wished engine."""
    pipe = open_pipeline(DiffusionPipeline, model, options, variant)
    if not isinstance(pipe, LatentDiffusion) or pipe.TASK.needs:
        raise InputError(f"{type(pipe).__name__} makes no pictures from prompts; name a text-to-image checkpoint")
    return pipe


def scheduler_class(name: str, config: Mapping[str, Any]) -> Any:
    """The scheduler `name` (with or without the ending "Scheduler") with another one's configuration."""
    full = name if name.endswith("Scheduler") else f"{name}Scheduler"
    return load_scheduler({**config, "_class_name": full})


def scale_of(pipe: DiffusionPipeline, options: argparse.Namespace) -> float:
    """The guidance that was asked for, the bundled model's own, or the pipeline's default."""
    usual = BUNDLED_GUIDANCE if model_named(options.model) == str(BUNDLED) else pipe.TAKES.default("guidance_scale")
    scale: float = usual if options.guidance is None else options.guidance
    return scale


def single(request: Request, index: int) -> Request:
    """The request for one picture out of a batch."""
    prompt = index // request.num_images_per_prompt

    def of(values: tuple[T, ...] | None) -> tuple[T, ...] | None:
        return None if values is None else (values[prompt],)

    seeds = None if request.seeds is None else (request.seeds[index],)
    return replace(
        request,
        prompt=(request.prompt[prompt],),
        negative_prompt=of(request.negative_prompt),
        prompt_2=of(request.prompt_2),
        negative_prompt_2=of(request.negative_prompt_2),
        class_labels=of(request.class_labels),
        num_images_per_prompt=1,
        seeds=seeds,
    )


def record(
    pipe: DiffusionPipeline,
    request: Request,
    digest: str,
    inputs: Mapping[str, Any] | None = None,
    loras: Sequence[Mapping[str, Any]] = (),
) -> dict[str, Any]:
    """What the PNG carries: request, task, model with its hash, scheduler, engines, versions, pictures and adapters."""
    checkpoint = pipe.origin
    return {
        "schema": SCHEMA,
        "request": request.to_dict(),
        "pipeline": type(pipe).__name__,
        "inputs": dict(inputs or {}),
        **({"loras": [dict(one) for one in loras]} if loras else {}),
        "model": {"name": model_name(checkpoint), "sha256": digest},
        "scheduler": dict(pipe.scheduler.config),
        "engines": {part: str(placed) for part, placed in pipe.placement.items()},
        **({} if pipe.rewrites is None else {"rewrites": ",".join(named(pipe.rewrites)) or pipe.rewrites}),
        "backends": {part: one.engine for part, one in pipe.placement.items() if not is_beside(part)},
        "versions": versions(),
    }


def model_name(checkpoint: Checkpoint | None) -> str | None:
    """The checkpoint's folder; None stands for the bundled model, wherever the package lies."""
    return None if checkpoint is None or checkpoint.folder == BUNDLED.resolve() else str(checkpoint.folder)


def versions() -> dict[str, str]:
    """Versions of what took part, as far as it is installed."""
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def numbered(path: Path, index: int, total: int) -> Path:
    """`apple.png` alone, `apple-1.png`, `apple-2.png` ... among several."""
    return path if total == 1 else path.with_name(f"{path.stem}-{index + 1}{path.suffix}")
