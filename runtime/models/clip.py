"""CLIP's text encoder."""

from collections.abc import Mapping
from typing import Any, ClassVar, Literal, overload

from torch import Tensor, nn
from torch.nn import functional as F

from anamorph.config import Config
from anamorph.errors import ConfigError, InputError
from anamorph.models.activations import Activation, quick_gelu
from anamorph.models.attention import multi_head
from anamorph.models.base import Model
from anamorph.models.linear import Linear
from anamorph.models.outputs import PooledOutput, TextProjectionOutput

FOREIGN = (
    "add_cross_attention", "architectures", "attn_implementation", "bad_words_ids", "begin_suppress_tokens",
    "chunk_size_feed_forward", "cross_attention_hidden_size", "decoder_start_token_id", "diversity_penalty",
    "do_sample", "dropout", "dtype", "early_stopping", "encoder_no_repeat_ngram_size", "experts_implementation",
    "exponential_decay_length_penalty", "finetuning_task", "forced_bos_token_id", "forced_eos_token_id",
    "gradient_checkpointing", "id2label", "is_decoder", "is_encoder_decoder", "label2id", "length_penalty",
    "max_length", "min_length", "model_type", "no_repeat_ngram_size", "num_beam_groups", "num_beams",
    "num_return_sequences", "output_attentions", "output_hidden_states", "output_scores", "prefix", "problem_type",
    "pruned_heads", "remove_invalid_values", "repetition_penalty", "return_dict", "return_dict_in_generate",
    "sep_token_id", "suppress_tokens", "task_specific_params", "temperature", "tf_legacy_loss", "tie_encoder_decoder",
    "tie_word_embeddings", "tokenizer_class", "top_k", "top_p", "torch_dtype", "torchscript", "transformers_version",
    "typical_p", "use_bfloat16", "use_cache", "use_return_dict",
)  # fmt: skip
"""Keys that versions of transformers write into every `config.json` and that say nothing about this model."""

LEGACY_EOS = 2
"""`eos_token_id` of files written before transformers 4.31; the end token is the largest id of a prompt there."""


ACTIVATIONS: Mapping[str, Activation] = {"quick_gelu": quick_gelu, "gelu": F.gelu}


class Embeddings(nn.Module):
    """Token ids [B, S] -> token plus position vectors [B, S, D].

    Vectors e [B, S, D] of words that were learned take a token's place where the mask m [B, S, 1] is 1: t - m t + e.
    """

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.token_embedding = nn.Embedding(config.vocab_size, config.hidden_size)
        self.position_embedding = nn.Embedding(config.max_position_embeddings, config.hidden_size)

    def forward(self, input_ids: Tensor, learned: Tensor | None = None, mask: Tensor | None = None) -> Tensor:
        tokens: Tensor = self.token_embedding(input_ids)
        if learned is not None and mask is not None:
            tokens = tokens - tokens * mask + learned
        return tokens + self.position_embedding.weight[: input_ids.shape[1]]


class SelfAttention(nn.Module):
    """Each token attends to all, or with `causal` to itself and to those before it."""

    def __init__(self, config: Config, *, causal: bool) -> None:
        super().__init__()
        self.heads, self.causal = config.num_attention_heads, causal
        self.q_proj, self.k_proj, self.v_proj, self.out_proj = (
            Linear(config.hidden_size, config.hidden_size) for _ in range(4)
        )

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.q_proj(x), self.k_proj(x), self.v_proj(x)
        mixed: Tensor = self.out_proj(multi_head(q, k, v, self.heads, causal=self.causal))
        return mixed


class MLP(nn.Module):
    """Two linear layers with the configuration's activation between them."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.activation = ACTIVATIONS[config.hidden_act]
        self.fc1 = Linear(config.hidden_size, config.intermediate_size)
        self.fc2 = Linear(config.intermediate_size, config.hidden_size)

    def forward(self, x: Tensor) -> Tensor:
        update: Tensor = self.fc2(self.activation(self.fc1(x)))
        return update


class Layer(nn.Module):
    """Attention and MLP, each normed before and added after."""

    def __init__(self, config: Config, *, causal: bool) -> None:
        super().__init__()
        self.layer_norm1 = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.self_attn = SelfAttention(config, causal=causal)
        self.layer_norm2 = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.mlp = MLP(config)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.self_attn(self.layer_norm1(x))
        total: Tensor = x + self.mlp(self.layer_norm2(x))
        return total


class Encoder(nn.Module):
    """The stack of layers; returns the states before the first and after each."""

    def __init__(self, config: Config, *, causal: bool) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Layer(config, causal=causal) for _ in range(config.num_hidden_layers))

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        states = [x]
        for layer in self.layers:
            states.append(layer(states[-1]))
        return tuple(states)


class CLIPTextModel(Model):
    """Token ids [B, S] -> states [B, S, D], and those of the end token [B, D].

    Source: Radford et al. 2021 (arXiv:2103.00020), section 2.4.
    """

    DEFAULTS: ClassVar[Mapping[str, Any]] = {
        "vocab_size": 49408,
        "hidden_size": 512,
        "intermediate_size": 2048,
        "projection_dim": 512,
        "num_hidden_layers": 12,
        "num_attention_heads": 8,
        "max_position_embeddings": 77,
        "hidden_act": "quick_gelu",
        "layer_norm_eps": 1e-5,
        "attention_dropout": 0.0,
        "initializer_range": 0.02,
        "initializer_factor": 1.0,
        "pad_token_id": 1,
        "bos_token_id": 49406,
        "eos_token_id": 49407,
    }
    ONLY: ClassVar[Mapping[str, tuple[Any, ...]]] = {
        "hidden_act": tuple(ACTIVATIONS),
        "attention_dropout": (0.0,),
    }
    FOREIGN: ClassVar[tuple[str, ...]] = FOREIGN
    STEM: ClassVar[str] = "model"
    HARMLESS: ClassVar[tuple[str, ...]] = ("*.position_ids",)
    PARTS: ClassVar[Mapping[str, str]] = {"text_encoder": "states"}

    def __init__(self, **config: Any) -> None:
        super().__init__(**config)
        full = self.config
        self.embeddings = Embeddings(full)
        self.encoder = Encoder(full, causal=True)
        self.final_layer_norm = nn.LayerNorm(full.hidden_size, eps=full.layer_norm_eps)

    @classmethod
    def complete(cls, config: Mapping[str, Any]) -> Config:
        full = super().complete({"architectures": [cls.__name__], "model_type": "clip_text_model", **config})
        if not isinstance(full.eos_token_id, int):
            raise ConfigError(f"{cls.__name__} does not serve eos_token_id={full.eos_token_id!r}; it serves one id")
        check_heads(cls.__name__, full)
        return full

    @classmethod
    def rename(cls, name: str) -> str:
        return name.removeprefix("text_model.")

    @classmethod
    def stored_name(cls, name: str) -> str:
        return f"text_model.{name}"

    def states(self, input_ids: Tensor, *learned: Tensor | None) -> tuple[Tensor, ...]:
        """Ids [B, S] -> (last_hidden_state [B, S, D], pooler_output [B, D], every layer's states [B, S, D] ...).

        `learned` are vectors [B, S, D] and a mask [B, S, 1] of words that are not in the vocabulary.
        """
        limit = self.config.max_position_embeddings
        if input_ids.shape[1] > limit:
            raise InputError(
                f"input_ids hold {input_ids.shape[1]} tokens, the model takes {limit}; truncate the prompt"
            )
        hidden = self.encoder(self.embeddings(input_ids, *learned))
        last = self.final_layer_norm(hidden[-1])
        return last, _at(last, self._end(input_ids)), *hidden

    def _end(self, input_ids: Tensor) -> Tensor:
        """Position of each prompt's first end token, [B]."""
        eos = self.config.eos_token_id
        return input_ids.argmax(-1) if eos == LEGACY_EOS else (input_ids == eos).int().argmax(-1)

    @overload
    def forward(
        self, input_ids: Tensor, *, output_hidden_states: bool = False, return_dict: Literal[True] = True
    ) -> PooledOutput: ...
    @overload
    def forward(
        self, input_ids: Tensor, *, output_hidden_states: bool = False, return_dict: bool
    ) -> PooledOutput | tuple[Any, ...]: ...
    def forward(
        self, input_ids: Tensor, *, output_hidden_states: bool = False, return_dict: bool = True
    ) -> PooledOutput | tuple[Any, ...]:
        """Encode token ids, int64 [B, S].

        Raises InputError: more tokens than `max_position_embeddings`.
        """
        last, pooled, *hidden = self.states(input_ids)
        output = PooledOutput(last, pooled, tuple(hidden) if output_hidden_states else None)
        return output if return_dict else output.to_tuple()


class CLIPTextModelWithProjection(Model):
    """`CLIPTextModel` and a linear map of the end token's states into the space shared with pictures, [B, P]."""

    DEFAULTS: ClassVar[Mapping[str, Any]] = CLIPTextModel.DEFAULTS
    ONLY: ClassVar[Mapping[str, tuple[Any, ...]]] = CLIPTextModel.ONLY
    FOREIGN: ClassVar[tuple[str, ...]] = FOREIGN
    STEM: ClassVar[str] = "model"
    HARMLESS: ClassVar[tuple[str, ...]] = CLIPTextModel.HARMLESS
    PARTS: ClassVar[Mapping[str, str]] = CLIPTextModel.PARTS

    def __init__(self, **config: Any) -> None:
        super().__init__(**config)
        self.text_model = CLIPTextModel(**self.config)
        self.text_projection = Linear(self.config.hidden_size, self.config.projection_dim, bias=False)

    @classmethod
    def complete(cls, config: Mapping[str, Any]) -> Config:
        return super().complete({"architectures": [cls.__name__], "model_type": "clip_text_model", **config})

    def states(self, input_ids: Tensor, *learned: Tensor | None) -> tuple[Tensor, ...]:
        """Ids [B, S] -> (text_embeds [B, P], last_hidden_state [B, S, D], every layer's states [B, S, D] ...)."""
        last, pooled, *hidden = self.text_model.states(input_ids, *learned)
        return self.text_projection(pooled), last, *hidden

    @overload
    def forward(
        self, input_ids: Tensor, *, output_hidden_states: bool = False, return_dict: Literal[True] = True
    ) -> TextProjectionOutput: ...
    @overload
    def forward(
        self, input_ids: Tensor, *, output_hidden_states: bool = False, return_dict: bool
    ) -> TextProjectionOutput | tuple[Any, ...]: ...
    def forward(
        self, input_ids: Tensor, *, output_hidden_states: bool = False, return_dict: bool = True
    ) -> TextProjectionOutput | tuple[Any, ...]:
        """Encode token ids, int64 [B, S].

        Raises InputError: more tokens than `max_position_embeddings`.
        """
        embeds, last, *hidden = self.states(input_ids)
        output = TextProjectionOutput(embeds, last, tuple(hidden) if output_hidden_states else None)
        return output if return_dict else output.to_tuple()


def _at(states: Tensor, positions: Tensor) -> Tensor:
    """states[b, positions[b]]: [B, S, D], [B] -> [B, D]."""
    return states.gather(1, positions[:, None, None].expand(-1, -1, states.shape[-1])).squeeze(1)


def check_heads(class_name: str, config: Config) -> None:
    """Raise ConfigError where the states do not divide into the heads."""
    if config.hidden_size % config.num_attention_heads:
        raise ConfigError(
            f"{class_name}: hidden_size={config.hidden_size} does not divide into "
            f"num_attention_heads={config.num_attention_heads}"
        )
