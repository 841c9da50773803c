"""Configurations: diffusers' `config.json`, completed with defaults, checked, immutable."""

import difflib
import json
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from anamorph.errors import CheckpointError, ConfigError


class Config(Mapping[str, Any]):
    """An immutable mapping whose keys are attributes too.

    It holds every key of the file it was read from, also those that this class does not use, so that saving it
    gives back what was loaded.
    """

    _values: dict[str, Any]

    def __init__(self, values: Mapping[str, Any]) -> None:
        object.__setattr__(self, "_values", {key: _frozen(value) for key, value in values.items()})

    def __getitem__(self, key: str) -> Any:
        return self._values[key]

    def __getattr__(self, key: str) -> Any:
        if key.startswith("__"):  # keeps copy and pickle from recursing before `_values` exists
            raise AttributeError(key)
        try:
            return self._values[key]
        except KeyError:
            raise AttributeError(f"the configuration has no key {key!r}") from None

    def __setattr__(self, key: str, value: Any) -> None:
        raise AttributeError(f"a configuration cannot be changed (tried to set {key!r}); use replace({key}=...)")

    def __iter__(self) -> Iterator[str]:
        return iter(self._values)

    def __len__(self) -> int:
        return len(self._values)

    def __repr__(self) -> str:
        return f"Config({self._values!r})"

    def __reduce__(self) -> tuple[type["Config"], tuple[dict[str, Any]]]:
        return Config, (self._values,)

    def replace(self, **changes: Any) -> "Config":
        """A copy with some keys changed."""
        return Config({**self._values, **changes})

    def to_json(self) -> str:
        """The text of a `config.json`, keys sorted as diffusers sorts them."""
        return json.dumps(self._values, indent=2, sort_keys=True) + "\n"


def complete(class_name: str, given: Mapping[str, Any], defaults: Mapping[str, Any], family: Iterable[str]) -> Config:
    """Fill `given` up with `defaults`, refusing keys that no class of the family knows.

    `family` lists the keys of every class that shares this kind of file (all schedulers, say): diffusers writes
    such foreign keys into its files, so they are kept. Keys that begin with `_` are diffusers' own notes.

    Raises ConfigError: a key that is neither in `defaults` nor in `family`.
    """
    known = {*defaults, *family}
    for key in given:
        if key not in known and not key.startswith("_"):
            near = difflib.get_close_matches(key, known, 1)
            hint = f"did you mean {near[0]!r}?" if near else f"it knows {', '.join(sorted(defaults))}"
            raise ConfigError(f"{class_name} does not know the configuration key {key!r}; {hint}")
    return Config({**defaults, **given, "_class_name": class_name})


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object.

    Raises CheckpointError: the file is missing, is no JSON, or holds something else than an object.
    """
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CheckpointError(f"{path} is missing; is {path.parent} a complete checkpoint folder?") from None
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise CheckpointError(f"{path} cannot be read as JSON: {error}") from None
    if not isinstance(value, dict):
        raise CheckpointError(f"{path} holds a {type(value).__name__}, expected a JSON object")
    return value


def _frozen(value: Any) -> Any:
    return tuple(_frozen(item) for item in value) if isinstance(value, list | tuple) else value
