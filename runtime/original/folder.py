"""An original file as a checkpoint folder in diffusers' layout, kept in the user's cache so that it is made once."""

import hashlib
import json
import logging
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from anamorph.cache import cache_folder
from anamorph.checkpoint import VERSION_WRITTEN
from anamorph.config import read_json
from anamorph.drafts import drafted
from anamorph.errors import CheckpointError
from anamorph.hub import Source, find_folder
from anamorph.original.kinds import Kind, recognise
from anamorph.original.parts import Converted
from anamorph.original.reading import open_original
from anamorph.tokenizer import ClipTokenizer
from anamorph.weights import write_safetensors

log = logging.getLogger(__name__)

LAYOUT = 1
"""Raised whenever the same file gives another folder."""
CONFIGS = ("*.json", "*.txt")
FILLER = "!"
"""What OpenCLIP's tokenizer fills texts up with."""


@dataclass(frozen=True)
class Wishes:
    """How a file is to be read.

    `config` names a checkpoint folder or hub id whose configurations and tokenizers count; without it they are read
    off the shapes, and the tokenizers are looked for beside the file, then on the hub. `tokenizers` are given ones.
    """

    config: str | None = None
    extract_ema: bool = False
    prediction_type: str | None = None
    cache_dir: str | None = None
    local_files_only: bool = False
    tokenizers: Mapping[str, ClipTokenizer] = field(default_factory=dict)


def as_folder(path: Path, wishes: Wishes) -> Path:
    """The folder that holds the file's models; written now if it is not in the cache.

    Raises CheckpointError: the file is damaged or of another kind, or there is no tokenizer for it.
    Raises ConfigError: no pipeline is served for its denoiser. Raises OutputError: the cache cannot be written.
    """
    kind = recognise(open_original(path), ema=wishes.extract_ema, prediction=wishes.prediction_type)
    config = config_folder(wishes)
    if config is not None:
        kind = _configured(kind, config)
    tokenizers = {slot: _tokenizer(path, kind, slot, config, wishes) for slot in kind.tokenizers}
    texts = _texts(kind)
    place = cache_folder() / "single-files" / _key(path, texts, tokenizers, wishes)
    if place.is_dir():
        log.info("%s: taking the converted folder %s", path, place)
        return place
    log.info("%s: converting once, into %s", path, place)
    with drafted(place) as draft:
        if draft is not None:
            _write(draft, kind, texts, tokenizers)
    return place


def _write(draft: Path, kind: Kind, texts: Mapping[str, str], tokenizers: Mapping[str, ClipTokenizer]) -> None:
    for name, text in texts.items():
        (draft / name).parent.mkdir(exist_ok=True)
        (draft / name).write_text(text, encoding="utf-8")
    for slot, tokenizer in tokenizers.items():
        tokenizer.save_pretrained(draft / slot)
    for model in kind.models:
        write_safetensors(draft / model.slot / f"{model.stem}.safetensors", model.tensors)


def _texts(kind: Kind) -> dict[str, str]:
    """File -> content of everything but weights and vocabularies."""
    encoders = ("text_encoder", "text_encoder_2") if "XL" in kind.class_name else ("text_encoder",)
    empty = (*encoders, *map(_tokenizer_of, encoders), "feature_extractor", "image_encoder")
    empty = empty if "XL" in kind.class_name else (*empty, "safety_checker")
    index: dict[str, Any] = {
        "_class_name": kind.class_name,
        "_diffusers_version": VERSION_WRITTEN,
        **kind.settings,
        **{slot: [None, None] for slot in empty},
        **{slot: ["transformers", "CLIPTokenizer"] for slot in kind.tokenizers},
        **{model.slot: [model.library, model.class_name] for model in kind.models},
        "scheduler": ["diffusers", kind.scheduler["_class_name"]],
    }
    files = {"model_index.json": index, "scheduler/scheduler_config.json": kind.scheduler}
    files |= {f"{model.slot}/config.json": model.config for model in kind.models}
    return {name: json.dumps(value, indent=2, sort_keys=True) + "\n" for name, value in files.items()}


def _tokenizer_of(encoder: str) -> str:
    return encoder.replace("text_encoder", "tokenizer")


def _configured(kind: Kind, folder: Path) -> Kind:
    """The same with what the folder configures: pipeline, scheduler and models, as far as it has them."""
    if (index := folder / "model_index.json").is_file():
        values = read_json(index)
        settings = {key: value for key, value in values.items() if not key.startswith("_") and not _is_slot(value)}
        kind = replace(kind, class_name=str(values.get("_class_name", kind.class_name)), settings=settings)
    if (scheduler := folder / "scheduler" / "scheduler_config.json").is_file():
        kind = replace(kind, scheduler=read_json(scheduler))
    return replace(kind, models=[configured(model, folder) for model in kind.models])


def configured(model: Converted, folder: Path) -> Converted:
    """The model with the configuration that the checkpoint folder has for it, if it has one."""
    for path in (folder / model.slot / "config.json", folder / "config.json"):
        if path.is_file():
            return replace(model, config=read_json(path))
    return model


def _is_slot(value: Any) -> bool:
    return isinstance(value, list) and len(value) == 2


def config_folder(wishes: Wishes) -> Path | None:
    """The folder that `config` names, or None; of a hub id the configurations alone are downloaded."""
    if wishes.config is None:
        return None
    source = Source(wishes.config, cache_dir=wishes.cache_dir, local_files_only=wishes.local_files_only)
    return find_folder(source, CONFIGS)


def _tokenizer(path: Path, kind: Kind, slot: str, config: Path | None, wishes: Wishes) -> ClipTokenizer:
    """The tokenizer for a slot: given, configured, beside the file, or from the hub; CLIP's are all the same words."""
    if slot in wishes.tokenizers:
        return wishes.tokenizers[slot]
    homes = [config] if config is not None else [path.parent, path.with_suffix("")]
    for home in homes:
        for name in dict.fromkeys((slot, "tokenizer")):
            if (home / name / "tokenizer_config.json").is_file():
                return _filled(ClipTokenizer.from_pretrained(home / name), kind.tokenizers[slot], name != slot)
    needed = (
        "a file holds no vocabulary; put a folder tokenizer with vocab.json, merges.txt and tokenizer_config.json "
        "beside it, or name a checkpoint folder or hub id that has one with config="
    )
    if config is not None:
        raise CheckpointError(f"{config} has no {slot}; {needed}")
    hub = Source(kind.hub_id, cache_dir=wishes.cache_dir, local_files_only=wishes.local_files_only)
    try:
        home = find_folder(hub, [f"{slot}/*"])
        return ClipTokenizer.from_pretrained(home / slot)
    except CheckpointError as error:
        raise CheckpointError(f"{path} has no tokenizer beside it, and {kind.hub_id} gave none: {needed}") from error


def _filled(tokenizer: ClipTokenizer, filler: bool, foreign: bool) -> ClipTokenizer:
    """A tokenizer of another slot, with what this one's texts are filled up with."""
    return tokenizer.replace(pad_token=FILLER) if foreign and filler else tokenizer


def _key(path: Path, texts: Mapping[str, str], tokenizers: Mapping[str, ClipTokenizer], wishes: Wishes) -> str:
    """A name for the folder that stands for everything that decides what it holds; the file counts by its stamp."""
    stamp = path.stat()
    words = {slot: tokenizer.to_json() + tokenizer.config.to_json() for slot, tokenizer in tokenizers.items()}
    content = [LAYOUT, str(path), stamp.st_size, stamp.st_mtime_ns, wishes.extract_ema, dict(texts), words]
    return f"{path.stem}-{hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:16]}"
