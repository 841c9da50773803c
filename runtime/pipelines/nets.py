"""Several models in one place of a pipeline, as diffusers lists and stores them."""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Self

from anamorph.checkpoint import SEVERAL, Source, numbered, open_checkpoint
from anamorph.components import Component
from anamorph.errors import InputError
from anamorph.pipelines.loaded import Loaded, Shown
from anamorph.pipelines.slots import Slot, Slots


class Several:
    """Models that a pipeline holds in one place; their residuals add up."""

    def __init__(self, nets: Sequence[Any]) -> None:
        if not nets:
            raise InputError(f"{type(self).__name__} got an empty list; give at least one model")
        self.nets = tuple(nets)

    @classmethod
    def from_pretrained(cls, folder: str | Path, **options: Any) -> Self:
        """Load the models of `folder`, `folder`_1, ... ; see the class of one of them."""
        from anamorph.models import MODELS

        kind, place = MODELS[SEVERAL[cls.__name__]], Path(folder)
        return cls([kind.from_pretrained(each, **options) for each in numbered(place)])

    def save_pretrained(self, folder: str | Path, *, variant: str | None = None) -> None:
        """Write the models into `folder`, `folder`_1, ..."""
        for index, net in enumerate(self.nets):
            net.save_pretrained(f"{folder}_{index}" if index else folder, variant=variant)


class MultiControlNetModel(Several):
    """Several ControlNets, each with a picture and a weight of its own."""


class MultiControlNetUnionModel(Several):
    """Several ControlNets for many kinds of pictures, each with a picture and a weight of its own."""


class MultiAdapter(Several):
    """Several T2I-Adapters, each with a picture and a weight of its own."""

    @property
    def adapters(self) -> tuple[Any, ...]:
        """The same as `nets`."""
        return self.nets


def class_of(value: Any) -> str:
    """The class of a model as callers give it, or of the first of several; raises CheckpointError: it is not there."""
    if (nets := _listed("the list of nets", value)) is not None:
        return class_of(nets[0])
    if isinstance(value, str | Path):
        return open_checkpoint(Source(str(value))).class_name
    value = getattr(value, "_orig_mod", value)  # what torch.compile made it of
    if isinstance(value, Shown):
        value = value.loaded
    if isinstance(value, Loaded):
        value = value.component
    return value.class_name if isinstance(value, Component) else type(value).__name__


def _listed(name: str, value: Any) -> Sequence[Any] | None:
    """Several models of one place, or None; raises InputError: the list is empty."""
    nets = value.nets if isinstance(value, Several) else value
    if not isinstance(nets, list | tuple):
        return None
    if not nets:
        raise InputError(f"{name} is an empty list; give at least one model")
    return nets


def unpacked(slots: Slots, given: Mapping[str, Any]) -> dict[str, Any]:
    """Components by name, lists of models in one place as `name`, `name`_1, ..."""
    result: dict[str, Any] = {}
    for name, value in given.items():
        nets = _listed(name, value) if name in slots and slots[name].several is not None else None
        result |= {name: value} if nets is None else {
            f"{name}_{index}" if index else name: each for index, each in enumerate(nets)
        }  # fmt: skip
    return result


def spread(slots: Slots, names: Iterable[str]) -> dict[str, Slot]:
    """The slots with one for each further model among `names`, behind the first."""
    names = list(names)
    result: dict[str, Slot] = {}
    for name, slot in slots.items():
        result[name] = slot
        if slot.several is not None:
            result |= {other: slot for other in names if place_of(slots, other) == name and other != name}
    return result


def place_of(slots: Slots, name: str) -> str:
    """The slot that a component's name belongs to: `name`_1 lies in that of `name`, where that takes several."""
    first, _, number = name.rpartition("_")
    return first if first in slots and slots[first].several is not None and number.isdigit() else name


def filled(slots: Slots, name: str, names: Iterable[str]) -> list[str]:
    """Those of the components' names that lie in the place `name`."""
    return [each for each in names if place_of(slots, each) == name]


def several_of(class_name: str | None, nets: Sequence[Any]) -> Several:
    """Models of one place as what diffusers calls them together."""
    return next(kind for kind in Several.__subclasses__() if kind.__name__ == class_name)(nets)
