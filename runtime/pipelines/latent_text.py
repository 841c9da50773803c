"""The first latent diffusion model that draws from texts (Rombach et al. 2022, arXiv:2112.10752, section 4.3.1)."""

import warnings
from collections.abc import Sequence
from typing import Any, ClassVar, cast

from anamorph.bert_tokenizer import BertTokenizer
from anamorph.pipelines.latent_diffusion import LatentDiffusion
from anamorph.pipelines.request import Request
from anamorph.pipelines.sampling import FiniteCheck, Guidance
from anamorph.pipelines.signature import Signature
from anamorph.pipelines.slots import SCHEDULER, WORD_PIECES, Slots, model
from anamorph.pipelines.tasks import Task, from_noise
from anamorph.pipelines.texts import Embeds, Encoder
from anamorph.pipelines.wording import PLAIN, Wording
from anamorph.tokenizer import ClipTokenizer


def whenever_other_than_one(request: Request) -> Guidance:
    """One more branch, which sees the empty text, unless the scale is 1: below it, pictures keep away from the text."""
    return Guidance(() if request.guidance_scale == 1 else (request.guidance_scale,))


class LDMTextToImagePipeline(LatentDiffusion):
    """Text to image with BERT's tokenizer and a text encoder of its own."""

    SLOTS: ClassVar[Slots] = {
        "vqvae": model("VQModel", "AutoencoderKL", parts=("vae_decoder",)),
        "bert": model("LDMBertModel"),
        "tokenizer": WORD_PIECES,
        "unet": model("UNet2DConditionModel"),
        "scheduler": SCHEDULER,
    }
    TAKES = Signature.of(
        "prompt height width num_inference_steps guidance_scale eta generator latents output_type return_dict * "
        "callback_on_step_end callback_on_step_end_tensor_inputs guidance_interval step_caching seed",
        guidance_scale=1.0,
    )
    VAE: ClassVar[str] = "vqvae"
    tokenizer: BertTokenizer
    TASK = Task(from_noise, guidance=whenever_other_than_one)

    def __init__(self, *components: Any, **named: Any) -> None:
        super().__init__(*components, **named)
        self.tokenizer = self.tokenizer.limited(self._config("bert")["max_position_embeddings"])

    __init__.__doc__ = LatentDiffusion.__init__.__doc__

    @property
    def encoders(self) -> tuple[Encoder, ...]:
        return (Encoder(cast(ClipTokenizer, self.tokenizer), self.program("bert")),)

    encoders.__doc__ = LatentDiffusion.encoders.__doc__

    def _encode(
        self, prompts: Sequence[Sequence[str]], clip_skip: int | None, wording: Wording = PLAIN, scale: float = 1.0
    ) -> Embeds:
        del clip_skip, wording, scale  # no call of this pipeline takes them
        encoding, program = self.tokenizer(prompts[0]), self.program("bert")
        for lost in filter(None, encoding.truncated):
            limit = self.tokenizer.model_max_length
            warnings.warn(f"a prompt is longer than {limit} tokens; this was cut off: {lost!r}", stacklevel=4)
        states = program.session()({"input_ids": program.arrays.put(encoding.input_ids)})["last_hidden_state"]
        FiniteCheck.of(program).add_now(states, "encoding the prompts")
        return {"prompt_embeds": program.arrays.get(states)}

    def _text_sizes(self) -> tuple[int, int, int | None]:
        return self._config("bert")["d_model"], 0, None
