"""What all pipelines of text encoders, a conditional UNet and an autoencoder share; a task is data to it."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, ClassVar

from numpy.typing import NDArray

from anamorph.arrays import Array
from anamorph.autoencoder_interfaces import latent_channels, vae_scale_factor
from anamorph.errors import ConfigError
from anamorph.lora.adapting import scaled
from anamorph.pipelines import looking, watermark
from anamorph.pipelines.arguments import Job, Limits, job_of
from anamorph.pipelines.base import DiffusionPipeline
from anamorph.pipelines.controlling import Following
from anamorph.pipelines.decoding import decoded, decoded_bytes, divided
from anamorph.pipelines.learning import Learning
from anamorph.pipelines.lora import SCALE, LoraLoading, scale_of
from anamorph.pipelines.prompts import Asking, Family, guidance_embedding, texts
from anamorph.pipelines.request import as_texts
from anamorph.pipelines.sampling import Guidance, Plan, check_axes
from anamorph.pipelines.signature import Arguments, Texts
from anamorph.pipelines.spans import table_of
from anamorph.pipelines.tasks import Scene, Task
from anamorph.pipelines.texts import Embeds, Encoder, last_states
from anamorph.pipelines.wording import PLAIN, Wording
from anamorph.scaling import Scaling
from anamorph.schedulers import Scheduler
from anamorph.tiling import autoencoder_tiles


class LatentDiffusion(LoraLoading, Learning, public=False):
    """Latent diffusion with CLIP text encoders (Rombach et al. 2022).

    A subclass declares its `TASK`, and the `FAMILY` that says how texts are encoded and what the denoiser is told.
    """

    VAE: ClassVar[str] = "vae"
    TASK: ClassVar[Task]
    FAMILY: ClassVar[Family] = Family(last_states, (texts, guidance_embedding))

    def __init__(self, *components: Any, **named: Any) -> None:
        super().__init__(*components, **named)
        self._check_channels()
        configs = {name: loaded.config for name, loaded in self._models.items()}
        if self.options.get("add_watermarker"):
            watermark.check()
        self.FAMILY.check(type(self).__name__, configs, self.options)

    __init__.__doc__ = DiffusionPipeline.__init__.__doc__

    def _check_channels(self) -> None:
        channels, latents = self._config("unet")["in_channels"], latent_channels(self._config(self.VAE))
        expected = self.TASK.channels(latents)
        if channels in expected:
            return
        if self._inpainting:
            raise ConfigError(
                f"this unet takes {channels} channels, which is a model for inpainting; open it with "
                "StableDiffusionInpaintPipeline"
            )
        feeds = " or ".join(map(str, expected))
        raise ConfigError(f"the unet takes {channels} channels, {type(self).__name__} feeds it {feeds}")

    @property
    def vae_scale_factor(self) -> int:
        """Pixels per latent along one side."""
        return vae_scale_factor(self._config(self.VAE))

    @property
    def scaling(self) -> Scaling:
        """How latents of the autoencoder become those of the denoiser."""
        return Scaling.of(self._config(self.VAE))

    @property
    def needs(self) -> tuple[str, ...]:
        return self.TASK.needs

    needs.__doc__ = DiffusionPipeline.needs.__doc__

    @classmethod
    def most_branches(cls, denoiser: Mapping[str, Any]) -> int:
        """See `DiffusionPipeline.most_branches`."""
        return 1 if cls._distilled(denoiser) else cls.BRANCHES

    @classmethod
    def _distilled(cls, denoiser: Mapping[str, Any]) -> bool:
        return denoiser.get("time_cond_proj_dim") is not None and guidance_embedding in cls.FAMILY.conditions

    @classmethod
    def source_scale(cls, factor: int) -> int:
        """See `DiffusionPipeline.source_scale`."""
        return 1 if cls.TASK.scale is None else cls.TASK.scale(factor)

    @property
    def encoders(self) -> tuple[Encoder, ...]:
        """The text encoders that are there, each with its tokenizer."""
        names = [name for name in self._models if name.startswith("text_encoder")]
        return tuple(Encoder(getattr(self, name.replace("text_encoder", "tokenizer")), self.program(name))
                     for name in names)  # fmt: skip

    def _limits(self) -> Limits:
        factor, vae = self.vae_scale_factor, self._config(self.VAE)
        return Limits(
            factor, self._config("unet")["sample_size"] * factor, vae["in_channels"], latent_channels(vae),
            *self._text_sizes(), None if self.TASK.scale is None else self.source_scale(factor), self._inpainting,
            self._following,
        )  # fmt: skip

    @property
    def _following(self) -> Following | None:
        """The nets whose pictures a call follows, if there are any."""
        return None

    @property
    def _inpainting(self) -> bool:
        """Whether the denoiser takes a mask and what stays as further channels."""
        return bool(self._config("unet")["in_channels"] == 2 * latent_channels(self._config(self.VAE)) + 1)

    def _text_sizes(self) -> tuple[int, int, int | None]:
        """Width of encoded texts, layers that may be skipped, width of pooled texts where the denoiser takes any."""
        text = [loaded.config for name, loaded in self._models.items() if name.startswith("text_encoder")]
        return (
            sum(config["hidden_size"] for config in text),
            min(config["num_hidden_layers"] for config in text) - self.FAMILY.unused_layers,
            text[-1]["projection_dim"] if self._config("unet").get("addition_embed_type") == "text_time" else None,
        )

    def _job(self, call: Arguments) -> Job:
        profile = self._models[self.DENOISER].profile
        if call["step_caching"] is None and profile is not None:
            call = {**call, "step_caching": profile.step_caching}
        job = job_of(call, self._limits(), self.TASK.needs, self._more)
        if self.options.get("add_watermarker"):
            watermark.check(job.request.width)
        request = replace(job.request, cross_attention_kwargs=scale_of(call["cross_attention_kwargs"]))
        return replace(job, request=request, looks=looking.looks_of(self, call))

    def _more(self, call: Arguments, prompts: int) -> dict[str, Any]:
        """Further fields of a call's request; raises InputError."""
        return self.FAMILY.more(call, prompts, options=self.options, encoders=len(self.encoders))

    def plan(self, job: Job) -> Plan:
        request, unet = job.request, self._config("unet")
        table = self.TASK.table(table_of(self.scheduler, request, self.TASK.distilled))
        # A model that has guidance among its inputs is not guided from outside.
        guidance = Guidance() if self._distilled(unet) else self.TASK.guidance(request)
        guidance = guidance.within(request.guidance_interval, len(table.rows)).dealt(self.guidance_batch)
        factor = self.vae_scale_factor
        sides = {"latent_height": request.height // factor, "latent_width": request.width // factor}
        for branches in guidance.counts:
            what = (f"{request.images} of {request.height}x{request.width} pixels ({factor} to a latent, "
                    f"{branches} branches)")  # fmt: skip
            check_axes(self.program("unet"), branches, request.images, sides, what, self.ALIKE)
        noise, arrays = job.noise, self.program("unet").arrays
        wording = Wording(bool(request.prompt_weighting), bool(request.long_prompts))
        scale = (request.cross_attention_kwargs or {}).get(SCALE, 1.0)
        encode = partial(self._encode, wording=wording, scale=scale)
        asking = Asking(job, guidance, encode, len(self.encoders), unet, self.options)
        told = {name: value for condition in self.FAMILY.conditions for name, value in condition(asking).items()}
        told |= looking.told(self, job.looks, guidance, request.images, sides)
        vae = self._config(self.VAE)
        channels = latent_channels(vae)
        scene = Scene(
            request, guidance, job.sources, job.latents, table, noise,
            (channels, request.height // factor, request.width // factor), self.scaling,
            self._inpainting, arrays, self._encode_pictures,
            self._models[self.VAE].component.class_name != "AutoencoderKL", self._schedulers,
        )  # fmt: skip
        start = self.TASK.start(scene)
        conditions = {name: arrays.put(value) for name, value in {**told, **start.conditions}.items()}
        return Plan(
            table,
            start.latents,
            conditions,
            guidance,
            noise,
            start.beside,
            start.joined,
            start.after,
            self.ALIKE,
            refresh=request.step_caching,
            scale=scale,
        )

    plan.__doc__ = DiffusionPipeline.plan.__doc__

    @property
    def _schedulers(self) -> dict[str, Scheduler]:
        return {name: value for name, value in self.components.items() if isinstance(value, Scheduler)}

    def _encode(
        self, prompts: Sequence[Sequence[str]], clip_skip: int | None, wording: Wording = PLAIN, scale: float = 1.0
    ) -> Embeds:
        encoders = [replace(one, wording=wording, program=scaled(one.program, scale)) for one in self.encoders]
        return self.FAMILY.encode(encoders, prompts, clip_skip)

    def encode(self, prompts: Sequence[str], clip_skip: int | None = None) -> NDArray[Any]:
        """Texts to hidden states [len(prompts), S, D]; warns where a text is longer than an encoder takes.

        With `clip_skip` the states are those before the last so many layers.
        """
        return self.embeds(prompts, clip_skip=clip_skip)["prompt_embeds"]

    def embeds(self, prompt: str | Sequence[str], prompt_2: Texts = None, *, clip_skip: int | None = None) -> Embeds:
        """Texts to everything that a call takes in their place, by name of the argument; see `encode`."""
        first = as_texts(prompt, "prompt")
        second = first if prompt_2 is None else as_texts(prompt_2, "prompt_2")
        return self._encode([first, *[second] * (len(self.encoders) - 1)], clip_skip)

    def upcast_vae(self) -> None:
        """Let the autoencoder compute in float32 from now on, whatever the other models do."""
        dtype = self._given.torch_dtype
        wishes = dict(dtype) if isinstance(dtype, Mapping) else {"default": dtype}
        self._given = replace(self._given, torch_dtype={**wishes, self.VAE: "float32"})
        loaded = self._models[self.VAE]
        self._models[self.VAE] = replace(self._open(self.VAE, loaded.component), sparing=loaded.sparing)

    def _encode_pictures(self, pictures: NDArray[Any]) -> NDArray[Any]:
        program = self.program("vae_encoder")
        cut, _ = autoencoder_tiles(self._config(self.VAE))
        put = program.arrays.put(pictures)
        moments = divided(self._models[self.VAE], "vae_encoder", put, cut, "encoding the pictures")
        return program.arrays.get(moments)

    def _pixels(self, latents: Array) -> NDArray[Any]:
        pixels = decoded(self._models[self.VAE], self.scaling, latents)
        return watermark.marked(pixels) if self.options.get("add_watermarker") else pixels

    def _bytes(self, latents: Array) -> NDArray[Any]:
        if self.options.get("add_watermarker"):  # which takes more than bytes
            return super()._bytes(latents)
        return decoded_bytes(self._models[self.VAE], self.scaling, latents)
