"""What all PyTorch models share: a checked configuration, loading and saving in diffusers' layout."""

import fnmatch
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, ClassVar, Self, Unpack

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from anamorph.config import Config, complete, read_json
from anamorph.errors import CheckpointError, ConfigError
from anamorph.files import replacing
from anamorph.hub import HubOptions, find_component
from anamorph.models.attention import slice_attention
from anamorph.models.attention_processor import AttnProcessor2_0, Processor, process_attention, processors
from anamorph.pickles import load_pickle, tensors
from anamorph.weights import Stored, WeightFiles, check_form, find_weights

TORCH_TYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64, "I32": torch.int32, "U8": torch.uint8, "BOOL": torch.bool,
}  # fmt: skip


class Model(nn.Module):
    """A PyTorch module built from a configuration alone.

    A subclass states `DEFAULTS` (diffusers' keys and defaults), `ONLY` (keys of which it serves a single value
    or a few, as key -> allowed values), `FOREIGN` (keys that its files may hold and that say nothing about it),
    `STEM` (name of its weight files), `HARMLESS` (patterns of stored buffers that carry nothing), `POINTWISE`
    (patterns of linear weights that older files hold as 1x1 convolutions), `PARTS` (part -> name of the method,
    tensors in and a tuple of tensors out, that engines and exporters call), and may override `rename`. No module
    may own a buffer that is not stored: models are built without memory first and then given the stored tensors.
    Layers that know a rewrite name it as `REWRITE` and obey `rewritten`.
    """

    DEFAULTS: ClassVar[Mapping[str, Any]] = {}
    ONLY: ClassVar[Mapping[str, tuple[Any, ...]]] = {}
    FOREIGN: ClassVar[tuple[str, ...]] = ()
    PARTS: ClassVar[Mapping[str, str]] = {}
    STEM: ClassVar[str] = "diffusion_pytorch_model"
    HARMLESS: ClassVar[tuple[str, ...]] = ()
    POINTWISE: ClassVar[tuple[str, ...]] = ()
    even_sizes: bool = False
    """Whether its levels halve every size that it is called with: exporters know this before they trace."""
    origin: tuple[Path, str | None] | None = None
    """The folder that it was loaded from, and the variant of its weights."""
    rewrites: tuple[str, ...] = ()
    """Rewrites by which it computes; see `anamorph.rewrites`."""

    def __init__(self, **config: Any) -> None:
        super().__init__()
        self.config = self.complete(config)

    @classmethod
    def complete(cls, config: Mapping[str, Any]) -> Config:
        """The full configuration; raises ConfigError on an unknown key or a value that is not served."""
        full = complete(cls.__name__, config, cls.DEFAULTS, cls.FOREIGN)
        for key, allowed in cls.ONLY.items():
            if full[key] not in allowed:
                raise ConfigError(
                    f"{cls.__name__} does not serve {key}={full[key]!r}; it serves {', '.join(map(repr, allowed))}"
                )
        return full

    def method(self, part: str) -> str:
        """Name of the method that serves a part; a model's only part may be called otherwise (as its slot is)."""
        return self.PARTS[part] if len(self.PARTS) > 1 else next(iter(self.PARTS.values()))

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> Self:
        """Build the model with fresh weights."""
        return cls(**config)

    @classmethod
    def rename(cls, name: str) -> str:
        """The name in this module of a tensor that a checkpoint calls `name`."""
        return name

    @classmethod
    def stored_name(cls, name: str) -> str:
        """The name under which `save_pretrained` writes this module's tensor `name`; `rename` inverts it."""
        return name

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | Path,
        *,
        subfolder: str | None = None,
        torch_dtype: torch.dtype | None = None,
        variant: str | None = None,
        use_safetensors: bool | None = None,
        **hub: Unpack[HubOptions],
    ) -> Self:
        """Load `config.json` and weights of a folder or hub id; `torch_dtype=None` means float32.

        Raises CheckpointError: missing or damaged files; weights that are missing, extra or of another shape.
        Raises ConfigError: the configuration is not one that this class serves.
        """
        place = find_component(pretrained_model_name_or_path, subfolder, ("*.json", "*.safetensors", "*.bin"), **hub)
        config = read_json(place / "config.json")
        weights = find_weights(place, cls.STEM, variant)
        check_form(weights, use_safetensors)
        with torch.device("meta"):
            model = cls(**config)
        model.load(weights, torch_dtype or torch.float32)
        model.origin = (place, variant)
        return model.eval()

    def as_stored(self) -> bool:
        """Whether its weights are still those of the files that it was loaded from, up to their type."""
        if self.origin is None:
            return False
        own = self.state_dict()
        files = find_weights(self.origin[0], self.STEM, self.origin[1])
        stored = self._unpickle(files) if files.pickled else dict(_read(files.files))
        renamed = {self.rename(name): value for name, value in stored.items()}
        return all(
            torch.equal(renamed[name].to(value.dtype).reshape(value.shape), value.cpu()) for name, value in own.items()
        )

    @classmethod
    def from_single_file(
        cls,
        path: str | Path,
        *,
        config: str | Path | None = None,
        torch_dtype: torch.dtype | None = None,
        extract_ema: bool = False,
        cache_dir: str | None = None,
        local_files_only: bool = False,
    ) -> Self:
        """Load this model out of a `.safetensors` or `.ckpt` file in the layout of the code that trained it.

        `config`: a folder or hub id whose configuration counts, of the model or of a whole checkpoint; without it the
        configuration is read off the shapes. `extract_ema` takes the average of the weights that training kept.
        Raises CheckpointError: the file is damaged, or holds no model of this class.
        """
        from anamorph.original.folder import Wishes, config_folder, configured
        from anamorph.original.kinds import model_of
        from anamorph.original.reading import find_file, open_original

        file = find_file(path, cache_dir=cache_dir, local_files_only=local_files_only)
        found = model_of(open_original(file), cls.__name__, ema=extract_ema)
        wishes = Wishes(None if config is None else str(config), cache_dir=cache_dir, local_files_only=local_files_only)
        if (folder := config_folder(wishes)) is not None:
            found = configured(found, folder)
        with torch.device("meta"):
            model = cls(**found.config)
        tensors = {cls.rename(name): _as_tensor(value) for name, value in found.tensors.items()}
        model.fill(tensors, torch_dtype or torch.float32, file)
        return model.eval()

    @classmethod
    def adopt(cls, model: nn.Module, config: Mapping[str, Any]) -> Self:
        """Another library's model of this class as one of ours; both share the weights.

        Raises ConfigError: its configuration is not served. Raises CheckpointError: its weights are others.
        """
        with torch.device("meta"):
            own = cls(**config)
        tensors = {cls.rename(name): value for name, value in model.state_dict().items()}
        own.fill(tensors, next(model.parameters()).dtype, Path(type(model).__name__))
        return own.eval()

    def load(self, weights: WeightFiles, dtype: torch.dtype) -> None:
        """Give this module the stored tensors, mapped from disk where type and layout allow it."""
        wanted = self.state_dict()
        if weights.pickled:
            self.fill(self._unpickle(weights), dtype, weights.files[0].parent)
            return
        # The headers are compared first, so that a wrong checkpoint costs no memory.
        shapes = {self.rename(name): entry.shape for name, entry in weights.entries().items()}
        self.verify(shapes, wanted, weights.files[0].parent)
        self.fill({self.rename(name): value for name, value in _read(weights.files)}, dtype, weights.files[0].parent)

    def fill(self, found: Mapping[str, Tensor], dtype: torch.dtype, where: Path) -> None:
        """Give this module tensors by its own names; `where` is what errors name.

        Raises CheckpointError: tensors are missing, extra or of another shape.
        """
        wanted = self.state_dict()
        self.verify({name: tuple(value.shape) for name, value in found.items()}, wanted, where)
        state = {
            name: (found[name].to(dtype) if found[name].is_floating_point() else found[name]).reshape(value.shape)
            for name, value in wanted.items()
        }
        self.load_state_dict(state, assign=True)

    def _unpickle(self, weights: WeightFiles) -> dict[str, Tensor]:
        found: dict[str, Tensor] = {}
        for file in weights.files:
            found |= tensors(file, load_pickle(file))
        return {self.rename(name): value for name, value in found.items()}

    def _shape(self, name: str, shape: tuple[int, ...]) -> tuple[int, ...]:
        """The shape under which a stored tensor is taken: 1x1 convolutions count as the matrices that they are."""
        return shape[:2] if shape[2:] == (1, 1) and _matches(name, self.POINTWISE) else shape

    def verify(self, stored: Mapping[str, tuple[int, ...]], wanted: Mapping[str, Tensor], where: Path) -> None:
        """Raise CheckpointError where stored names and shapes differ from this module's."""
        found = {name: self._shape(name, shape) for name, shape in stored.items()}
        extra = [name for name in found if name not in wanted and not _matches(name, self.HARMLESS)]
        missing = [name for name in wanted if name not in found]
        shapes = [
            f"{name} is {list(found[name])}, expected {list(value.shape)}"
            for name, value in wanted.items()
            if name in found and found[name] != tuple(value.shape)
        ]
        problems = [
            f"{title}: {'; '.join(names[:5])}{f' and {len(names) - 5} more' if len(names) > 5 else ''}"
            for title, names in (("missing weights", missing), ("extra weights", extra), ("wrong shapes", shapes))
            if names
        ]
        if problems:
            raise CheckpointError(
                f"{where} does not fit its config.json as {type(self).__name__}: {' | '.join(problems)}"
            )

    def save_pretrained(self, folder: str | Path, *, variant: str | None = None) -> None:
        """Write `config.json` and one safetensors file in diffusers' layout."""
        place = Path(folder)
        state = {self.stored_name(name): value.contiguous() for name, value in self.state_dict().items()}
        with replacing(place / f"{self.STEM}{f'.{variant}' if variant else ''}.safetensors") as draft:
            save_file(state, draft, metadata={"format": "pt"})
        with replacing(place / "config.json") as draft:
            draft.write_text(self.config.to_json(), encoding="utf-8")

    def rewrite(self, names: Iterable[str]) -> None:
        """Compute by these rewrites and no others from now on; weights stay as they are."""
        self.rewrites = tuple(names)
        for module in self.modules():
            if hasattr(module, "REWRITE"):
                module.rewritten = module.REWRITE in self.rewrites  # type: ignore[assignment]

    def set_attention_slice(self, slice_size: int | str | None = "auto") -> None:
        """See `slice_attention`."""
        slice_attention(self, slice_size)

    @property
    def attn_processors(self) -> dict[str, Processor]:
        """How each attention is computed, by diffusers' names."""
        return processors(self)

    def set_attn_processor(self, processor: Processor | Mapping[str, Processor]) -> None:
        """See `process_attention`."""
        process_attention(self, processor)

    def set_default_attn_processor(self) -> None:
        """Let PyTorch's fused function compute attention again."""
        process_attention(self, AttnProcessor2_0())

    @property
    def dtype(self) -> torch.dtype:
        """Type of the weights."""
        return next(self.parameters()).dtype

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return next(self.parameters()).device


def _read(files: Iterable[Path]) -> Iterable[tuple[str, Tensor]]:
    for path in files:
        try:
            with safe_open(path, framework="pt", device="cpu") as file:
                for name in file.keys():  # noqa: SIM118 - safe_open is no mapping
                    yield name, file.get_tensor(name)
        except SafetensorError as error:
            raise CheckpointError(f"{path} is no valid safetensors file: {error}") from None


def _as_tensor(stored: Stored) -> Tensor:
    """A tensor over the mapped values; bits that NumPy holds for PyTorch's types become these again."""
    tensor = torch.from_numpy(np.ascontiguousarray(stored.values))
    return tensor.view(TORCH_TYPES[stored.dtype])


def _matches(name: str, patterns: Iterable[str]) -> bool:
    return any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)
