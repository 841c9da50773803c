"""The components of a pipeline, before any engine has opened them. No engine here."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from anamorph.artifact import Artifact
from anamorph.checkpoint import Checkpoint
from anamorph.config import Config
from anamorph.errors import ConfigError
from anamorph.interface import Interface
from anamorph.lora.factors import Change, Layers
from anamorph.lora.ports import layers_of, with_factors
from anamorph.model_interfaces import Declared, interfaces
from anamorph.native import split, splits

TRANSFORMERS = (
    "CLIPTextModel", "CLIPTextModelWithProjection", "CLIPVisionModel", "CLIPVisionModelWithProjection", "LDMBertModel",
    "StableDiffusionSafetyChecker", "DPTForDepthEstimation",
)  # fmt: skip
"""Classes whose files are named as transformers names them."""
CHECKPOINT = "checkpoint"
"""The content that engines open which run models themselves; all other contents are exported formats."""
UNEXPORTED = ("DPTForDepthEstimation",)
"""Classes that no exporter writes: where other parts run on exports, an engine that opens checkpoints runs them."""


@dataclass(frozen=True)
class Component:
    """One model of a pipeline: where its weights come from, before any engine has opened it.

    Its source is the folder of a `checkpoint` (exported or not), with the `variant` of the weights to take, or a
    `module` (a PyTorch model built by hand).
    """

    name: str
    class_name: str
    config: Config
    folder: Path | None = None
    variant: str | None = None
    module: Any = None
    checkpoint: Checkpoint | None = None
    refining: bool = False
    """Whether it belongs to SDXL's refiner, whose denoiser's configuration does not tell."""
    rewrites: tuple[str, ...] = ()
    """By which an engine that runs models shall compute it."""
    adapted: Layers = field(default_factory=dict, compare=False)
    """The layers that shall take factors with each call; see `anamorph.lora.ports`."""
    fused: Change = field(default_factory=dict, compare=False)
    """What shall be added to its weights before it runs."""

    @property
    def artifact(self) -> Artifact | None:
        """The exported folder that holds this component, if it comes from one."""
        return None if self.checkpoint is None else self.checkpoint.artifact

    @property
    def content(self) -> str:
        """What an engine must be able to open: "checkpoint" or the name of an exported format."""
        return CHECKPOINT if self.artifact is None else self.artifact.format

    @property
    def parts(self) -> tuple[str, ...]:
        """The functions that engines open, in order."""
        if self.artifact is not None:
            return tuple(name for name, part in self.artifact.parts.items() if part.component == self.name)
        declared = interfaces(self.class_name, self.name, self.refining)
        if not splits(self.rewrites):
            return tuple(declared)
        return tuple(self._split(declared))

    @property
    def stored(self) -> Path:
        """Its folder; raises ConfigError where it was built by hand and never stored."""
        if self.folder is None:
            raise ConfigError(f"{self.name} is a module that was never stored; save the pipeline and load that folder")
        return self.folder

    @property
    def stem(self) -> str:
        """How its weight files are named: as diffusers does, or as transformers does."""
        return "model" if self.class_name in TRANSFORMERS else "diffusion_pytorch_model"

    def interface(self, part: str) -> Interface:
        """Inputs and outputs of one part; an exported one may take fewer sizes than the model.

        The factors of adapted layers come last.
        """
        if self.artifact is not None and part in self.artifact.parts:
            exported = self.artifact.parts[part]
            here = layers_of(exported) if self.adapted else {}
            return with_factors(exported.interface, {name: self.adapted[name] for name in self.adapted if name in here})
        declared = interfaces(self.class_name, self.name, self.refining)
        plain = self._split(declared)[part] if splits(self.rewrites) else declared[part](self.config)
        return with_factors(plain, self.adapted)

    def _split(self, declared: "Declared") -> dict[str, Interface]:
        """The interfaces by rewrites that share out between parts what a denoiser takes."""
        plain = (declare(self.config) for declare in declared.values())
        return {name: one for each in plain for name, one in split(each, self.config, self.rewrites).items()}
