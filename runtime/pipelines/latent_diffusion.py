"""What all pipelines of a text encoder, a conditional UNet and an autoencoder share; a task is data to it."""

import time
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from anamorph.arrays import Array
from anamorph.checkpoint import Checkpoint
from anamorph.components import vae_scale_factor
from anamorph.engine import Program
from anamorph.errors import ConfigError, InputError
from anamorph.noise import NoiseSource, SeededNoise, TorchNoise
from anamorph.pipelines.arguments import Call, Job, Limits, job_of
from anamorph.pipelines.base import DiffusionPipeline
from anamorph.pipelines.cropping import put_back
from anamorph.pipelines.outputs import PipelineOutput, check_output_type, finish_images
from anamorph.pipelines.request import Request, steps_left
from anamorph.pipelines.sampling import Changes, FiniteCheck, Guidance, Plan, Step, denoise
from anamorph.pipelines.tasks import Scene, Task
from anamorph.pipelines.texts import hidden_states
from anamorph.progress import Bar
from anamorph.schedulers import Scheduler, Table
from anamorph.tokenizer import ClipTokenizer

CALLBACK_TENSORS = ("latents", "prompt_embeds")
StepCallback = Callable[[Any, int, float, dict[str, Any]], Mapping[str, Any] | None]


@dataclass(frozen=True)
class State:
    """One finished step of a running generation; `seconds` is the time that it took on the host."""

    step: Step
    seconds: float
    pipeline: "LatentDiffusion"

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


class LatentDiffusion(DiffusionPipeline, public=False):
    """Latent diffusion with a CLIP text encoder (Rombach et al. 2022).

    A subclass declares its `TASK`, and in `PARTS` what it opens.
    """

    SLOTS: ClassVar[Mapping[str, tuple[str, ...]]] = {
        "vae": ("AutoencoderKL",),
        "text_encoder": ("CLIPTextModel",),
        "unet": ("UNet2DConditionModel",),
    }
    TASK: ClassVar[Task]

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
        self._check_channels()

    def _check_channels(self) -> None:
        channels, latents = self._config("unet")["in_channels"], self._config("vae")["latent_channels"]
        if channels == latents or (self.TASK.inpainting and channels == 2 * latents + 1):
            return
        if channels == 2 * latents + 1:
            raise ConfigError(
                f"this unet takes {channels} channels, which is a model for inpainting; open it with "
                "StableDiffusionInpaintPipeline"
            )
        expected = f"{latents} or {2 * latents + 1}" if self.TASK.inpainting else str(latents)
        raise ConfigError(f"the unet takes {channels} channels, {type(self).__name__} feeds it {expected}")

    def generate(self, job: Job, output_type: str = "pil") -> Any:
        """Run a job that `job` made (or one rebuilt from a recorded request) and return its images."""
        _check_output(job, output_type)
        return self._finish(job, self._run(job, None, ()), output_type)

    @property
    def vae_scale_factor(self) -> int:
        """Pixels per latent along one side."""
        return vae_scale_factor(self._config("vae"))

    def _config(self, slot: str) -> Any:
        return self._models[slot].config

    def _job(self, prompt: str | Sequence[str] | None, arguments: Mapping[str, Any]) -> Job:
        """Check the arguments of a call and freeze them; TypeError: a name that this task does not take."""
        if strange := [name for name in arguments if name not in self.TASK.takes]:
            raise TypeError(f"{type(self).__name__} takes no argument {strange[0]!r}; it takes prompt, "
                            f"{', '.join(sorted(self.TASK.takes))}")  # fmt: skip
        call = Call(**{"strength": self.TASK.strength, **arguments, "prompt": prompt})
        factor, vae, text = self.vae_scale_factor, self._config("vae"), self._config("text_encoder")
        limits = Limits(
            factor, self._config("unet")["sample_size"] * factor, vae["in_channels"], vae["latent_channels"],
            text["hidden_size"], text["num_hidden_layers"],
        )  # fmt: skip
        return job_of(call, limits, self.TASK.needs)

    def _call(
        self,
        prompt: str | Sequence[str] | None,
        output_type: str,
        return_dict: bool,
        callback: StepCallback | None,
        names: Sequence[str],
        **arguments: Any,
    ) -> Any:
        check_output_type(output_type)
        job = self._job(prompt, arguments)
        _check_output(job, output_type)
        images = self._finish(job, self._run(job, callback, tuple(names)), output_type)
        return PipelineOutput(images) if return_dict else (images, None)

    def plan(self, job: Job) -> Plan:
        """Encode texts and pictures, draw the first noise and compute the scheduler's table: all the loop needs."""
        request = job.request
        table = self._table(request)
        guidance = Guidance(request.guidance_scale, request.guidance_scale > 1, request.guidance_rescale)
        self._check_axes(request, guidance)
        noise, arrays = _noise(job), self._program("unet").arrays
        states = np.repeat(self._text(job, guidance), request.num_images_per_prompt, axis=0)
        vae, factor = self._config("vae"), self.vae_scale_factor
        scene = Scene(
            request, job.sources, job.latents, table, noise,
            (vae["latent_channels"], request.height // factor, request.width // factor), vae["scaling_factor"],
            self._config("unet")["in_channels"] != vae["latent_channels"], arrays, self._encode_pictures,
        )  # fmt: skip
        start = self.TASK.start(scene)
        conditions = {"encoder_hidden_states": arrays.put(states)}
        return Plan(table, start.latents, conditions, guidance, noise, start.channels, start.after)

    def _check_axes(self, request: Request, guidance: Guidance) -> None:
        """Raise InputError before anything runs where the denoiser was exported for other sizes than the call's."""
        factor = self.vae_scale_factor
        sizes = {"latent_height": request.height // factor, "latent_width": request.width // factor,
                 "batch": guidance.branches * request.images}  # fmt: skip
        axes = self._program("unet").interface.axes
        for name in (name for name in sizes if name in axes):
            if (refusal := axes[name].refusal(sizes[name])) is not None:
                raise InputError(
                    f"the opened unet cannot draw {request.images} of {request.height}x{request.width} pixels "
                    f"({factor} to a latent, {guidance.branches} branches): {refusal}"
                )

    def _table(self, request: Request) -> Table:
        def table(begin: int) -> Table:
            return self.scheduler.table(
                request.num_inference_steps, timesteps=request.timesteps, sigmas=request.sigmas, eta=request.eta,
                begin=begin,
            )  # fmt: skip

        whole = table(0)
        if request.strength is None:
            return whole
        steps = request.num_inference_steps or len(whole)
        skipped = steps - steps_left(steps, request.strength)
        return table(skipped * self.scheduler.order) if skipped else whole

    def _text(self, job: Job, guidance: Guidance) -> NDArray[Any]:
        """Hidden states [branches * P, S, D], negative prompts first."""
        request = job.request
        if guidance.active:
            negative = self.encode(request.negative_prompt) if job.negative_embeds is None else job.negative_embeds
        embeds = job.prompt_embeds
        positive = self.encode(request.prompt, request.clip_skip) if embeds is None else embeds
        return np.concatenate([negative, positive]) if guidance.active else positive

    def encode(self, texts: Sequence[str], clip_skip: int | None = None) -> NDArray[Any]:
        """Texts to hidden states [len(texts), S, D]; warns where a text is longer than the encoder takes.

        With `clip_skip` the states are those before the last so many layers, normalised as the last ones are.
        """
        return hidden_states(self.tokenizer, self._program("text_encoder"), texts, clip_skip)

    def _encode_pictures(self, pictures: NDArray[Any]) -> NDArray[Any]:
        program = self._program("vae_encoder")
        moments = program.session()({"sample": program.arrays.put(pictures)})["latent_parameters"]
        FiniteCheck(program.arrays, "vae_encoder").add_now(moments, "encoding the pictures")
        return program.arrays.get(moments)

    def decode(self, latents: Array, output_type: str = "pil") -> Any:
        """Latents of the denoiser (or NumPy, or a tensor) to pictures, as `output_type` says."""
        check_output_type(output_type)
        if output_type == "latent":
            return latents
        program = self._program("vae_decoder")
        sample = program.arrays.accept(latents) / self._config("vae")["scaling_factor"]
        pixels = program.session()({"latent_sample": sample})["sample"]
        FiniteCheck(program.arrays, "vae_decoder").add_now(pixels, "decoding the latents")
        return finish_images(program.arrays.get(pixels), output_type)

    def _finish(self, job: Job, latents: Array, output_type: str) -> Any:
        images, whole = self.decode(latents, output_type), job.overlay
        return images if whole is None else [put_back(i, whole.original, whole.mask, whole.box) for i in images]

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


def _noise(job: Job) -> NoiseSource:
    if job.request.seeds is not None:
        return SeededNoise(job.request.seeds)
    return TorchNoise(job.generator, job.request.images)


def _check_output(job: Job, output_type: str) -> None:
    check_output_type(output_type)
    if job.overlay is not None and output_type != "pil":
        raise InputError(f"padding_mask_crop puts pictures back into Pillow images; got output_type {output_type!r}")
