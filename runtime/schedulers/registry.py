"""Which class a configuration file means."""

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from anamorph.config import read_json
from anamorph.errors import ConfigError

if TYPE_CHECKING:
    from anamorph.schedulers.base import Scheduler

FILE = "scheduler_config.json"

SchedulerType = TypeVar("SchedulerType", bound="type[Scheduler]")
SCHEDULERS: dict[str, type["Scheduler"]] = {}
"""All scheduler classes by the name that stands in `_class_name`."""


def register(cls: SchedulerType) -> SchedulerType:
    """Enter a class into SCHEDULERS."""
    SCHEDULERS[cls.__name__] = cls
    return cls


def read_config(folder: str | Path) -> dict[str, Any]:
    """The contents of a folder's `scheduler_config.json`."""
    return read_json(Path(folder) / FILE)


def load_scheduler(config: Mapping[str, Any]) -> "Scheduler":
    """Build the class that the configuration names in `_class_name`.

    Raises ConfigError: it names none, or one that does not exist here.
    """
    name = config.get("_class_name")
    if name not in SCHEDULERS:
        raise ConfigError(f"the scheduler class {name!r} is not known; there are {', '.join(sorted(SCHEDULERS))}")
    return SCHEDULERS[str(name)].from_config(config)


def scheduler_from_folder(folder: str | Path) -> "Scheduler":
    """Build the scheduler whose `scheduler_config.json` lies in `folder`."""
    return load_scheduler(read_config(folder))
