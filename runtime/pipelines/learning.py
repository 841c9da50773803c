"""What pipelines of texts learn from files without changing weights: words, and pictures as prompts."""

from collections.abc import Sequence
from typing import Any, Unpack

from anamorph.arrays import Array
from anamorph.hub import HubOptions
from anamorph.pipelines import ip_adapters, looking
from anamorph.pipelines.base import DiffusionPipeline
from anamorph.pipelines.learned_words import forget, teach
from anamorph.pipelines.textual_inversion import spelled_out
from anamorph.tokenizer import ClipTokenizer


class Learning(DiffusionPipeline, public=False):
    """The methods for learned words (textual inversion) and for IP-Adapters."""

    def load_textual_inversion(
        self,
        pretrained_model_name_or_path: Any,
        token: str | Sequence[str] | None = None,
        *,
        weight_name: str | None = None,
        subfolder: str | None = None,
        tokenizer: ClipTokenizer | None = None,
        text_encoder: Any = None,
        **hub: Unpack[HubOptions],
    ) -> None:
        """Teach the pipeline a word that was learned from pictures (Gal et al. 2022), on whatever engine it runs.

        The source is a file, a folder or hub id, a mapping as files hold it, a tensor [n, D], or a list of these with
        a list of tokens; files of diffusers and of AUTOMATIC1111's web interface are read. `tokenizer` or
        `text_encoder`, one of the pipeline's own, says which of several encoders a tensor belongs to.

        Raises CheckpointError: a file is missing, damaged or holds code. Raises InputError: it holds no learned word,
        the word is known already, its vectors have another width, or the opened encoder takes none.
        """
        teach(self, pretrained_model_name_or_path, token, weight_name, subfolder, (tokenizer, text_encoder), hub)

    def unload_textual_inversion(self, tokens: str | Sequence[str] | None = None) -> None:
        """Forget these learned words, or all of them; raises InputError where one is none."""
        forget(self, (tokens,) if isinstance(tokens, str) else tokens)

    def maybe_convert_prompt(self, prompt: str | list[str], tokenizer: ClipTokenizer) -> str | list[str]:
        """Prompts with every token of learned words that have several vectors; calls do this themselves."""
        if isinstance(prompt, str):
            return spelled_out(prompt, tokenizer)
        return [spelled_out(text, tokenizer) for text in prompt]

    def load_ip_adapter(
        self,
        pretrained_model_name_or_path_or_dict: Any,
        subfolder: str | Sequence[str] | None = None,
        weight_name: str | Sequence[str] | None = None,
        image_encoder_folder: str | None = "image_encoder",
        **hub: Unpack[HubOptions],
    ) -> None:
        """Let pictures be prompts (Ye et al. 2023, arXiv:2308.06721), on whatever engine the pipeline runs.

        The source is a folder, hub id, file or mapping of weights, or a list of these, which take the place of adapters
        that were loaded before. The picture encoder is read from `image_encoder_folder` below `subfolder` (with a
        slash: below the source) unless the pipeline has one; without it (None), calls take `ip_adapter_image_embeds`.

        Raises CheckpointError: a file is missing, damaged or holds code, or there is no picture encoder.
        Raises InputError: an adapter is for another UNet or picture encoder, or the opened UNet takes none.
        """
        ip_adapters.load(self, pretrained_model_name_or_path_or_dict, subfolder, weight_name, image_encoder_folder, hub)

    def set_ip_adapter_scale(self, scale: Any) -> None:
        """How strongly pictures count as prompts: a number, or a list with one entry for each adapter.

        An entry is a number, a list with one for each masked picture, or a mapping from "down", "mid" and "up" to
        numbers, or to mappings from "block_0" ... to a number or one per transformer; what it leaves out is 0.
        Raises InputError: the entries are of another count or form, or name a block that looks at no text.
        """
        ip_adapters.rescale(self, scale)

    def unload_ip_adapter(self) -> None:
        """Forget all IP-Adapters, and the picture encoder."""
        ip_adapters.unload(self)

    def prepare_ip_adapter_image_embeds(
        self,
        ip_adapter_image: Any,
        ip_adapter_image_embeds: Any = None,
        device: Any = None,
        num_images_per_prompt: int = 1,
        do_classifier_free_guidance: bool = True,
    ) -> list[Array]:
        """Encoded pictures for each adapter, [N, pictures, ...], with guidance [2 N, ...], the negative ones first.

        They are arrays of the denoiser's kind; with N = 1, calls take them as `ip_adapter_image_embeds`. Raises
        InputError: the pictures do not fit the adapters, or `device` is another than the denoiser's.
        """
        return looking.prepared(
            self, ip_adapter_image, ip_adapter_image_embeds, device, num_images_per_prompt, do_classifier_free_guidance
        )
