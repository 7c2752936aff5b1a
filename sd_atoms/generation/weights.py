"""Prompts whose words have weights, (castle)1.3 or castle++, as the package compel reads them."""

from collections.abc import Sequence

import torch

from sd_atoms.errors import UserError
from sd_atoms.methods.adapters import one_line


def weighted_states(pipe, prompts: Sequence[str], negative_prompt: str | None) -> dict[str, torch.Tensor]:
    """Text states (n, tokens, d) of prompts, and of what guidance leads away from, as a pipeline is called with them.

    One prompt at a time, so that none depends on the others.

    Raises:
        UserError: as `plain_texts`.
    """
    reader = _reader(pipe)
    with torch.no_grad():
        states = torch.cat([reader.build_conditioning_tensor(prompt) for prompt in prompts])
        negative = reader.build_conditioning_tensor(negative_prompt or "")
    return dict(prompt_embeds=states, negative_prompt_embeds=negative.expand_as(states))


def plain_texts(pipe, prompts: Sequence[str]) -> list[str]:
    """The prompts without their weights.

    Raises:
        UserError: compel is not installed, or a prompt is none that it can read.
    """
    reader, texts = _reader(pipe), []
    for prompt in prompts:
        try:
            parts = reader.parse_prompt_string(prompt).prompts
        except Exception as error:  # its parser raises whatever it trips over
            raise UserError(f"prompt_weights: {prompt!r} cannot be read by compel ({one_line(error)})") from error
        words = getattr(parts[0], "children", [None])
        if len(parts) > 1 or not all(hasattr(part, "text") for part in words):
            raise UserError(f"prompt_weights: {prompt!r}: weights are read, not .and(), .blend() and .swap()")
        texts.append(" ".join(part.text for part in words))
    return texts


def _reader(pipe):
    try:
        from compel import Compel
    except ImportError as error:
        raise UserError('prompt_weights needs the package compel: pip install "sd-atoms[weights]"') from error
    return Compel(tokenizer=pipe.tokenizer, text_encoder=pipe.text_encoder)
