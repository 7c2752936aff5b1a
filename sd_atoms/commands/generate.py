"""Draws pictures from prompts with adapters, from nothing, from a picture or inside a mask."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path

from sd_atoms.commands.drawing import Drawing, Settings, prepare
from sd_atoms.data.prompts import fill
from sd_atoms.errors import UserError
from sd_atoms.generation import GRID_NOTE, Request, generate_missing, image_notes, read_images, save_image
from sd_atoms.generation.record import command_notes, making
from sd_atoms.machine import make_accelerator, on_main
from sd_atoms.methods.adapters import adapters_off
from sd_atoms.report.grid import image_grid

GRID = "grid.png"


def run(config: Settings) -> Path:
    """Draws what the folder lacks, then its grid; returns the folder.

    Raises:
        UserError: something in the settings is wrong, or the folder holds other pictures of the same names.
    """
    out = Path(config.out)
    if out.exists() and not out.is_dir():
        raise UserError(f"out: {out} is a file")
    if (out / "config.yaml").exists():
        raise UserError(f"out: {out} is a run folder; name another folder for the pictures, such as {out / 'more'}")
    accelerator = make_accelerator()
    on_main(accelerator, lambda: check_grid(out / GRID, config.overwrite))
    own = prepare(config, accelerator.device)
    requests = [
        Request(fill(template, own.token), seed, f"prompt{index:02d}-seed{seed}")
        for index, template in enumerate(own.templates)
        for seed in own.seeds
    ]
    base_requests = [
        Request(_base_prompt(own, template), seed, f"base-prompt{index:02d}-seed{seed}")
        for index, template in enumerate(own.templates if config.compare_base else [])
        for seed in own.seeds
    ]

    def draw(requests: Sequence[Request], notes: dict[str, str], settings: Settings, files: dict[str, str]) -> None:
        def record(request: Request, together: int, place: int) -> dict[str, str]:
            one = dataclasses.replace(settings, prompt=(request.prompt,), seeds=str(request.seed))
            return command_notes(one, making(files, together, place, accelerator.device))

        generate_missing(
            own.pipe, accelerator, requests, own.sampling, out, notes, config.overwrite, config.generation_batch_size,
            own.conditions, record,
        )  # fmt: skip

    draw(requests, own.notes, own.settings, own.adapters.files | own.images)
    if config.compare_base:
        with adapters_off(own.pipe.unet, own.pipe.text_encoder):
            draw(base_requests, own.base_notes, dataclasses.replace(own.settings, adapter=()), own.images)
    if accelerator.is_main_process:
        rows, labels = [], []
        for index in range(len(own.templates)):
            place = slice(index * len(own.seeds), (index + 1) * len(own.seeds))
            if config.compare_base:
                rows.append(read_images(out, base_requests[place]))
                labels.append(f"base: {base_requests[place][0].prompt}")
            rows.append(read_images(out, requests[place]))
            labels.append(requests[place][0].prompt)
        grid = image_grid(rows, labels, [f"seed {seed}" for seed in own.seeds])
        save_image(out / GRID, grid, {GRID_NOTE: ", ".join(labels)})
        print(f"{len(requests) + len(base_requests)} pictures and {GRID} are in {out}")
    accelerator.end_training()
    return out


def _base_prompt(own: Drawing, template: str) -> str:
    """A prompt for the base, which knows none of the adapters' words."""
    prompt = fill(template, own.base_token)
    for token, word in own.adapters.words.items():
        prompt = prompt.replace(token, word)
    return prompt


def check_grid(path: Path, overwrite: bool) -> None:
    """Refuses to replace a picture of the grid's name; a grid of the pictures beside it may be made again.

    Raises:
        UserError: it is another picture.
    """
    if path.exists() and not overwrite and GRID_NOTE not in image_notes(path):
        raise UserError(f"{path}: exists and is no grid of `generate`; move it, or pass --overwrite")
