"""Which adapters a component has, which of them are in force, and its programs as callers see them."""

import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

from anamorph.arrays import Array, Arrays
from anamorph.components import Component
from anamorph.engine import Placement, Program, Session
from anamorph.errors import BackendError
from anamorph.guard import Held
from anamorph.interface import Interface
from anamorph.lora.factors import Change, Factors, Layers, nothing, padded, summed
from anamorph.lora.ports import factor_ports, inputs_of, without_factors
from anamorph.memory import Saving

if TYPE_CHECKING:
    from anamorph.pipelines.loaded import Loaded

Weight = float | Mapping[str, float]
"""How much of an adapter counts: everywhere, or by parts of layers' names; layers that none names count whole."""


@runtime_checkable
class Adaptable(Protocol):
    """A program of a model whose layers can be changed, while it runs or before it is opened."""

    def layers(self) -> Layers:
        """The layers that can be changed; raises BackendError where there are none, and says why."""

    def ranks(self, rank: int) -> int | None:
        """The rank at which all layers' factors come where one has `rank`; None: each comes as it is, or not at all."""


def layers_of(programs: Mapping[str, Program]) -> dict[str, tuple[int, ...]]:
    """The layers of a component that can be changed; raises BackendError: its engine takes no adapters."""
    found: dict[str, tuple[int, ...]] = {}
    for part, program in programs.items():
        able = _able(program)
        if able is None:
            raise BackendError(f"{part} runs on {program.placement.engine}, which takes no adapters; name another one")
        found |= able.layers()
    return found


def _able(program: Program) -> Adaptable | None:
    """What an engine opened, where it can be changed."""
    inner = program.program if isinstance(program, Held) else program
    return inner if isinstance(inner, Adaptable) else None


def weight_of(layer: str, weight: Weight) -> float:
    """How much of an adapter counts in a layer."""
    if not isinstance(weight, Mapping):
        return weight
    return next((value for part, value in weight.items() if part in layer), 1.0)


def weighed(change: Change, weight: Weight, scale: float = 1.0) -> dict[str, Factors]:
    """A change as far as it counts; layers in which it does not are left out."""
    weights = {layer: scale * weight_of(layer, weight) for layer in change}
    return {layer: one.times(weights[layer]) for layer, one in change.items() if weights[layer]}


Open = Callable[[Component], Mapping[str, Program]]


@dataclass
class Adapting:
    """The adapters of one component, which `component` was opened for as `programs`, by `open`.

    `known` are loaded, those of them in `active` count, `fused` are part of the weights. Programs are opened for the
    layers that known adapters change, when they are next asked for; while they run, factors come with each call.
    """

    component: Component
    programs: Mapping[str, Program]
    open: Open
    known: dict[str, Change] = field(default_factory=dict)
    active: dict[str, Weight] = field(default_factory=dict)
    fused: dict[str, Change] = field(default_factory=dict)
    enabled: bool = True
    savings: list[Saving] = field(default_factory=list)
    stale: bool = False
    """Whether adapters came or went since `programs` were opened."""
    melted: Mapping[str, Change] = field(default_factory=dict)
    """What is fused in `programs`."""
    lock: threading.RLock = field(default_factory=threading.RLock)
    last: tuple[float, Mapping[str, Factors]] | None = None
    """At which scale something counted in the last call, and what."""

    def renew(self) -> None:
        """Take note that adapters came or went."""
        with self.lock:
            self.stale, self.last = True, None

    def choose(self, active: dict[str, Weight]) -> None:
        """Let these adapters and no others count."""
        with self.lock:
            self.active, self.last = active, None

    @property
    def asked(self) -> Component:
        """The component as engines shall open it for these adapters."""
        free = [change for name, change in self.known.items() if name not in self.fused]
        hot = {layer: (len(one.up), *one.down.shape[1:]) for change in free for layer, one in change.items()}
        if hot and hot.items() <= self.component.adapted.items():  # those of adapters that have gone do no harm
            hot = dict(self.component.adapted)
        return replace(self.component, adapted=hot, fused=summed(list(self.fused.values())))

    def opened(self) -> Mapping[str, Program]:
        """The programs for the adapters of now."""
        with self.lock:
            if self.stale:
                asked, fused = self.asked, dict(self.fused)
                alike = fused.keys() == self.melted.keys() and all(fused[name] is self.melted[name] for name in fused)
                if asked.adapted != self.component.adapted or not alike:
                    programs = self.open(asked)
                    _check_taken(programs, asked.adapted)
                    self.programs, self.component, self.melted = programs, asked, fused
                    for saving in self.savings:
                        for program in self.programs.values():
                            program.spare(saving)
                self.stale = False
            return self.programs

    def counting(self, scale: float) -> Mapping[str, Factors]:
        """What comes with a call in which all counts `scale` times; nothing is computed anew while nothing changes."""
        if not self.enabled:
            return {}
        with self.lock:
            if self.last is None or self.last[0] != scale:
                hot = {name: weight for name, weight in self.active.items() if name not in self.fused}
                every = [weighed(self.known[name], weight, scale) for name, weight in hot.items()]
                self.last = scale, summed(every)
            return self.last[1]


def _check_taken(programs: Mapping[str, Program], adapted: Layers) -> None:
    """Raise BackendError where no program takes the factors of a layer: they would be lost without a word."""
    taken = {port.name for program in programs.values() for port in program.interface.inputs}
    if lost := [port.name for port in factor_ports(adapted) if port.name not in taken]:
        engine = next(iter(programs.values())).placement.engine
        raise BackendError(f"{engine} opened the model without {lost[0]}, which an adapter needs; name another engine")


@dataclass(frozen=True)
class Adapted:
    """A part of a component with adapters, as callers see it: an engine's program that gets factors with each call."""

    part: str
    adapting: Adapting
    scale: float = 1.0

    @property
    def program(self) -> Program:
        """The engine's."""
        return self.adapting.opened()[self.part]

    @property
    def interface(self) -> Interface:
        """See `Program.interface`."""
        return without_factors(self.program.interface)

    @property
    def placement(self) -> Placement:
        """See `Program.placement`; adapters that count are among the details."""
        placed, own = self.program.placement, self.adapting
        names = {"adapters": [name for name in own.active if own.enabled and name not in own.fused], "fused": own.fused}
        told = {key: " ".join(value) for key, value in names.items() if value}
        return replace(placed, details={**placed.details, **told})

    @property
    def arrays(self) -> Arrays:
        """See `Program.arrays`."""
        return self.program.arrays

    def layers(self) -> Layers:
        """See `Adaptable.layers`."""
        return layers_of({self.part: self.program})

    def ranks(self, rank: int) -> int | None:
        """See `Adaptable.ranks`."""
        able = _able(self.program)
        return None if able is None else able.ranks(rank)

    def session(self) -> Session:
        """A caller that gives the factors of now with each call."""
        program = self.program
        ports = {port.name for port in program.interface.inputs}
        change = self._whole(self.adapting.counting(self.scale))
        given = {name: program.arrays.put(value) for name, value in inputs_of(change).items() if name in ports}
        return Giving(program.session(), given)

    def _whole(self, change: Change) -> Change:
        """A change at the rank that the program takes, for all of its layers where it takes no fewer."""
        rank = self.ranks(max((one.rank for one in change.values()), default=0)) if change else None
        if rank is None:
            return change
        adapted = self.adapting.component.adapted
        return {layer: padded(change.get(layer) or nothing(shape), rank) for layer, shape in adapted.items()}

    def spare(self, saving: Saving) -> str | None:
        """See `Program.spare`; what is opened later is asked, too."""
        answer = self.program.spare(saving)
        if answer is None:
            self.adapting.savings.append(saving)
        return answer

    def shown(self, loaded: "Loaded") -> Any:
        """See `Program.shown`."""
        return self.program.shown(loaded)


@dataclass(frozen=True)
class Giving:
    """A session that gets further inputs with each call."""

    session: Session
    given: Mapping[str, Array]

    def __call__(self, inputs: Mapping[str, Array]) -> dict[str, Array]:
        return self.session({**inputs, **self.given})


def scaled(program: Program, scale: float) -> Program:
    """A program in whose calls all adapters count `scale` times; as it is where it has none."""
    return replace(program, scale=program.scale * scale) if isinstance(program, Adapted) else program


def adapting_of(loaded: "Loaded") -> Adapting | None:
    """The adapters of an opened component, if it ever had any."""
    return next((one.adapting for one in loaded.programs.values() if isinstance(one, Adapted)), None)


def adapted(loaded: "Loaded", adapting: Adapting) -> None:
    """Let a component have these adapters from now on."""
    loaded.programs.update({part: Adapted(part, adapting) for part in loaded.programs})
    forget_shown(loaded)


def forget_shown(loaded: "Loaded") -> None:
    """What the pipeline shows in the component's place belongs to programs that are opened anew."""
    vars(loaded).pop("shown", None)


def moved(loaded: "Loaded", before: Adapting, opener: Open) -> "Loaded":
    """A component that was opened anew elsewhere, with the adapters that it had before."""
    opened = Adapting(loaded.component, dict(loaded.programs), opener, before.known, before.active, before.fused)
    opened.enabled, opened.stale = before.enabled, True
    adapted(loaded, opened)
    return loaded
