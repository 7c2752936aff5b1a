"""The page of an experiment: a folder that a browser opens from disk, without a network."""

import json
from collections.abc import Mapping, Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any

import jinja2
from PIL import Image
from plotly.offline import get_plotlyjs

from sd_atoms.files import replacing, write_text
from sd_atoms.report.rows import PRETRAINED, Comparison, Row, columns_of, first_sentence, paired_columns, tried_rates

LONGEST_SIDE_PX = 320  # of a picture on the page
QUALITY = 85  # of WebP
PLAIN = {"parameters": "parameters", "seconds": "seconds of training", "kilobytes": "KB", "memory_gb": "memory, GB"}


def write_page(comparison: Comparison, rows: Sequence[Row], folder: Path) -> None:
    """Writes index.html, the plotting library beside it, and every picture into images/."""
    data = page_data(comparison, rows, folder)
    template = jinja2.Template(
        files("sd_atoms.report").joinpath("page.html").read_text(encoding="utf-8"), autoescape=True
    )
    page = template.render(
        title=f"Comparison on {comparison.base}",
        sentence=first_sentence(comparison, rows),
        data=in_script(data),
        failed=comparison.failed,
        against=comparison.against,
        differing=[row for row in rows if row.differences],
        told=paired_columns(rows),
        rates=tried_rates(comparison),
    )
    write_text(folder / "plotly.min.js", get_plotlyjs())
    write_text(folder / "index.html", page)


def page_data(comparison: Comparison, rows: Sequence[Row], folder: Path) -> dict[str, Any]:
    """What the page's script knows; the pictures are written on the way.

    "images": concept -> method -> training seed -> number of the prompt -> a path per drawing seed. "scales": concept
    -> method -> number of the prompt -> strength -> path, of the first training seed.
    """
    columns = columns_of(comparison, rows)
    images, scales = {}, {}
    for concept in comparison.concepts:
        for method in comparison.methods:
            for place, run in enumerate(comparison.of(concept, method)):
                own = {
                    number: [
                        _shrunk(run, f"{number:02d}-{seed}", folder) for seed in range(comparison.images_per_prompt)
                    ]
                    for number in range(len(comparison.prompts))
                }
                images.setdefault(concept, {}).setdefault(method, {})[run["scores"]["seed"]] = own
                if place == 0 and method != PRETRAINED:
                    found = _of_scales(comparison, run, own, folder)
                    if found:
                        scales.setdefault(concept, {})[method] = found
    return {
        "base": comparison.base,
        "concepts": list(comparison.concepts),
        "methods": list(comparison.methods),
        "prompts": list(comparison.prompts),
        "shown": list(comparison.shown_prompts),
        "columns": ["seeds", "parameters", "KB", "rate", *columns, "score", "seconds"],
        "rows": [_row(row, columns) for row in rows],
        "axes": {**{key: heading for heading, key in columns.items()}, **PLAIN},
        "start": [f"{comparison.fidelity} diversity", f"{comparison.fidelity} image"],
        "images": images,
        "scales": scales,
    }


def in_script(value: Any) -> str:
    """JSON that can stand inside the script of a page, whatever texts it holds."""
    text = json.dumps(value, ensure_ascii=False)
    return text.replace("<", "\\u003c").replace("\u2028", "\\u2028").replace("\u2029", "\\u2029")


def _of_scales(comparison: Comparison, run: Mapping[str, Any], own: Mapping[int, list[str]], folder: Path) -> dict:
    """Number of the prompt -> strength -> path; nothing for a method without strengths."""
    found: dict[int, dict[str, str]] = {}
    for number in comparison.scale_prompts:
        for scale in comparison.scales:
            path = own[number][0] if scale == 1 else _shrunk(run, f"scale-{scale:g}-{number:02d}-0", folder)
            if path:
                found.setdefault(number, {})[f"{scale:g}"] = path
    return found if any(len(paths) > 1 for paths in found.values()) else {}


def _row(row: Row, columns: Mapping[str, str]) -> dict[str, Any]:
    plain = [row.seeds, row.parameters, row.kilobytes, row.rate]
    cells = [[value, None] for value in plain]
    for key in columns.values():
        value, low, high = row.figures.get(key, (None, None, None))
        cells.append([value, None if low is None else (high - low) / 2])
    cells += [[row.score, None], [row.seconds, None]]
    points = {key: list(figure) for key, figure in row.figures.items() if key in columns.values()}
    points |= {key: [getattr(row, key), None, None] for key in PLAIN if getattr(row, key) is not None}
    return {"concept": row.concept, "method": row.method, "cells": cells, "points": points}


def _shrunk(run: Mapping[str, Any], name: str, folder: Path) -> str:
    """The path, from the page, of a picture made small; empty where the run has none."""
    source = Path(run["drawn"]) / f"{name}.png"
    if not source.exists():
        return ""
    path = Path("images") / run["scores"]["name"] / f"{name}.webp"
    with Image.open(source) as image, replacing(folder / path) as temporary:
        small = image.convert("RGB")
        small.thumbnail((LONGEST_SIDE_PX, LONGEST_SIDE_PX), Image.Resampling.LANCZOS)
        small.save(temporary, format="WEBP", quality=QUALITY)
    return path.as_posix()
