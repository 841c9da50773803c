"""Tap points: where the output of each block of a model lies in an exported graph.

Blocks are known by the paths of their modules, such as `down_blocks.0.attentions.1`: the modules outside every
numbered list, and the members of lists named in the plural, which hold blocks rather than the steps of one layer.
"""

from collections.abc import Iterable
from typing import Any

MODEL = "model."
"""Where the model lies inside the module that is traced (`trace.as_module`)."""


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
