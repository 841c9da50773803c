"""PyTorch, operation by operation, on CPU and CUDA."""

import importlib.util
from collections.abc import Callable, Hashable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import TYPE_CHECKING, Any
from weakref import WeakValueDictionary

from anamorph.arrays import Array
from anamorph.backends.torch_arrays import TorchArrays
from anamorph.components import CHECKPOINT, Component
from anamorph.engine import Backend, Costs, Placement, Program, Target, kind_of
from anamorph.errors import BackendError
from anamorph.interface import Interface
from anamorph.lora.factors import Layers
from anamorph.memory import AttentionSlices, ChannelsLast, Offload, Saving
from anamorph.plugins import hookimpl
from anamorph.rewrites import ONEDNN, fitting, noted
from anamorph.weights import find_weights

if TYPE_CHECKING:
    from anamorph.backends.offloading import Offloaded
    from anamorph.pipelines.loaded import Loaded

ATTENTION = "attention"
"""The option that chooses how attention is computed."""
BY_PIXELS = ("vae_decoder", "vae_encoder")
"""Parts that processors are given the channels of a pixel side by side: all their layers keep that order, in which they
are faster, and weights may stay as they are mapped."""
LEAST_RANK = 8
"""Smaller ranks are padded to this one where all have one rank."""
INSTALL = "PyTorch is not installed; run: pip install 'anamorph[torch]'"


def called(module: Any) -> Any:
    """The module that a stranger put into a denoiser's place, or None."""
    from anamorph.models.called import Called

    return module.module if isinstance(module, Called) else None


def waiting_of(module: Any) -> "Offloaded | None":
    """How a model's weights wait in host memory, if they do."""
    from anamorph.backends.offloading import offloaded

    return offloaded(module)


@dataclass(frozen=True)
class TorchProgram:
    """A function of a PyTorch model on one device, with its inputs cast to the execution precision."""

    function: Callable[..., tuple[Any, ...]]
    module: Any
    part: str
    engine: str
    interface: Interface
    savings: tuple[type[Saving], ...]
    """What it can be asked for after it was opened."""
    rewrites: tuple[str, ...] = ()
    """Those of the module's that concern this part."""
    options: tuple[tuple[str, str], ...] = ()
    """What else the engine was told."""
    padded: bool = False
    """Whether factors of all adapted layers come at one rank, a power of two: each further rank is compiled."""
    history: Sequence[str] = field(default=(), compare=False)
    """See `Placement.history`; it grows."""

    def layers(self) -> Layers:
        """See `anamorph.lora.adapting.Adaptable`."""
        from anamorph.backends.torch_lora import layers_of

        if called(self.module) is not None:
            raise BackendError(f"{self.part} is a module of another library, which takes no adapters; use its own")
        if waiting_of(self.module) is not None:
            raise BackendError(f"{self.part} is offloaded; call remove_all_hooks() before adapters come or go")
        return layers_of(self.module)

    def ranks(self, rank: int) -> int | None:
        """See `anamorph.lora.adapting.Adaptable`."""
        return max(LEAST_RANK, 1 << (rank - 1).bit_length()) if self.padded else None

    @property
    def placement(self) -> Placement:
        """Read back from the module at each time of asking."""
        precision = str(self.module.dtype).removeprefix("torch.")
        waits = waiting_of(self.module)
        notes = {**noted(self.rewrites), **dict(self.options)}
        if waits is not None:
            notes["offload"] = str(waits.wish.kind)
        if (stranger := called(self.module)) is not None:
            notes["calling"] = type(stranger).__name__
        return Placement(self.part, self.engine, str(self._device), precision, notes, tuple(self.history))

    @property
    def arrays(self) -> TorchArrays:
        """Tensors on the device that computes."""
        return TorchArrays(self._device)

    @property
    def _device(self) -> Any:
        waits = waiting_of(self.module)
        return self.module.device if waits is None else waits.device

    def session(self) -> "TorchSession":
        """PyTorch modules hold no state of a call, so a session is no more than the program."""
        return TorchSession(self)

    def shown(self, loaded: "Loaded") -> Any:
        """The model with the switches of `loaded`; what a stranger put into its place, as it was given."""
        from anamorph.backends.torch_view import OpenedModel

        stranger = called(self.module)
        return OpenedModel(self.module, loaded) if stranger is None else stranger

    def spare(self, saving: Saving) -> str | None:
        """Change the module, which other programs may share."""
        import torch

        from anamorph.backends.offloading import offload

        if not isinstance(saving, self.savings):
            return saving.refusal(self.engine)
        if isinstance(saving, AttentionSlices):
            self.module.set_attention_slice(saving.size)
        elif isinstance(saving, Offload):
            offload(self.module, saving)
        elif isinstance(saving, ChannelsLast):
            waits = waiting_of(self.module)
            offload(self.module, Offload(None))
            self.module.to(memory_format=torch.channels_last if saving.on else torch.contiguous_format)
            if waits is not None:
                offload(self.module, waits.wish)
        return None


@dataclass(frozen=True)
class TorchSession:
    """Calls the program's function without recording gradients."""

    program: TorchProgram

    def __call__(self, inputs: Mapping[str, Array]) -> dict[str, Array]:
        import torch

        program, waits = self.program, waiting_of(self.program.module)
        ports = program.interface.inputs  # a scalar timestep stays as it is, too
        casts = {port.name for port in ports if port.axes and port.dtype == "float32" and not port.exact}
        given = ((port.name, inputs.get(port.name)) for port in ports)
        dtype = program.module.dtype
        values = [value.to(dtype) if value is not None and name in casts else value for name, value in given]
        if program.part in BY_PIXELS and program.arrays.device.type == "cpu":
            last = torch.channels_last
            values = [value if value is None else value.contiguous(memory_format=last) for value in values]
        with torch.inference_mode(), nullcontext() if waits is None else waits.awake():
            results = program.function(*values)
        outputs = zip(program.interface.outputs, results, strict=True)
        return {port.name: value.to(getattr(torch, port.dtype)) for port, value in outputs}


class Eager:
    """PyTorch eager; the reference that every other engine is compared with."""

    name = "eager"
    formats = (CHECKPOINT,)
    rank: int | None = 10
    double = False
    # PyTorch's float16 kernels on x86 are two orders of magnitude slower than float32: never offered there.
    places: Mapping[str, tuple[str, ...]] = MappingProxyType({
        "cpu": ("float32", "bfloat16"), "cuda": ("float32", "float16", "bfloat16"),
    })  # fmt: skip
    sizes = "any"
    costs = Costs()
    options: Mapping[str, str] = MappingProxyType({
        ATTENTION: "how attention is computed: sdpa (PyTorch chooses), flash, efficient, math, cudnn, xformers, "
        "sliced, or plain (written out)",
    })  # fmt: skip
    concurrent = True
    savings: tuple[type[Saving], ...] = (AttentionSlices, ChannelsLast, Offload)
    """What its programs can be asked for."""

    def unavailable(self) -> str | None:
        return None if importlib.util.find_spec("torch") else INSTALL

    def devices(self) -> tuple[str, ...]:
        import torch

        cuda = tuple(f"cuda:{index}" for index in range(torch.cuda.device_count()))
        return (*cuda[:1], "cpu", *(("cuda",) if cuda else ()), *cuda[1:])

    def precisions(self, device: str) -> tuple[str, ...]:
        return self.places[kind_of(device)]

    padded = False
    """See `TorchProgram.padded`."""

    def open(self, component: Component, parts: Sequence[str], target: Target) -> dict[str, Program]:
        module = load_module(component, target)
        if component.adapted or component.fused:
            from anamorph.backends.torch_lora import changed

            module = changed(module, component)
        return {part: self.program(component, module, part, target) for part in parts}

    def program(self, component: Component, module: Any, part: str, target: Target) -> TorchProgram:
        """One part of a component's model."""
        return TorchProgram(
            self.function(module, part), module, part, self.name, component.interface(part), self.savings,
            _in_force(module, component, part, target), target.options, self.padded,
        )  # fmt: skip

    def function(self, module: Any, part: str) -> Callable[..., tuple[Any, ...]]:
        """The callable that serves one part."""
        method: Callable[..., tuple[Any, ...]] = getattr(module, module.method(part))
        factors = getattr(module, "factors", None)
        return method if factors is None else factors.taking(method)


def _in_force(module: Any, component: Component, part: str, target: Target) -> tuple[str, ...]:
    """The rewrites by which the module computes a part on the target."""
    import torch

    from anamorph.models.linear import multiplies

    names = fitting(module.rewrites, part, component.class_name, component.config)
    taken = multiplies(kind_of(target.device), getattr(torch, target.precision))
    return names if taken else tuple(name for name in names if name != ONEDNN)


def load_module(component: Component, target: Target) -> Any:
    """The component's PyTorch model on the target, its convolutions in the layout that is fastest there."""
    import torch

    from anamorph.models import MODELS
    from anamorph.models.attention_processor import choose_attention

    dtype = getattr(torch, target.precision)
    module = component.module
    if module is None:
        key = _same_weights(component, target)
        if (known := _opened.get(key)) is not None:
            return known if waiting_of(known) else known.to(target.device)
        model = MODELS[component.class_name]
        module = model.from_pretrained(component.stored, torch_dtype=dtype, variant=component.variant)
        module.rewrite(component.rewrites)
        _opened[key] = module
    if (way := dict(target.options).get(ATTENTION)) is not None:
        choose_attention(module, way)
    module = module.to(device=target.device, dtype=dtype).eval()
    if target.device == "cpu" and dtype == torch.float32:  # oneDNN lays weights out by itself; they can stay mapped
        return module
    return module.to(memory_format=torch.channels_last)  # channels of one pixel side by side: faster convolutions


_opened: WeakValueDictionary[Hashable, Any] = WeakValueDictionary()
"""Models that some program still holds: who opens the same weights again shares their memory."""


def _same_weights(component: Component, target: Target) -> Hashable:
    """Equal where the same files, unchanged, are opened on the same target to be computed in the same way."""
    files = find_weights(component.stored, component.stem, component.variant).files
    stamps = tuple((str(file), file.stat().st_mtime_ns, file.stat().st_size) for file in files)
    return component.class_name, component.config.to_json(), component.rewrites, target, stamps


@hookimpl
def anamorph_backends() -> list[Backend]:
    return [Eager()]
