"""An adapter at rest: its settings, its numbers under PEFT's keys, its words, and what is known of its making."""

import hashlib
import json
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from peft import PeftConfig

from sd_atoms.pipeline.config import kept_settings
from sd_atoms.tuner import AtomsConfig

TEXT = "text_encoder"


@dataclass(frozen=True, repr=False)
class Artefact:
    """An adapter at rest.

    config: settings of the UNet's tuner; None without an adapter there. state: "<layer>.<part>" -> the numbers, as
    PEFT keeps them; of atoms the parts are those of `AtomsLayer`: atoms_delta and atoms_initial (m, K), atoms_beta,
    atoms_block_delta, atoms_block_initial.
    tokens: placeholder -> embedding row (d,). about: the rest of the header; empty for a file of plain PEFT.
    text_config, text_state: the same of the text encoder's adapter, if there is one. source: where it was read, for
    messages. size_bytes: of the files it was read from. left_over: keys of another program's file that say
    nothing; names: (UNET or TEXT, layer) -> how that file calls the layer.
    """

    config: PeftConfig | None
    state: dict[str, torch.Tensor]
    tokens: dict[str, torch.Tensor] = field(default_factory=dict)
    about: dict[str, Any] = field(default_factory=dict)
    text_config: PeftConfig | None = None
    text_state: dict[str, torch.Tensor] = field(default_factory=dict)
    source: str = "adapter"
    size_bytes: int | None = None
    left_over: tuple[str, ...] = ()
    names: Mapping[tuple[str, str], str] = field(default_factory=dict)

    def __repr__(self) -> str:
        """One line, without the numbers."""
        trained = sum(value.numel() for key, value in self.state.items() if not key.endswith("_initial"))
        parts = [f"{self.method}: {len(self.layers)} modules, {trained:,} parameters"]
        if self.text_config is not None:
            parts.append(f"{len(self.text_layers)} modules of the text encoder")
        parts += [f"tokens {' '.join(self.tokens)}"] * bool(self.tokens) + [
            f"base {self.about.get('base', 'unknown')}"
        ]
        return f"<{type(self).__name__} {self.source}, {', '.join(parts)}>"

    @property
    def method(self) -> str:
        """The name of the method, as far as the file says it."""
        if self.config is None:
            return self.about.get("method", "token") if self.text_config is not None else "token"
        return self.about.get("method", "atoms" if self.is_atoms else f"peft-{self.config.peft_type.value.lower()}")

    @property
    def is_atoms(self) -> bool:
        """Whether the UNet's adapter is of filter atoms."""
        return isinstance(self.config, AtomsConfig)

    @property
    def layers(self) -> list[str]:
        """Names of the adapted layers, in the order of `state`."""
        return list(by_layer(self.state))

    @property
    def text_layers(self) -> list[str]:
        """Names of the adapted layers of the text encoder, in the order of `text_state`."""
        return list(by_layer(self.text_state))

    def digest(self) -> str:
        """Tells adapters apart: 16 hexadecimal digits of what they hold, the same for a folder and its file."""
        content = hashlib.sha256()
        text = {f"{TEXT}.{key}": value for key, value in self.text_state.items()}
        for key, value in sorted({**self.state, **self.tokens, **text}.items()):
            content.update(key.encode() + value.float().contiguous().numpy().tobytes())
        if self.is_atoms and self.config.scale_pattern:
            content.update(json.dumps(self.config.scale_pattern, sort_keys=True).encode())
        for config in (self.text_config, None if self.is_atoms else self.config):
            if config is not None:  # LoRA of another alpha is another one; the layers are in the keys
                settings = kept_settings(config) | {"target_modules": None}
                content.update(json.dumps(settings, sort_keys=True).encode())
        return content.hexdigest()[:16]


def by_layer(state: Mapping[str, torch.Tensor]) -> dict[str, dict[str, tuple[int, ...]]]:
    """layer -> part -> shape, of "<layer>.<part>" -> tensor."""
    layers = defaultdict(dict)
    for key, value in state.items():
        layer, part = layer_and_part(key)
        layers[layer][part] = tuple(value.shape)
    return dict(layers)


def layer_and_part(key: str) -> tuple[str, str]:
    """The two of "<layer>.<part>" under PEFT's keys; a part is one word (atoms_delta) or two (lora_A.weight)."""
    words = key.split(".")
    size = 2 if words[-1] in ("weight", "bias") else 1
    return ".".join(words[:-size]), ".".join(words[-size:])
