"""Whether an adapter fits a network: all of its layers, or those of them that can be taken."""

import warnings
from collections.abc import Collection, Iterable, Iterator, Mapping
from copy import deepcopy
from dataclasses import replace

import peft.mapping
from peft import PeftConfig
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

from sd_atoms.errors import AtomsWarning, UserError, shortlist
from sd_atoms.methods.imported import PREFIX, ImportedConfig, check_fit
from sd_atoms.methods.method import adapter_shapes
from sd_atoms.pipeline.artefact import TEXT, Artefact, by_layer, layer_and_part
from sd_atoms.pipeline.config import UNET
from sd_atoms.pipeline.fingerprint import from_text, to_text
from sd_atoms.pipeline.foreign import SHOWN
from sd_atoms.tuner import AtomsConfig, layer_plan
from sd_atoms.tuner.shared import base_of

FIRST = "conv_in"  # the layer that is wider where the network also sees a mask, as for inpainting


def touched_layers(model: nn.Module, state: Iterable[str]) -> list[str]:
    """The layers with a weight that the entries of a state are of."""
    layers = {name for name, module in model.named_modules() if hasattr(module, "weight")}
    return [name for name in dict.fromkeys(_layer_of(key, layers) for key in state) if name in layers]


def _layer_of(key: str, layers: Collection[str]) -> str:
    """The layer of "<layer>.<part>", where parts may have dots too; where there is none, as of atoms or LoRA."""
    name = key
    while name and name not in layers:
        name = name.rpartition(".")[0]
    return name or layer_and_part(key)[0]


def fitting(artefact: Artefact, unet: nn.Module | None, text_encoder: nn.Module | None) -> Artefact:
    """The artefact without what these networks cannot take.

    Of an adapter that another program made that may be any layer; of ours it is a first convolution of another width
    alone, as inpainting networks have, since everything else tells another architecture.

    Raises:
        UserError: layers or shapes do not fit, layers carry adapters of another kind, or no layer is left of what
            another program made.

    Warns:
        AtomsWarning: layers are left out, or the file holds what nobody knows; the message names the first of them.
    """
    label, notes = artefact.source, []
    if artefact.left_over:
        notes.append(
            f"{len(artefact.left_over)} of its keys say nothing known ({shortlist(artefact.left_over, SHOWN)})"
        )
    if isinstance(artefact.config or artefact.text_config, ImportedConfig):
        artefact, note = _fitting_import(artefact, unet, text_encoder)
        notes += [note] * bool(note)
    if artefact.config is not None:
        problem, misfits = _problem("this base", unet, artefact.config, artefact.state)
        if misfits == [FIRST]:
            notes.append(f"{FIRST} is of another width in this base")
            artefact = _without_first(artefact)
            problem, _ = _problem("this base", unet, artefact.config, artefact.state)
        if problem:
            raise UserError(f"{label}: {problem}")
    if artefact.text_config is not None:
        problem, _ = _problem("this base's text encoder", text_encoder, artefact.text_config, artefact.text_state)
        if problem:
            raise UserError(f"{label}: {problem}")
    if notes:
        warnings.warn(f"{label}: {'; '.join(notes)}; left out", AtomsWarning, stacklevel=3)
    return artefact


def _fitting_import(artefact: Artefact, unet, text_encoder) -> tuple[Artefact, str | None]:
    """What another program made, without the layers that do not fit, and a note about these."""
    parts = {
        UNET: (artefact.config, artefact.state, unet),
        TEXT: (artefact.text_config, artefact.text_state, text_encoder),
    }
    made, reasons, count = [], [], 0
    for place, (config, state, model) in parts.items():
        out = dict(_misfits(config, model))
        count += 0 if config is None else len(config.parts)
        reasons += [f"{artefact.names.get((place, layer), layer)} {why}" for layer, why in out.items()]
        if out:
            kept = {name: own for name, own in config.parts.items() if name not in out}
            config = ImportedConfig(parts=kept, inference_mode=True) if kept else None
            state = {key: value for key, value in state.items() if layer_and_part(key)[0] not in out}
        made += [config, state]
    if len(reasons) == count:
        raise UserError(f"{artefact.source}: none of its {count} layers fits this base ({shortlist(reasons, SHOWN)})")
    config, state, text_config, text_state = made
    artefact = replace(artefact, config=config, state=state, text_config=text_config, text_state=text_state)
    text = f"{len(reasons)} of its {count} layers do not fit this base ({shortlist(reasons, SHOWN)})"
    return artefact, text if reasons else None


def _misfits(config: PeftConfig | None, model: nn.Module | None) -> Iterator[tuple[str, str]]:
    """The layers of an imported adapter that a network lacks or has of another shape, and why."""
    modules = {} if model is None else dict(model.named_modules())
    for name, shapes in config.parts.items() if isinstance(config, ImportedConfig) else ():
        if name not in modules:
            yield name, "is not there"
            continue
        try:
            check_fit(shapes, base_of(modules[name]))
        except ValueError as error:
            yield name, str(error)


def _without_first(artefact: Artefact) -> Artefact:
    config, about = deepcopy(artefact.config), dict(artefact.about)
    config.exclude_modules = [FIRST]
    if "fingerprint" in about:  # a row for each layer, in the order of their names
        rows = from_text(about["fingerprint"])
        kept = [index for index, name in enumerate(sorted(artefact.layers)) if name != FIRST]
        about["fingerprint"] = to_text(rows[kept])
    state = {key: value for key, value in artefact.state.items() if layer_and_part(key)[0] != FIRST}
    return replace(artefact, config=config, about=about, state=state)


def _problem(place: str, model: nn.Module, config: PeftConfig, state) -> tuple[str | None, list[str]]:
    """Why an adapter cannot go into a network, None if it can, and the layers whose shapes are others there."""
    modules, layers = dict(model.named_modules()), touched_layers(model, state)
    taken = [name for name in layers if _carries_others(modules[name], config)]
    found = {key: tuple(value.shape) for key, value in state.items()}
    if taken:
        expected = found
    elif isinstance(config, AtomsConfig):
        expected = _atoms_shapes(modules, config, by_layer(state))
    elif isinstance(config, ImportedConfig):  # `_fitting_import` has looked at each layer
        table = config.parts.items()
        expected = {f"{layer}.{PREFIX}{part}": tuple(shape) for layer, own in table for part, shape in own.items()}
    else:
        try:
            expected = adapter_shapes(model, config)
        except UserError as error:
            return f"it does not fit {place} ({error})", []
    wrong = [key for key in {**found, **expected} if found.get(key) != expected.get(key)]
    misfits = list(dict.fromkeys(_layer_of(key, layers) for key in wrong))
    held, told = ({_layer_of(key, layers) for key in keys} for keys in (found, expected))
    broken = [key for key in wrong if (key in found) != (key in expected) and _layer_of(key, layers) in held & told]
    count = len(held)
    for names, text in (
        (taken, f"{len(taken)} of its layers carry adapters of another kind in {place}; delete those first"),
        (broken, f"corrupt, it lacks or does not know {len(broken)} tensors of its layers"),
        (misfits, f"made for another architecture, {len(misfits)} of its {count} layers do not fit {place}"),
    ):
        if names:
            named = f"{', '.join(names[:3])}{', …' if len(names) > 3 else ''}"
            return f"{text} ({named})", misfits if names is misfits else []
    return None, []


def _atoms_shapes(modules: Mapping[str, nn.Module], config: AtomsConfig, names: Iterable[str]) -> dict[str, tuple]:
    """`adapter_shapes` of atoms in those layers, as far as they take them; fast, for hot-swaps."""
    expected = {}
    for name in names:
        layer = base_of(modules.get(name))
        try:
            shapes = layer_plan(config, name, layer).shapes(layer, config.train_beta)
        except ValueError:
            continue
        expected |= {f"{name}.{part}": shape for part, shape in shapes.items()}
    return expected


def _carries_others(layer: nn.Module | None, config: PeftConfig) -> bool:
    """Whether a layer has adapters of another kind: of two kinds in one layer, the outer does not see the inner."""
    own = peft.mapping.PEFT_TYPE_TO_TUNER_MAPPING[config.peft_type].tuner_layer_cls
    while isinstance(layer, BaseTunerLayer):
        if not isinstance(layer, own) and layer._get_available_adapters():
            return True
        layer = layer.base_layer
    return False
