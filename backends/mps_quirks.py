"""What is known to go wrong on PyTorch's device for Apple's graphics processors, as data: when, why, and who says so.

None of it was tried by this project, which has no such machine.
"""

import os
import platform
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType

GIB = 2**30


@dataclass(frozen=True)
class Machine:
    """What quirks depend on: macOS' and PyTorch's versions, and the memory (bytes)."""

    macos: tuple[int, ...]
    torch: tuple[int, ...]
    memory: int


@dataclass(frozen=True)
class Quirk:
    """One thing that goes wrong, what is done about it, on which machines, and where that is written."""

    problem: str
    remedy: str
    source: str
    met: Callable[[Machine], bool] = lambda _: True


BATCHES, PICTURES, SLICES, OFFLOADED, WARM_UP, NARROW, DOUBLES, LAYOUT = (
    "batches", "float32-autoencoder", "attention-slices", "slices-offloaded", "warm-up", "no-bfloat16", "no-float64",
    "no-channels-last",
)  # fmt: skip
QUIRKS: Mapping[str, Quirk] = MappingProxyType(
    {
        BATCHES: Quirk(
            "batches of several pictures crash, or come out wrong",
            "one picture at a time, with both branches of its guidance",
            "huggingface/diffusers#363, pytorch/pytorch#84039",
        ),
        PICTURES: Quirk(
            "autoencoders overflow in float16, and pictures come out black",
            "float16 is refused for autoencoders, which compute in float32 beside it",
            "AUTOMATIC1111/stable-diffusion-webui, webui-macos-env.sh: --no-half-vae",
        ),
        SLICES: Quirk(
            "the scores of attention push other memory out, which costs a fifth of the speed or more",
            "half of the heads at a time where the machine has less than 64 GiB",
            "diffusers' documentation, optimization/mps",
            lambda machine: machine.memory < 64 * GIB,
        ),
        OFFLOADED: Quirk(
            "attention in slices makes NaN where weights wait in host memory",
            "all heads at once while weights wait",
            "huggingface/diffusers#14438",
        ),
        WARM_UP: Quirk(
            "the first call of a model differs from all later ones",
            "the first call is made twice, and the first result thrown away",
            "huggingface/diffusers#372, removed for PyTorch 2 by #2771",
            lambda machine: machine.torch < (2,),
        ),
        NARROW: Quirk(
            "there is no bfloat16 before macOS 14",
            "it is not offered there",
            "pytorch/pytorch#119641",
            lambda machine: machine.macos < (14,),
        ),
        DOUBLES: Quirk(
            "there is no float64",
            "arrays become float32 before they go to the device",
            "pytorch/pytorch#122602",
        ),
        LAYOUT: Quirk(
            "convolutions of parts of the channels are wrong where these lie innermost",
            "each channel has a plane of its own",
            "pytorch/pytorch#180984",
        ),
    }
)


def machine() -> Machine:
    """This one; raises ValueError where it is no Mac, which has no such version."""
    import torch

    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return Machine(_numbers(platform.mac_ver()[0]), _numbers(torch.__version__.split("+")[0]), memory)


def met(here: Machine) -> frozenset[str]:
    """Names of the quirks that are to be expected on a machine."""
    return frozenset(name for name, quirk in QUIRKS.items() if quirk.met(here))


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(int(number) for number in version.split(".")[:2])
