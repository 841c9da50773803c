"""A stranger's PyTorch module in the place of a denoiser: compiled, traced, or written by hand."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from anamorph.conditions import HINT
from anamorph.errors import InputError
from anamorph.native import is_hinting

ADDED = ("text_embeds", "time_ids", "image_embeds")
"""Inputs that diffusers' denoisers take in the mapping `added_cond_kwargs`."""


class Called(nn.Module):
    """Calls a module as diffusers calls its denoisers: `module(sample, timestep, encoder_hidden_states=...)`.

    `names` are the denoiser's further inputs, in order; those that a call leaves out are not passed on. The module
    returns a tuple whose first value is the prediction, or an object that has it as `sample`.
    """

    rewrites: tuple[str, ...] = ()

    def __init__(self, module: nn.Module, names: Sequence[str]) -> None:
        super().__init__()
        self.module = module
        self.names = tuple(names)

    def method(self, part: str) -> str:  # noqa: ARG002 - a denoiser has one part
        """See `Model.method`."""
        return "denoise"

    def denoise(self, sample: Tensor, timestep: Tensor, *inputs: Tensor | None) -> tuple[Tensor]:
        """One call of the denoiser; raises InputError where the module returns something else."""
        output = self.module(sample, timestep, **self._given(inputs))
        predicted = output[0] if isinstance(output, tuple) else getattr(output, "sample", output)
        if not isinstance(predicted, Tensor):
            raise InputError(
                f"{type(self.module).__name__} returned a {type(output).__name__}, expected a tuple that begins with a "
                "tensor, or an object with one as sample"
            )
        return (predicted,)

    def _given(self, inputs: Sequence[Tensor | None]) -> dict[str, Any]:
        """Further inputs as diffusers' denoisers take them."""
        given: dict[str, Any] = {
            name: value for name, value in zip(self.names, inputs, strict=False) if value is not None
        }
        if added := {name: given.pop(name) for name in ADDED if name in given}:
            given["added_cond_kwargs"] = added
        for name in [name for name in given if "." in name]:  # one of several, which are given as a list
            given.setdefault(name.partition(".")[0], []).append(given.pop(name))
        return given

    @property
    def dtype(self) -> torch.dtype:
        """Type of the module's weights; float32 where it has none."""
        return next((weight.dtype for weight in self.parameters()), torch.float32)

    @property
    def device(self) -> torch.device:
        """Where the module's weights are; the processor where it has none."""
        return next((weight.device for weight in self.parameters()), torch.device("cpu"))

    def set_attention_slice(self, slice_size: int | str | None = "auto") -> None:  # noqa: ARG002 - as models have it
        """Refuse: raises InputError."""
        raise InputError(f"attention of {type(self.module).__name__} cannot be sliced; slice the model before")

    def save_pretrained(self, folder: Any, *, variant: str | None = None) -> None:
        """Save the model that was compiled; raises InputError where the module is none."""
        model = getattr(self.module, "_orig_mod", None)
        if model is None:
            raise InputError(f"{type(self.module).__name__} is no model of anamorph and cannot be saved")
        model.save_pretrained(folder, variant=variant)


class CalledNet(Called):
    """A ControlNet of ours that was compiled: what does not change from step to step, the model makes itself."""

    def method(self, part: str) -> str:
        """See `Model.method`."""
        return "hint" if is_hinting(part) else "denoise"

    def hint(self, picture: Tensor) -> tuple[Tensor]:
        """See `ControlNetModel.hint`."""
        made: tuple[Tensor] = self.module._orig_mod.hint(picture)  # type: ignore[union-attr, operator]
        return made

    def denoise(self, sample: Tensor, timestep: Tensor, *inputs: Tensor | None) -> tuple[Tensor, ...]:  # type: ignore[override]
        """One call: the residuals of the way down, and that of the middle."""
        given = self._given(inputs)
        down, mid = self.module(
            sample, timestep, controlnet_cond=None, hint=given.pop(HINT), return_dict=False, **given
        )
        return (*down, mid)
