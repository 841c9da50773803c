"""An exported folder: its manifest `anamorph.json`, read with suspicion. No engine and no PyTorch here."""

import json
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any

from anamorph.digests import digest
from anamorph.errors import ArtifactError
from anamorph.interface import Axis, Dimension, Interface, Port, Scaled
from anamorph.linked import Constant, Linked, open_linked

MANIFEST = "anamorph.json"
DRAFT = "anamorph.draft.json"
"""What the manifest is called until the folder is certified: a draft does not load."""
SCHEMA = 1
"""Version of the manifest; a newer one is refused."""
PORTABLE, NATIVE = "portable", "native"
"""Signatures: the inputs that other tools feed, or also our own optional ones."""
VERIFIED, FAILED, UNVERIFIED = "verified", "failed", "unverified"


@dataclass(frozen=True)
class FileRecord:
    """Size (bytes) and SHA-256 (hexadecimal) of one file."""

    size: int
    sha256: str

    @classmethod
    def of(cls, path: Path) -> "FileRecord":
        """Measure a file."""
        return cls(path.stat().st_size, digest(path))


@dataclass(frozen=True)
class Difference:
    """How far one output is from the reference: relative L2 norm, and the largest difference of any value."""

    relative_l2: float
    max_abs: float


@dataclass(frozen=True)
class Part:
    """One exported function: `file` is opened by the engine, `files` (relative to the artifact) are its own.

    `constants` say from which tensor of the checkpoint each weight of the graph comes. Those that are linked stay
    there, in the files `linked` (relative to the checkpoint). `storage` is the type of the weights on disk, "linked"
    where they are the checkpoint's own. `status` is "verified", "failed" or "unverified: why"; `errors` are
    the largest differences per output that were measured when it was written, with float32 execution. `taps` names
    the value of the graph that each block of the model ends with, in the order in which they are computed. `rewrites`
    are those by which the graph computes; see `anamorph.rewrites`.
    """

    component: str
    file: str
    files: Mapping[str, FileRecord]
    interface: Interface
    storage: str
    status: str
    errors: Mapping[str, Difference] = field(default_factory=dict)
    taps: Mapping[str, str] = field(default_factory=dict)
    constants: Mapping[str, Constant] = field(default_factory=dict)
    linked: Mapping[str, FileRecord] = field(default_factory=dict)
    rewrites: tuple[str, ...] = ()

    @property
    def size(self) -> int:
        """Of its files and of the weights that these leave in the checkpoint."""
        return sum(record.size for record in (*self.files.values(), *self.linked.values()))


@dataclass(frozen=True)
class Artifact:
    """An exported pipeline.

    `signature` is "portable" (what other tools feed) or "native" (with the optional inputs of our own). `source`
    names the checkpoint that it was made from and the SHA-256 over its weights; `image` holds the certificate of the
    whole pipeline; `versions` those of the packages that wrote it.
    """

    folder: Path
    format: str
    signature: str
    parts: Mapping[str, Part]
    source: Mapping[str, str]
    image: Mapping[str, Any]
    versions: Mapping[str, str]

    def open_part(self, name: str) -> Path:
        """The file that the engine opens, after comparing all files of the part with their records.

        Raises ArtifactError: the part or one of its files is missing, truncated or another one.
        """
        if name not in self.parts:
            raise ArtifactError(f"{self.folder} holds no {name}; it holds {', '.join(self.parts)}; export it again")
        part = self.parts[name]
        for path, record in self._records(part):
            _check_size(path, record)
            if FileRecord.of(path) != record:
                raise ArtifactError(f"{path} is not the file of the export (SHA-256); export again")
        return self.folder / part.file

    def open_weights(self, name: str) -> dict[str, Linked]:
        """The weights that a part takes from the checkpoint, mapped; call it after `open_part`, which checks them."""
        part = self.parts[name]
        return open_linked({file: self.checkpoint / file for file in part.linked}, part.constants)

    @property
    def checkpoint(self) -> Path:
        """The checkpoint that it was made from, where linked weights lie."""
        return Path(self.source["name"])

    def check_sizes(self) -> None:
        """Raise ArtifactError where a file is missing or has another size than when it was written."""
        for part in self.parts.values():
            for path, record in self._records(part):
                _check_size(path, record)

    def _records(self, part: Part) -> Iterator[tuple[Path, FileRecord]]:
        for relative, record in part.files.items():
            yield self.folder / relative, record
        for relative, record in part.linked.items():
            yield self.checkpoint / relative, record

    def to_json(self) -> str:
        """The text of the manifest."""
        values = {
            "schema": SCHEMA,
            "format": self.format,
            "signature": self.signature,
            "source": dict(self.source),
            "versions": dict(self.versions),
            "image": dict(self.image),
            "parts": {
                name: {**asdict(part), "interface": interface_to_dict(part.interface)}
                for name, part in self.parts.items()
            },
        }
        return json.dumps(values, indent=1) + "\n"


def _check_size(path: Path, record: FileRecord) -> None:
    if not path.is_file():
        raise ArtifactError(f"{path} is missing; the artifact is incomplete; export it again")
    if (size := path.stat().st_size) != record.size:
        raise ArtifactError(f"{path} has {size} bytes, {MANIFEST} records {record.size}; export it again")


def is_artifact(folder: Path) -> bool:
    """Whether a folder was exported, as opposed to a checkpoint."""
    return (folder / MANIFEST).is_file()


def read_artifact(folder: Path, made_from: Path | None = None, manifest: str = MANIFEST) -> Artifact:
    """Read the manifest and compare the files' sizes with it; contents are compared when a part is opened.

    Linked weights are looked for in `made_from`, or where the checkpoint lay when it was exported. Only the exporter
    opens a draft, by its `manifest`'s name.
    Raises ArtifactError: the manifest is of a newer schema, damaged, or names files outside its folder; a file is
    missing or has another size.
    """
    path = folder / manifest
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        schema = values["schema"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ArtifactError(f"{path} cannot be read ({error}); export the checkpoint again") from None
    if schema != SCHEMA:
        raise ArtifactError(
            f"{path} has schema {schema!r}, this version reads {SCHEMA}; update anamorph or export again"
        )
    try:
        parts = {str(name): _part(value) for name, value in values["parts"].items()}
        source = {**values["source"], **({} if made_from is None else {"name": str(made_from)})}
        artifact = Artifact(
            folder, str(values["format"]), str(values["signature"]), parts, source, values["image"], values["versions"]
        )
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise ArtifactError(
            f"{path} is damaged ({type(error).__name__}: {error}); export the checkpoint again"
        ) from None
    _check_paths(artifact)
    artifact.check_sizes()
    return artifact


def _part(value: Mapping[str, Any]) -> Part:
    return Part(
        value["component"],
        value["file"],
        _files(value["files"]),
        interface_from_dict(value["interface"]),
        value["storage"],
        value["status"],
        {name: Difference(**measured) for name, measured in value["errors"].items()},
        {str(block): str(name) for block, name in value["taps"].items()},
        {str(name): _constant(constant) for name, constant in value["constants"].items()},
        _files(value["linked"]),
        tuple(str(name) for name in value["rewrites"]),
    )


def _files(value: Mapping[str, Any]) -> dict[str, FileRecord]:
    return {str(name): FileRecord(int(record["size"]), str(record["sha256"])) for name, record in value.items()}


def _constant(value: Mapping[str, Any]) -> Constant:
    return Constant(**{**value, "shape": tuple(int(size) for size in value["shape"])})


def _check_paths(artifact: Artifact) -> None:
    for name, part in artifact.parts.items():
        if part.file not in part.files:
            raise ArtifactError(f"{artifact.folder}/{MANIFEST} does not record {part.file} of {name}; it is refused")
        for relative in (*part.files, *part.linked):
            if not inside(relative):
                raise ArtifactError(
                    f"{artifact.folder}/{MANIFEST} names {relative!r}, outside its folder; it is refused"
                )


def inside(relative: str) -> bool:
    """Whether a relative path of a manifest or model file stays in its folder."""
    place = PurePosixPath(relative.replace("\\", "/"))
    return not place.is_absolute() and ".." not in place.parts and ":" not in relative and relative != ""


def interface_to_dict(interface: Interface) -> dict[str, Any]:
    """An interface as plain JSON types."""

    def port(value: Port) -> dict[str, Any]:
        return {**asdict(value), "axes": [axis if isinstance(axis, int) else asdict(axis) for axis in value.axes]}

    return {
        "component": interface.component,
        "inputs": [port(value) for value in interface.inputs],
        "outputs": [port(value) for value in interface.outputs],
        "sizes": [dict(listed) for listed in interface.sizes],
    }


def interface_from_dict(values: Mapping[str, Any]) -> Interface:
    """The inverse of `interface_to_dict`; raises KeyError or TypeError on a damaged one."""

    def dimension(value: Any) -> Dimension:
        if isinstance(value, int):
            return value
        return Scaled(**value) if "axis" in value else Axis(**value)

    def port(value: Mapping[str, Any]) -> Port:
        return Port(**{**value, "axes": tuple(dimension(axis) for axis in value["axes"])})

    inputs, outputs = (tuple(port(value) for value in values[key]) for key in ("inputs", "outputs"))
    sizes = tuple(tuple((str(axis), int(size)) for axis, size in listed.items()) for listed in values.get("sizes", ()))
    return Interface(values["component"], inputs, outputs, sizes)
