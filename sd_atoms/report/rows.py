"""What an experiment found: its runs as rows by concept and method, with intervals and paired differences."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from sd_atoms.errors import shortlist
from sd_atoms.report.sweep import harmonic_mean

PRETRAINED = "pretrained"
DRAWS = 1000  # of the bootstrap of paired differences


@dataclass(frozen=True)
class Comparison:
    """What a report is made of.

    base: what was tuned. methods: labels in order, "pretrained" first. prompts: templates, {} for the concept.
    shown_prompts, scale_prompts: numbers of those in the small grid, and of those drawn at all scales. fidelity, text:
    networks that judge; text None where none knows texts. against: the method that the others are paired with.
    runs, rate_runs: what finished runs left: "scores" (of scores.json), "folder", "drawn" (of its pictures) and, of
    trained ones, "training", "environment", "settings", "peft_config", "adapter_bytes", "losses", "steady_seconds".
    failed: run -> why.
    """

    base: str
    methods: Sequence[str]
    concepts: Sequence[str]
    prompts: Sequence[str]
    shown_prompts: Sequence[int]
    scales: Sequence[float]
    scale_prompts: Sequence[int]
    images_per_prompt: int
    fidelity: str
    text: str | None
    against: str
    runs: Sequence[Mapping[str, Any]]
    rate_runs: Sequence[Mapping[str, Any]]
    failed: Mapping[str, str]

    def of(self, concept: str, method: str) -> list[Mapping[str, Any]]:
        """The runs of a method on a concept, by seed."""
        found = [run for run in self.runs if (run["scores"]["concept"], run["scores"]["method"]) == (concept, method)]
        return sorted(found, key=lambda run: run["scores"]["seed"])


def picture_of(run: Mapping[str, Any], name: str) -> Image.Image | None:
    """A picture that a run drew; None where there is none of that name."""
    path = Path(run["drawn"]) / f"{name}.png"
    if not path.exists():
        return None
    with Image.open(path) as image:
        return image.convert("RGB")


@dataclass(frozen=True)
class Row:
    """A method on a concept: the means over its seeds.

    parameters, kilobytes, rate, seconds, memory_gb: None where nothing was trained. figures: "network figure"
    -> (mean, low, high); low and high are None where there is no interval. differences: the same of what is told in
    pairs. score: of likeness and text. edge: whether the rate is the smallest or largest that was tried.
    """

    concept: str
    method: str
    seeds: int
    parameters: int | None
    kilobytes: float | None
    rate: float | None
    seconds: float | None
    memory_gb: float | None
    figures: Mapping[str, tuple[float, float | None, float | None]]
    differences: Mapping[str, tuple[float, float, float]]
    score: float | None
    edge: bool = False


def rows_of(comparison: Comparison) -> list[Row]:
    """The rows of the table, those of one concept together, methods in their order."""
    rows = []
    for concept in comparison.concepts:
        for method in comparison.methods:
            runs = comparison.of(concept, method)
            if runs:
                rows.append(_row(comparison, concept, method, runs))
    return rows


def _row(comparison: Comparison, concept: str, method: str, runs: Sequence[Mapping[str, Any]]) -> Row:
    trained = [run for run in runs if "training" in run]
    figures = {}
    for network in runs[0]["scores"]["networks"]:
        own = [run["scores"]["networks"][network]["figures"] for run in runs]
        for name in own[0]:
            if all(name in entry for entry in own):
                figures[f"{network} {name}"] = mean_of([entry[name] for entry in own])
    image = figures.get(f"{comparison.fidelity} image")
    text = figures.get(f"{comparison.text} text")
    pairs = {}
    if trained and method != comparison.against:
        pairs = paired(comparison, runs, comparison.of(concept, comparison.against))
    training = [run["training"] for run in trained]
    counts = [
        sum(entry[f"trained_{kind}numbers"] for kind in ("", "token_", "text_")) for entry in training
    ]  # of one method all are alike
    rate = trained[0]["scores"]["learning_rate"] if trained else None
    tried = {run["scores"]["learning_rate"] for run in comparison.rate_runs if run["scores"]["method"] == method}
    return Row(
        concept,
        method,
        len(runs),
        parameters=counts[0] if counts else None,
        kilobytes=mean_value([run["adapter_bytes"] / 1000 for run in trained]),
        rate=rate,
        seconds=mean_value([run["steady_seconds"] or run["training"]["seconds"] for run in trained]),
        memory_gb=mean_value([entry["peak_memory_bytes"] / 1e9 for entry in training if "peak_memory_bytes" in entry]),
        figures=figures,
        differences=pairs,
        score=harmonic_mean(image and image[0], text and text[0]),
        edge=len(tried) > 1 and rate in (min(tried), max(tried)),
    )


def selection(image: float, text: float) -> float:
    """What rates are chosen by: the harmonic mean of likeness and text, or the smaller where one is not above 0."""
    return harmonic_mean(image, text) or min(image, text)


def tried_rates(comparison: Comparison) -> dict[str, dict[float, float]]:
    """Method -> rate -> the mean score that rates are chosen by, of the runs on other seeds and prompts."""
    found: dict[str, dict[float, list[float]]] = {}
    for run in comparison.rate_runs:
        scores = run["scores"]
        own, text = (
            scores["networks"].get(name, {}).get("figures", {}) for name in (comparison.fidelity, comparison.text)
        )
        if "image" in own and "text" in text:
            score = selection(own["image"]["value"], text["text"]["value"])
            found.setdefault(scores["method"], {}).setdefault(scores["learning_rate"], []).append(score)
    return {
        method: {rate: sum(own) / len(own) for rate, own in sorted(rates.items())} for method, rates in found.items()
    }


def mean_of(figures: Sequence[Mapping[str, Any]]) -> tuple[float, float | None, float | None]:
    """The mean of a figure over runs with its interval (95 %).

    The wider one of two: the mean of the runs' own (other images of the same prompts, which all runs share), and how
    far the runs lie apart (other seeds of training, by Student's t).
    """
    values = np.array([figure["value"] for figure in figures], dtype=float)
    mean, count = float(values.mean()), len(values)
    halves = []
    if all(figure["low"] is not None for figure in figures):
        halves.append(sum((figure["high"] - figure["low"]) / 2 for figure in figures) / count)
    if count > 1:
        halves.append(student_t(count - 1) * float(values.std(ddof=1) / np.sqrt(count)))
    if not halves:
        return mean, None, None
    return mean, mean - max(halves), mean + max(halves)


def student_t(freedom: int) -> float:
    """The 97.5 % quantile of Student's t distribution."""
    known = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262)
    return known[freedom - 1] if freedom <= len(known) else 1.96 + 2.4 / freedom  # to within 2 %


def paired(
    comparison: Comparison, runs: Sequence[Mapping[str, Any]], others: Sequence[Mapping[str, Any]]
) -> dict[str, tuple[float, float, float]]:
    """How much more likeness, text and surroundings a method has than another on the same seeds, prompts and noise.

    The bootstrap draws prompts, with all their images and seeds, for images of one prompt are alike.
    """
    by_seed = {run["scores"]["seed"]: run for run in others}
    both = [(run, by_seed[run["scores"]["seed"]]) for run in runs if run["scores"]["seed"] in by_seed]
    told = [("fidelity", comparison.fidelity, "image"), ("text", comparison.text, "text")]
    told += [(f"surroundings ({name})", name, "surroundings") for name in runs[0]["scores"]["networks"]]
    found = {}
    for label, network, name in told:
        known = [run["scores"]["networks"].get(network, {}).get("by_image", {}) for pair in both for run in pair]
        if not both or not all(name in values for values in known):
            continue
        apart = [
            np.subtract(*(run["scores"]["networks"][network]["by_image"][name] for run in pair)) for pair in both
        ]  # each (prompts * images_per_prompt,)
        by_prompt = np.mean(apart, axis=0).reshape(-1, comparison.images_per_prompt).mean(1)
        generator = np.random.default_rng(0)
        drawn = by_prompt[generator.integers(len(by_prompt), size=(DRAWS, len(by_prompt)))].mean(1)
        low, high = np.quantile(drawn, [0.025, 0.975])
        found[label] = (float(by_prompt.mean()), float(low), float(high))
    return found


def paired_columns(rows: Sequence[Row]) -> list[str]:
    """What is told in pairs, in order."""
    return list(dict.fromkeys(("fidelity", "text", *(key for row in rows for key in row.differences))))


def columns_of(comparison: Comparison, rows: Sequence[Row]) -> dict[str, str]:
    """Heading -> figure of the table, as far as rows have it; the judges first, other networks' likeness beside it."""
    networks = list(dict.fromkeys(key.rpartition(" ")[0] for row in rows for key in row.figures))
    wanted = {f"fidelity ({comparison.fidelity})": f"{comparison.fidelity} image"}
    wanted |= {f"fidelity ({name})": f"{name} image" for name in networks if name != comparison.fidelity}
    if comparison.text is not None:
        wanted |= {f"text ({comparison.text})": f"{comparison.text} text", "match": f"{comparison.text} match"}
    judge = comparison.fidelity
    wanted |= {"diversity": f"{judge} diversity", "Vendi": f"{judge} vendi", "copies": f"{judge} copies"}
    wanted["drift"] = f"{judge} drift"
    wanted |= {f"surroundings ({name})": f"{name} surroundings" for name in networks}
    return {heading: key for heading, key in wanted.items() if any(key in row.figures for row in rows)}


def first_sentence(comparison: Comparison, rows: Sequence[Row]) -> str:
    """Which method is best in what, per concept, and which others reach it within their intervals."""
    parts = []
    for concept in comparison.concepts:
        own = [row for row in rows if row.concept == concept and row.method != PRETRAINED]
        if not own:
            continue
        told = []
        for label, key in (("likeness", f"{comparison.fidelity} image"), ("text", f"{comparison.text} text")):
            known = [row for row in own if key in row.figures]
            if known:
                best = max(known, key=lambda row: row.figures[key][0])
                value = best.figures[key][0]
                reached = [row.method for row in known if row is not best and (row.figures[key][2] or 0) >= value]
                also = f"; in reach of the intervals of {shortlist(reached)}" if reached else ""
                told.append(f"{label}{'' if told else ' is highest'} with {best.method} ({value:.3f}{also})")
        scored = [row for row in own if row.score is not None]
        if scored:
            best = max(scored, key=lambda row: row.score)
            told.append(f"their harmonic mean with {best.method} ({best.score:.3f})")
        if told:
            parts.append(f"{concept}: {', '.join(told)}")
    return "; ".join(parts) + "." if parts else ""


def mean_value(values: Sequence[float]) -> float | None:
    """The mean, None of nothing."""
    return sum(values) / len(values) if values else None
