"""The report of an experiment: its table, its numbers for other programs, its figures and its page."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from sd_atoms.files import replacing, safe_name, write_json, write_text
from sd_atoms.report.comparison_figures import curves_figure, pareto_figure, prompt_grid
from sd_atoms.report.markdown import escaped, number_text, table
from sd_atoms.report.page import write_page
from sd_atoms.report.rows import Comparison, Row, columns_of, first_sentence, paired_columns, rows_of, tried_rates
from sd_atoms.report.table import figures_csv


def write_report(comparison: Comparison, folder: Path) -> dict[str, Any]:
    """Writes table.md, table.csv, results.json, runs/*.json, figures and page; returns what results.json has."""
    rows = rows_of(comparison)
    results = results_of(comparison, rows)
    write_json(folder / "results.json", results)
    for run in results["runs"]:
        write_json(folder / "runs" / f"{run['run_info']['experiment_name'].replace('/', '--')}.json", run)
    write_text(folder / "table.md", comparison_markdown(comparison, rows))
    write_text(folder / "table.csv", comparison_csv(rows))
    for name, figure in (("pareto.png", pareto_figure(comparison, rows)), ("curves.png", curves_figure(comparison))):
        if figure is not None:
            with replacing(folder / name) as temporary:
                figure.savefig(temporary, format="png")
    for concept in comparison.concepts:
        for name, numbers in (("grid", comparison.shown_prompts), ("grid-all", range(len(comparison.prompts)))):
            grid = prompt_grid(comparison, concept, list(numbers))
            if grid is not None:
                with replacing(folder / f"{name}-{safe_name(concept)}.png") as temporary:
                    grid.save(temporary, format="PNG")
    write_page(comparison, rows, folder)
    return results


def comparison_markdown(comparison: Comparison, rows: Sequence[Row]) -> str:
    """The table, with what its columns mean, the paired differences, the rates that were tried and what failed."""
    columns = columns_of(comparison, rows)
    header = ["concept", "method", "seeds", "parameters", "KB", "rate", *columns, "score", "seconds", "memory"]
    header = [escaped(name) for name in header]
    best = {
        concept: max((row.score for row in rows if row.concept == concept and row.score is not None), default=None)
        for concept in comparison.concepts
    }
    lines = []
    for row in rows:
        score = number_text(row.score, ".3f")
        lines.append(
            [
                escaped(row.concept), escaped(row.method), str(row.seeds), number_text(row.parameters, ",d"),
                number_text(row.kilobytes, ",.0f"), number_text(row.rate, "g") + ("*" if row.edge else ""),
                *(_figure(row.figures.get(key)) for key in columns.values()),
                f"**{score}**" if score and row.score == best[row.concept] else score,
                number_text(row.seconds, ",.0f"), number_text(row.memory_gb, ".2f"),
            ]
        )  # fmt: skip
    right = [False, False] + [True] * (len(header) - 2)
    parts = [f"# Comparison on {escaped(comparison.base)}", first_sentence(comparison, rows)]
    parts.append(table(header, lines, right=right))
    parts.append("\n".join(f"- {text}" for text in meanings(comparison, rows)))
    differing = [row for row in rows if row.differences]
    if differing:
        against, told = escaped(comparison.against), paired_columns(rows)
        parts.append(f"## Against {against}, on the same seeds, prompts and noise")
        cells = [
            [
                escaped(row.concept),
                escaped(row.method),
                *(_signed(row.differences.get(key)) for key in told),
            ]
            for row in differing
        ]
        parts.append(table(["concept", "method", *told], cells, right=[False, False] + [True] * len(told)))
        parts.append("The intervals are over prompts; what another seed of training would change is not in them.")
    if comparison.rate_runs:
        parts += ["## Rates that were tried, on other seeds and prompts", _rates_table(comparison)]
    if comparison.failed:
        parts += [
            "## What failed",
            "\n".join(f"- {escaped(n)}: {escaped(why)}" for n, why in comparison.failed.items()),
        ]
    return "\n\n".join(part for part in parts if part) + "\n"


def meanings(comparison: Comparison, rows: Sequence[Row]) -> list[str]:
    """What the columns mean, a line each."""
    texts = [
        "Means over seeds; ± is half an interval of 95 %, over images and seeds.",
        "fidelity: mean cosine of the pictures of all prompts and the photos, by the network named; higher is more "
        "alike.",
        "text: mean cosine of pictures and their prompts; match: share whose best prompt of all is their own.",
        "diversity: mean 1 − cosine between pictures; Vendi: how many different ones they amount to; copies: share "
        "nearer to a photo than any two photos are to each other.",
        "drift: (1 − cosine) / 2 between pictures of other things with and without the adapter; lower is better.",
        "score: harmonic mean of fidelity and text; the best is **bold**. rate: of the learning; seconds: of "
        "training, its steps times their median; memory: GB at the peak of the process.",
    ]
    if any(key.endswith(" surroundings") for row in rows for key in row.figures):
        texts.append(
            "surroundings: mean cosine to the most alike photo where no photo has its subject; what pretrained has is "
            "by chance, above it they came along."
        )
    if any(row.edge for row in rows):
        texts.append("*: the smallest or largest rate that was tried; others beyond it may be better.")
    return texts


def comparison_csv(rows: Sequence[Row]) -> str:
    """The same rows for other programs, all figures of all networks with their intervals."""
    plain = ("concept", "method", "seeds", "parameters", "kilobytes", "rate", "score", "seconds", "memory_gb")
    return figures_csv(plain, [vars(row) for row in rows])


def results_of(comparison: Comparison, rows: Sequence[Row]) -> dict[str, Any]:
    """All numbers. Each of "runs" also has what PEFT's comparison of image generation reads of a run."""
    return {
        "base": comparison.base,
        "prompts": list(comparison.prompts),
        "fidelity": comparison.fidelity,
        "text": comparison.text,
        "against": comparison.against,
        "first_sentence": first_sentence(comparison, rows),
        "rows": [asdict(row) for row in rows],
        "runs": [_peft_shape(comparison, run) for run in comparison.runs if "training" in run],
        "pretrained": [run["scores"] for run in comparison.runs if "training" not in run],
        "rate_runs": [run["scores"] for run in comparison.rate_runs],
        "failed": dict(comparison.failed),
    }


def report_text(results: Mapping[str, Any], folder: Path) -> str:
    """What a finished comparison says on the terminal."""
    lines = [
        f"\n{results['first_sentence']}",
        f"{folder / 'index.html'} shows it; {folder / 'table.md'} has the numbers",
    ]
    lines += [f"failed: {name}: {why}" for name, why in results["failed"].items()]
    return "\n".join(lines)


def _peft_shape(comparison: Comparison, run: Mapping[str, Any]) -> dict[str, Any]:
    """A run as PEFT's method_comparison reads it, beside all that we know of it."""
    scores, training, environment = run["scores"], run["training"], run["environment"]
    figures = scores["networks"][comparison.fidelity]["figures"]
    versions = environment["versions"]
    memory = training.get("peak_memory_bytes", 0)
    settings = {**run["settings"], "model_id": run["settings"]["pretrained_model_name_or_path"]}
    samples = training["steps"] * settings["train_batch_size"] * settings["gradient_accumulation_steps"]
    return {
        "run_info": {
            "created_at": environment["started"],
            "total_time": scores["seconds"],
            "experiment_name": scores["name"],
            "peft_branch": "main",
            "train_config": settings,
            "peft_config": run["peft_config"],
            "error_msg": "",
        },
        "train_info": {
            "accelerator_memory_reserved_avg": memory,
            "accelerator_memory_max": memory,
            "accelerator_memory_reserved_99th": memory,
            "train_time": training["seconds"],
            "file_size": run["adapter_bytes"],
            "num_trainable_params": sum(training[f"trained_{kind}numbers"] for kind in ("", "token_", "text_")),
            "status": "success",
            "metrics": [
                {
                    "step": training["steps"],
                    "train loss": training.get("last_loss"),
                    "train samples": samples,
                    "test dino_similarity": figures.get("image", {}).get("value"),
                    **({"drift": figures["drift"]["value"]} if "drift" in figures else {}),
                }
            ],
        },
        "meta_info": {
            "package_info": {f"{name}-version": version for name, version in versions.items()}
            | {"datasets-version": None},
            "system_info": {"system": environment["system"], "device": environment["device"]},
        },
        "scores": scores,
        "training": training,
    }


def _rates_table(comparison: Comparison) -> str:
    cells = [
        [escaped(method), ", ".join(f"{rate:g}: {score:.3f}" for rate, score in rates.items())]
        for method, rates in tried_rates(comparison).items()
    ]
    return table(["method", "rate: score"], cells)


def _figure(figure: tuple[float, float | None, float | None] | None) -> str:
    if figure is None:
        return ""
    value, low, high = figure
    digits = 1 if abs(value) >= 2 else 3
    return f"{value:.{digits}f}" + ("" if low is None else f" ± {(high - low) / 2:.{digits}f}")


def _signed(figure: tuple[float, float, float] | None) -> str:
    return "" if figure is None else f"{figure[0]:+.3f} ({figure[1]:+.3f} to {figure[2]:+.3f})"
