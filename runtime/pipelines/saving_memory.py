"""Switches of a pipeline that save memory, with diffusers' names; those that do not apply say so."""

import warnings
from collections.abc import Sequence
from typing import Any, ClassVar

from anamorph.errors import BackendError, InputError
from anamorph.memory import Offload
from anamorph.pipelines.loaded import Loaded, accelerators, group, offloaded


class SavingMemory:
    """What `DiffusionPipeline` takes from here; each switch holds for all pipelines that share the component."""

    DENOISER: ClassVar[str]
    _models: dict[str, Loaded]

    def enable_vae_slicing(self) -> None:
        """Encode and decode the pictures of a batch one after another; the results are the same."""
        _autoencoder(self._models).enable_slicing()

    def disable_vae_slicing(self) -> None:
        """Encode and decode all pictures of a batch at once."""
        _autoencoder(self._models).disable_slicing()

    def enable_vae_tiling(self) -> None:
        """Encode and decode large pictures in overlapping tiles, on every engine; seams differ a little."""
        _autoencoder(self._models).enable_tiling()

    def disable_vae_tiling(self) -> None:
        """Encode and decode pictures whole, whatever their size."""
        _autoencoder(self._models).disable_tiling()

    def enable_attention_slicing(self, slice_size: str | int | None = "auto") -> None:
        """Let the denoiser compute attention of some heads at a time; see `Loaded.set_attention_slice`."""
        self._models[self.DENOISER].set_attention_slice(slice_size)

    def disable_attention_slicing(self) -> None:
        """Let the denoiser compute attention of all heads at once."""
        self._models[self.DENOISER].set_attention_slice(None)

    def enable_xformers_memory_efficient_attention(self, attention_op: Any = None) -> None:  # noqa: ARG002 - as diffusers has it
        """Does not apply, and says so: every engine's own attention is as sparing."""
        _say("xformers does not apply: every engine's own fused attention never holds all scores either")

    def disable_xformers_memory_efficient_attention(self) -> None:
        """Does not apply, and says so."""
        self.enable_xformers_memory_efficient_attention()

    def enable_model_cpu_offload(self, gpu_id: int | None = None, device: Any = None) -> None:
        """Let models wait in host memory; each visits the accelerator from its call until the next model's.

        On a machine without one this warns that it does not apply. Raises BackendError: the engine does not serve
        it, or has no such device. Raises InputError: `gpu_id` and the number of a device are both given.
        """
        self._offload("enable_model_cpu_offload", "model", gpu_id, device)

    def enable_sequential_cpu_offload(self, gpu_id: int | None = None, device: Any = None) -> None:
        """Let models wait in host memory; layer by layer they visit the accelerator. See `enable_model_cpu_offload`."""
        self._offload("enable_sequential_cpu_offload", "sequential", gpu_id, device)

    def enable_group_offload(
        self,
        onload_device: Any,
        offload_device: Any = "cpu",
        offload_type: str = "block_level",
        num_blocks_per_group: int | None = None,
        non_blocking: bool = False,
        use_stream: bool = False,
        record_stream: bool = False,
        low_cpu_mem_usage: bool = False,
        offload_to_disk_path: str | None = None,
        exclude_modules: str | Sequence[str] | None = None,
    ) -> None:
        """Let groups of layers wait in host memory and visit `onload_device`; see `Loaded.enable_group_offload`.

        `exclude_modules` stay where they are.
        Raises InputError: a wrong argument. Raises BackendError: an engine does not serve it, or has no such device.
        """
        excluded = (exclude_modules,) if isinstance(exclude_modules, str) else tuple(exclude_modules or ())
        if strange := [name for name in excluded if name not in self._models]:
            raise InputError(f"exclude_modules names {', '.join(strange)}; expected some of {', '.join(self._models)}")
        wish = group(
            onload_device, offload_device, offload_type, num_blocks_per_group, non_blocking, use_stream, record_stream,
            low_cpu_mem_usage, offload_to_disk_path,
        )  # fmt: skip
        offloaded([loaded for name, loaded in self._models.items() if name not in excluded], wish)

    def remove_all_hooks(self) -> None:
        """Undo offloading; all weights are in host memory then, and `to` takes them elsewhere."""
        for loaded in self._models.values():
            loaded.spare(Offload(None))

    def _offload(self, switch: str, kind: str, gpu_id: int | None, device: Any) -> None:
        every = list(self._models.values())
        found = accelerators(every)
        if gpu_id is None and device is None and not found:
            _say(f"{switch} does not apply: no engine of this pipeline has an accelerator on this machine")
            return
        if gpu_id is not None and ":" in str(device):
            raise InputError(f"gpu_id is {gpu_id} and device {str(device)!r}; give the number once")
        chosen = str(device or (found[0] if gpu_id is None else "cuda"))
        offloaded(every, Offload(kind, chosen if gpu_id is None else f"{chosen}:{gpu_id}"))


def check_resident(every: Sequence[Loaded]) -> None:
    """Raise BackendError where components wait in host memory, so that they cannot be moved."""
    waiting = [part for loaded in every for part, placed in loaded.placement.items() if "offload" in placed.details]
    if waiting:
        raise BackendError(f"{', '.join(waiting)} are offloaded; call remove_all_hooks() before to()")


def _autoencoder(models: dict[str, Loaded]) -> Loaded:
    for loaded in models.values():
        if any(part.startswith("vae") for part in loaded.programs):
            return loaded
    raise InputError("this pipeline has no autoencoder, whose pictures could be sliced or tiled")


def _say(reason: str) -> None:
    warnings.warn(reason, stacklevel=4)
