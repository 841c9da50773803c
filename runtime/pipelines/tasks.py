"""What tells one task from another: where the latents start, what else the denoiser sees, what follows a step.

Its heart is a function from a `Scene` (the checked call and what the loop will use) to a `Start`. New tasks are built
from the small functions below; noise is drawn in diffusers' order, so that its generators give its pictures.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from anamorph.arrays import Array, Arrays
from anamorph.noise import NoiseSource
from anamorph.pipelines.pictures import repeated
from anamorph.pipelines.request import Request
from anamorph.pipelines.sampling import AfterStep, Guidance
from anamorph.scaling import Scaling
from anamorph.schedulers import Scheduler, Table, add_noise

F32 = NDArray[np.float32]


@dataclass(frozen=True)
class Sources:
    """What a task starts from, checked and brought to size.

    `pictures` [B, C, H, W] in -1..1, or `latents` [B, c, h, w] that the caller encoded; `mask` [B, 1, H, W] is 1
    where something is to be drawn; `masked_latents` [B, c, h, w] the caller's encoding of what stays; `depth`
    [B, 1, h, w] in -1..1 at the size of the latents.
    """

    pictures: F32 | None = None
    latents: F32 | None = None
    mask: F32 | None = None
    masked_latents: F32 | None = None
    depth: F32 | None = None


@dataclass(frozen=True)
class Scene:
    """All that a task may use; `encode` gives mean and log-variance [B, 2 c, h, w] of pictures, or their latents."""

    request: Request
    guidance: Guidance
    sources: Sources
    given: F32 | None
    table: Table
    noise: NoiseSource
    shape: tuple[int, int, int]
    """[c, h, w] of one picture's latents."""
    scaling: Scaling
    """How latents of the autoencoder become those of the denoiser."""
    inpainting_model: bool
    """Whether the denoiser takes a mask and what stays as further channels."""
    arrays: Arrays
    encode: Callable[[F32], F32]
    exact: bool = False
    """Whether the autoencoder gives latents and no distribution of them."""
    schedulers: Mapping[str, Scheduler] = field(default_factory=dict)
    """The pipeline's schedulers by the names of their slots."""


@dataclass(frozen=True)
class Start:
    """The first latents, `beside`, `joined` and `after` of a `Plan`, and further conditions for every branch."""

    latents: Array
    beside: Mapping[str, Array] = field(default_factory=dict)
    joined: tuple[str, ...] = ()
    after: AfterStep | None = None
    conditions: Mapping[str, NDArray[Any]] = field(default_factory=dict)


def classifier_free(request: Request) -> Guidance:
    """One more branch, which sees the negative prompt, where the scale is above 1."""
    return Guidance((request.guidance_scale,) if request.guidance_scale > 1 else (), request.guidance_rescale)


def unguided(request: Request) -> Guidance:
    """No other branch, whatever the scale."""
    del request
    return Guidance()


def plain_model(latent_channels: int) -> tuple[int, ...]:
    """A denoiser that sees the latents alone."""
    return (latent_channels,)


def with_one_more(latent_channels: int) -> tuple[int, ...]:
    """A denoiser that sees the latents and one more channel."""
    return (latent_channels + 1,)


def with_as_many(latent_channels: int) -> tuple[int, ...]:
    """A denoiser that sees the latents of two pictures."""
    return (2 * latent_channels,)


def with_colours(latent_channels: int) -> tuple[int, ...]:
    """A denoiser that sees the latents and a picture in RGB."""
    return (latent_channels + 3,)


def plain_or_inpainting(latent_channels: int) -> tuple[int, ...]:
    """A denoiser that sees the latents alone, or beside them a mask and the latents of what stays."""
    return latent_channels, 2 * latent_channels + 1


@dataclass(frozen=True)
class Task:
    """A task: its `start`, the sources that it `needs`, how it guides, and how many channels its denoiser may take.

    `channels` is a function of the number of channels that latents have. `distilled`: the scheduler chooses the
    timesteps of a strength among those that the model was distilled on. Where pictures come out larger than the one
    that they start from, `scale` says how many times, given the autoencoder's pixels per latent; a source of another
    size than the model takes is resized with a bicubic filter there. `table` changes the scheduler's.
    """

    start: Callable[[Scene], Start]
    needs: tuple[str, ...] = ()
    guidance: Callable[[Request], Guidance] = classifier_free
    channels: Callable[[int], tuple[int, ...]] = plain_model
    scale: Callable[[int], int] | None = None
    table: Callable[[Table], Table] = lambda table: table
    distilled: bool = False


LOG_VARIANCE = (-30.0, 20.0)
"""Limits of the autoencoder's log-variance."""


def from_noise(scene: Scene) -> Start:
    """Text to image: x = sigma_0 z."""
    return Start(scene.arrays.put(_pure(scene, _noise(scene))))


def from_picture(scene: Scene) -> Start:
    """Image to image: x = alpha x_0 + sigma z at the level of the first row (SDEdit, Meng et al. 2022).

    A picture that another pipeline has left on the way is at that level already, and so are given latents.
    """
    if scene.given is not None:
        return Start(scene.arrays.put(scene.given))
    # A single generator draws once for a picture that several start from; generators of their own draw for each.
    clean = _clean(scene, scene.request.images if scene.noise.separate else None)
    if scene.request.denoising_start is not None:
        return Start(scene.arrays.put(clean))
    noisy = add_noise(scene.table, 0, clean, scene.noise.normal(scene.shape))
    return Start(scene.arrays.put(noisy))


def with_depth(scene: Scene) -> Start:
    """Image to image with the picture's depth as a further channel."""
    depth = scene.sources.depth
    assert depth is not None
    start = from_picture(scene)
    dealt = [repeated(depth, scene.request.images)] * scene.guidance.branches
    return Start(start.latents, {"depth_mask": scene.arrays.put(np.concatenate(dealt))}, ("depth_mask",))


def beside_picture(scene: Scene) -> Start:
    """Text to image with the picture's most probable latents as further channels, zeros in the least guided branch.

    Source: Brooks et al. 2023 (arXiv:2211.09800), section 3.2.
    """
    latents = scene.sources.latents
    if latents is None:
        assert scene.sources.pictures is not None
        latents = scene.encode(scene.sources.pictures)[:, : scene.shape[0]]
    latents = repeated(latents, scene.request.images)
    branches = [np.zeros_like(latents)] * (scene.guidance.branches > 1)
    branches += [latents] * (scene.guidance.branches - len(branches))
    beside = {"image_latents": scene.arrays.put(np.concatenate(branches))}
    return replace(from_noise(scene), beside=beside, joined=("image_latents",))


def inpaint(scene: Scene) -> Start:
    """Draw where the mask is 1, and keep the rest.

    A model for inpainting sees the mask and the latents of what stays as further channels (Rombach et al. 2022,
    appendix E); with any other, the picture's own latents take back what stays after each step, at its noise level
    (Lugmayr et al. 2022, arXiv:2201.09865, eq. 8).
    """
    request, resumed = scene.request, scene.request.denoising_start is not None
    whole = request.strength == 1.0 and not resumed
    # A picture must not depend on its batch where seeds name it; generators draw as diffusers has them draw.
    draws = request.images if request.seeds is not None else None
    latents = clean = None
    if not scene.inpainting_model or (scene.given is None and not whole):
        clean = _clean(scene, draws)
    noise = _noise(scene)
    if clean is not None and scene.given is None and not whole:
        latents = clean if resumed else add_noise(scene.table, 0, clean, noise)
    start = scene.arrays.put(_pure(scene, noise) if latents is None else latents)
    mask = _small_mask(scene)
    kept = _kept(scene, draws)
    every = (
        {"mask": mask} if kept is None or not scene.inpainting_model else {"mask": mask, "masked_image_latents": kept}
    )
    beside = {name: scene.arrays.put(np.concatenate([one] * scene.guidance.branches)) for name, one in every.items()}
    if scene.inpainting_model:
        return Start(start, beside, tuple(beside))
    assert clean is not None
    return Start(start, beside, after=_putting_back(scene, clean, noise))


def _noise(scene: Scene) -> F32:
    return scene.noise.normal(scene.shape) if scene.given is None else scene.given


def _pure(scene: Scene, noise: F32) -> F32:
    return np.float32(scene.table.init_noise_sigma) * noise


def clean_latents(scene: Scene) -> F32:
    """Latents of the pictures, one for each that is made; generators draw as diffusers has them draw."""
    return _clean(scene, scene.request.images if scene.request.seeds is not None else None)


def _clean(scene: Scene, draws: int | None) -> F32:
    """Latents of the pictures, one for each that is made; `draws` of them are sampled (None: one per source)."""
    latents = scene.sources.latents
    if latents is None:
        assert scene.sources.pictures is not None
        latents = _posterior(scene, scene.sources.pictures, draws)
    return repeated(latents, scene.request.images)


def _posterior(scene: Scene, pictures: F32, draws: int | None) -> F32:
    """A sample of the autoencoder's distribution, mean + exp(log variance / 2) z, scaled."""
    count = len(pictures) if draws is None else draws
    moments = repeated(scene.encode(pictures), count)
    if scene.exact:
        return scene.scaling.scaled(moments)
    mean, log_variance = moments[:, : scene.shape[0]], moments[:, scene.shape[0] :]
    deviation: F32 = np.exp(np.float32(0.5) * log_variance.clip(*LOG_VARIANCE))
    return scene.scaling.scaled(mean + deviation * scene.noise.normal(tuple(mean.shape[1:]), count))


def _small_mask(scene: Scene) -> F32:
    """The mask at the size of the latents, one for each picture that is made."""
    mask = scene.sources.mask
    assert mask is not None
    return repeated(mask[:, :, :: mask.shape[2] // scene.shape[1], :: mask.shape[3] // scene.shape[2]],
                    scene.request.images)  # fmt: skip


def _kept(scene: Scene, draws: int | None) -> F32 | None:
    """Latents of what stays; their noise is drawn also where no model looks at them. None of a picture's latents."""
    sources, images = scene.sources, scene.request.images
    if sources.masked_latents is not None:
        return repeated(sources.masked_latents, images)
    if sources.pictures is None:
        return None
    assert sources.mask is not None
    masked = sources.pictures * (1 - sources.mask)
    if not scene.inpainting_model and not scene.exact:
        return scene.noise.normal(scene.shape, len(masked) if draws is None else draws)
    return repeated(_posterior(scene, masked, draws), images)


def _putting_back(scene: Scene, clean: F32, noise: F32) -> AfterStep:
    table, put = scene.table, scene.arrays.put
    known, noise = put(clean), put(noise)

    def after(n: int, x: Array, beside: Mapping[str, Array]) -> Array:
        drawn = beside["mask"][: x.shape[0]]
        return (1 - drawn) * (add_noise(table, n + 1, known, noise) if n + 1 < len(table) else known) + drawn * x

    return after
