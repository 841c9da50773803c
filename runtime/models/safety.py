"""The checker that holds back pictures whose contents are near to listed concepts."""

from collections.abc import Mapping
from typing import Any, ClassVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional as F

from anamorph.config import Config
from anamorph.errors import ConfigError, InputError
from anamorph.models.base import Model
from anamorph.models.clip import FOREIGN
from anamorph.models.clip_vision import CLIPVisionModel
from anamorph.models.linear import Linear
from anamorph.safety import CONCEPTS, SPECIAL, flagged


class StableDiffusionSafetyChecker(Model):
    """Cosine similarities of a picture to stored concepts, each less its threshold.

    Source: Rombach et al. 2022, CompVis/stable-diffusion-safety-checker; Rando et al. 2022 (arXiv:2210.04610).
    """

    DEFAULTS: ClassVar[Mapping[str, Any]] = {
        "projection_dim": 512,
        "logit_scale_init_value": 2.6592,
        "initializer_factor": 1.0,
        "text_config": None,
        "vision_config": None,
    }
    FOREIGN: ClassVar[tuple[str, ...]] = (*FOREIGN, "initializer_range", "text_config_dict", "vision_config_dict")
    STEM: ClassVar[str] = "model"
    HARMLESS: ClassVar[tuple[str, ...]] = ("*.position_ids",)
    PARTS: ClassVar[Mapping[str, str]] = {"safety_checker": "scores"}

    def __init__(self, **config: Any) -> None:
        super().__init__(**config)
        width = self.config.projection_dim
        self.vision_model = CLIPVisionModel(**(self.config.vision_config or {}))
        self.visual_projection = Linear(self.vision_model.config.hidden_size, width, bias=False)
        self.concept_embeds, self.special_care_embeds, self.concept_embeds_weights, self.special_care_embeds_weights = (
            nn.Parameter(torch.ones(shape), requires_grad=False)
            for shape in ((CONCEPTS, width), (SPECIAL, width), (CONCEPTS,), (SPECIAL,))
        )

    @classmethod
    def complete(cls, config: Mapping[str, Any]) -> Config:
        full = super().complete({"architectures": [cls.__name__], "model_type": "clip", **config})
        if not isinstance(full.vision_config, Mapping | None):
            raise ConfigError(f"{cls.__name__}: vision_config is {full.vision_config!r}, expected an object")
        return full

    @classmethod
    def rename(cls, name: str) -> str:
        return name.replace("vision_model.vision_model.", "vision_model.", 1)

    @classmethod
    def stored_name(cls, name: str) -> str:
        return f"vision_model.{name}" if name.startswith("vision_model.") else name

    def scores(self, clip_input: Tensor) -> tuple[Tensor, Tensor]:
        """Pictures [B, C, s, s], normalised as CLIP's processor does -> (special [B, 3], concepts [B, 17]).

        Above 0 a picture is nearer to the concept than its threshold; `anamorph.safety.flagged` decides.
        """
        _, pooled, *_ = self.vision_model.states(clip_input)
        picture = F.normalize(self.visual_projection(pooled))
        special = picture @ F.normalize(self.special_care_embeds).t() - self.special_care_embeds_weights
        return special.float(), (picture @ F.normalize(self.concept_embeds).t() - self.concept_embeds_weights).float()

    @torch.no_grad()
    def forward(self, clip_input: Tensor, images: NDArray[Any] | Tensor) -> tuple[NDArray[Any] | Tensor, list[bool]]:
        """Black pictures in the place of those that are held back, and which they are; `images` stays as it is.

        Raises InputError: there are not as many images as inputs.
        """
        if len(images) != len(clip_input):
            raise InputError(f"got {len(images)} images for {len(clip_input)} inputs, expected one input per image")
        special, concepts = (values.cpu().numpy() for values in self.scores(clip_input))
        held = flagged(special, concepts)
        if isinstance(images, Tensor):
            images = images.clone()
            images[torch.from_numpy(held)] = 0
        else:
            images = np.array(images)
            images[held] = 0
        return images, held.tolist()
