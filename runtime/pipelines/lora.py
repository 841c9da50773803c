"""Low-rank adapters of a pipeline, with diffusers' names: loading, choosing and weighing them, and fusing weights.

Adapters belong to the opened components: pipelines that share these share them. A loaded adapter is *hot*: engines open
a component for the layers that it changes, and its factors come with each call, so that choosing another one costs
nothing. A fused one is part of the weights, for which the component is opened anew; calls cost what they did.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Unpack

import numpy as np

from anamorph.errors import BackendError, InputError
from anamorph.hub import HubOptions
from anamorph.lora.adapting import Adapting, Open, Weight, adapted, adapting_of, forget_shown, layers_of, weighed
from anamorph.lora.blocks import by_blocks
from anamorph.lora.names import CHANGED, spelled
from anamorph.lora.reading import FILES, Home, changes_of, read_source
from anamorph.lora.writing import write_factors
from anamorph.pipelines.loaded import Loaded

SCALE = "scale"
"""What `cross_attention_kwargs` call the weight of all adapters in a call."""
Names = str | Sequence[str]


def named(names: Names) -> list[str]:
    """One name or several."""
    return [names] if isinstance(names, str) else list(names)


class LoraLoading:
    """What pipelines whose denoisers look at texts take from here."""

    _models: dict[str, Loaded]
    SLOTS: ClassVar[Any]

    if TYPE_CHECKING:

        def _opener(self, name: str) -> Open:
            """How the pipeline opens a component."""

    # ---- loading -------------------------------------------------------------------------------------------------

    def load_lora_weights(
        self,
        pretrained_model_name_or_path_or_dict: Any,
        adapter_name: str | None = None,
        hotswap: bool = False,
        *,
        weight_name: str | None = None,
        subfolder: str | None = None,
        **hub: Unpack[HubOptions],
    ) -> None:
        """Load an adapter (LoRA, LoCon or LoHa) on whatever engine the models run; where it changes something, it alone
        counts from now on.

        The source is a file, a folder or hub id, or tensors by name, in the layout of diffusers, PEFT or Kohya's
        scripts; a file of pickles is opened weights-only. `hotswap` replaces the loaded adapter of that name.

        Raises CheckpointError: a file is missing, damaged or holds code. Raises InputError: tensors belong to no layer,
        do not fit theirs or are not finite, or the name is taken. Raises BackendError: an engine takes no adapters.
        """  # fmt: skip
        source = read_source(pretrained_model_name_or_path_or_dict, weight_name, subfolder, hub)
        homes, refusals = self._homes()
        try:
            changes = changes_of(source, homes)
        except InputError:
            if refusals:
                raise refusals[0] from None
            raise
        name = self._name(adapter_name, hotswap)
        for component in self._changeable:
            adapting = self._adapting(component)
            if component in changes:
                adapting.known[name] = changes[component]
            else:  # what is replaced may have changed more
                adapting.known.pop(name, None)
                adapting.active.pop(name, None)
            self._renewed(component, adapting)
        self._activate({name: None}, list(changes))

    def _homes(self) -> tuple[dict[str, Home], list[BackendError]]:
        """The models that can be changed, and why others cannot."""
        homes, refusals = {}, []
        for name in self._changeable:
            loaded = self._models[name]
            try:
                layers = layers_of(loaded.programs)
            except BackendError as error:
                refusals.append(error)
                continue
            homes[name] = Home(spelled(layers, loaded.config), layers)
        if not homes:
            raise refusals[0] if refusals else InputError("this pipeline has no model that adapters change")
        return homes, refusals

    def _name(self, given: str | None, hotswap: bool) -> str:
        known = self._known()
        name = f"default_{len(known)}" if given is None else given
        if not isinstance(name, str) or not name or "." in name:
            raise InputError(f"adapter_name is {name!r}, expected a name without dots")
        if hotswap and name not in known:
            raise InputError(f"there is no adapter {name!r} to replace; loaded are {', '.join(known) or 'none'}")
        if name in known and not hotswap:
            raise InputError(f"an adapter {name!r} is loaded already; pass another adapter_name, or hotswap=True")
        if name in self.fused_loras:
            raise InputError(f"an adapter {name!r} is fused; pass another adapter_name, or call unfuse_lora first")
        return name

    @property
    def _changeable(self) -> list[str]:
        return [name for name in CHANGED if name in self._models]

    def _adapting(self, component: str) -> Adapting:
        """The adapters of a component, from now on if it had none."""
        loaded = self._models[component]
        adapting = adapting_of(loaded)
        if adapting is None:
            adapting = Adapting(loaded.component, dict(loaded.programs), self._opener(component))
            adapted(loaded, adapting)
        return adapting

    def _renewed(self, component: str, adapting: Adapting) -> None:
        """Let the component be opened for its adapters when it is next asked for."""
        adapting.renew()
        forget_shown(self._models[component])

    def _every(self) -> dict[str, Adapting]:
        found = {name: adapting_of(self._models[name]) for name in self._changeable}
        return {name: adapting for name, adapting in found.items() if adapting is not None}

    def _known(self) -> list[str]:
        return list(dict.fromkeys(name for adapting in self._every().values() for name in adapting.known))

    # ---- choosing ------------------------------------------------------------------------------------------------

    def set_adapters(self, adapter_names: Names, adapter_weights: Any = None) -> None:
        """Let these adapters count and no others, each so much: a number, or numbers by component, for the UNet also by
        blocks, such as {"unet": {"down": 0.5, "up": {"block_1": [0.2, 0.4, 1.0]}}}; what is not named counts whole.

        Raises InputError: an adapter is not loaded, or weights do not fit.
        """  # fmt: skip
        names = named(adapter_names)
        weights = list(adapter_weights) if isinstance(adapter_weights, list | tuple) else [adapter_weights] * len(names)
        if len(weights) != len(names):
            raise InputError(f"there are {len(names)} adapters and {len(weights)} weights; give as many")
        self._check_known(names)
        self._activate(dict(zip(names, weights, strict=True)), self._changeable)

    def _activate(self, weights: Mapping[str, Any], components: Sequence[str]) -> None:
        """Check all weights, then let these adapters and no others count in the components."""
        every = {name: adapting for name, adapting in self._every().items() if name in components}
        chosen = {
            component: {name: self._weight(component, value) for name, value in weights.items() if name in one.known}
            for component, one in every.items()
        }
        for component, adapting in every.items():
            adapting.choose(chosen[component])

    def _weight(self, component: str, value: Any) -> Weight:
        if isinstance(value, Mapping):
            if strange := [key for key in value if key not in self._changeable]:
                raise InputError(f"weights name {strange[0]!r}, expected {', '.join(self._changeable)}")
            value = value.get(component)
        if isinstance(value, Mapping) and component == "unet":
            return by_blocks(value, layers_of(self._models[component].programs))
        return 1.0 if value is None else number(value, "an adapter's weight")

    def _check_known(self, names: Sequence[str]) -> None:
        known = self._known()
        if lost := [name for name in names if name not in known]:
            raise InputError(f"there is no adapter {lost[0]!r}; loaded are {', '.join(known) or 'none'}")

    def get_active_adapters(self) -> list[str]:
        """The adapters that count."""
        return list(dict.fromkeys(name for adapting in self._every().values() for name in adapting.active))

    def get_list_adapters(self) -> dict[str, list[str]]:
        """Component -> the adapters that change it."""
        return {component: list(adapting.known) for component, adapting in self._every().items() if adapting.known}

    def disable_lora(self) -> None:
        """Let no adapter count until `enable_lora`; fused ones stay."""
        for adapting in self._every().values():
            adapting.enabled = False

    def enable_lora(self) -> None:
        """Let the chosen adapters count again."""
        for adapting in self._every().values():
            adapting.enabled = True

    def delete_adapters(self, adapter_names: Names) -> None:
        """Forget these adapters; raises InputError where one is not loaded, or fused."""
        names = named(adapter_names)
        self._check_known(names)
        if fused := [name for name in names if name in self.fused_loras]:
            raise InputError(f"the adapter {fused[0]!r} is fused; call unfuse_lora first")
        for component, adapting in self._every().items():
            for name in names:
                adapting.known.pop(name, None)
                adapting.active.pop(name, None)
            self._renewed(component, adapting)

    def unload_lora_weights(self) -> None:
        """Forget all adapters; what is fused stays in the weights until `unfuse_lora`."""
        for component, adapting in self._every().items():
            adapting.known, adapting.active = {}, {}
            self._renewed(component, adapting)

    # ---- fusing --------------------------------------------------------------------------------------------------

    def fuse_lora(
        self,
        components: Sequence[str] | None = None,
        lora_scale: float = 1.0,
        safe_fusing: bool = False,  # noqa: ARG002 - what is not finite was refused when it was loaded
        adapter_names: Names | None = None,
    ) -> None:
        """Add the chosen adapters (or `adapter_names`) to the weights of `components` (None: of all), so that calls
        cost what they did: W + lora_scale w up down, in float32, rounded to the type in which W is stored.

        Raises InputError: there is nothing to fuse, or a name is unknown.
        """  # fmt: skip
        scale = number(lora_scale, "lora_scale")
        names = self.get_active_adapters() if adapter_names is None else named(adapter_names)
        self._check_known(names)
        chosen = self._chosen(components)
        fresh = {
            c: [name for name in names if name in one.known and name not in one.fused] for c, one in chosen.items()
        }
        if not any(fresh.values()):
            raise InputError("there is no adapter to fuse; load one, and choose it with set_adapters")
        for component, adapting in chosen.items():
            for name in fresh[component]:
                adapting.fused[name] = weighed(adapting.known[name], adapting.active.get(name, 1.0), scale)
            self._renewed(component, adapting)

    def unfuse_lora(self, components: Sequence[str] | None = None) -> None:
        """Take fused adapters out of the weights, which are the checkpoint's own again, bit by bit."""
        for component, adapting in self._chosen(components).items():
            adapting.fused = {}
            self._renewed(component, adapting)

    def _chosen(self, components: Sequence[str] | None) -> dict[str, Adapting]:
        wanted = self._changeable if components is None else named(components)
        if strange := [name for name in wanted if name not in self._changeable]:
            raise InputError(f"adapters do not change {strange[0]!r}; expected some of {', '.join(self._changeable)}")
        return {name: adapting for name, adapting in self._every().items() if name in wanted}

    @property
    def fused_loras(self) -> set[str]:
        """The adapters that are part of the weights."""
        return {name for adapting in self._every().values() for name in adapting.fused}

    @property
    def num_fused_loras(self) -> int:
        """Their number."""
        return len(self.fused_loras)

    # ---- saving --------------------------------------------------------------------------------------------------

    @classmethod
    def save_lora_weights(
        cls,
        save_directory: str | Path,
        unet_lora_layers: Mapping[str, Any] | None = None,
        text_encoder_lora_layers: Mapping[str, Any] | None = None,
        text_encoder_2_lora_layers: Mapping[str, Any] | None = None,
        *,
        weight_name: str = FILES[0],
    ) -> None:
        """Write trained factors (a layer's name with ".lora_A.weight" or ".lora_B.weight" -> tensor) as diffusers does.

        In float32, but for arrays of float16, which stay so.
        Raises InputError: there are none. Raises OutputError: the file cannot be written.
        """
        given = (unet_lora_layers, text_encoder_lora_layers, text_encoder_2_lora_layers)
        write_factors(Path(save_directory) / weight_name, dict(zip(CHANGED, given, strict=True)))


def scale_of(kwargs: Mapping[str, Any] | None) -> dict[str, float] | None:
    """How much adapters count in a call, where it says so; raises InputError: that is no finite number."""
    if kwargs is None or SCALE not in kwargs:
        return None
    return {SCALE: number(kwargs[SCALE], f"cross_attention_kwargs[{SCALE!r}]")}


def number(value: Any, what: str) -> float:
    """A finite number; raises InputError: something else."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not np.isfinite(value):
        raise InputError(f"{what} is {value!r}, expected a finite number")
    return float(value)
