"""The report of an experiment on image sets: table, numbers for other programs, a figure for each set, one page."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

import jinja2
from PIL import Image

from sd_atoms.files import replacing, safe_name, write_json, write_text
from sd_atoms.report.grid import image_grid
from sd_atoms.report.markdown import escaped, number_text, table
from sd_atoms.report.rows import PRETRAINED, mean_of, mean_value, picture_of
from sd_atoms.report.table import figures_csv

# heading -> figure, whether lower is better
COLUMNS = {
    "FD": ("fid", True), "KID": ("kid", True), "CMMD": ("cmmd", True), "precision": ("precision", False),
    "recall": ("recall", False), "coverage": ("coverage", False), "accuracy": ("accuracy", False),
}  # fmt: skip
MEANINGS = (
    "FD, KID, CMMD: distance of the generated images from the test split, by the network named; lower is better. FD "
    "follows the number of images below 2,048: compare it between methods only.",
    "precision, coverage: share of generated images near real ones, and of real images near generated ones; recall: "
    "of real images that lie among generated ones.",
    "accuracy: share of generated images that a linear classifier of the network's features, fitted to the real "
    "training images, gives the class of their prompt; in brackets that of real test images.",
    "± is half an interval of 95 %, over images, or over seeds where that is wider.",
)


@dataclass(frozen=True)
class ImageSet:
    """An image set as the report shows it.

    tasks: titles of its labellings. columns: what stands above the columns of its figure: classes, or numbers of
    samples. real: a real image for each column. shown: names of the generated images for each column, without .png.
    class_names: by label; empty where the prompt names no class.
    """

    name: str
    tasks: Sequence[str]
    columns: Sequence[str]
    real: Sequence[Image.Image | None]
    shown: Sequence[str]
    class_names: Sequence[str]


@dataclass(frozen=True)
class SetComparison:
    """What a report is made of.

    base: what was tuned. sets, methods: in order; the base's own row is PRETRAINED and comes first. runs: what
    finished ones left, as for a comparison. failed: run -> why.
    """

    base: str
    sets: Sequence[ImageSet]
    methods: Sequence[str]
    runs: Sequence[Mapping[str, Any]]
    failed: Mapping[str, str]

    def of(self, name: str, method: str) -> list[Mapping[str, Any]]:
        """The runs of a method on a set, by seed."""
        found = [run for run in self.runs if (run["scores"]["concept"], run["scores"]["method"]) == (name, method)]
        return sorted(found, key=lambda run: run["scores"]["seed"])


def write_set_report(comparison: SetComparison, folder: Path) -> dict[str, Any]:
    """Writes table.md, table.csv, results.json, a figure for each set, index.html; returns what results.json has."""
    rows = set_rows(comparison)
    results = {
        "base": comparison.base,
        "sentences": [sentence(rows, own.name) for own in comparison.sets],
        "rows": rows,
        "runs": [run["scores"] for run in comparison.runs],
        "failed": dict(comparison.failed),
    }
    write_json(folder / "results.json", results)
    write_text(folder / "table.md", sets_markdown(comparison, rows))
    write_text(folder / "table.csv", sets_csv(rows))
    for own in comparison.sets:
        figure = set_figure(comparison, own)
        if figure is not None:
            with replacing(folder / _figure_name(own)) as temporary:
                figure.save(temporary, format="PNG")
    write_text(folder / "index.html", page_text(comparison, rows))
    return results


def set_rows(comparison: SetComparison) -> list[dict[str, Any]]:
    """A row for each set, network and method: figures as means over seeds with (low, high), None without interval."""
    rows = []
    for own in comparison.sets:
        networks = dict.fromkeys(
            name for method in comparison.methods for run in comparison.of(own.name, method)
            for name in run["scores"]["networks"]
        )  # fmt: skip
        for network in networks:
            for method in comparison.methods:
                runs = comparison.of(own.name, method)
                if runs:
                    rows.append(_row(own.name, network, method, runs))
    return rows


def _row(name: str, network: str, method: str, runs: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    scores = [run["scores"]["networks"][network] for run in runs]
    figures = {
        key: mean_of([own["figures"][key] for own in scores])
        for key in scores[0]["figures"]
        if all(key in own["figures"] for own in scores)
    }
    training = [run["training"] for run in runs if "training" in run]
    counts = [sum(own[f"trained_{kind}numbers"] for kind in ("", "token_", "text_")) for own in training]
    labels = dict.fromkeys(label for own in scores for label in own["coverage_by_class"])
    return {
        "set": name,
        "network": network,
        "method": method,
        "seeds": len(runs),
        "parameters": counts[0] if counts else None,
        "seconds": mean_value([own["seconds"] for own in training]),
        "figures": figures,
        "coverage_by_class": {
            int(label): mean_value([own["coverage_by_class"][label] for own in scores]) for label in labels
        },
        "notes": list(dict.fromkeys(note for own in scores for note in own["notes"])),
    }


def sentence(rows: Sequence[Mapping[str, Any]], name: str) -> str:
    """Which method comes nearest to a set, by the KID or else the FD of each network, and whether it is nearer than
    the base, or farther, by more than both intervals."""
    own, told = [row for row in rows if row["set"] == name], []
    for network in dict.fromkeys(row["network"] for row in own):
        key = next((key for key in ("kid", "cmmd", "fid") if all(key in row["figures"] for row in own)), None)
        tuned = [row for row in own if row["network"] == network and row["method"] != PRETRAINED]
        base = [row for row in own if row["network"] == network and row["method"] == PRETRAINED]
        if not key or not tuned:
            continue
        best = min(tuned, key=lambda row: row["figures"][key][0])
        text = f"by {network} {best['method']} comes nearest of the methods ({key} {_short(best['figures'][key][0])}"
        if base:
            before, after = base[0]["figures"][key], best["figures"][key]
            text += f", base {_short(before[0])}"
            if None not in (*before, *after):
                nearer, farther = after[2] < before[1], after[1] > before[2]
                text += ": nearer" if nearer else ": farther" if farther else ", not apart by the intervals"
        told.append(text + ")")
    return f"{name}: {'; '.join(told)}." if told else f"{name}: nothing to compare."


def sets_markdown(comparison: SetComparison, rows: Sequence[Mapping[str, Any]]) -> str:
    """The table, a section for each network, with what its columns mean and what failed."""
    parts = [f"# Image sets on {escaped(comparison.base)}"]
    parts.append("\n".join(f"- {escaped(sentence(rows, own.name))}" for own in comparison.sets))
    for network in dict.fromkeys(row["network"] for row in rows):
        own = [row for row in rows if row["network"] == network]
        shown = _columns(own)
        cells = [
            [escaped(row["set"]), escaped(row["method"]), f"{row['seeds']}", number_text(row["parameters"], ","),
             *(_cell(row, key) for key, _ in shown.values())]
            for row in own
        ]  # fmt: skip
        header = ["set", "method", "seeds", "parameters", *shown]
        parts += [f"## By {escaped(network)}", table(header, cells, right=[False, False] + [True] * (len(header) - 2))]
    parts.append("\n".join(f"- {text}" for text in MEANINGS))
    notes = dict.fromkeys(f"{row['set']}, {row['network']}: {note}" for row in rows for note in row["notes"])
    if notes:
        parts += ["## Notes", "\n".join(f"- {escaped(note)}" for note in notes)]
    if comparison.failed:
        failed = [f"- {escaped(name)}: {escaped(why)}" for name, why in comparison.failed.items()]
        parts += ["## What failed", "\n".join(failed)]
    return "\n\n".join(parts) + "\n"


def sets_csv(rows: Sequence[Mapping[str, Any]]) -> str:
    """The same rows for other programs, all figures with their intervals."""
    plain = ("set", "network", "method", "seeds", "parameters", "seconds")
    return figures_csv(plain, rows)


def set_figure(comparison: SetComparison, own: ImageSet) -> Image.Image | None:
    """Rows: real images, the base, every method by its first seed; columns: classes, or samples of one noise."""
    rows, labels = [list(own.real)], ["real"]
    for method in comparison.methods:
        runs = comparison.of(own.name, method)
        if runs:
            rows.append([picture_of(runs[0], name) for name in own.shown])
            labels.append("base" if method == PRETRAINED else method)
    if len(rows) == 1:
        return None
    return image_grid(rows, labels, own.columns, title=f"{', '.join(own.tasks)} on {comparison.base}")


def page_text(comparison: SetComparison, rows: Sequence[Mapping[str, Any]]) -> str:
    """The overview page, which a browser opens from disk, without a network."""
    shown = _columns(rows)
    sections = []
    for own in comparison.sets:
        mine = [row for row in rows if row["set"] == own.name]
        by_class = [row for row in mine if row["coverage_by_class"] and row["network"] == mine[0]["network"]]
        sections.append(
            {
                "name": own.name,
                "tasks": ", ".join(own.tasks),
                "sentence": sentence(rows, own.name),
                "figure": _figure_name(own) if mine else "",
                "network": mine[0]["network"] if mine else "",
                "methods": [row["method"] for row in by_class],
                "classes": [
                    (name, [number_text(row["coverage_by_class"].get(label), ".2f") for row in by_class])
                    for label, name in enumerate(own.class_names)
                    if any(label in row["coverage_by_class"] for row in by_class)
                ],
            }
        )
    cells = [
        {
            "plain": [
                row["set"],
                row["method"],
                row["network"],
                str(row["seeds"]),
                number_text(row["parameters"], ","),
            ],
            "figures": [(_cell(row, key), row["figures"].get(key, ("",))[0]) for key, _ in shown.values()],
        }
        for row in rows
    ]
    template = jinja2.Template(
        files("sd_atoms.report").joinpath("sets.html").read_text(encoding="utf-8"), autoescape=True
    )
    return template.render(
        title=f"Image sets on {comparison.base}",
        headings=["set", "method", "network", "seeds", "parameters", *shown],
        rows=cells,
        sections=sections,
        meanings=MEANINGS,
        failed=comparison.failed,
    )


def _columns(rows: Sequence[Mapping[str, Any]]) -> dict[str, tuple[str, bool]]:
    """Those of COLUMNS that a row has."""
    return {head: own for head, own in COLUMNS.items() if any(own[0] in row["figures"] for row in rows)}


def _figure_name(own: ImageSet) -> str:
    return f"figure-{safe_name(own.name)}.png"


def _cell(row: Mapping[str, Any], key: str) -> str:
    if key not in row["figures"]:
        return ""
    value, low, high = row["figures"][key]
    text = _short(value) + ("" if low is None else f" ± {_short((high - low) / 2)}")
    real = row["figures"].get("accuracy_real")
    return f"{text} ({_short(real[0])})" if key == "accuracy" and real else text


def _short(value: float) -> str:
    return f"{value:.4f}" if abs(value) < 0.1 else f"{value:.3f}" if abs(value) < 10 else f"{value:.1f}"
