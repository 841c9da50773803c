"""The contract of an engine: prepare once, run many.

A *backend* opens a component and gives *programs* (weights and compiled code, shared by all threads). A program
gives *sessions* (whatever a call mutates, one per thread). The runtime calls sessions with arrays by name.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

from anamorph.arrays import Array, Arrays
from anamorph.artifact import Artifact
from anamorph.components import Component
from anamorph.entries import Key
from anamorph.interface import Interface
from anamorph.memory import Saving

if TYPE_CHECKING:
    from anamorph.pipelines.loaded import Loaded

PRECISIONS = {"float32": 32, "bfloat16": 16, "float16": 16}
"""Names of execution precisions and their bits."""


def kind_of(device: str) -> str:
    """The kind of a device: "cuda" of "cuda:1", "gpu" of "gpu.1"."""
    return device.partition(":")[0].partition(".")[0].lower()


@dataclass(frozen=True)
class Target:
    """Where and how a component shall run; `options` are the engine's own, by name.

    `trusted`: the caller vouches for machine code that an exported folder holds.
    """

    device: str = "cpu"
    precision: str = "float32"
    options: tuple[tuple[str, str], ...] = ()
    trusted: bool = False


@dataclass(frozen=True)
class Placement:
    """What really runs: read back from the opened program, never copied from the wish.

    `history` says for which sizes models were compiled or found in the cache, and why, one sentence each.
    """

    part: str
    engine: str
    device: str
    precision: str
    details: Mapping[str, str] = field(default_factory=dict)
    history: tuple[str, ...] = ()

    def __str__(self) -> str:
        notes = "".join(f", {key} {value}" for key, value in self.details.items())
        return f"{self.part}: {self.engine} on {self.device} in {self.precision}{notes}"


class Session(Protocol):
    """One thread's way to call a program."""

    def __call__(self, inputs: Mapping[str, Array]) -> dict[str, Array]:
        """Run once; inputs and outputs are named as in the program's interface, which the inputs were compared with."""


class Program(Protocol):
    """An opened part of a component, shared by all threads."""

    @property
    def interface(self) -> Interface:
        """Its inputs and outputs."""

    @property
    def placement(self) -> Placement:
        """Where it runs and in which precision, read back."""

    @property
    def arrays(self) -> Arrays:
        """The kind of array that its sessions take and return."""

    def session(self) -> Session:
        """A caller of its own for one thread."""

    def spare(self, saving: Saving) -> str | None:
        """Take memory otherwise from the next call on; None, or one sentence on why that does not apply here."""

    def shown(self, loaded: "Loaded") -> Any:
        """What a pipeline shows as its component of that name: `loaded`, or a model with the switches of that."""


class Graph:
    """What programs that run a finished graph share: how they take memory was settled when it was made."""

    if TYPE_CHECKING:

        @property
        def placement(self) -> Placement:
            """Where it runs."""

    def spare(self, saving: Saving) -> str | None:
        """See `Program.spare`."""
        return saving.refusal(self.placement.engine)

    def shown(self, loaded: "Loaded") -> Any:
        """See `Program.shown`."""
        return loaded


@dataclass(frozen=True)
class Around:
    """What programs that stand before another one share with it: everything but its calls."""

    program: Program

    @property
    def interface(self) -> Interface:
        """See `Program.interface`."""
        return self.program.interface

    @property
    def placement(self) -> Placement:
        """See `Program.placement`."""
        return self.program.placement

    @property
    def arrays(self) -> Arrays:
        """See `Program.arrays`."""
        return self.program.arrays

    def spare(self, saving: Saving) -> str | None:
        """See `Program.spare`."""
        return self.program.spare(saving)


@dataclass(frozen=True)
class Costs:
    """What weights cost with an engine.

    `memory`: bytes of memory for each byte of weights in the precision that runs; `disk`: precision -> bytes of the
    user's cache for each parameter, beside what an exporter writes.
    """

    memory: float = 1.0
    disk: Mapping[str, float] = field(default_factory=dict)


SIZES = {
    "any": "any size",
    "each": "any size, each compiled at its first call",
    "exported": "the sizes that it was exported for",
}
"""How a backend serves sizes of pictures -> what that means for its users."""


@runtime_checkable
class Backend(Protocol):
    """One engine; an object of this shape is what a plug-in hands over."""

    @property
    def name(self) -> str:
        """How users name it."""

    @property
    def formats(self) -> tuple[str, ...]:
        """What it opens: "checkpoint" (diffusers' folders, through the PyTorch models) or names of exported formats."""

    @property
    def rank(self) -> int | None:
        """The available engine of the highest rank is taken by `backend="auto"`; None: only when it is named."""

    @property
    def double(self) -> bool:
        """A test double: it does not run the model, and demos and comparisons leave it out."""

    @property
    def places(self) -> Mapping[str, tuple[str, ...]]:
        """Kind of device ("cpu", "cuda") -> execution precisions that it serves there, on whatever machine has it."""

    @property
    def sizes(self) -> str:
        """How it serves sizes of pictures: a key of `SIZES`."""

    @property
    def costs(self) -> Costs:
        """What weights cost, for predictions."""

    @property
    def options(self) -> Mapping[str, str]:
        """Name of what else it can be told (`x.*`: all that begin with it) -> what that means, as half a sentence."""

    def unavailable(self) -> str | None:
        """None, or one sentence: what is missing and how to install it. Must be cheap and import nothing heavy."""

    def devices(self) -> tuple[str, ...]:
        """Devices that exist on this machine, the preferred one first."""

    def precisions(self, device: str) -> tuple[str, ...]:
        """Execution precisions served on `device`, the default first."""

    def open(self, component: Component, parts: Sequence[str], target: Target) -> dict[str, Program]:
        """Load `parts` of one component onto `target`, which was found among `devices` and `precisions`.

        Raises BackendError: the component cannot be served (never a silent change).
        """


@runtime_checkable
class Concurrent(Protocol):
    """A backend that says whether `open` may run in several threads at once; of others, components wait in line."""

    @property
    def concurrent(self) -> bool:
        """Whether it may."""


@runtime_checkable
class Revealing(Protocol):
    """A backend whose opened parts hand out values inside their graphs, by which `anamorph verify` names a block."""

    def inner_values(
        self, artifact: Artifact, part: str, names: Sequence[str]
    ) -> Callable[[Mapping[str, Array]], dict[str, Array]]:
        """A part as a function from its inputs to the values of these names, in float32."""


@runtime_checkable
class Keeping(Protocol):
    """A backend that keeps what it compiles of exported parts in the user's cache; see `anamorph.entries`."""

    def key(self, artifact: Artifact, part: str, target: Target) -> Key:
        """What the entry of the part's model for all sizes depends on; those for one size differ in their shape."""
