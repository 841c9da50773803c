"""What pipelines that follow pictures share: nets in one of their places, and the argument that holds the pictures."""

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from anamorph.arrays import Array
from anamorph.conditions import PICTURE
from anamorph.engine import Program
from anamorph.errors import InputError
from anamorph.pipelines.arguments import Job
from anamorph.pipelines.controlling import Following
from anamorph.pipelines.latent_diffusion import LatentDiffusion
from anamorph.pipelines.nets import filled
from anamorph.pipelines.sampling import FiniteCheck
from anamorph.pipelines.slots import Slot, Slots

NOTHING: Mapping[str, NDArray[Any]] = MappingProxyType({})
LAST = ("safety_checker", "feature_extractor", "image_encoder")
"""Components that diffusers has behind all others where there are nets."""


def beside(slots: Slots, name: str, nets: Slot) -> dict[str, Slot]:
    """These components with nets, which diffusers has behind the denoiser, and processors of pictures at the end."""
    names = [each for each in slots if each not in LAST]
    behind = names.index("unet") + 1
    every = [*names[:behind], name, *names[behind:], *(each for each in LAST if each in slots)]
    return {each: nets if each == name else slots[each] for each in every}


class Followed(LatentDiffusion, public=False):
    """A subclass says where its nets are, what one of them is called, and which argument holds their pictures."""

    PLACE: ClassVar[str]
    CALLED: ClassVar[str]
    FOLLOWS: ClassVar[str] = "image"
    CHANNELS: ClassVar[str]
    """The key of a net's configuration that says how many channels its pictures have."""

    @property
    def nets(self) -> list[str]:
        """The names of its nets, which are those of their folders."""
        return filled(self.SLOTS, self.PLACE, self._models)

    @property
    def needs(self) -> tuple[str, ...]:
        return (*self.TASK.needs, self.FOLLOWS)

    needs.__doc__ = LatentDiffusion.needs.__doc__

    def pictures_of(self, name: str) -> int:
        """See `DiffusionPipeline.pictures_of`."""
        return len(self.nets) if name == self.FOLLOWS else 1

    @property
    def _following(self) -> Following:
        channels = tuple(self._config(name)[self.CHANNELS] for name in self.nets)
        return Following(self.FOLLOWS, channels, self.CALLED, self._multiple)

    @property
    def _multiple(self) -> int:
        """What pictures without a wished size are cut to, in pixels."""
        return self.vae_scale_factor

    def _check_takes(self, what: str) -> None:
        """Raise InputError where the opened denoiser has no place for what nets add."""
        if not any(port.name.startswith(what) for port in self.program("unet").interface.inputs):
            raise InputError(
                f"the opened unet takes no {what}, which {self.CALLED}s add; export it with the native signature "
                "(--signature native)"
            )

    def _seen(
        self, program: Program, job: Job, pictures: NDArray[np.float32], told: Mapping[str, NDArray[Any]] = NOTHING
    ) -> dict[str, Array]:
        """What a net's program makes of its pictures, each of them once, for all that are drawn: [N, ...].

        `told` are numbers beside every picture.
        """
        arrays, request = program.arrays, job.request
        beside = {name: arrays.put(np.full(len(pictures), value)) for name, value in told.items()}
        outputs = program.session()({PICTURE: arrays.put(pictures), **beside})
        each = request.images if len(pictures) == 1 else request.num_images_per_prompt
        check = FiniteCheck.of(program)
        for value in outputs.values():
            check.add_now(value, "looking at its picture")
        order = [index for index in range(len(pictures)) for _ in range(each)]
        return {name: arrays.concat([value[i : i + 1] for i in order]) for name, value in outputs.items()}
