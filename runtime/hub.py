"""Folders and files of the Hugging Face hub, through its own cache, with or without a connection."""

import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import TypedDict, TypeVar, Unpack

from anamorph.errors import CheckpointError

HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")
SMALL = (".json", ".txt", ".model")
"""Endings of what is always downloaded: configurations and vocabularies."""
STEMS = ("model", "pytorch_model", "diffusion_pytorch_model")
"""How the weight files of components are named."""
GRAPH = re.compile(r"\.onnx(_data)?$|\.xml$|openvino_\w+\.bin$")
"""Files of an exported folder."""
Found = TypeVar("Found")


@dataclass(frozen=True)
class Source:
    """Where to find a checkpoint, and which of its variants to take."""

    name: str
    revision: str | None = None
    cache_dir: str | Path | None = None
    local_files_only: bool = False
    variant: str | None = None


def find_folder(source: Source, patterns: Sequence[str] | None = None) -> Path:
    """A local folder, or that of a hub id in the hub's cache; what is missing there is downloaded.

    `patterns` limits what is downloaded; without it that is what a pipeline of the wished variant is loaded from.
    Raises CheckpointError: there is no such folder or id, or it cannot be had.
    """
    local = Path(source.name).expanduser()
    if local.is_dir():
        return local.resolve()
    if local.exists():
        raise CheckpointError(f"{local} is a file, expected a checkpoint folder; open it with from_single_file")
    if not HUB_ID.fullmatch(source.name):
        raise CheckpointError(f"there is no folder {source.name}, and it is no hub id of the form owner/name")

    def download() -> Path:
        from huggingface_hub import snapshot_download

        wanted = _wanted(source) if patterns is None else list(patterns)
        return Path(
            snapshot_download(
                source.name,
                revision=source.revision,
                cache_dir=source.cache_dir,
                local_files_only=source.local_files_only,
                allow_patterns=wanted,
            )
        )

    return _had(f"{source.name} is neither a local folder nor could it", download)


class HubOptions(TypedDict, total=False):
    """How a hub id is found: which `revision`, in which cache, and whether only there."""

    revision: str | None
    cache_dir: str | Path | None
    local_files_only: bool


def find_component(
    name: str | Path, subfolder: str | None, patterns: Sequence[str], **options: Unpack[HubOptions]
) -> Path:
    """The folder of one component: `subfolder` of a checkpoint, or itself; of a hub id it alone is downloaded.

    Raises CheckpointError: there is no such folder, or it cannot be had.
    """
    source = Source(str(name), **options)
    inside = f"{subfolder}/" if subfolder else ""
    folder = find_folder(source, [inside + pattern for pattern in patterns])
    place = folder / subfolder if subfolder else folder
    if not place.is_dir():
        raise CheckpointError(f"{folder} has no folder {subfolder!r}; name one that it has with subfolder=")
    return place


def download_file(source: Source, file: str) -> Path:
    """One file of a hub id; raises CheckpointError where it cannot be had."""

    def download() -> Path:
        from huggingface_hub import hf_hub_download

        return Path(
            hf_hub_download(
                source.name,
                file,
                revision=source.revision,
                cache_dir=source.cache_dir,
                local_files_only=source.local_files_only,
            )
        )

    return _had(f"{source.name}/{file} could not", download)


def _wanted(source: Source) -> list[str] | None:
    """Names of the files to download; None, which means all that is there, where only the cache is asked."""
    from huggingface_hub import HfApi, constants

    if source.local_files_only or constants.HF_HUB_OFFLINE:
        return None
    try:
        files = HfApi().list_repo_files(source.name, revision=source.revision)
    except Exception:  # each version of the package raises others; without a connection the cache decides
        return None
    return needed(files, source.variant)


def needed(files: Iterable[str], variant: str | None) -> list[str]:
    """What a pipeline is loaded from: small files, and per folder one form of its weights.

    That is the variant where the folder has it and the plain weights otherwise, as safetensors rather than pickles;
    graphs where there are no weights.
    """
    files = list(files)
    wanted = [name for name in files if PurePosixPath(name).suffix in SMALL]
    for folder in dict.fromkeys(str(PurePosixPath(name).parent) for name in files):
        inside = [name for name in files if str(PurePosixPath(name).parent) == folder]
        for tag in dict.fromkeys((variant, None)):
            forms = [[name for name in inside if _is_weight(name, tag, suffix)] for suffix in ("safetensors", "bin")]
            if chosen := next(filter(None, forms), None):
                wanted += chosen
                break
        else:
            wanted += [name for name in inside if GRAPH.search(name)]
    return wanted


def _is_weight(name: str, variant: str | None, suffix: str) -> bool:
    """Whether a file holds all or a shard of a component's weights of that variant."""
    tag = rf"\.{re.escape(variant)}" if variant else ""
    shard = r"(?:-\d+-of-\d+)?"
    pattern = rf"(?:{'|'.join(STEMS)})(?:{tag}{shard}|{shard}{tag})\.{suffix}"
    return re.fullmatch(pattern, PurePosixPath(name).name) is not None


def _had(what: str, download: Callable[[], Found]) -> Found:
    """What `download` gives; raises CheckpointError with the first line of what went wrong."""
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return download()
    except (LocalEntryNotFoundError, HfHubHTTPError, HFValidationError, OSError) as error:
        reason = str(error).strip().splitlines()[0]
        raise CheckpointError(f"{what} be had from the hub or its cache: {reason}") from None
