"""Tap points: where the output of each block of a model lies in an exported graph, and in the model itself.

Blocks are known by the paths of their modules, such as `down_blocks.0.attentions.1`: the modules outside every
numbered list, and the members of lists named in the plural, which hold blocks rather than the steps of one layer.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from numpy.typing import NDArray

from anamorph.arrays import Array
from anamorph.artifact import Artifact
from anamorph.engine import Revealing
from anamorph.plugins import choose_backend

if TYPE_CHECKING:
    import torch

MODEL = "model."
"""Where the model lies inside the module that is traced (`trace.as_module`)."""
Taps = Callable[[Mapping[str, Array]], dict[str, NDArray[Any]]]
"""A part as a function from its inputs to the output of each of its blocks."""


def block_outputs(nodes: Iterable[Any]) -> dict[str, Any]:
    """Path of each block -> the last node that its module contributes, in the order in which they are computed.

    A block that ends with another one's output is left out, because the inner one tells more.
    """
    last: dict[str, Any] = {}
    for node in nodes:
        for place, _ in node.meta.get("nn_module_stack", {}).values():
            path = place.removeprefix(MODEL)
            if path != place and is_block(path):
                last.pop(path, None)
                last[path] = node  # moves it to the end, so that blocks stand in the order in which they end
    innermost = {node: path for path, node in sorted(last.items(), key=lambda item: item[0].count("."))}
    return {path: node for path, node in last.items() if innermost[node] == path}


def is_block(path: str) -> bool:
    """Whether a module's path ends at a block: `mid_block.resnets.0` does, `mid_block.resnets.0.conv1` does not."""
    steps = path.split(".")
    numbers = [index for index, step in enumerate(steps) if step.isdecimal()]
    return not numbers or (numbers[-1] == len(steps) - 1 and all(steps[index - 1].endswith("s") for index in numbers))


@contextmanager
def recorded(module: "torch.nn.Module", blocks: Iterable[str]) -> Iterator[dict[str, NDArray[Any]]]:
    """Keep what these blocks of a PyTorch model return while the block of code runs, where that is one tensor."""
    import torch

    found: dict[str, NDArray[Any]] = {}

    def keep(path: str) -> Callable[[torch.nn.Module, Any, Any], None]:
        def hook(_module: torch.nn.Module, _inputs: Any, output: Any) -> None:
            if isinstance(output, torch.Tensor):
                found[path] = output.detach().numpy().copy()

        return hook

    modules = dict(module.named_modules())
    handles = [modules[path].register_forward_hook(keep(path)) for path in blocks if path in modules]
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()


def open_taps(artifact: Artifact, part: str) -> Taps:
    """Open a part of an exported folder through its engine, for the outputs of its blocks; none where it shows none."""
    taps = artifact.parts[part].taps
    backend, _ = choose_backend(artifact.format)
    if not taps or not isinstance(backend, Revealing):
        return lambda _: {}
    values = backend.inner_values(artifact, part, list(taps.values()))

    def run(inputs: Mapping[str, Array]) -> dict[str, NDArray[Any]]:
        found = values(inputs)
        return {block: found[name] for block, name in taps.items()}

    return run
