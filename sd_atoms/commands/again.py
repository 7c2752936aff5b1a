"""Draws a picture of `sd-atoms generate` once more, by what its PNG text says, and compares the two."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from sd_atoms.commands import drawing
from sd_atoms.data.images import read_image
from sd_atoms.files import check_outputs
from sd_atoms.generation import Request, generate, picture_notes, save_image
from sd_atoms.generation.png import AGAIN_NOTE
from sd_atoms.generation.record import check_files, check_there, command_notes, making, read_making
from sd_atoms.machine import make_accelerator
from sd_atoms.settings import Parser, add_flags, resolve, setting

WHAT, RESULT = "what to draw", "result"


@dataclass(frozen=True)
class Settings:
    """Settings of `sd-atoms again`."""

    picture: str = setting(None, WHAT, "a PNG that `sd-atoms generate` drew", required=True, positional=True)
    out: str | None = setting(None, RESULT, "the file to write; none = NAME-again.png beside it")
    overwrite: bool = setting(False, RESULT, "replace that file where it exists")


def run(settings: Settings) -> Path:
    """Draws the picture, writes it and says whether it is the same; returns the path.

    Raises:
        UserError: the picture says no command, what it needs is missing or has changed, or the file is there.
    """
    picture = Path(settings.picture).expanduser()
    out = picture.with_name(f"{picture.stem}-again.png") if settings.out is None else Path(settings.out)
    words, made = read_making(picture)
    check_outputs(settings.overwrite, out=str(out))
    check_there(picture, made.files)
    parser = Parser(prog=f"the command in {picture}")
    add_flags(parser, drawing.Settings)
    known, unknown = parser.parse_known_args(words)
    accelerator = make_accelerator()
    torch.set_num_threads(made.threads)  # sums in another order differ in their last bits
    own = drawing.prepare(resolve(drawing.Settings, vars(known), None, unknown), accelerator.device)
    files = own.adapters.files | own.images
    check_files(picture, made.files, files)
    request = Request(own.templates[0], own.seeds[0], picture.stem)
    # the last bits also depend on how many are drawn at once, and on the place among them, but not on the others
    together = [request] * made.together
    drawn = list(generate(own.pipe, together, own.sampling, None, made.together, own.conditions))[made.place][1]
    now = making(files, made.together, made.place, accelerator.device)
    notes = picture_notes(request, own.sampling, own.notes)
    save_image(out, drawn, notes | command_notes(own.settings, now) | {AGAIN_NOTE: picture.name})
    before = np.asarray(read_image(picture), dtype=int)
    difference = np.abs(np.asarray(drawn, dtype=int) - before).max() if before.shape[:2] == drawn.size[::-1] else None
    outcome = "the same, bit for bit"
    if difference is None or difference:
        apart = "of another size" if difference is None else f"up to {difference} of 255 apart"
        other = [f"{name} {now.libraries.get(name)}, was {old}" for name, old in made.libraries.items()
                 if now.libraries.get(name) != old]  # fmt: skip
        other += [f"drawn on {now.device}, was {made.device}"] * (now.device != made.device)
        outcome = f"{apart} ({'; '.join(other) or 'another machine, another base, or a picture changed since'})"
    print(f"{out}: {outcome}")
    return out
