"""What an OpenVINO model may consist of: a graph in OpenVINO's own format and the weights beside it.

OpenVINO decides by content how to read a file: a graph of another format under the name `openvino_model.xml` would be
read too, together with the files that it refers to, wherever they lie.
"""

import re
from pathlib import Path

from anamorph.artifact import Artifact
from anamorph.errors import ArtifactError

BEGINNING = re.compile(rb"\s*(<\?xml[^<>]*\?>\s*)?<net[\s>]")
"""An IR file: the element `net` is its root."""
ELSEWHERE = b"__weights_path"
"""The key under which OpenVINO keeps a path to weights in a model's information."""


def check_ir(artifact: Artifact, part: str, graph: Path) -> None:
    """Raise ArtifactError where the graph is no IR, or takes weights from a file that the artifact does not record."""
    data = graph.read_bytes()
    if not BEGINNING.match(data):
        raise ArtifactError(f"{graph} is no OpenVINO IR; export the checkpoint again")
    if ELSEWHERE in data:
        raise ArtifactError(f"{graph} names a file of weights itself; it is refused")
    weights = graph.with_suffix(".bin")
    if weights.exists() and weights.relative_to(artifact.folder).as_posix() not in artifact.parts[part].files:
        raise ArtifactError(f"{graph} reads weights from {weights}, which its artifact does not record; it is refused")
