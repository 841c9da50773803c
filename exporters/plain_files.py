"""What lies beside the models in every folder, and is the same for every engine."""

import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from anamorph.checkpoint import ALONE, Checkpoint
from anamorph.components import Component
from anamorph.exporters.settling import slots_of
from anamorph.pipelines.slots import KINDS, Tokenizer, read_slot
from anamorph.schedulers.registry import FILE


def copy_rest(checkpoint: Checkpoint, components: Sequence[Component], draft: Path) -> None:
    """Index, schedulers and tokenizers; slots that were not exported become empty, so that no loader looks for them."""
    if checkpoint.class_name in ALONE:
        shutil.copy(checkpoint.folder / "config.json", draft)
        return
    index: dict[str, Any] = json.loads((checkpoint.folder / "model_index.json").read_text(encoding="utf-8"))
    copied = _plain_files(checkpoint)
    kept = {*(component.name for component in components), *copied}
    for name in checkpoint.components:
        if name not in kept:
            index[name] = [None, None]
    (draft / "model_index.json").write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
    for name in copied:
        if checkpoint.flat:  # nothing but a scheduler lies beside a model
            (draft / name).mkdir()
            shutil.copy(checkpoint.folder / FILE, draft / name)
        else:
            shutil.copytree(checkpoint.place(name), draft / name)
    for name, tokenizer in tokenizers_of(checkpoint).items():
        vocabulary = draft / name / "tokenizer.json"
        if not vocabulary.exists():
            vocabulary.write_text(tokenizer.to_json(), encoding="utf-8")


def _plain_files(checkpoint: Checkpoint) -> list[str]:
    """The components that are no models: they are the same for every engine."""
    plain = (name for name, slot in slots_of(checkpoint).items() if slot.kind in KINDS)
    return [name for name in plain if checkpoint.components.get(name) is not None]


def tokenizers_of(checkpoint: Checkpoint) -> dict[str, Tokenizer]:
    slots = slots_of(checkpoint)
    read = {name: read_slot(checkpoint, name, slots[name]) for name in _plain_files(checkpoint)}
    return {name: value for name, value in read.items() if isinstance(value, Tokenizer)}
