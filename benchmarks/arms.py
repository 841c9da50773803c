"""Which process runs a cell: our engines here, peers in the environments that `make peers` builds."""

import os
import sys
from dataclasses import dataclass
from pathlib import Path

from anamorph.benchmarks import peers
from anamorph.benchmarks.scenarios import Cell
from anamorph.errors import BackendUnavailable, InputError

ROOT = "ANAMORPH_PEERS"
"""Environment variable: where the peers' environments lie, build/peers by default."""
HERE = Path(peers.__file__).parent


@dataclass(frozen=True)
class Peer:
    """Another tool: its environment's name, its script with arguments, and the precisions that can be asked of it."""

    environment: str
    script: tuple[str, ...]
    precisions: tuple[str, ...] = ("float32", "bfloat16")


PEERS = {
    "diffusers": Peer("diffusers", ("diffusers_arm.py", "eager"), ("float32", "bfloat16", "float16")),
    "diffusers-compile": Peer("diffusers", ("diffusers_arm.py", "compile"), ("float32", "bfloat16", "float16")),
    "optimum-onnx": Peer("optimum-onnx", ("optimum_arm.py", "optimum-onnx"), ("float32",)),
    "optimum-intel": Peer("optimum-intel", ("optimum_arm.py", "optimum-intel")),
    "openvino-genai": Peer("openvino-genai", ("genai_arm.py",)),
    "stable-diffusion-cpp": Peer("stable-diffusion-cpp", ("sdcpp_arm.py",), ("float32", "bfloat16", "float16")),
}


def python_of(peer: str) -> Path:
    """The interpreter of a peer's environment.

    Raises BackendUnavailable: it was not built.
    """
    root = Path(os.environ.get(ROOT, "build/peers"))
    python = (root / PEERS[peer].environment / "bin" / "python").absolute()
    if not python.exists():
        raise BackendUnavailable(f"{peer} has no environment in {root}; run: make peers")
    return python


def command(cell: Cell) -> list[str]:
    """The command that starts the cell's process.

    Raises BackendUnavailable: the peer is not there. Raises InputError: it does not serve the precision.
    """
    if cell.engine not in PEERS:
        return [sys.executable, "-P", "-m", "anamorph.benchmarks.arm", cell.engine]
    peer = PEERS[cell.engine]
    if cell.precision not in peer.precisions:
        raise InputError(f"{cell.engine} is measured in {', '.join(peer.precisions)}, not in {cell.precision}")
    if cell.rewrites or cell.near or cell.guidance_batch:
        raise InputError(
            f"{cell.engine} is measured as it is; leave out rewrites, interval, quantize, caching and guidance_batch"
        )
    script, *arguments = peer.script
    return [str(python_of(cell.engine)), "-sE", str(HERE / script), *arguments]


def form_of(engine: str) -> str | None:
    """The format of ours that a peer opens, None where it takes the checkpoint."""
    return {"openvino-genai": "openvino"}.get(engine)
