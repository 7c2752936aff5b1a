"""What adapters come to together on a base, and which files can be made of it."""

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import nn

from sd_atoms.errors import UserError
from sd_atoms.formats.keys import TEXT, UNET
from sd_atoms.methods import all_methods
from sd_atoms.methods.adapters import set_adapters
from sd_atoms.pipeline.adapters import base_distance, base_weight, load_adapter
from sd_atoms.pipeline.artefact import Artefact
from sd_atoms.pipeline.base import open_base
from sd_atoms.pipeline.changes import Change, add_changes, network_changes
from sd_atoms.pipeline.comfy import mixings, why_not
from sd_atoms.pipeline.export import has_lora_form
from sd_atoms.pipeline.fingerprint import SAME_BASE

# by the width of its text states, what kohya's headers call a base
SD_NAMES = {768: "sd_v1", 1024: "sd_v2"}
SD_CHANNELS = 320  # of their first convolution


@dataclass
class Contents:
    """What adapters come to together: layers by (part of the pipeline, name), B of atoms, tokens; `modules`: name ->
    shape of the weight of all of the UNet's;
    strengths: of the adapters; twice: a token that two of them have, with other rows; sd: what kohya's headers call
    the base, None where they have no name for it."""

    layers: dict[tuple[str, str], Change] = field(default_factory=dict)
    mixed: dict[tuple[str, str], torch.Tensor] = field(default_factory=dict)
    weights: dict[str, torch.Tensor] = field(default_factory=dict)
    tokens: dict[str, torch.Tensor] = field(default_factory=dict)
    modules: dict[str, torch.Size] = field(default_factory=dict)
    checkpoint_shapes: dict[str, torch.Size] = field(default_factory=dict)
    strengths: tuple[float, ...] = ()
    twice: str | None = None
    sd: str | None = None


def gather(
    artefacts: Sequence[Artefact], strengths: Sequence[float], base: str, base_config: str | None, other_base: bool
) -> Contents:
    """What adapters change on a base together, each at its strength.

    Raises:
        UserError: the base is another than an adapter's and that is not asked for, a method has no strength, or its
            changes do not add up with others'.
    """
    contents = Contents(strengths=tuple(strengths))
    for number, (artefact, strength) in enumerate(zip(artefacts, strengths, strict=True)):
        method = all_methods().get(artefact.method)
        if len(artefacts) > 1 and method is not None and not method.linear:
            raise UserError(
                f"{artefact.source}: changes of {artefact.method} do not add up with others'; export it alone"
            )
        pipe = open_base(base, base_config=base_config)  # a new one: two kinds of adapters cannot be in one layer
        if number == 0:
            _describe(pipe, contents)
        if not other_base:
            _refuse_other_base(artefact, pipe.unet)
        artefact = load_adapter(pipe, artefact, "export")
        for part in (UNET, TEXT):
            model = getattr(pipe, part)
            set_adapters(model, ["export"], [strength])
            changes = {(part, name): change for name, change in network_changes(model, "export")}
            add_changes(contents.layers, changes)
        if why_not([artefact.config for artefact in artefacts]) is None:
            for (name, part), b in mixings(pipe.unet, "export").items():
                before = contents.mixed.get((name, part))
                contents.mixed[name, part] = b if before is None else before + b  # one for all channels is of each
                contents.weights[name] = base_weight(pipe.unet.get_submodule(name)).detach()
        for token, row in artefact.tokens.items():
            if not torch.equal(contents.tokens.setdefault(token, row), row):
                contents.twice = token
    return contents


def _describe(pipe, contents: Contents) -> None:
    modules = {
        name: module for name, module in pipe.unet.named_modules() if isinstance(module, (nn.Conv2d, nn.Linear))
    }
    contents.modules = {name: module.weight.shape for name, module in modules.items()}
    contents.checkpoint_shapes = {
        f"{part}.{name}": parameter.shape
        for part in ("unet", "vae", "text_encoder")
        for name, parameter in getattr(pipe, part).named_parameters()
    }
    if pipe.unet.config.block_out_channels[0] == SD_CHANNELS:
        contents.sd = SD_NAMES.get(pipe.unet.config.cross_attention_dim)


def _refuse_other_base(artefact: Artefact, unet: nn.Module) -> None:
    try:
        apart = base_distance(artefact, unet)
    except UserError:  # layers that are not there; loading says which
        return
    if apart is not None and apart > SAME_BASE:
        raise UserError(
            f"{artefact.source}: trained on {artefact.about.get('base', 'another base')}, whose weights differ from "
            f"this base's by about {apart:.1%}; give its own by --base, or pass --other_base"
        )


def refusal(kind: str, artefacts: Sequence[Artefact], contents: Contents) -> str | None:
    """Why these adapters have no such form; None if they have."""
    if kind in ("words", "checkpoint") and contents.twice:
        return f"two of the adapters have a word {contents.twice}, and not the same"
    if kind == "words":
        return None if contents.tokens else "the adapter has no words of its own"
    if not contents.layers and not any(contents.strengths):
        return "at a strength of 0 nothing is changed"
    if not contents.layers:
        return "the adapter changes no weight" + (", it has words alone" if contents.tokens else "")
    if kind == "comfy":
        if any(part == TEXT for part, _ in contents.layers):
            return "it changes the text encoder too, which has no matrix B"
        return why_not([artefact.config for artefact in artefacts])
    if kind == "lora" and not has_lora_form(contents.layers):
        return "it changes biases or norms, which LoRA has no place for; diff and checkpoint take them"
    return None
