"""Prompt templates and seeds as users write them."""

import os
import re
import warnings
from collections.abc import Collection, Iterable
from pathlib import Path

from sd_atoms.errors import AtomsWarning, UserError
from sd_atoms.sources import packaged_file

LARGEST_SEED = 2**63 - 1
MOST_SEEDS = 100_000  # far above any experiment; a slip such as 0-99999999999 must not fill the memory


def load_templates(path: str | os.PathLike, words: Collection[str] = (), plain: bool = False) -> list[str]:
    """Reads one template per line from a UTF-8 file, or a packaged one such as "few_shot".

    `{}` stands for the concept, once per template. Blank lines and lines that start with `#` are skipped.

    Args:
        path: the file.
        words: a line with one of them needs no `{}`.
        plain: no line does.

    Raises:
        UserError: no such file, not UTF-8, no template in it, or a line whose braces are not one `{}`.
    """
    templates = _numbered_lines(path, "one per line, with {} for the concept")
    for number, template in templates:
        rest = template.replace("{}", "", 1)
        named = plain or any(word in template for word in words)
        if (rest == template and not named) or "{" in rest or "}" in rest:
            raise UserError(f"{path}, line {number}: {template!r}: expected {{}} exactly once and no other braces")
    return [template for _, template in templates]


def load_prompts(path: str | os.PathLike) -> list[str]:
    """Reads one prompt per line from a UTF-8 file; there is no concept to fill in, so braces are refused.

    Blank lines and lines that start with `#` are skipped.

    Raises:
        UserError: no such file, not UTF-8, no prompt in it, or a line with braces.
    """
    prompts = _numbered_lines(path, "one per line")
    for number, prompt in prompts:
        if "{" in prompt or "}" in prompt:
            raise UserError(f"{path}, line {number}: {prompt!r}: expected a plain prompt without braces")
    return [prompt for _, prompt in prompts]


def fill(template: str, concept: str) -> str:
    """Puts `concept` in the place of `{}`; braces in the concept itself stay as they are."""
    return template.replace("{}", concept)


def cut_prompt(tokenizer, prompt: str) -> tuple[str, list[str]] | None:
    """What is lost of a prompt of more tokens than the text encoder reads; None where nothing is.

    Returns:
        One clause that names the prompt and the first words lost, and the placeholders (words that were added to the
        tokenizer) that are nowhere in what is left.
    """
    most, found = tokenizer.model_max_length, tokenizer(prompt, verbose=False, return_offsets_mapping=True)
    ids = found.input_ids
    if len(ids) <= most:
        return None
    start, _ = found.offset_mapping[most - 1]  # the one before is the last that stays, the end token takes its place
    lost = prompt[prompt.rfind(" ", 0, start) + 1 :].split()  # from the start of a word that is cut in two
    gone = set(ids[most - 1 :]) - set(ids[: most - 1]) - set(tokenizer.all_special_ids)
    shown = " ".join(lost[:6]) + " …" * (len(lost) > 6)
    text = f"{prompt[:40]!r}… has {len(ids)} tokens, of {most} that are read: lost from {shown!r} on"
    return text, [word for word, number in tokenizer.get_added_vocab().items() if number in gone]


def check_lengths(tokenizer, prompts: Iterable[str]) -> None:
    """Says which prompts will be cut.

    Raises:
        UserError: a placeholder is cut off, so that the picture would not show the concept.

    Warns:
        AtomsWarning: other words are.
    """
    for prompt in dict.fromkeys(prompts):
        cut = cut_prompt(tokenizer, prompt)
        if cut and cut[1]:
            raise UserError(f"prompt {cut[0]}, and {' '.join(cut[1])} with it; make it shorter")
        if cut:
            warnings.warn(f"prompt {cut[0]}", AtomsWarning, stacklevel=2)


def parse_seeds(text: str) -> list[int]:
    """Turns "0-3,7" into [0, 1, 2, 3, 7]: whole numbers and ranges that include both ends, in the order given.

    Raises:
        UserError: anything else, a range that runs backwards, a seed given twice, a seed above 2^63 - 1 or more than
            100,000 seeds.
    """
    seeds = []
    for part in text.split(","):
        match = re.fullmatch(r"([0-9]{1,19})(?:\s*-\s*([0-9]{1,19}))?", part.strip())
        if match is None:
            raise UserError(f"seeds {text!r}: {part.strip()!r} is neither a number from 0 up (7) nor a range (0-3)")
        first, last = int(match[1]), int(match[2] or match[1])
        if last < first:
            raise UserError(f"seeds {text!r}: range {part.strip()!r} runs backwards; expected {last}-{first}")
        if last > LARGEST_SEED:
            raise UserError(f"seeds {text!r}: {last} is too large; the largest seed is {LARGEST_SEED}")
        if len(seeds) + last - first >= MOST_SEEDS:
            raise UserError(f"seeds {text!r}: more than {MOST_SEEDS} seeds")
        seeds.extend(range(first, last + 1))
    seen = set()
    for seed in seeds:
        if seed in seen:
            raise UserError(f"seeds {text!r}: {seed} is given twice; expected every seed once")
        seen.add(seed)
    return seeds


def _numbered_lines(path: str | os.PathLike, expected: str) -> list[tuple[int, str]]:
    """(line number, text) of all lines but blank ones and comments."""
    if not Path(path).exists():
        path = packaged_file(str(path), "prompts", ".txt") or path
    path = Path(path)
    try:
        lines = path.read_text(encoding="utf-8-sig").split("\n")
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}); expected a text file of prompts") from error
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: is not UTF-8 (byte {error.start}); expected a text file of prompts") from error
    stripped = [(number, line.strip()) for number, line in enumerate(lines, start=1)]
    kept = [(number, text) for number, text in stripped if text and not text.startswith("#")]
    if not kept:
        raise UserError(f"{path}: no prompts; expected {expected}")
    return kept
