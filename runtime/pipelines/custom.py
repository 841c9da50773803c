"""Pipelines in Python files of others: their code runs only where the caller says that it is trusted."""

import importlib.util
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from anamorph.errors import CheckpointError, InputError

if TYPE_CHECKING:
    from anamorph.pipelines.base import DiffusionPipeline

FILE = "pipeline.py"
"""The file of a folder that is named as a custom pipeline."""


def custom_class(name: str | Path, *, trusted: bool) -> type["DiffusionPipeline"]:
    """The pipeline that a local Python file (or the `pipeline.py` of a folder) defines.

    Raises InputError: the caller has not said that its code may run, or it is no local file.
    Raises CheckpointError: the file fails, or defines no pipeline or several.
    """
    from anamorph.pipelines.base import DiffusionPipeline

    given = Path(name).expanduser()
    path = given / FILE if given.is_dir() else given
    if not path.is_file():
        raise InputError(
            f"custom_pipeline {str(name)!r} is no local Python file; download it, read it, and name the file"
        )
    if not trusted:
        raise InputError(
            f"{path} is code that would run here; read it, and pass trust_remote_code=True if you trust it"
        )
    module_name = f"anamorph_custom_{path.stem}"
    spec = importlib.util.spec_from_file_location(module_name, path)
    if spec is None or spec.loader is None:
        raise InputError(f"custom_pipeline {path} is no Python file; name one that ends in .py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[module_name] = module
    try:
        spec.loader.exec_module(module)
    except Exception as error:  # whatever a stranger's code may raise
        del sys.modules[module_name]
        raise CheckpointError(f"{path} cannot be imported: {type(error).__name__}: {error}") from error
    found = [
        value for value in vars(module).values()
        if isinstance(value, type) and issubclass(value, DiffusionPipeline) and value.__module__ == module_name
    ]  # fmt: skip
    if len(found) != 1:
        names = ", ".join(kind.__name__ for kind in found) or "none"
        raise CheckpointError(f"{path} defines {names}; expected one class derived from DiffusionPipeline")
    return found[0]
