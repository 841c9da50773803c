"""What an export shall hold, settled before anything is written: components, sizes, interfaces, rewrites."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace

from anamorph.artifact import NATIVE
from anamorph.autoencoder_interfaces import vae_scale_factor
from anamorph.checkpoint import ALONE, Checkpoint
from anamorph.components import UNEXPORTED, Component
from anamorph.denoiser_interfaces import hint_factor
from anamorph.errors import ConfigError, InputError
from anamorph.exporters.formats import Format
from anamorph.exporters.static import fixed, joined
from anamorph.exporters.trace import part_interface, without_images
from anamorph.exporting import ExportOptions
from anamorph.interface import Interface
from anamorph.native import is_preparing, native_of
from anamorph.pipelines.base import DiffusionPipeline
from anamorph.pipelines.describing import settle_variant
from anamorph.pipelines.followed import Followed
from anamorph.pipelines.nets import spread
from anamorph.pipelines.slots import Slots, model, models, read_slot
from anamorph.rewrites import check_met, fitting, inexact


def read_components(checkpoint: Checkpoint) -> list[Component]:
    """The models of a checkpoint that are exported; raises ConfigError where its pipeline is not one of ours."""
    found = (read_slot(checkpoint, name, slot) for name, slot in models(slots_of(checkpoint)).items())
    return settle_variant([one for one in found if one is not None and one.class_name not in UNEXPORTED])


def slots_of(checkpoint: Checkpoint) -> Slots:
    """The components of a checkpoint's pipeline, or the only one of a model in a folder of its own."""
    if checkpoint.class_name in ALONE:
        return {ALONE[checkpoint.class_name]: model(checkpoint.class_name)}
    kind = DiffusionPipeline.registry.get(checkpoint.class_name)
    if kind is None:
        known = ", ".join((*DiffusionPipeline.registry, *ALONE))
        raise ConfigError(f"{checkpoint.folder} is a {checkpoint.class_name}; {known} can be exported")
    return spread(kind.SLOTS, checkpoint.components)


def interfaces_of(
    checkpoint: Checkpoint, options: ExportOptions, form: Format
) -> list[tuple[Component, Mapping[str, Interface]]]:
    """What each part shall take, settled before anything is written."""
    wanted = options.wanted(form.name)
    components = [
        replace(c, rewrites=native_of(fitting(wanted, c.name, c.class_name, c.config)))
        for c in read_components(checkpoint)
    ]
    kind = DiffusionPipeline.registry.get(checkpoint.class_name, DiffusionPipeline)
    if issubclass(kind, Followed) and options.signature != NATIVE:
        raise InputError(
            f"{checkpoint.folder} has {kind.CALLED}s, which add to the denoiser's states; that takes the native "
            "signature (--signature native)"
        )
    factor = _factor(components)
    further = () if options.coreml is None else options.coreml.sizes

    def interface(component: Component, part: str) -> Interface:
        denoises = component.interface(part).inputs[0].name == "sample" and not part.startswith("vae")
        branches = kind.most_branches(component.config) if denoises or is_preparing(part) else 1

        def at(size: tuple[int, int] | None) -> Interface:
            taken = part_interface(component, part, replace(options, size=size), factor, branches, kind.ALIKE)
            return taken if form.images else without_images(taken)

        return joined([fixed(at(size)) for size in (options.size, *further)]) if form.static else at(options.size)

    return [(c, {part: interface(c, part) for part in c.parts}) for c in components]


def sized(checkpoint: Checkpoint, options: ExportOptions, form: Format) -> ExportOptions:
    """Options with a size for formats that need one: what is asked for, or what the model was trained for."""
    if not form.static or options.size is not None:
        return options
    components = read_components(checkpoint)
    sides = (c.config.get("sample_size") for c in components if "vae_decoder" not in c.parts)
    side = next((side for side in sides if isinstance(side, int)), None)
    if side is None:
        raise InputError(f"no config.json of {checkpoint.folder} has a sample_size; name a size (--static)")
    return replace(options, size=(side * _factor(components),) * 2)


def _factor(components: Iterable[Component]) -> int:
    """Pixels per latent along one side, as the first component has it that says so."""
    for component in components:
        if "vae_decoder" in component.parts:
            return vae_scale_factor(component.config)
        if component.class_name == "ControlNetModel":
            return hint_factor(component.config)
    return 1


def reference(rewrites: Sequence[str]) -> tuple[str, ...]:
    """The rewrites of the model that a part is compared with, which else computes as it is written."""
    return (*native_of(rewrites), *inexact(rewrites))


def check_rewrites(
    interfaces: Sequence[tuple[Component, Mapping[str, Interface]]], options: ExportOptions, form: str
) -> None:
    """Raise InputError where a rewrite that is wished for by its name applies to nothing."""
    parts = [(part, c.class_name, c.config) for c, functions in interfaces for part in functions]
    wanted = options.wanted(form)
    check_met(options.rewrites, [name for part in parts for name in fitting(wanted, *part)], parts)
