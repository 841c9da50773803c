"""Stable Diffusion 1.x and 2.x (Rombach et al. 2022): each class declares a task and its arguments."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, ClassVar, Unpack

from anamorph.pipelines.arguments import Arguments, Img2ImgArguments, InpaintArguments, Job
from anamorph.pipelines.latent_diffusion import LatentDiffusion, State, StepCallback
from anamorph.pipelines.tasks import Task, from_noise, from_picture, inpaint

__all__ = [
    "Job",
    "StableDiffusionImg2ImgPipeline",
    "StableDiffusionInpaintPipeline",
    "StableDiffusionPipeline",
    "State",
]

DRAWING: Mapping[str, str] = {"text_encoder": "text_encoder", "unet": "unet", "vae_decoder": "vae"}
EDITING: Mapping[str, str] = {**DRAWING, "vae_encoder": "vae"}


class StableDiffusionPipeline(LatentDiffusion):
    """Text to image with a CLIP text encoder, a conditional UNet and an autoencoder."""

    PARTS: ClassVar[Mapping[str, str]] = DRAWING
    TASK = Task(from_noise, Arguments.__optional_keys__)

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
        guidance_rescale: float = 0.0,
        clip_skip: int | None = None,
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
        return self._call(
            prompt, output_type, return_dict, callback_on_step_end, callback_on_step_end_tensor_inputs,
            height=height, width=width, num_inference_steps=num_inference_steps, timesteps=timesteps, sigmas=sigmas,
            guidance_scale=guidance_scale, negative_prompt=negative_prompt, latents=latents, eta=eta,
            num_images_per_prompt=num_images_per_prompt, generator=generator, prompt_embeds=prompt_embeds,
            negative_prompt_embeds=negative_prompt_embeds, guidance_rescale=guidance_rescale, clip_skip=clip_skip,
            seed=seed,
        )  # fmt: skip

    def steps(self, prompt: str | Sequence[str] | None = None, **arguments: Unpack[Arguments]) -> Iterator[State]:
        """Generate step by step: yields a `State` after each call of the denoiser; closing it stops cleanly.

        Arguments and errors are those of a call; everything is checked before the first step runs.
        """
        return self._states(self.plan(self.job(prompt, **arguments)))

    def job(self, prompt: str | Sequence[str] | None = None, **arguments: Unpack[Arguments]) -> Job:
        """Check the arguments of a call and freeze them; raises InputError, or TypeError for a strange name."""
        return self._job(prompt, arguments)


class StableDiffusionImg2ImgPipeline(LatentDiffusion):
    """Image to image: a picture is noised by `strength` and drawn anew (SDEdit, Meng et al. 2022)."""

    PARTS: ClassVar[Mapping[str, str]] = EDITING
    TASK = Task(from_picture, Img2ImgArguments.__optional_keys__, ("image",), strength=0.8)

    def __call__(
        self,
        prompt: str | Sequence[str] | None = None,
        image: Any = None,
        strength: float = 0.8,
        num_inference_steps: int | None = None,
        timesteps: Sequence[int] | None = None,
        sigmas: Sequence[float] | None = None,
        guidance_scale: float = 7.5,
        negative_prompt: str | Sequence[str] | None = None,
        num_images_per_prompt: int = 1,
        eta: float = 0.0,
        generator: Any = None,
        prompt_embeds: Any = None,
        negative_prompt_embeds: Any = None,
        output_type: str = "pil",
        return_dict: bool = True,
        clip_skip: int | None = None,
        callback_on_step_end: StepCallback | None = None,
        callback_on_step_end_tensor_inputs: Sequence[str] = ("latents",),
        *,
        guidance_rescale: float = 0.0,
        seed: int | Sequence[int] | None = None,
    ) -> Any:
        """Draw a picture anew; arguments as in diffusers, plus `seed` and `guidance_rescale`.

        `image`: RGB Pillow images, NumPy [B, H, W, C] or torch [B, C, H, W] in 0..1, lists of one of these, or
        latents [B, c, h, w]. Their number divides that of the pictures, and picture i starts from number i modulo it;
        sides are rounded down to multiples of 8. `strength` in 0..1 is the share of the steps that runs.

        Returns and raises as text to image does.
        """
        return self._call(
            prompt, output_type, return_dict, callback_on_step_end, callback_on_step_end_tensor_inputs,
            image=image, strength=strength, num_inference_steps=num_inference_steps, timesteps=timesteps,
            sigmas=sigmas, guidance_scale=guidance_scale, negative_prompt=negative_prompt, eta=eta,
            num_images_per_prompt=num_images_per_prompt, generator=generator, prompt_embeds=prompt_embeds,
            negative_prompt_embeds=negative_prompt_embeds, guidance_rescale=guidance_rescale, clip_skip=clip_skip,
            seed=seed,
        )  # fmt: skip

    def steps(
        self, prompt: str | Sequence[str] | None = None, **arguments: Unpack[Img2ImgArguments]
    ) -> Iterator[State]:
        """Generate step by step; see `StableDiffusionPipeline.steps`."""
        return self._states(self.plan(self.job(prompt, **arguments)))

    def job(self, prompt: str | Sequence[str] | None = None, **arguments: Unpack[Img2ImgArguments]) -> Job:
        """Check the arguments of a call and freeze them; raises InputError, or TypeError for a strange name."""
        return self._job(prompt, arguments)


class StableDiffusionInpaintPipeline(LatentDiffusion):
    """Inpainting: draws where a mask is white, with a model made for that or with any other."""

    PARTS: ClassVar[Mapping[str, str]] = EDITING
    TASK = Task(inpaint, InpaintArguments.__optional_keys__, ("image", "mask_image"), strength=1.0, inpainting=True)

    def __call__(
        self,
        prompt: str | Sequence[str] | None = None,
        image: Any = None,
        mask_image: Any = None,
        masked_image_latents: Any = None,
        height: int | None = None,
        width: int | None = None,
        padding_mask_crop: int | None = None,
        strength: float = 1.0,
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
        clip_skip: int | None = None,
        callback_on_step_end: StepCallback | None = None,
        callback_on_step_end_tensor_inputs: Sequence[str] = ("latents",),
        *,
        guidance_rescale: float = 0.0,
        seed: int | Sequence[int] | None = None,
    ) -> Any:
        """Draw where the mask is white; arguments as in diffusers, plus `seed` and `guidance_rescale`.

        `image` as for image to image; `mask_image`: Pillow images, or arrays in 0..1 [H, W], [B, H, W] or with one
        channel, of the image's size, at least 0.5 where something is to be drawn. Both are brought to `height` x
        `width` (default: the model's own). At `strength` 1 the start is noise alone, below it is the noised picture.
        `padding_mask_crop` draws the region around the mask with so many pixels of its surroundings, and puts it back.

        Returns and raises as text to image does.
        """
        return self._call(
            prompt, output_type, return_dict, callback_on_step_end, callback_on_step_end_tensor_inputs,
            image=image, mask_image=mask_image, masked_image_latents=masked_image_latents, height=height, width=width,
            padding_mask_crop=padding_mask_crop, strength=strength, num_inference_steps=num_inference_steps,
            timesteps=timesteps, sigmas=sigmas, guidance_scale=guidance_scale, negative_prompt=negative_prompt,
            num_images_per_prompt=num_images_per_prompt, eta=eta, generator=generator, latents=latents,
            prompt_embeds=prompt_embeds, negative_prompt_embeds=negative_prompt_embeds,
            guidance_rescale=guidance_rescale, clip_skip=clip_skip, seed=seed,
        )  # fmt: skip

    def steps(
        self, prompt: str | Sequence[str] | None = None, **arguments: Unpack[InpaintArguments]
    ) -> Iterator[State]:
        """Generate step by step; see `StableDiffusionPipeline.steps`."""
        return self._states(self.plan(self.job(prompt, **arguments)))

    def job(self, prompt: str | Sequence[str] | None = None, **arguments: Unpack[InpaintArguments]) -> Job:
        """Check the arguments of a call and freeze them; raises InputError, or TypeError for a strange name."""
        return self._job(prompt, arguments)
