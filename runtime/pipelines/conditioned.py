"""Stable Diffusion that also looks at a picture: at its depth, or at itself while it is told how to change it."""

from collections.abc import Mapping
from typing import Any, ClassVar

from numpy.typing import NDArray

from anamorph.autoencoder_interfaces import latent_channels
from anamorph.clip_image import DPTImageProcessor
from anamorph.errors import InputError
from anamorph.image import to_pil
from anamorph.pipelines.arguments import Job
from anamorph.pipelines.latent_diffusion import LatentDiffusion
from anamorph.pipelines.pictures import is_latent, read_pictures
from anamorph.pipelines.prompts import Family, texts
from anamorph.pipelines.request import Request
from anamorph.pipelines.sampling import FiniteCheck, Guidance
from anamorph.pipelines.signature import Arguments, Signature
from anamorph.pipelines.slots import DEPTH_PROCESSOR, SCHEDULER, TOKENIZER, Slots, model
from anamorph.pipelines.stable_diffusion import EDITING, EMBEDDED, OPTIONS, RETURNED, SHOWN, VAES, WATCHED
from anamorph.pipelines.tasks import Task, beside_picture, with_as_many, with_depth, with_one_more
from anamorph.pipelines.texts import last_states


class StableDiffusionDepth2ImgPipeline(LatentDiffusion):
    """Image to image that keeps the depth of the picture, which `depth_map` gives or the depth estimator finds."""

    SLOTS: ClassVar[Slots] = {
        "vae": model(*VAES, parts=("vae_decoder", "vae_encoder")),
        "text_encoder": model("CLIPTextModel"),
        "tokenizer": TOKENIZER,
        "unet": model("UNet2DConditionModel"),
        "scheduler": SCHEDULER,
        "depth_estimator": model("DPTForDepthEstimation", optional=True),
        "feature_extractor": DEPTH_PROCESSOR,
    }
    feature_extractor: DPTImageProcessor
    TAKES = Signature.of(
        "prompt image depth_map strength num_inference_steps guidance_scale negative_prompt num_images_per_prompt "
        f"eta generator {EMBEDDED} {WATCHED} * timesteps sigmas guidance_rescale guidance_interval step_caching seed",
        strength=0.8,
    )
    TASK = Task(with_depth, ("image", "depth_map"), channels=with_one_more)

    def __init__(self, *components: Any, **named: Any) -> None:
        super().__init__(*components, **named)
        if "depth_estimator" in self._models and self.feature_extractor is None:
            raise InputError("a depth_estimator without a feature_extractor; pass both, or depth_estimator=None")

    __init__.__doc__ = LatentDiffusion.__init__.__doc__

    @property
    def needs(self) -> tuple[str, ...]:
        return ("image",) if "depth_estimator" in self._models else self.TASK.needs

    needs.__doc__ = LatentDiffusion.needs.__doc__

    def _job(self, call: Arguments) -> Job:
        if call["depth_map"] is None and call["image"] is not None and "depth_estimator" in self._models:
            call = {**call, "depth_map": self._estimated(call["image"])}
        return super()._job(call)

    def _estimated(self, image: Any) -> NDArray[Any]:
        """Inverse depth of pictures in a unit of its own, [B, h, w]."""
        vae = self._config(self.VAE)
        given = read_pictures(image, vae["in_channels"], latent_channels(vae))
        if is_latent(given, latent_channels(vae)):
            raise InputError("image holds latents, whose depth cannot be estimated; give depth_map, too")
        pictures = list(given.images) if given.array is None else to_pil(2 * given.array - 1)
        program = self.program("depth_estimator")
        put = program.arrays.put(self.feature_extractor(pictures))
        depth = program.session()({"pixel_values": put})["predicted_depth"]
        FiniteCheck.of(program).add_now(depth, "estimating the depth")
        return program.arrays.get(depth)


def two_scales(request: Request) -> Guidance:
    """Guided by the picture and by the text, where both scales ask for it (Brooks et al. 2023, eq. 3)."""
    image, text = request.image_guidance_scale or 0.0, request.guidance_scale
    return Guidance((image, text) if text > 1 and image >= 1 else (), request.guidance_rescale)


def image_guidance(call: Arguments, prompts: int, *, options: Mapping[str, Any], encoders: int) -> dict[str, Any]:  # noqa: ARG001
    """How strongly the picture guides."""
    scale = call["image_guidance_scale"]
    if isinstance(scale, bool) or not isinstance(scale, int | float) or not 0 <= scale < float("inf"):
        raise InputError(f"image_guidance_scale is {scale!r}, expected a finite number of 0 or more")
    return {"image_guidance_scale": float(scale)}


class StableDiffusionInstructPix2PixPipeline(LatentDiffusion):
    """Changes a picture as the prompt says (Brooks et al. 2023, arXiv:2211.09800)."""

    SLOTS: ClassVar[Slots] = EDITING
    OPTIONS: ClassVar[Mapping[str, Any]] = OPTIONS
    TAKES = Signature.of(
        "prompt image num_inference_steps guidance_scale image_guidance_scale negative_prompt num_images_per_prompt "
        f"eta generator latents prompt_embeds negative_prompt_embeds {SHOWN} {RETURNED} callback_on_step_end "
        "callback_on_step_end_tensor_inputs cross_attention_kwargs * clip_skip timesteps sigmas guidance_rescale "
        "guidance_interval step_caching seed",
        num_inference_steps=100, image_guidance_scale=1.5,
    )  # fmt: skip
    BRANCHES: ClassVar[int] = 3
    ALIKE: ClassVar[bool] = False
    FAMILY = Family(last_states, (texts,), more=image_guidance)
    TASK = Task(beside_picture, ("image",), guidance=two_scales, channels=with_as_many)
