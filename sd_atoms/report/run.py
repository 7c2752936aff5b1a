"""What a training run shows for itself: its grid, and the summary that it prints."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from sd_atoms.report.grid import Block, labelled_blocks

SCORES = {
    "image": "picture and photos",
    "text": "picture and prompt",
    "match": "right prompt, share",
    "diversity": "diversity",
}


def concept_grid(
    title: str | None,
    photos: Sequence[Image.Image],
    images: Mapping[str, Sequence[Image.Image]],
    prompts: Mapping[str, Sequence[str]],
) -> Image.Image:
    """The picture of a run: photos, the instance prompt without and with the adapter, every template with it.

    Args:
        title: above all.
        photos: what was learned from.
        images, prompts: of each kind, "base-instance", "instance" and "prompt".
    """
    columns, shown = 5, 10
    blocks = [Block("Your pictures", photos[:shown])]
    for kind, who, count in (("base-instance", "The base", columns), ("instance", "With the adapter", shown)):
        if len(set(prompts[kind])) > 1:  # those of classes
            blocks.append(Block(who, images[kind][:count], prompts[kind][:count]))
        else:
            blocks.append(Block(f"{who}: {prompts[kind][0]}", images[kind][:count]))
    if images["prompt"]:
        blocks.append(Block("With the adapter, where it never stood", images["prompt"], prompts["prompt"]))
    return labelled_blocks(blocks, columns, title=title)


def learning_curve(log: list[dict]) -> dict[str, float]:
    """Seconds of all steps, and the mean loss of the first and of the last fifth of them, if there is a log."""
    losses = [entry["loss"] for entry in log]
    if not losses:  # somebody removed the log of a finished run
        return {"seconds": 0.0}
    fifth = max(1, len(losses) // 5)
    return {
        "seconds": log[-1]["seconds"],
        "first_loss": sum(losses[:fifth]) / fifth,
        "last_loss": sum(losses[-fifth:]) / fifth,
    }


def summary_text(metrics: Mapping[str, Any], words: str, adapter: Path, grid: Path, next_steps: Sequence[str]) -> str:
    """What came out of a run, and what to do with it.

    Args:
        metrics: as in metrics.json.
        words: the new tokens.
        adapter: the one file.
        grid: the picture of the run.
        next_steps: commands to try.
    """
    training = metrics["training"]
    parts = [f"{training['trained_numbers']:,} parameters of {training['method']}"] * bool(training["trained_numbers"])
    if training["trained_token_numbers"]:
        parts.append(f"{training['trained_token_numbers']:,} of {words}")
    if training["trained_text_numbers"]:
        parts.append(f"{training['trained_text_numbers']:,} of the text encoder")
    curve = ""
    if "last_loss" in training:
        curve = f"; loss {training['first_loss']:.3f} -> {training['last_loss']:.3f}"
    lines = [f"\nTrained {' and '.join(parts)} in {training['steps']} steps, {training['seconds']:.0f} s{curve}."]
    if training["relative_change"]:
        lines.append(f"Its filters moved by |ΔF|/|F| = {training['relative_change']:.1%} of the base's.")
    if training["kept_step"]:
        lines.append(f"Kept step {training['kept_step']}, of the lowest validation loss.")
    if "clip" in metrics:
        adapted, base = metrics["clip"]["adapted"], metrics["clip"]["base"]
        lines.append("\nCLIP                       adapter     base  difference")
        lines += [
            f"  {label:<22} {adapted[key]:>9.3f} {base[key]:>8.3f} {adapted[key] - base[key]:>+11.3f}"
            for key, label in SCORES.items()
            if key in adapted
        ]
    lines.append(f"\n{adapter} ({adapter.stat().st_size / 1000:.0f} KB) and {grid}\n\nTry next:")
    return "\n".join([*lines, *(f"  {command}" for command in next_steps)]) + "\n"
