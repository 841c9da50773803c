"""Stable Diffusion 1.x and 2.x, text to image (Rombach et al. 2022)."""

import time
import warnings
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from typing import Any, ClassVar, TypedDict, Unpack

import numpy as np
from numpy.typing import NDArray

from anamorph.arrays import Array, to_numpy
from anamorph.checkpoint import Checkpoint
from anamorph.components import vae_scale_factor
from anamorph.engine import Program
from anamorph.errors import InputError
from anamorph.noise import NoiseSource, SeededNoise, TorchNoise
from anamorph.pipelines.base import DiffusionPipeline
from anamorph.pipelines.outputs import PipelineOutput, check_output_type, finish_images
from anamorph.pipelines.request import Request, as_texts, check_numbers, check_size, negatives_for, seeds_for
from anamorph.pipelines.sampling import Changes, FiniteCheck, Guidance, Plan, Step, denoise
from anamorph.progress import Bar
from anamorph.schedulers import Scheduler
from anamorph.tokenizer import ClipTokenizer

DEFAULT_STEPS = 50
CALLBACK_TENSORS = ("latents", "prompt_embeds")
StepCallback = Callable[["StableDiffusionPipeline", int, float, dict[str, Any]], Mapping[str, Any] | None]


class Arguments(TypedDict, total=False):
    """The arguments of a generation, as `StableDiffusionPipeline.job` takes them."""

    height: int | None
    width: int | None
    num_inference_steps: int | None
    timesteps: Sequence[int] | None
    sigmas: Sequence[float] | None
    guidance_scale: float
    negative_prompt: str | Sequence[str] | None
    num_images_per_prompt: int
    eta: float
    generator: Any
    latents: Any
    prompt_embeds: Any
    negative_prompt_embeds: Any
    seed: int | Sequence[int] | None


@dataclass(frozen=True)
class Job:
    """A checked call: the serialisable request, and what the caller brought instead of seeds and texts."""

    request: Request
    generator: Any = None
    latents: NDArray[Any] | None = None
    prompt_embeds: NDArray[Any] | None = None
    negative_embeds: NDArray[Any] | None = None


@dataclass(frozen=True)
class State:
    """One finished step of a running generation; `seconds` is the time that it took on the host."""

    step: Step
    seconds: float
    pipeline: "StableDiffusionPipeline"

    @property
    def index(self) -> int:
        """Number of the step, from 0."""
        return self.step.index

    @property
    def total(self) -> int:
        """Number of all steps."""
        return self.step.total

    @property
    def timestep(self) -> float:
        """What the denoiser was told about the noise, in training steps."""
        return self.step.timestep

    @property
    def latents(self) -> Array:
        """[N, c, h, w], the denoiser's own arrays (PyTorch tensors or NumPy)."""
        return self.step.latents

    def preview(self, output_type: str = "pil") -> Any:
        """Decode the latents of this step to pictures."""
        return self.pipeline.decode(self.latents, output_type)


class StableDiffusionPipeline(DiffusionPipeline):
    """Text to image with a CLIP text encoder, a conditional UNet and an autoencoder."""

    SLOTS: ClassVar[Mapping[str, tuple[str, ...]]] = {
        "vae": ("AutoencoderKL",),
        "text_encoder": ("CLIPTextModel",),
        "unet": ("UNet2DConditionModel",),
    }
    PARTS: ClassVar[Mapping[str, str]] = {"text_encoder": "text_encoder", "unet": "unet", "vae_decoder": "vae"}

    def __init__(
        self,
        vae: Any,
        text_encoder: Any,
        tokenizer: ClipTokenizer,
        unet: Any,
        scheduler: Scheduler,
        *,
        backend: str | Mapping[str, str] = "auto",
        device: Any = None,
        torch_dtype: Any = None,
        origin: Checkpoint | None = None,
    ) -> None:
        super().__init__(
            tokenizer=tokenizer, scheduler=scheduler, backend=backend, device=device, torch_dtype=torch_dtype,
            origin=origin, vae=vae, text_encoder=text_encoder, unet=unet,
        )  # fmt: skip

    def __call__(
        self,
        prompt: str | Sequence[str] | None = None,
        height: int | None = None,
        width: int | None = None,
        num_inference_steps: int | None = None,
        timesteps: Sequence[int] | None = None,
        sigmas: Sequence[float] | None = None,
        guidance_scale: float = 7.5,
        negative_prompt: str | Sequence[str] | None = None,
        num_images_per_prompt: int = 1,
        eta: float = 0.0,
        generator: Any = None,
        latents: Any = None,
        prompt_embeds: Any = None,
        negative_prompt_embeds: Any = None,
        output_type: str = "pil",
        return_dict: bool = True,
        callback_on_step_end: StepCallback | None = None,
        callback_on_step_end_tensor_inputs: Sequence[str] = ("latents",),
        *,
        seed: int | Sequence[int] | None = None,
    ) -> Any:
        """Generate pictures; arguments as in diffusers, plus `seed` (one number, or one per picture).

        Returns an object whose `.images` are Pillow images (or as `output_type` says: "np" [N, H, W, C] in 0..1,
        "pt" [N, C, H, W] in 0..1, "latent" [N, c, h, w]); with `return_dict=False` the tuple (images, None).

        Raises InputError: an argument is out of range or does not fit the others.
        Raises NumericalError: a component returned NaN or infinity.
        """
        check_output_type(output_type)
        job = self.job(
            prompt, height=height, width=width, num_inference_steps=num_inference_steps, timesteps=timesteps,
            sigmas=sigmas, guidance_scale=guidance_scale, negative_prompt=negative_prompt,
            num_images_per_prompt=num_images_per_prompt, eta=eta, generator=generator, latents=latents,
            prompt_embeds=prompt_embeds, negative_prompt_embeds=negative_prompt_embeds, seed=seed,
        )  # fmt: skip
        final = self._run(job, callback_on_step_end, tuple(callback_on_step_end_tensor_inputs))
        images = self.decode(final, output_type)
        return PipelineOutput(images) if return_dict else (images, None)

    def steps(self, prompt: str | Sequence[str] | None = None, **arguments: Unpack[Arguments]) -> Iterator[State]:
        """Generate step by step: yields a `State` after each call of the denoiser; closing it stops cleanly.

        Arguments and errors are those of a call; everything is checked before the first step runs.
        """
        return self._states(self.plan(self.job(prompt, **arguments)))

    def generate(self, job: Job, output_type: str = "pil") -> Any:
        """Run a job that `job` made (or one rebuilt from a recorded request) and return its images."""
        check_output_type(output_type)
        return self.decode(self._run(job, None, ()), output_type)

    def job(
        self,
        prompt: str | Sequence[str] | None = None,
        *,
        height: int | None = None,
        width: int | None = None,
        num_inference_steps: int | None = None,
        timesteps: Sequence[int] | None = None,
        sigmas: Sequence[float] | None = None,
        guidance_scale: float = 7.5,
        negative_prompt: str | Sequence[str] | None = None,
        num_images_per_prompt: int = 1,
        eta: float = 0.0,
        generator: Any = None,
        latents: Any = None,
        prompt_embeds: Any = None,
        negative_prompt_embeds: Any = None,
        seed: int | Sequence[int] | None = None,
    ) -> Job:
        """Check the arguments of a call and freeze them; raises InputError."""
        if (prompt is None) == (prompt_embeds is None):
            raise InputError("give either prompt or prompt_embeds")
        check_numbers(guidance_scale, num_images_per_prompt)
        embeds, negatives = self._given_embeds(prompt_embeds, negative_prompt_embeds, negative_prompt)
        prompts = ("",) * len(embeds) if prompt is None else as_texts(prompt, "prompt")  # type: ignore[arg-type]
        default = self._models["unet"].config["sample_size"] * self.vae_scale_factor
        size = (default if height is None else height, default if width is None else width)
        check_size(*size, self.vae_scale_factor)
        if num_inference_steps is None and timesteps is None and sigmas is None:
            num_inference_steps = DEFAULT_STEPS
        images = len(prompts) * num_images_per_prompt
        if generator is not None and seed is not None:
            raise InputError("give either seed or generator, not both")
        seeds = seeds_for(images, seed) if generator is None else None
        request = Request(
            prompts, negatives_for(len(prompts), negative_prompt), *size, num_inference_steps, float(guidance_scale),
            num_images_per_prompt, float(eta), seeds,
            None if timesteps is None else tuple(timesteps), None if sigmas is None else tuple(sigmas),
        )  # fmt: skip
        given = None if latents is None else self._given_latents(latents, request)
        return Job(request, generator, given, embeds, negatives)

    @property
    def vae_scale_factor(self) -> int:
        """Pixels per latent along one side."""
        return vae_scale_factor(self._models["vae"].config)

    def _given_embeds(
        self, prompt_embeds: Any, negative_prompt_embeds: Any, negative_prompt: Any
    ) -> tuple[NDArray[Any] | None, NDArray[Any] | None]:
        if negative_prompt_embeds is not None and negative_prompt is not None:
            raise InputError("give either negative_prompt or negative_prompt_embeds, not both")
        width = self._models["text_encoder"].config["hidden_size"]
        arrays = []
        for name, value in (("prompt_embeds", prompt_embeds), ("negative_prompt_embeds", negative_prompt_embeds)):
            array = None if value is None else to_numpy(value).astype(np.float32)
            if array is not None and (array.ndim != 3 or array.shape[2] != width or not len(array)):
                raise InputError(f"{name} has shape {list(array.shape)}, expected [prompts, tokens, {width}]")
            arrays.append(array)
        if arrays[0] is not None and arrays[1] is not None and arrays[0].shape != arrays[1].shape:
            raise InputError("prompt_embeds and negative_prompt_embeds have different shapes; expected the same")
        return arrays[0], arrays[1]

    def _given_latents(self, latents: Any, request: Request) -> NDArray[Any]:
        array = to_numpy(latents).astype(np.float32)
        expected = (request.images, *self._latent_shape(request))
        if array.shape != expected:
            raise InputError(f"latents have shape {list(array.shape)}, expected {list(expected)}")
        return array

    def _latent_shape(self, request: Request) -> tuple[int, int, int]:
        factor = self.vae_scale_factor
        channels = self._models["unet"].config["in_channels"]
        return channels, request.height // factor, request.width // factor

    def plan(self, job: Job) -> Plan:
        """Encode the texts, draw the first noise and compute the scheduler's table: all that the loop needs."""
        request = job.request
        table = self.scheduler.table(
            request.num_inference_steps, timesteps=request.timesteps, sigmas=request.sigmas, eta=request.eta
        )
        guidance = Guidance(request.guidance_scale, request.guidance_scale > 1)
        noise = self._noise(job)
        latents = noise.normal(self._latent_shape(request)) if job.latents is None else job.latents
        states = np.repeat(self._text(job, guidance), request.num_images_per_prompt, axis=0)
        arrays = self._program("unet").arrays
        start = np.float32(table.init_noise_sigma) * latents
        conditions = {"encoder_hidden_states": arrays.put(states)}
        return Plan(table, arrays.put(start), conditions, guidance, noise)

    @staticmethod
    def _noise(job: Job) -> NoiseSource:
        if job.request.seeds is not None:
            return SeededNoise(job.request.seeds)
        return TorchNoise(job.generator, job.request.images)

    def _text(self, job: Job, guidance: Guidance) -> NDArray[Any]:
        """Hidden states [branches * P, S, D], negative prompts first."""
        request = job.request
        if guidance.active:
            negative = self.encode(request.negative_prompt) if job.negative_embeds is None else job.negative_embeds
        positive = self.encode(request.prompt) if job.prompt_embeds is None else job.prompt_embeds
        return np.concatenate([negative, positive]) if guidance.active else positive

    def encode(self, texts: Sequence[str]) -> NDArray[Any]:
        """Texts to hidden states [len(texts), S, D]; warns where a text is longer than the encoder takes."""
        encoding = self.tokenizer(texts)
        for lost in filter(None, encoding.truncated):
            limit = self.tokenizer.model_max_length
            warnings.warn(f"a prompt is longer than {limit} tokens; this was cut off: {lost!r}", stacklevel=2)
        program = self._program("text_encoder")
        states = program.session()({"input_ids": program.arrays.put(encoding.input_ids)})["last_hidden_state"]
        FiniteCheck(program.arrays, "text_encoder").add_now(states, "encoding the prompts")
        return program.arrays.get(states)

    def decode(self, latents: Array, output_type: str = "pil") -> Any:
        """Latents of the denoiser (or NumPy, or a tensor) to pictures, as `output_type` says."""
        check_output_type(output_type)
        if output_type == "latent":
            return latents
        program = self._program("vae_decoder")
        sample = program.arrays.accept(latents) / self._models["vae"].config["scaling_factor"]
        pixels = program.session()({"latent_sample": sample})["sample"]
        FiniteCheck(program.arrays, "vae_decoder").add_now(pixels, "decoding the latents")
        return finish_images(program.arrays.get(pixels), output_type)

    def _program(self, part: str) -> Program:
        return self._models[self.PARTS[part]].programs[part]

    def _states(self, plan: Plan) -> Generator[State, Changes | None, Array]:
        program = self._program("unet")
        with closing(denoise(plan, program.session(), program.arrays)) as loop:
            changes: Changes | None = None
            while True:
                started = time.perf_counter()
                try:
                    step = loop.send(changes)
                except StopIteration as stop:
                    return stop.value
                changes = yield State(step, time.perf_counter() - started, self)

    def _run(self, job: Job, callback: StepCallback | None, names: tuple[str, ...]) -> Array:
        """Drive the loop to its end, with the caller's callback between the steps."""
        if strange := [name for name in names if name not in CALLBACK_TENSORS]:
            raise InputError(f"callbacks cannot have {', '.join(strange)}; they can have {', '.join(CALLBACK_TENSORS)}")
        plan = self.plan(job)
        with closing(self._states(plan)) as states, Bar(len(plan.table.rows), "denoising", self.show_progress) as bar:
            changes: Changes | None = None
            while True:
                try:
                    state = states.send(changes)
                except StopIteration as stop:
                    return stop.value
                bar.advance()
                changes = self._ask(callback, names, state)

    def _ask(self, callback: StepCallback | None, names: tuple[str, ...], state: State) -> Changes | None:
        if callback is None:
            return None
        have = {"latents": state.latents, "prompt_embeds": state.step.conditions["encoder_hidden_states"]}
        answer = callback(self, state.index, state.timestep, {name: have[name] for name in names}) or {}
        if strange := [name for name in answer if name not in CALLBACK_TENSORS]:
            raise InputError(f"the callback returned {', '.join(strange)}; expected {', '.join(CALLBACK_TENSORS)}")
        conditions = {"encoder_hidden_states": answer["prompt_embeds"]} if "prompt_embeds" in answer else {}
        return Changes(answer.get("latents"), conditions)
