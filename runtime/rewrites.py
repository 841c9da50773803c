"""Rewrites: other ways to compute what a model computes, each with a name, its preconditions and where it is on.

A rewrite is applied to a model before it is traced, compiled or run, so that every engine and every format has it.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from anamorph import native
from anamorph.decoders import BYTES, bytes_unmet
from anamorph.errors import InputError
from anamorph.machine import is_zen
from anamorph.stepping import SCOPE, scope_unmet

ALL, NONE, DEFAULT = "all", "none", "default"
Wish = str | Sequence[str] | None
"""What callers ask for: names (also as one text with commas), among which "default" stands for those that are on by
themselves, as does None; "all" exact ones; "none"."""
Unmet = Callable[[str, str, Mapping[str, Any]], str | None]
"""From a part, its model's class and configuration: None, or why the rewrite does not apply, as half a sentence."""


@dataclass(frozen=True)
class Rewrite:
    """One rewrite. `exact`: it changes nothing but the order of additions.

    `on` names the formats and the engines that run models for which it is on by itself: where it was measured to be
    exact and no slower. `all_of` are the only ones for which "all" means it, too: it is of no use elsewhere, or asks
    for schedulers of some kinds. `only` are the only ones that have it at all.
    """

    name: str
    meaning: str
    exact: bool
    unmet: Unmet
    on: frozenset[str]
    all_of: frozenset[str] | None = None
    only: frozenset[str] | None = None


def _once(unmet: Callable[[str, Mapping[str, Any]], str | None]) -> Unmet:
    """A precondition of every part that denoises, or prepares for one."""
    return lambda part, class_name, config: SEES if native.is_hinting(part) else unmet(class_name, config)


SEES = "it sees nothing but a picture"


def _branches_part(part: str, class_name: str, config: Mapping[str, Any]) -> str | None:
    apart = native.is_preparing(part) or native.is_hinting(part)
    return "it sees no samples" if apart else native.prefix_unmet(class_name, config)


def _goes_on(part: str, class_name: str, config: Mapping[str, Any]) -> str | None:
    if class_name in native.CONTROLNETS or native.is_preparing(part):
        return "it predicts no samples"
    return native.unshaped(class_name, config) or scope_unmet(config)


def _layers_part(part: str, class_name: str, config: Mapping[str, Any]) -> str | None:
    return "it computes no layers" if native.is_preparing(part) else native.caching_unmet(class_name, config)


EVERYWHERE = frozenset({"onnx", "openvino", "eager", "compile"})


def _doubles(part: str, class_name: str, config: Mapping[str, Any]) -> str | None:
    """Whether a convolution follows nearest neighbours somewhere: in autoencoders' decoders and UNets' ways up."""
    if native.is_beside(part):
        return "it changes no resolution"
    if class_name in ("AutoencoderKL", "VQModel"):
        levels = config["block_out_channels"] if part.endswith("decoder") else ()
        return None if len(levels) > 1 else "nothing in it doubles a resolution"
    ways = config.get("up_block_types", ())[:-1] if "UNet" in class_name else ()
    plain = [way for way in ways if way in PLAIN_UP]
    return None if plain else "nothing in it doubles a resolution by nearest neighbours and a convolution"


def _normalises(part: str, class_name: str, config: Mapping[str, Any]) -> str | None:  # noqa: ARG001 - as all others
    """Whether it normalises large pictures: on a UNet's latents the rewrite was no faster."""
    return None if class_name in ("AutoencoderKL", "VQModel") else "it is no autoencoder of pictures"


def _attends(part: str, class_name: str, config: Mapping[str, Any]) -> str | None:
    """Whether pixels look around: in autoencoders' middle, and in blocks of UNets that say so."""
    if native.is_preparing(part) or native.is_hinting(part):
        return "it sees no pixels that look around"
    if class_name in ("AutoencoderKL", "VQModel"):
        return None if config.get("mid_block_add_attention", True) else "nothing in it looks around"
    blocks = (*config.get("down_block_types", ()), *config.get("up_block_types", ()), config.get("mid_block_type"))
    return None if any("Attn" in str(block) for block in blocks) else "nothing in it looks around"


def _multiplies(part: str, class_name: str, config: Mapping[str, Any]) -> str | None:
    """Whether it has layers that multiply by a matrix, not convolutions alone."""
    if class_name == "T2IAdapter" or native.is_hinting(part):
        return NO_MATRIX
    if class_name in ("AutoencoderKL", "VQModel") and _attends(part, class_name, config):
        return NO_MATRIX
    return None


NO_MATRIX = "nothing in it multiplies by a matrix"
PLAIN_UP = ("UpBlock2D", "CrossAttnUpBlock2D", "AttnUpBlock2D")
"""Blocks of a UNet's way up that double by nearest neighbours and a 3x3 convolution."""


def merging_unmet(part: str, class_name: str, config: Mapping[str, Any]) -> str | None:
    """Why tokens cannot be merged at the highest resolution that has transformers, or None."""
    if class_name != "UNet2DConditionModel" or native.is_preparing(part):
        return "it is no UNet that looks at a text"
    level = merging_level(config)
    if level is None:
        return "it has no resolution with transformers on both ways"
    if level == len(config["block_out_channels"]) - 1:
        return "latents may have odd sides where its transformers are"
    only = config.get("only_cross_attention", False)
    return "its pixels look at the text alone" if (any(only) if isinstance(only, Sequence) else only) else None


def merging_level(config: Mapping[str, Any]) -> int | None:
    """Number of the highest resolution, from 0, that has transformers on the way down and up."""
    ways = zip(config["down_block_types"], config["up_block_types"][::-1], strict=True)
    return next(
        (level for level, way in enumerate(ways) if way == ("CrossAttnDownBlock2D", "CrossAttnUpBlock2D")), None
    )


def _split_unmet(part: str, class_name: str, config: Mapping[str, Any]) -> str | None:
    apart = native.is_preparing(part) or native.is_hinting(part)
    if class_name not in native.LOOKERS or apart:
        return "it has no transformers over pixels"
    blocks = (*config["down_block_types"], config.get("mid_block_type"), *config.get("up_block_types", ()))
    return None if set(blocks) & set(TRANSFORMING) else "it has no transformers over pixels"


TRANSFORMING = ("CrossAttnDownBlock2D", "UNetMidBlock2DCrossAttn", "CrossAttnUpBlock2D")
"""Blocks of a UNet with transformers over pixels."""


PHASES, ROWS, ATTENTION = "phase-convolutions", "row-norms", "fused-attention"
CHUNKS, MERGING, SPLIT_EINSUM = "key-chunks", "token-merging", "split-einsum"
ONEDNN = "onednn-linear"
REWRITES: Mapping[str, Rewrite] = {
    rewrite.name: rewrite
    for rewrite in (
        Rewrite(
            PHASES,
            "a 3x3 convolution of pixels that are each doubled becomes four 2x2 convolutions of the small picture",
            True,
            _doubles,
            EVERYWHERE,
        ),
        Rewrite(
            ROWS,
            "group norms take their means over rows of pixels first, which need not be moved for that",
            True,
            _normalises,
            frozenset({"openvino"}),
        ),
        Rewrite(
            ATTENTION,
            "attention of pixels is one operation of the graph, which never has all scores in memory at once",
            True,
            _attends,
            frozenset({"onnx"}),
            only=frozenset({"onnx"}),
        ),
        Rewrite(
            CHUNKS,
            "attention to very many pixels goes by chunks of keys, whose scores stay near the cores (bfloat16)",
            True,
            _attends,
            frozenset({"openvino"}),
            only=frozenset({"openvino"}),
        ),
        Rewrite(
            ONEDNN,
            "products with weights in float32 go to oneDNN instead of MKL, which is fast on Intel's processors alone",
            True,
            _multiplies,
            # On others' processors PyTorch's own products were not measured.
            frozenset({"eager", "compile"}) if is_zen() else frozenset(),
            only=frozenset({"eager", "compile"}),
        ),
        Rewrite(
            native.KEYS,
            "keys and values of all attentions to the text are computed once per picture",
            True,
            _once(native.keys_unmet),
            EVERYWHERE,
        ),
        Rewrite(
            native.TIMES,
            "time embeddings and their projections are computed once per picture, for all steps together",
            True,
            _once(native.times_unmet),
            EVERYWHERE,
        ),
        Rewrite(
            native.PREFIX,
            "branches of guidance share what comes before the first attention to the text",
            True,
            _branches_part,
            EVERYWHERE,
        ),
        Rewrite(
            SCOPE,
            "guidance and the scheduler's step are part of the denoiser's graph, which returns the next samples",
            True,
            _goes_on,
            frozenset(),
            frozenset(),
        ),
        Rewrite(
            BYTES,
            "the autoencoder scales latents by its own weights, and gives pictures as bytes, too",
            True,
            bytes_unmet,
            EVERYWHERE,
        ),
        Rewrite(
            native.CACHING,
            "calls hand out the state before their last layer, and a further part computes that layer alone",
            False,
            _layers_part,
            frozenset(),
        ),
        Rewrite(
            MERGING,
            "where transformers see most pixels, the half that resembles others looks around together with them",
            False,
            merging_unmet,
            frozenset(),
        ),
        Rewrite(
            SPLIT_EINSUM,
            "transformers over pixels become 1x1 convolutions and a small product per head, for Apple's Neural Engine",
            True,
            _split_unmet,
            frozenset(),
            frozenset({"coreml"}),
        ),
    )
}
"""Name -> rewrite."""


def wanted(wish: Wish, place: str) -> tuple[str, ...]:
    """Names of the rewrites that a wish means for a format or an engine that runs models.

    Raises InputError: a name is unknown, or of a rewrite that this place does not have.
    """
    if wish is None:
        return tuple(rewrite.name for rewrite in REWRITES.values() if place in rewrite.on)
    if wish == ALL:
        exact = [each for each in REWRITES.values() if each.exact and _has(each, place)]
        return tuple(each.name for each in exact if each.all_of is None or place in each.all_of)
    names = named(wish)
    if strange := [name for name in names if name not in REWRITES]:
        known = ", ".join((ALL, NONE, DEFAULT, *REWRITES))
        raise InputError(f"there is no rewrite {strange[0]!r}; expected {known}")
    for name in names:
        if not _has(REWRITES[name], place):
            places = " and ".join(sorted(REWRITES[name].only or ()))
            raise InputError(f"the rewrite {name} is for {places}, and {place} does not have it; leave it out")
    usual = wanted(None, place) if DEFAULT in _listed(wish) else ()
    return tuple(name for name in REWRITES if name in (*names, *usual))


def _has(rewrite: Rewrite, place: str) -> bool:
    return rewrite.only is None or place in rewrite.only


def named(wish: Wish) -> tuple[str, ...]:
    """The rewrites that a wish insists on by their names."""
    return tuple(name for name in _listed(wish) if name != DEFAULT)


def _listed(wish: Wish) -> tuple[str, ...]:
    if wish is None or wish in (ALL, NONE):
        return ()
    return tuple(name.strip() for name in (wish.split(",") if isinstance(wish, str) else wish))


def inexact(names: Iterable[str]) -> tuple[str, ...]:
    """Those of the rewrites that change what is computed: a certificate compares with a model that has them, too."""
    return tuple(name for name in names if not REWRITES[name].exact)


def fitting(names: Iterable[str], part: str, class_name: str, config: Mapping[str, Any]) -> tuple[str, ...]:
    """Those of the rewrites whose preconditions hold for a part."""
    return tuple(name for name in names if REWRITES[name].unmet(part, class_name, config) is None)


def check_met(wish: Wish, applied: Iterable[str], parts: Sequence[tuple[str, str, Mapping[str, Any]]]) -> None:
    """Compare what a wish insists on with what was applied; `parts` are those of the pipeline, for the reasons.

    Raises InputError: a rewrite that is wished for by its name applies to none of them.
    """
    done = set(applied)
    for name in named(wish):
        if name not in done:
            reasons = {part: REWRITES[name].unmet(part, kind, config) for part, kind, config in parts}
            why = "; ".join(
                f"{part}: {said or 'its engine takes models as they are'}" for part, said in reasons.items()
            )
            raise InputError(f"the rewrite {name} applies to no part ({why}); leave it out")


NOTE = "rewrites"
"""The detail of a placement that names the rewrites by which a part computes."""


def noted(names: Sequence[str]) -> dict[str, str]:
    """That detail, where there are any."""
    return {NOTE: " ".join(names)} if names else {}
