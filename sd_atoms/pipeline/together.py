"""Several adapters in one pipeline, each at its strength."""

import math
import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch
from torch import nn

from sd_atoms.errors import UserError
from sd_atoms.formats.keys import TEXT, UNET
from sd_atoms.methods import all_methods
from sd_atoms.methods.adapters import delete_adapter, set_adapters, unwrap
from sd_atoms.methods.imported import PREFIX, ImportedConfig
from sd_atoms.pipeline.adapters import load_adapter
from sd_atoms.pipeline.artefact import Artefact
from sd_atoms.pipeline.changes import Change, network_changes

ALONE = "default"  # the name of one adapter in a pipeline


def split_strength(text: str, usual: float) -> tuple[str, float]:
    """("castle.safetensors", 0.8) of "castle.safetensors=0.8"; `usual` where nothing is said.

    Raises:
        UserError: what follows the last = is no number.
    """
    source, equals, number = text.rpartition("=")
    if not equals or Path(text).expanduser().exists():
        return text, usual
    try:
        strength = float(number)
    except ValueError:
        strength = math.nan
    if not source or not math.isfinite(strength):
        raise UserError(f"adapter: {text!r}: {number!r} is no strength; PATH or PATH=0.8 is allowed")
    return source, strength


def load_together(pipe, artefacts: Sequence[Artefact], strengths: Sequence[float]) -> None:
    """Loads adapters of any methods, and their words, and makes all of them active.

    Adapters of two kinds cannot share a layer, so there the changes are worked out and put in as such.

    Args:
        pipe: a pipeline without adapters.
        artefacts: what to load.
        strengths: of each.

    Raises:
        UserError: as `load_adapter`; two bring one word with different embeddings; or two kinds meet in a layer and
            the changes of one do not add up with others'.
    """
    check_words(artefacts)
    labels = [artefact.source for artefact in artefacts]
    if len(artefacts) > 1:
        artefacts = _of_one_kind(pipe, artefacts)
    names = adapter_names(labels)
    for artefact, name in zip(artefacts, names, strict=True):
        load_adapter(pipe, artefact, name)
    for part in (pipe.unet, pipe.text_encoder):
        set_adapters(part, names, strengths)


def adapter_names(sources: Sequence[str]) -> list[str]:
    """What adapters are called in a pipeline and in messages: by their files, told apart by numbers where needed."""
    if len(sources) == 1:
        return [ALONE]
    stems = [re.sub(r"\W+", "_", Path(source).stem).strip("_") or ALONE for source in sources]
    numbered = [f"{stem}_{number}" for number, stem in enumerate(stems, 1)]
    names = [stem if stems.count(stem) == 1 else name for stem, name in zip(stems, numbered, strict=True)]
    return names if len(set(names)) == len(names) else numbered  # castle, castle and castle_2


def check_words(artefacts: Sequence[Artefact]) -> None:
    """Every word has to mean one thing. Upper and lower case are one to a tokenizer.

    Raises:
        UserError: two adapters bring a word with different embeddings.
    """
    seen = {}
    for artefact in artefacts:
        for token, row in artefact.tokens.items():
            other, spelt, first = seen.setdefault(token.lower(), (artefact, token, row))
            if other is not artefact and not (spelt == token and torch.equal(first, row)):
                raise UserError(
                    f"adapter: {other.source} and {artefact.source} both bring the word {token}, each with its own "
                    "embedding; train one of them with another placeholder_token"
                )


def _of_one_kind(pipe, artefacts: Sequence[Artefact]) -> list[Artefact]:
    """The same adapters; those that share a layer with one of another kind as plain changes of weights."""
    kinds: dict[tuple[str, str], set[type]] = {}
    for artefact in artefacts:
        for key, config in _layers(artefact):
            kinds.setdefault(key, set()).add(type(config))
    mixed = {key for key, found in kinds.items() if len(found) > 1}
    return [_as_changes(pipe, a) if mixed & {key for key, _ in _layers(a)} else a for a in artefacts]


def _layers(artefact: Artefact):
    """((part of the pipeline, layer), settings of the tuner) of all layers that an adapter is in."""
    for part, layers, config in (
        (UNET, artefact.layers, artefact.config),
        (TEXT, artefact.text_layers, artefact.text_config),
    ):
        yield from (((part, layer), config) for layer in layers)


def _as_changes(pipe, artefact: Artefact) -> Artefact:
    """An adapter as what it adds to each weight at a strength of 1; `pipe` is left as it was.

    Raises:
        UserError: what it adds depends on what others add.
    """
    if isinstance(artefact.config or artefact.text_config, ImportedConfig):
        return artefact
    method = all_methods().get(artefact.method)
    if method is not None and not method.linear:
        raise UserError(
            f"adapter: {artefact.source}: changes of {artefact.method} do not add up with those of an adapter of "
            "another kind in the same layers; load it alone"
        )
    own = replace(artefact, tokens={})
    load_adapter(pipe, own, ALONE)
    made = []
    for part in (UNET, TEXT):
        model: nn.Module = getattr(pipe, part)
        changes = dict(network_changes(model, ALONE))
        parts = {layer: _parts(change) for layer, change in changes.items()}
        shapes = {layer: {name: list(v.shape) for name, v in held.items()} for layer, held in parts.items()}
        state = {f"{layer}.{PREFIX}{name}": v for layer, held in parts.items() for name, v in held.items()}
        made += [ImportedConfig(parts=shapes, inference_mode=True) if shapes else None, state]
        if ALONE in getattr(model, "peft_config", {}):
            delete_adapter(model, ALONE)
        unwrap(model)
    config, state, text_config, text_state = made
    about = {key: value for key, value in artefact.about.items() if key != "fingerprint"}  # has been compared by now
    return replace(artefact, config=config, state=state, about=about, text_config=text_config, text_state=text_state)


def _parts(change: Change) -> dict[str, torch.Tensor]:
    """A layer's change under the names that files of other programs have for such."""
    names = {"weight": "w_norm", "bias": "b_norm"} if change.norm else {"weight": "diff", "bias": "diff_b"}
    return {names[parameter]: value for parameter, value in change.values.items()}
