"""Packages of AOTInductor: machine code that torch.export and Inductor made ahead of time.

Opening one runs its code with the rights of this process. So it must lie in the cache of this user, who has made it, or
be trusted by the caller; and it must have been compiled for this processor by this version of PyTorch.
"""

import importlib.util
from collections.abc import Mapping, Sequence
from types import MappingProxyType

from anamorph.artifact import Artifact
from anamorph.backends.eager import INSTALL, Eager
from anamorph.backends.numpy_program import artifact_of
from anamorph.backends.torch_arrays import TorchArrays
from anamorph.backends.torch_graph import TorchGraph
from anamorph.cache import cache_folder
from anamorph.components import Component
from anamorph.engine import Backend, Costs, Placement, Program, Target
from anamorph.entries import check_owner
from anamorph.errors import ArtifactError
from anamorph.machine import processor
from anamorph.plugins import hookimpl
from anamorph.rewrites import noted

FORMAT = "aotinductor"


class AotInductor(Eager):
    """Opens exported folders that hold AOTInductor's packages."""

    name = FORMAT
    formats = (FORMAT,)
    rank: int | None = 1
    places: Mapping[str, tuple[str, ...]] = MappingProxyType({"cpu": ("float32",)})
    concurrent = False  # its loader does not promise it
    costs = Costs()
    options: Mapping[str, str] = MappingProxyType({})

    def unavailable(self) -> str | None:
        return None if importlib.util.find_spec("torch") else INSTALL

    def devices(self) -> tuple[str, ...]:
        return tuple(self.places)

    def open(self, component: Component, parts: Sequence[str], target: Target) -> dict[str, Program]:
        artifact = artifact_of(component, self.name, self.formats)
        _check_trusted(artifact, target)
        _check_machine(artifact)
        return {part: _open(artifact, part) for part in parts}


def _check_trusted(artifact: Artifact, target: Target) -> None:
    """Raise ArtifactError where nobody vouches for the machine code of a folder."""
    own = cache_folder() / "exports"
    if target.trusted:
        return
    if not artifact.folder.resolve().is_relative_to(own.resolve()):
        raise ArtifactError(
            f"{artifact.folder} holds machine code that would run here; pass trust_remote_code=True "
            "(--trust-remote-code) if you trust who made it, or name the checkpoint to compile it yourself"
        )
    check_owner(artifact.folder)


def _check_machine(artifact: Artifact) -> None:
    """Raise ArtifactError where the code was made for another processor or version of PyTorch."""
    import torch

    for what, here in (("processor", processor()), ("torch", torch.__version__)):
        made = artifact.versions.get(what)
        if made != here:
            raise ArtifactError(f"{artifact.folder} was compiled for {what} {made}, this is {here}; export it again")


def _open(artifact: Artifact, part: str) -> TorchGraph:
    import torch
    from torch._inductor import aoti_load_package

    path = artifact.open_part(part)
    try:
        loaded = aoti_load_package(str(path))
    except (RuntimeError, OSError) as error:
        reason = str(error).strip().splitlines()[0]
        raise ArtifactError(f"{path} cannot be opened by AOTInductor: {reason}") from None

    device = torch.device("cpu")
    placement = Placement(part, FORMAT, "cpu", "float32", noted(artifact.parts[part].rewrites))
    return TorchGraph(loaded, artifact.parts[part].interface, placement, TorchArrays(device), broadcasts=False)


@hookimpl
def anamorph_backends() -> list[Backend]:
    return [AotInductor()]
