"""What a caller wishes of where and how components run, by component, part or for all."""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from anamorph.components import Component
from anamorph.engine import PRECISIONS, Backend, Target
from anamorph.errors import InputError
from anamorph.guard import missing as lacking
from anamorph.guard import places_here
from anamorph.memory import APART, JOINT
from anamorph.plugins import choose_backend, get_backend, list_backends
from anamorph.profiles import Profile, applying
from anamorph.rewrites import Wish

log = logging.getLogger(__name__)

SHORT = {"fp32": "float32", "fp16": "float16", "bf16": "bfloat16"}


@dataclass(frozen=True)
class Given:
    """The arguments of `from_pretrained` that say where and how a pipeline runs, as the caller gave them.

    Raises InputError: `guidance_batch` is neither "joint" nor "apart".
    """

    backend: str | Mapping[str, str] = "auto"
    device: Any = None
    torch_dtype: Any = None
    rewrites: Wish = None
    backend_options: Mapping[str, Any] | None = None
    trust_remote_code: bool = False
    guidance_batch: str | None = None

    def __post_init__(self) -> None:
        if self.guidance_batch not in (JOINT, APART, None):
            raise InputError(f"guidance_batch is {self.guidance_batch!r}, expected {JOINT} or {APART}")


@dataclass(frozen=True)
class Wishes:
    """What the caller asked for, per component name, part name or "default"."""

    backend: Mapping[str, str]
    device: Mapping[str, str | None]
    precision: Mapping[str, str | None]
    rewrites: Wish = None
    """Not per part: each rewrite knows its own."""
    options: Mapping[str, Mapping[str, str]] = field(default_factory=lambda: {"default": {}})
    trusted: bool = False

    @classmethod
    def of(cls, given: Given, names: Sequence[str]) -> "Wishes":
        """Normalise the arguments of `from_pretrained`.

        Raises InputError: a mapping names no component of the pipeline, or a precision is unknown.
        """
        devices = _per_component(given.device, None, names, "device")
        dtypes = _per_component(given.torch_dtype, None, names, "torch_dtype")
        return cls(
            _per_component(given.backend, "auto", names, "backend"),
            {key: None if value is None else str(value) for key, value in devices.items()},
            {key: None if value is None else precision_name(value) for key, value in dtypes.items()},
            given.rewrites,
            _options(given.backend_options, names),
            given.trust_remote_code,
        )

    def backend_of(self, component: Component, part: str) -> Backend:
        """The engine for one part; `auto` is decided by what was measured or what the component holds, and logged."""
        wish = _pick(self.backend, component.name, part)
        if wish != "auto":
            return get_backend(wish)
        if (profile := self.profile_of(component, part)) is not None:
            backend, reason = get_backend(profile.engine), f"auto: {profile}"
        else:
            backend, reason = choose_backend(component.content)
        log.info("%s: engine %s (%s)", part, backend.name, reason)
        return backend

    def profile_of(self, component: Component, part: str) -> Profile | None:
        """What was measured to be best here for this checkpoint, where the caller leaves the choice and the device."""
        engine, device = _pick(self.backend, component.name, part), _pick(self.device, component.name, part)
        if engine != "auto" or component.checkpoint is None or component.artifact is not None or device is not None:
            return None
        profile = applying(component.checkpoint, _pick(self.precision, component.name, part))
        if profile is None or (profile.quality and self.rewrites is not None):
            return None
        backend = list_backends().get(profile.engine)
        return None if backend is None or lacking(backend) is not None else profile

    def target_of(self, component: Component, part: str, backend: Backend) -> Target:
        """Device and precision for one part; what the caller left open was measured, or is the engine's first."""
        places = places_here(backend)
        device = _pick(self.device, component.name, part) or next(iter(places))
        profile = self.profile_of(component, part)
        precision = _pick(self.precision, component.name, part) or (None if profile is None else profile.precision)
        chosen = precision or places.get(device, tuple(PRECISIONS))[0]
        return Target(device, chosen, self.options_of(component, part), self.trusted)

    def options_of(self, component: Component, part: str) -> tuple[tuple[str, str], ...]:
        """What the engine of one part is told beside that."""
        return tuple(sorted(_pick(self.options, component.name, part).items()))


def single_wish(wishes: Mapping[str, Any]) -> tuple[str, str | None, str | None]:
    """Engine, device and precision for all components alike; raises InputError where they are to differ."""
    one = Wishes.of(Given(**wishes), ())
    return one.backend["default"], one.device["default"], one.precision["default"]


def precision_name(value: Any) -> str:
    """`torch.bfloat16`, "bfloat16" or "bf16" -> "bfloat16".

    Raises InputError: the precision is unknown.
    """
    name = str(value).removeprefix("torch.")
    name = SHORT.get(name, name)
    if name not in PRECISIONS:
        raise InputError(f"precision {value!r} is unknown; expected one of {', '.join((*PRECISIONS, *SHORT))}")
    return name


def _options(value: Mapping[str, Any] | None, names: Sequence[str]) -> dict[str, Mapping[str, str]]:
    """Options of engines for all components, or for those that are named; values as texts.

    Raises InputError: a component is unknown, or options are no mapping.
    """
    if value is None or not all(isinstance(one, Mapping) for one in value.values()):
        value = {"default": value or {}}
    found = _per_component(value, {}, names, "backend_options")
    return {name: {key: str(one) for key, one in options.items()} for name, options in found.items()}


def _per_component(value: Any, default: Any, names: Sequence[str], argument: str) -> dict[str, Any]:
    if not isinstance(value, Mapping):
        return {"default": default if value is None else value}
    if strange := [key for key in value if key not in names and key != "default"]:
        raise InputError(f"{argument} names {', '.join(map(str, strange))}; expected default, {', '.join(names)}")
    return {"default": default, **value}


def _pick(wishes: Mapping[str, Any], component: str, part: str) -> Any:
    return wishes.get(part, wishes.get(component, wishes["default"]))
