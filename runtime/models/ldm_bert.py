"""The text encoder of the first latent diffusion model."""

from collections.abc import Mapping
from typing import Any, ClassVar, Literal, overload

from torch import Tensor, nn

from anamorph.config import Config
from anamorph.errors import InputError
from anamorph.models.activations import ACTIVATIONS
from anamorph.models.attention import multi_head
from anamorph.models.base import Model
from anamorph.models.clip import FOREIGN
from anamorph.models.linear import Linear
from anamorph.models.outputs import EncoderOutput


class BertAttention(nn.Module):
    """Each token attends to all; the heads together may be narrower than the states."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.heads = config.encoder_attention_heads
        inner = self.heads * config.head_dim
        self.q_proj, self.k_proj, self.v_proj = (Linear(config.d_model, inner, bias=False) for _ in range(3))
        self.out_proj = Linear(inner, config.d_model)

    def forward(self, x: Tensor) -> Tensor:
        mixed: Tensor = self.out_proj(multi_head(self.q_proj(x), self.k_proj(x), self.v_proj(x), self.heads))
        return mixed


class BertLayer(nn.Module):
    """Attention and two linear layers, each normed before and added after."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.activation = ACTIVATIONS[config.activation_function]
        self.self_attn_layer_norm = nn.LayerNorm(config.d_model)
        self.self_attn = BertAttention(config)
        self.final_layer_norm = nn.LayerNorm(config.d_model)
        self.fc1 = Linear(config.d_model, config.encoder_ffn_dim)
        self.fc2 = Linear(config.encoder_ffn_dim, config.d_model)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.self_attn(self.self_attn_layer_norm(x))
        total: Tensor = x + self.fc2(self.activation(self.fc1(self.final_layer_norm(x))))
        return total


class BertEncoder(nn.Module):
    """Token ids [B, S] -> states [B, S, D]."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(config.vocab_size, config.d_model)
        self.embed_positions = nn.Embedding(config.max_position_embeddings, config.d_model)
        self.layers = nn.ModuleList(BertLayer(config) for _ in range(config.encoder_layers))
        self.layer_norm = nn.LayerNorm(config.d_model)

    def forward(self, input_ids: Tensor) -> Tensor:
        x = self.embed_tokens(input_ids) + self.embed_positions.weight[: input_ids.shape[1]]
        for layer in self.layers:
            x = layer(x)
        states: Tensor = self.layer_norm(x)
        return states


class LDMBertModel(Model):
    """Token ids [B, S] -> states [B, S, D] (Rombach et al. 2022, arXiv:2112.10752, appendix E.2.1)."""

    DEFAULTS: ClassVar[Mapping[str, Any]] = {
        "vocab_size": 30522,
        "max_position_embeddings": 77,
        "encoder_layers": 32,
        "encoder_ffn_dim": 5120,
        "encoder_attention_heads": 8,
        "head_dim": 64,
        "encoder_layerdrop": 0.0,
        "activation_function": "gelu",
        "d_model": 1280,
        # What training drops is all there when pictures are drawn.
        "dropout": 0.1,
        "attention_dropout": 0.0,
        "activation_dropout": 0.0,
        "init_std": 0.02,
        "classifier_dropout": 0.0,
        "scale_embedding": False,
        "use_cache": True,
        "pad_token_id": 0,
    }
    ONLY: ClassVar[Mapping[str, tuple[Any, ...]]] = {
        "activation_function": ("gelu", "silu", "relu"),
        "scale_embedding": (False,),
    }
    FOREIGN: ClassVar[tuple[str, ...]] = (*FOREIGN, "bos_token_id", "eos_token_id", "num_hidden_layers")
    STEM: ClassVar[str] = "model"
    PARTS: ClassVar[Mapping[str, str]] = {"text_encoder": "states"}

    def __init__(self, **config: Any) -> None:
        super().__init__(**config)
        self.model = BertEncoder(self.config)
        # Its training's guess of each token: stored in every checkpoint, not used here.
        self.to_logits = Linear(self.config.d_model, self.config.vocab_size)

    @classmethod
    def complete(cls, config: Mapping[str, Any]) -> Config:
        return super().complete({"architectures": [cls.__name__], "model_type": "ldmbert", **config})

    def states(self, input_ids: Tensor) -> tuple[Tensor]:
        """Ids [B, S] -> (last_hidden_state [B, S, D],)."""
        limit = self.config.max_position_embeddings
        if input_ids.shape[1] > limit:
            raise InputError(
                f"input_ids hold {input_ids.shape[1]} tokens, the model takes {limit}; truncate the prompt"
            )
        return (self.model(input_ids),)

    @overload
    def forward(self, input_ids: Tensor, *, return_dict: Literal[True] = True) -> EncoderOutput: ...
    @overload
    def forward(self, input_ids: Tensor, *, return_dict: bool) -> EncoderOutput | tuple[Tensor]: ...
    def forward(self, input_ids: Tensor, *, return_dict: bool = True) -> EncoderOutput | tuple[Tensor]:
        """Encode token ids, int64 [B, S]; padding is attended to like words, as in training.

        Raises InputError: more tokens than `max_position_embeddings`.
        """
        states = self.states(input_ids)
        return EncoderOutput(*states) if return_dict else states
