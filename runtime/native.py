"""The native signature of a UNet that looks at a text: what it is told once per picture, and what at each step.

Three rewrites, each on its own or together with the others, share out what the plain signature takes at every step:

    keys-once       keys and values of all attentions to the text come from the part "..._prepare"
    times-once      so do the time projections of all residual blocks, for all steps
    prefix-sharing  samples enter once for all branches of guidance, which part at the first attention to the text

With step-scope samples enter once, too, and the next ones come out: see `anamorph.stepping`. With step-caching the
state that enters the last layer of the way up comes out, and the part "..._shallow" computes that layer alone, with an
older such state (Ma et al. 2023, arXiv:2312.00858). No PyTorch here.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from anamorph.conditions import (
    ADDED,
    CONTROL_TYPE,
    HINT,
    IMAGE_BIAS,
    IMAGE_KEYS,
    IMAGE_VALUES,
    INTRABLOCK,
    PROJECTED,
    mask_name,
    projection,
)
from anamorph.decoders import BYTES, is_decoding, picturing
from anamorph.interface import BATCH, Axis, Dimension, Interface, Port
from anamorph.stepping import SCOPE, sample_ports, step_ports

KEYS, TIMES, PREFIX, CACHING = "keys-once", "times-once", "prefix-sharing", "step-caching"
NATIVE_REWRITES = (KEYS, TIMES, PREFIX, SCOPE, CACHING, BYTES)
"""The rewrites that change what a part takes; others change how it computes."""

BRANCHES, SEQUENCE, STEPS = (Axis(name) for name in ("branches", "sequence", "steps"))
TEXT_KEYS, TEXT_VALUES, TIME_ROW, DEEP = "text_keys", "text_values", "time_projections", "deep_state"
PREPARE, SHALLOW, HINTING = "_prepare", "_shallow", "_hint"

CONTROLNETS = ("ControlNetModel", "ControlNetUnionModel")
LOOKERS = ("UNet2DConditionModel", *CONTROLNETS)
"""Classes of models that look at a text on the way down."""
LOOKING = ("CrossAttnDownBlock2D", "CrossAttnUpBlock2D", "UNetMidBlock2DCrossAttn")
"""Blocks with a transformer behind each residual block (in the middle: behind each but the last)."""
PLAIN = ("DownBlock2D", "UpBlock2D", "UNetMidBlock2D")


def preparing(part: str) -> str:
    """The part that prepares what `part` takes."""
    return f"{part}{PREPARE}"


def shallow(part: str) -> str:
    """The part that computes the last layer of `part` alone."""
    return f"{part}{SHALLOW}"


def is_preparing(part: str) -> bool:
    """Whether a part prepares what another one takes."""
    return part.endswith(PREPARE)


def is_shallow(part: str) -> bool:
    """Whether a part computes the last layer of another one alone."""
    return part.endswith(SHALLOW)


def is_beside(part: str) -> bool:
    """Whether a part only goes with another one of the same model."""
    return is_preparing(part) or is_shallow(part)


def is_hinting(part: str) -> bool:
    """Whether a part encodes the picture that a ControlNet follows."""
    return part.endswith(HINTING)


def native_of(rewrites: Sequence[str]) -> tuple[str, ...]:
    """Those of the rewrites that change what a part takes, and not only how it computes."""
    return tuple(name for name in rewrites if name in NATIVE_REWRITES)


def is_branched(port: Port) -> bool:
    """Whether a port holds every branch of guidance apart, [branches, N, ...]."""
    return _begins(port, BRANCHES)


def takes_branches(interface: Interface) -> bool:
    """Whether samples enter a part once for all branches of guidance."""
    return BRANCHES.name in interface.axes


def in_steps(port: Port) -> bool:
    """Whether a port holds something for each step, [T, ...]."""
    return _begins(port, STEPS)


def _begins(port: Port, axis: Axis) -> bool:
    return bool(port.axes) and isinstance(first := port.axes[0], Axis) and first.name == axis.name


def splits(rewrites: Sequence[str]) -> bool:
    """Whether any of these rewrites changes what a part takes."""
    return bool(native_of(rewrites))


def split(plain: Interface, config: Mapping[str, Any], rewrites: Sequence[str]) -> dict[str, Interface]:
    """A part's interface by these rewrites, and those of the parts beside it, by their names.

    A denoiser's is sample, timestep, conditions and optional residuals; what follows from the time or from the text
    alone leaves it for the part that prepares. Interfaces that no rewrite concerns stay as they are.
    """
    if BYTES in rewrites and is_decoding(plain.component):
        return {plain.component: picturing(plain)}
    if "timestep" not in {port.name for port in plain.inputs}:
        return {plain.component: plain}
    sample, timestep, *others = plain.inputs
    optional = [port for port in others if port.optional]
    conditions = [port for port in others if not port.optional]
    timely, worded = _time_conditions(config), _text_conditions(config)
    once = {*(timely if TIMES in rewrites else ()), *(worded if KEYS in rewrites else ())}
    stepwise = {*(() if TIMES in rewrites else timely), *(() if KEYS in rewrites else worded)}
    row, keys = _row(config), _keys(config)
    told = [
        row if TIMES in rewrites else timestep,
        *(port for port in conditions if port.name in stepwise or port.name == HINT),
        *(keys if KEYS in rewrites else ()),
    ]
    deep = [_deep(config, sample)] if CACHING in rewrites else []

    def part(name: str, inputs: Sequence[Port], outputs: Sequence[Port]) -> Interface:
        if not {PREFIX, SCOPE} & set(rewrites):
            return Interface(name, (sample, *inputs), tuple(outputs))
        time = inputs[0] if BATCH not in inputs[0].axes else _branched(inputs[0])
        told, made = (time, *map(_branched, inputs[1:])), tuple(map(_branched, outputs))
        if SCOPE not in rewrites:
            return Interface(name, (sample, *told), made)
        own, history = sample_ports(sample)
        return Interface(name, (own, *told, *step_ports(sample, BRANCHES)), (outputs[0], *made[1:], history))

    parts = [part(plain.component, (*told, *optional), (*plain.outputs, *deep))]
    if {KEYS, TIMES} & set(rewrites):
        inputs = [Port("timesteps", (STEPS,), exact=True)] if TIMES in rewrites else []
        inputs += [port for port in conditions if port.name in once]
        made = [replace(row, axes=(STEPS, *row.axes))] if TIMES in rewrites else []
        made += keys if KEYS in rewrites else ()
        parts.append(Interface(preparing(plain.component), tuple(inputs), tuple(made)))
    if deep:
        lasting = (IMAGE_KEYS, IMAGE_VALUES, IMAGE_BIAS, mask_name(0))
        images = [port for port in optional if port.name in lasting]
        parts.append(part(shallow(plain.component), (*told, *deep, *optional[:1], *images), plain.outputs))
    return {one.component: one for one in parts}


def _deep(config: Mapping[str, Any], sample: Port) -> Port:
    """What enters the last layer of the way up, whose block has two layers or more."""
    return Port(DEEP, (BATCH, config["block_out_channels"][0], *sample.axes[2:]))


def _branched(port: Port) -> Port:
    if port.name == HINT or port.name.startswith(INTRABLOCK):
        return port
    return replace(port, axes=(BRANCHES, *port.axes))


def _row(config: Mapping[str, Any]) -> Port:
    alone: Dimension = BATCH if _time_conditions(config) else 1
    return Port(TIME_ROW, (alone, time_width(config)))


def _keys(config: Mapping[str, Any]) -> tuple[Port, Port]:
    axes = (BATCH, SEQUENCE, text_width(config))
    return Port(TEXT_KEYS, axes), Port(TEXT_VALUES, axes)


def _time_conditions(config: Mapping[str, Any]) -> tuple[str, ...]:
    """What joins the time embedding."""
    kind = config.get("addition_embed_type")
    classes = config.get("class_embed_type") is not None or config.get("num_class_embeds") is not None
    return (
        *ADDED[kind],
        *(("encoder_hidden_states",) if kind == "text" else ()),
        *(("timestep_cond",) if config.get("time_cond_proj_dim") is not None else ()),
        *(("class_labels",) if classes else ()),
        *((CONTROL_TYPE,) if config.get("num_control_type") is not None else ()),
    )


def _text_conditions(config: Mapping[str, Any]) -> tuple[str, ...]:
    """What attentions to the text look at."""
    kind = projection(config)
    return (*(() if kind == "image_proj" else ("encoder_hidden_states",)), *PROJECTED[kind])


@dataclass(frozen=True)
class Looking:
    """The attentions to the text behind one residual block: `depth` of them, `width` wide, at a level of resolution.

    `name` is the path of the transformer that they belong to.
    """

    name: str
    level: int
    width: int
    depth: int


def _blocks(config: Mapping[str, Any]) -> Iterator[tuple[str, str, int, int, Sequence[int]]]:
    """Path, kind, level, residual blocks and the depth behind each of them, of every block in the order of calls."""
    levels = len(config["block_out_channels"])
    layers = _spread(config["layers_per_block"], levels)
    depths = _spread(config.get("transformer_layers_per_block", 1), levels)
    turned = config.get("reverse_transformer_layers_per_block")
    for level, (kind, count, depth) in enumerate(zip(config["down_block_types"], layers, depths, strict=True)):
        yield f"down_blocks.{level}", kind, level, count, _spread(depth, count)
    middle = config.get("mid_block_type", LOOKING[-1])
    if middle is not None:
        yield "mid_block", middle, levels - 1, 2 if middle in LOOKING else 1, _spread(depths[-1], 1)[:1]
    if (kinds := config.get("up_block_types")) is None:
        return
    upward = depths[::-1] if turned is None else _spread(turned, levels)
    for index, (kind, count, depth) in enumerate(zip(kinds, layers[::-1], upward, strict=True)):
        yield f"up_blocks.{index}", kind, levels - 1 - index, count + 1, _spread(depth, count + 1)


def _spread(value: Any, count: int) -> list[Any]:
    return list(value) if isinstance(value, Sequence) else [value] * count


def time_width(config: Mapping[str, Any]) -> int:
    """The width of all time projections of residual blocks together."""
    times = 2 if config.get("resnet_time_scale_shift") == "scale_shift" else 1
    channels: Sequence[int] = config["block_out_channels"]
    return times * sum(channels[level] * count for _, _, level, count, _ in _blocks(config))


def attentions(config: Mapping[str, Any]) -> tuple[Looking, ...]:
    """All attentions to the text, in the order in which their keys lie side by side."""
    channels = config["block_out_channels"]
    return tuple(
        Looking(f"{block}.attentions.{index}", level, channels[level], depth)
        for block, kind, level, _, depths in _blocks(config)
        if kind in LOOKING
        for index, depth in enumerate(depths)
    )


def text_width(config: Mapping[str, Any]) -> int:
    """The width of the keys of all attentions to the text together."""
    return sum(one.width * one.depth for one in attentions(config))


def unshaped(class_name: str, config: Mapping[str, Any]) -> str | None:
    """Why a model has no native signature of its own, or None."""
    if class_name not in LOOKERS:
        return "it is no UNet that looks at a text"
    middle = config.get("mid_block_type", PLAIN[0]) or PLAIN[0]
    kinds = (*config["down_block_types"], *config.get("up_block_types", ()), middle)
    if strange := [kind for kind in kinds if kind not in (*LOOKING, *PLAIN)]:
        return f"it has blocks of another kind ({strange[0]})"
    only = (config.get("only_cross_attention", False), config.get("mid_block_only_cross_attention"))
    if any(any(value) if isinstance(value, Sequence) else value for value in only):
        return "its pixels look at the text alone"
    return None


def keys_unmet(class_name: str, config: Mapping[str, Any]) -> str | None:
    """Why keys and values cannot be computed once, or None."""
    if (reason := unshaped(class_name, config)) is not None:
        return reason
    if projection(config) not in (None, "text_proj"):
        return "its attentions look at pictures"
    return None if text_width(config) else "it looks at no text"


def times_unmet(class_name: str, config: Mapping[str, Any]) -> str | None:
    """Why time projections cannot be computed once, or None."""
    return unshaped(class_name, config)


def caching_unmet(class_name: str, config: Mapping[str, Any]) -> str | None:
    """Why the last layer of the way up cannot be computed alone, or None."""
    if class_name in CONTROLNETS:
        return "it has no way up"
    return unshaped(class_name, config)


def prefix_unmet(class_name: str, config: Mapping[str, Any]) -> str | None:
    """Why branches of guidance share nothing, or None."""
    if (reason := unshaped(class_name, config)) is not None:
        return reason
    if joined := _time_conditions(config):
        return f"its time embedding depends on {joined[0]}, which differs between branches"
    if projection(config) not in (None, "text_proj"):
        return "its attentions look at pictures"
    looks = any(kind in LOOKING for kind in config["down_block_types"])
    return None if looks else "no block of its way down looks at the text"
