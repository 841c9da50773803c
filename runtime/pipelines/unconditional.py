"""Pipelines without texts: pictures from noise alone, or of a class."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from anamorph.arrays import Array, to_numpy
from anamorph.autoencoder_interfaces import vae_scale_factor
from anamorph.conditions import unconditional_ports
from anamorph.errors import ConfigError, InputError
from anamorph.pipelines.arguments import Job, seeds_of
from anamorph.pipelines.base import DiffusionPipeline
from anamorph.pipelines.decoding import decoded, decoded_bytes
from anamorph.pipelines.request import Request, as_interval, check_numbers
from anamorph.pipelines.sampling import Guidance, Plan, check_axes
from anamorph.pipelines.signature import Arguments, Signature
from anamorph.pipelines.slots import SCHEDULER, Slots, model
from anamorph.pipelines.tasks import classifier_free
from anamorph.scaling import Scaling
from anamorph.schedulers import DDIMScheduler, Table

WATCHED = "callback_on_step_end callback_on_step_end_tensor_inputs seed"


class UnconditionalPipeline(DiffusionPipeline, public=False):
    """Pictures [B, C, H, W] of the model's own size, drawn from noise by a UNet without texts (Ho et al. 2020)."""

    SLOTS: ClassVar[Slots] = {"unet": model("UNet2DModel"), "scheduler": SCHEDULER}
    BRANCHES: ClassVar[int] = 1

    def __init__(self, *components: Any, **named: Any) -> None:
        super().__init__(*components, **named)
        if self._given.guidance_batch is not None:
            raise InputError(f"{type(self).__name__} is not guided; leave guidance_batch out")
        config = self._config("unet")
        if ports := unconditional_ports(config):
            raise ConfigError(f"this unet wants {ports[0].name}, which {type(self).__name__} does not feed")
        if config["sample_size"] is None:
            raise ConfigError("this unet's config.json has no sample_size; write the size of its pictures into it")

    __init__.__doc__ = DiffusionPipeline.__init__.__doc__

    def _job(self, call: Arguments) -> Job:
        count = call["batch_size"]
        if isinstance(count, bool) or not isinstance(count, int) or count < 1:
            raise InputError(f"batch_size is {count!r}, expected 1 or more")
        side = self._config("unet")["sample_size"]
        height, width = (side, side) if isinstance(side, int) else side
        request = Request(
            ("",) * count, None, height, width, call["num_inference_steps"], 1.0, eta=float(call["eta"]),
            seeds=seeds_of(call, count), use_clipped_model_output=call["use_clipped_model_output"],
        )  # fmt: skip
        return Job(request, call["generator"])

    def plan(self, job: Job) -> Plan:
        request, program = job.request, self.program("unet")
        table = _table(self, request)
        sides = {"latent_height": request.height, "latent_width": request.width}
        check_axes(program, 1, request.images, sides, f"{request.images} of {request.height}x{request.width} pixels")
        noise = job.noise
        start = noise.normal((self._config("unet")["in_channels"], request.height, request.width))
        return Plan(table, program.arrays.put(np.float32(table.init_noise_sigma) * start), {}, Guidance(), noise)

    plan.__doc__ = DiffusionPipeline.plan.__doc__

    def _pixels(self, latents: Array) -> NDArray[Any]:
        return to_numpy(latents)


def _table(pipe: DiffusionPipeline, request: Request) -> Table:
    clipped = request.use_clipped_model_output
    options: dict[str, Any] = {} if clipped is None else {"use_clipped_model_output": clipped}
    return pipe.scheduler.table(request.num_inference_steps, eta=request.eta, **options)


class DDPMPipeline(UnconditionalPipeline):
    """Pictures from noise by the scheduler of the checkpoint, in a thousand steps (Ho et al. 2020)."""

    TAKES = Signature.of(
        f"batch_size generator num_inference_steps output_type return_dict * {WATCHED}", num_inference_steps=1000
    )


class DDIMPipeline(UnconditionalPipeline):
    """Pictures from noise by DDIM, whatever scheduler the checkpoint names (Song et al. 2021, arXiv:2010.02502)."""

    TAKES = Signature.of(
        "batch_size generator eta num_inference_steps use_clipped_model_output output_type return_dict * " + WATCHED
    )

    def __init__(self, *components: Any, **named: Any) -> None:
        super().__init__(*components, **named)
        self.scheduler = DDIMScheduler.from_config(self.scheduler.config)

    __init__.__doc__ = DiffusionPipeline.__init__.__doc__


class DiTPipeline(DiffusionPipeline):
    """Pictures of a class by a transformer over patches of latents (Peebles and Xie 2022, arXiv:2212.09748)."""

    SLOTS: ClassVar[Slots] = {
        "transformer": model("DiTTransformer2DModel", "Transformer2DModel"),
        "vae": model("AutoencoderKL", parts=("vae_decoder",)),
        "scheduler": SCHEDULER,
    }
    OPTIONS: ClassVar[Mapping[str, Any]] = {"id2label": None}
    TAKES = Signature.of(
        "class_labels guidance_scale generator num_inference_steps output_type return_dict * guidance_interval "
        f"{WATCHED}",
        guidance_scale=4.0,
    )
    DENOISER: ClassVar[str] = "transformer"

    @property
    def labels(self) -> dict[str, int]:
        """Every name of a class and its number, in alphabetical order; a class may have several names."""
        named = {label.strip(): int(number) for number, every in (self.options["id2label"] or {}).items()
                 for label in every.split(",")}  # fmt: skip
        return dict(sorted(named.items()))

    def get_label_ids(self, label: str | Sequence[str]) -> list[int]:
        """Numbers of named classes; raises InputError: the checkpoint names no such class."""
        known, words = self.labels, [label] if isinstance(label, str) else list(label)
        if strange := [word for word in words if word not in known]:
            raise InputError(f"there is no class {strange[0]!r}; `labels` holds the {len(known)} that have a name")
        return [known[word] for word in words]

    def _job(self, call: Arguments) -> Job:
        classes = int(self._config("transformer")["num_embeds_ada_norm"])
        labels = _classes(call["class_labels"], classes)
        check_numbers(call["guidance_scale"], 1)
        side = self._config("transformer")["sample_size"] * vae_scale_factor(self._config("vae"))
        request = Request(
            ("",) * len(labels), None, side, side, call["num_inference_steps"], float(call["guidance_scale"]),
            seeds=seeds_of(call, len(labels)), class_labels=labels,
            guidance_interval=as_interval(call["guidance_interval"]),
        )  # fmt: skip
        return Job(request, call["generator"])

    def plan(self, job: Job) -> Plan:
        request, program, config = job.request, self.program("transformer"), self._config("transformer")
        channels, side = config["in_channels"], config["sample_size"]
        table = _table(self, request)
        guidance = classifier_free(request).within(request.guidance_interval, len(table.rows))
        guidance = guidance.dealt(self.guidance_batch)
        if (config["out_channels"] or channels) == 2 * channels and table.variance is None:
            table = replace(table, variance="unused")  # a model may predict what this scheduler does not ask for
        for branches in guidance.counts:
            check_axes(program, branches, request.images, {}, f"{request.images} pictures ({branches} branches)")
        noise, labels = job.noise, np.array(request.class_labels, np.int64)
        none = np.full_like(labels, config["num_embeds_ada_norm"])
        asked = np.concatenate([*[none] * (guidance.branches - 1), labels])
        start = np.float32(table.init_noise_sigma) * noise.normal((channels, side, side))
        put = program.arrays.put
        return Plan(table, put(start), {"class_labels": put(asked)}, guidance, noise)

    plan.__doc__ = DiffusionPipeline.plan.__doc__

    def _pixels(self, latents: Array) -> NDArray[Any]:
        return decoded(self._models["vae"], Scaling.of(self._config("vae")), latents)

    def _bytes(self, latents: Array) -> NDArray[Any]:
        return decoded_bytes(self._models["vae"], Scaling.of(self._config("vae")), latents)


def _classes(given: Any, count: int) -> tuple[int, ...]:
    if given is None:
        raise InputError("class_labels is missing; give the class of each picture, see `labels`")
    values = to_numpy(given).reshape(-1)
    if not values.size or values.dtype.kind not in "iu":
        raise InputError(f"class_labels is {given!r}, expected whole numbers; `get_label_ids` turns names into them")
    if values.min() < 0 or values.max() >= count:
        raise InputError(f"class_labels hold {values.min() if values.min() < 0 else values.max()}, "
                         f"expected 0 to {count - 1}")  # fmt: skip
    return tuple(int(value) for value in values)
