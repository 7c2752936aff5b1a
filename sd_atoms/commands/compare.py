"""Trains methods on concepts alike, scores them alike, and shows them on one page.

FILE says what is compared: settings of all runs, concepts, methods, seeds (docs/compare.md). Each run is an ordinary
run folder below output_dir. Stopped at any moment, the same command goes on; started twice, on one machine or on
several that share the folder, the work is divided.
"""

import argparse
import json
import shutil
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import yaml

from sd_atoms.commands import train
from sd_atoms.data.concepts import find_images
from sd_atoms.data.prompts import fill
from sd_atoms.errors import UserError
from sd_atoms.evaluation.networks import open_network
from sd_atoms.evaluation.run import RESIZE, Drawn, score_run
from sd_atoms.files import write_json, write_text
from sd_atoms.generation import Request, generate_missing, making_notes
from sd_atoms.jobs.experiment import PRETRAINED, Experiment, Plan, Run, chosen_rate, read_plan
from sd_atoms.jobs.queue import HOW, TAKEN, Job, QueueSettings, Taken, held, run_jobs, status_text
from sd_atoms.machine import forget_accelerator, make_accelerator
from sd_atoms.methods.adapters import set_adapters
from sd_atoms.pipeline import load_adapter, open_base, read_artefact
from sd_atoms.pipeline.fingerprint import weights_digest
from sd_atoms.pipeline.sizes import training_resolution_px
from sd_atoms.report.comparison import Comparison, report_text, write_report
from sd_atoms.report.rows import selection
from sd_atoms.settings import add_flags, fields_of, read_yaml, replaced, resolve, section, setting, to_yaml
from sd_atoms.sources import public_name
from sd_atoms.training.config import TrainConfig
from sd_atoms.training.optimiser import with_defaults
from sd_atoms.training.run_folder import ADAPTER, CONFIG, LOG, METRICS, changed_settings, read_log

SCORES, DRAWN, QUEUE, CACHE = "scores.json", "drawn", "queue", "cache"


@dataclass(frozen=True)
class Working:
    """How an experiment is worked through."""

    queue: QueueSettings = section(QueueSettings)
    dry_run: bool = setting(False, HOW, "only list the runs, and what they will cost")
    run: str | None = setting(None, HOW, "do this one run here and now, as the jobs of a scheduler do")
    merge: str | None = setting(
        None, HOW, "other folders of the same experiment, comma-separated; their finished runs are copied"
    )


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the file, and every flag."""
    parser.usage = "%(prog)s FILE [--FLAG VALUE …]"
    parser.add_argument("file", metavar="FILE", help="YAML file of the experiment, or a packaged one")
    add_flags(parser, Working)
    add_flags(parser, Experiment)


def run(arguments: argparse.Namespace) -> None:
    """Works through an experiment, or says what there is to say of it.

    Raises:
        UserError: the file or the flags are wrong, or no run could be finished.
        KeyboardInterrupt: Ctrl-C or SIGTERM; the same command goes on.
    """
    flags = vars(arguments)
    file = flags.pop("file")
    working = resolve(Working, {name: flags.pop(name) for name in fields_of(Working) if name in flags})
    if not (working.run or working.dry_run or working.queue.status):
        print(report_text(*work_through(file, flags, working)))
        return
    plan = read_plan(file, flags)
    if working.run is not None:
        try:
            do_run(plan, plan.named(working.run))
        except Taken:
            raise SystemExit(TAKEN) from None
    elif working.dry_run:
        print(plan_text(plan))
    else:
        jobs = jobs_of(plan, file, flags)
        print(status_text(jobs, plan.folder / QUEUE, _seconds_of, lambda job: _step_of(plan, job)))


def compare(
    file: str,
    *,
    jobs: int = 1,
    devices: str | None = None,
    threads: int | None = None,
    merge: str | None = None,
    **settings: Any,
) -> dict[str, Any]:
    """`sd-atoms compare` as a call: works through all runs that are not finished, and writes the report.

    Args:
        file: the experiment, or a packaged one such as "compare/pocket_quick".
        jobs, devices, threads, merge: as the flags.
        settings: of the experiment, over those of the file: output_dir, seeds, networks, …

    Returns:
        what is in report/results.json.

    Raises:
        UserError: the file or the settings are wrong, a folder holds something else, or no run could be finished.
        KeyboardInterrupt: Ctrl-C or SIGTERM.
    """
    working = Working(QueueSettings(jobs=jobs, devices=devices, threads=threads), merge=merge)
    return work_through(file, settings, working)[0]


def work_through(file: str, flags: Mapping[str, Any], working: Working) -> tuple[dict[str, Any], Path]:
    """The results of an experiment and the folder of its report; raises as `compare` does."""
    plan = read_plan(file, flags)
    slots = working.queue.slots()
    check_folders(plan)
    for folder in (working.merge or "").split(","):
        if folder.strip():
            merge_from(plan, Path(folder.strip()))
    write_text(plan.folder / "experiment.yaml", experiment_yaml(plan))
    failed = run_jobs(jobs_of(plan, file, flags), plan.folder / QUEUE, slots, lambda text: print(text, flush=True))
    comparison = comparison_of(plan, failed)
    if not comparison.runs:
        raise UserError(f"{plan.folder}: no run could be finished; the first: {next(iter(failed.values()))}")
    return write_report(comparison, plan.folder / "report"), plan.folder / "report"


def do_run(plan: Plan, run: Run) -> None:
    """Trains, draws and scores one run, as far as that is not done.

    Raises:
        Taken: another process does it.
        UserError: something in it is wrong, or what it needs is not there.
        Interrupted: Ctrl-C or SIGTERM while it trained; a checkpoint is on disk.
    """
    with held(plan.folder / QUEUE, run.name):
        folder = plan.run_folder(run)
        if (folder / SCORES).exists():
            return
        started = time.monotonic()
        rate = chosen_rate(plan, run, lambda other: selection_score(plan, other))
        config = with_defaults(plan.config(run, rate))
        if run.stage != PRETRAINED:
            check_same(config, folder)
            if not (folder / METRICS).exists():
                train.run(replaced(config, resume_from_checkpoint="latest"))
                forget_accelerator()
        result = draw_and_score(plan, run, config)
        result["seconds"] = time.monotonic() - started
        write_json(folder / SCORES, result)


def draw_and_score(plan: Plan, run: Run, config: TrainConfig) -> dict[str, Any]:
    """Draws what the run's folder lacks of its pictures, and scores them.

    Raises:
        UserError: a network cannot be opened, or pictures of these names were made otherwise.
    """
    accelerator = make_accelerator()
    folder, concept = plan.run_folder(run) / DRAWN, config.all_concepts[0]
    (source,), _ = find_images(config.data, [concept], accelerator)
    base = config.base.pretrained_model_name_or_path
    pipe = open_base(base, revision=config.base.revision, variant=config.base.variant, device=accelerator.device)
    made_by = {part: weights_digest(getattr(pipe, part)).hex() for part in ("unet", "vae", "text_encoder")}
    px = training_resolution_px(pipe, config.data.resolution)
    sampling = replace(config.images.sampling, resolution=px)
    templates = plan.tuning if run.stage == "rate" else plan.prompts
    unrelated = () if run.stage == "rate" else plan.unrelated
    word = concept.plain_word if run.stage == PRETRAINED else concept.word
    requests = image_requests(templates, word, plan.experiment.images_per_prompt)
    others = [Request(prompt, 0, f"unrelated-{number:02d}") for number, prompt in enumerate(unrelated)]
    notes = making_notes("none", base)
    together = config.images.generation_batch_size
    if run.stage != PRETRAINED:
        artefact = read_artefact(str(plan.run_folder(run) / ADAPTER))
        load_adapter(pipe, artefact)
        notes = making_notes(run.name, base) | {"adapter_digest": artefact.digest()}
        scaled = artefact.config is not None and config.method.chosen().linear and run.stage == "scored"
        for scale in plan.scales if scaled else ():
            if scale != 1:  # 1 is what all prompts are drawn at
                for part in (pipe.unet, pipe.text_encoder):
                    set_adapters(part, ["default"], [scale])
                first = [plan.prompts[number] for number in plan.shown_prompts[: plan.experiment.scale_prompts]]
                small = [
                    replace(request, name=f"scale-{scale:g}-{request.name}")
                    for request in image_requests(first, word, 1)
                ]
                strength = {"adapter_scale": f"{scale:g}"}
                generate_missing(pipe, accelerator, small, sampling, folder, notes | strength, batch_size=together)
        for part in (pipe.unet, pipe.text_encoder):
            set_adapters(part, ["default"], [1.0])
    generate_missing(pipe, accelerator, [*requests, *others], sampling, folder, notes, batch_size=together)

    networks = [open_network(name, accelerator.device, RESIZE) for name in plan.networks]
    bases = plan.run_folder(plan.named(f"{run.name.split('/')[0]}/{PRETRAINED}")) / DRAWN if others else folder
    drawn = Drawn(
        [folder / f"{request.name}.png" for request in requests],
        [
            request.prompt
            for request in image_requests(templates, concept.plain_word, plan.experiment.images_per_prompt)
        ],
        [folder / f"{request.name}.png" for request in others],
        [bases / f"{request.name}.png" for request in others],
    )
    groups = [name.strip() for name in plan.experiment.metrics.split(",")]
    scores = score_run(networks, drawn, source.images, groups, plan.folder / CACHE, accelerator)
    return {
        "name": run.name, "stage": run.stage, "concept": run.concept, "method": run.method, "seed": run.seed,
        "learning_rate": None if run.stage == PRETRAINED else config.optimiser.learning_rate,
        "scored_by": {
            "base": public_name(base), "base_digests": made_by,
            "photos": [image.digest() for image in source.images], "prompts": list(templates),
            "unrelated": list(unrelated), "images_per_prompt": plan.experiment.images_per_prompt,
            "sampling": vars(sampling), "resize": RESIZE, "metrics": groups,
            "networks": {network.name: network.digest for network in networks},
        },
        "networks": scores,
    }  # fmt: skip


def image_requests(templates: Sequence[str], word: str, images_per_prompt: int) -> list[Request]:
    """The pictures of a run: each template with seeds 0, 1, …"""
    return [
        Request(fill(template, word), seed, f"{number:02d}-{seed}")
        for number, template in enumerate(templates)
        for seed in range(images_per_prompt)
    ]


def selection_score(plan: Plan, run: Run) -> float | None:
    """What a rate is chosen by; None where a run has no likeness or no text."""
    path = plan.run_folder(run) / SCORES
    networks = read_scores(path)["networks"] if path.exists() else {}
    fidelity, text = judges(plan, networks)
    if text is None:
        return None
    figures = networks[fidelity]["figures"]["image"], networks[text]["figures"]["text"]
    return selection(*(figure["value"] for figure in figures))


def judges(plan: Plan, networks: Mapping[str, Any]) -> tuple[str, str | None]:
    """The networks that the likeness and the text are told by; None where none knows texts."""
    knowing = [name for name, scores in networks.items() if "text" in scores["figures"]]
    return plan.experiment.fidelity or plan.networks[0], plan.experiment.text or next(iter(knowing), None)


def jobs_of(plan: Plan, file: str, flags: Mapping[str, Any]) -> list[Job]:
    """Every run as a process of its own."""
    words = [sys.executable, "-m", "sd_atoms", "compare", file, *(f"--{name}={flags[name]}" for name in flags)]
    return [Job(run.name, plan.run_folder(run) / SCORES, (*words, "--run", run.name), run.needs) for run in plan.runs]


def check_folders(plan: Plan) -> None:
    """Refuses, before anything is trained, to go on with runs of other settings.

    Raises:
        UserError: a run folder holds such a run, or the folder is none of an experiment.
    """
    if (plan.folder / CONFIG).exists():
        raise UserError(f"output_dir: {plan.folder} holds a run, and an experiment needs a folder of its own")
    if plan.folder.exists() and not plan.folder.is_dir():
        raise UserError(f"output_dir: {plan.folder} is a file")
    for run in plan.runs:
        if run.stage != PRETRAINED:
            # the rate that a run was given is settled when it begins
            check_same(with_defaults(plan.config(run)), plan.run_folder(run), bool(run.rate_runs))


def check_same(config: TrainConfig, folder: Path, any_rate: bool = False) -> None:
    """Refuses to go on with a run of other settings.

    Raises:
        UserError: the folder holds one.
    """
    free = {"output_dir", "strict_resume", "resolution", "cache_dir", *(("learning_rate",) if any_rate else ())}
    if config.method.budget is not None:
        free |= {"budget", *config.method.chosen().settings}  # chosen anew, the same for the same base
    changed = changed_settings(config, folder / CONFIG, free) if (folder / CONFIG).exists() else []
    if changed:
        raise UserError(
            f"{folder}: holds a run of other settings ({'; '.join(changed)}); remove it, or name another output_dir"
        )


def merge_from(plan: Plan, other: Path) -> None:
    """Copies the finished runs of another folder of the same experiment that are missing here.

    Raises:
        UserError: it holds none, or they were trained or scored otherwise.
    """
    found = [run for run in plan.runs if (other / "runs" / run.name / SCORES).exists()]
    if not found:
        raise UserError(f"merge: {other}: holds no finished run of this experiment")
    here = [plan.run_folder(run) / SCORES for run in plan.runs if (plan.run_folder(run) / SCORES).exists()]
    check_scored_alike([*here, *(other / "runs" / run.name / SCORES for run in found)])
    for run in found:
        source, folder = other / "runs" / run.name, plan.run_folder(run)
        if run.stage != PRETRAINED:
            check_same(with_defaults(plan.config(run)), source, bool(run.rate_runs))
        if not (folder / SCORES).exists():
            with held(plan.folder / QUEUE, run.name):
                shutil.copytree(source, folder, dirs_exist_ok=True, ignore=shutil.ignore_patterns(SCORES))
                write_json(folder / SCORES, read_scores(source / SCORES))  # last: it says that the run is whole


def check_scored_alike(paths: Sequence[Path]) -> None:
    """Refuses to set runs side by side that were scored otherwise, each kind of run for itself.

    Raises:
        UserError: base, photos, prompts, sampling, networks or metrics differ; the line names one of each.
    """
    first: dict[tuple, tuple[Path, dict]] = {}
    for path in paths:
        scores = read_scores(path)
        known, by = first.setdefault((scores["stage"] == "rate", scores["concept"]), (path, scores["scored_by"]))
        changed = [key for key, value in scores["scored_by"].items() if by.get(key) != value]
        if changed:
            raise UserError(f"{path}: cannot stand beside {known}: {', '.join(changed)} differ")


def read_scores(path: Path) -> dict[str, Any]:
    """What a finished run says.

    Raises:
        UserError: the file cannot be read.
    """
    try:
        scores = json.loads(path.read_text(encoding="utf-8"))
        if not {"name", "stage", "concept", "scored_by", "networks"} <= scores.keys():
            raise ValueError("parts are missing")
        return scores
    except (OSError, ValueError, AttributeError) as error:
        raise UserError(f"{path}: cannot be read ({error}); remove it to score the run anew") from error


def collected(plan: Plan) -> list[dict[str, Any]]:
    """All that finished runs left, in the order of the plan.

    Raises:
        UserError: they were scored otherwise, or a file cannot be read.
    """
    done = [run for run in plan.runs if (plan.run_folder(run) / SCORES).exists()]
    check_scored_alike([plan.run_folder(run) / SCORES for run in done])
    found = []
    for run in done:
        folder = plan.run_folder(run)
        entry = {"scores": read_scores(folder / SCORES), "folder": folder, "drawn": folder / DRAWN}
        if run.stage != PRETRAINED:
            entry |= {
                "training": _read(folder / METRICS)["training"],
                "environment": _read(folder / "env.json"),
                "settings": read_yaml(folder / CONFIG),
                "peft_config": _read(folder / ADAPTER / "adapter_config.json"),
                "adapter_bytes": sum(path.stat().st_size for path in folder.glob("*.safetensors")),
                "losses": [(line["step"], line["loss"]) for line in read_log(folder / LOG)],
            }
        found.append(entry)
    return found


def comparison_of(plan: Plan, failed: Mapping[str, str]) -> Comparison:
    """What a report is made of."""
    entries = collected(plan)
    fidelity, text = judges(plan, entries[0]["scores"]["networks"]) if entries else (plan.networks[0], None)
    return Comparison(
        base=str(next(iter(plan.concepts.values()))["pretrained_model_name_or_path"]),
        methods=(PRETRAINED, *plan.methods),
        concepts=tuple(plan.concepts),
        prompts=plan.prompts,
        shown_prompts=tuple(plan.shown_prompts),
        scales=tuple(plan.scales),
        scale_prompts=tuple(plan.shown_prompts[: plan.experiment.scale_prompts]),
        images_per_prompt=plan.experiment.images_per_prompt,
        fidelity=fidelity,
        text=text,
        against=plan.against,
        runs=tuple(entry for entry in entries if entry["scores"]["stage"] != "rate"),
        rate_runs=tuple(entry for entry in entries if entry["scores"]["stage"] == "rate"),
        failed=dict(failed),
    )


def plan_text(plan: Plan) -> str:
    """The runs, and what they cost, as far as that can be said."""
    counts = {stage: [run for run in plan.runs if run.stage == stage] for stage in (PRETRAINED, "rate", "scored")}
    lines = [f"{run.name}" for run in plan.runs]
    lines += ["", *(f"{len(runs):>5} runs: {stage}" for stage, runs in counts.items() if runs)]
    trained = [run for run in plan.runs if run.stage != PRETRAINED]
    steps = sum(plan.config(run).loop.max_train_steps or 0 for run in trained)
    pictures = sum(_picture_count(plan, run) for run in plan.runs)
    lines.append(f"{steps:,} training steps, {pictures:,} pictures")
    done = [(run, plan.run_folder(run)) for run in plan.runs if (plan.run_folder(run) / SCORES).exists()]
    if done:
        seconds = sum(read_scores(folder / SCORES)["seconds"] for _, folder in done) / len(done)
        size = sum(path.stat().st_size for _, folder in done for path in folder.rglob("*") if path.is_file())
        hours, bytes_each = seconds * len(plan.runs) / 3600, size / len(done)
        lines.append(
            f"about {hours:.1f} hours at one run at a time and {bytes_each * len(plan.runs) / 1e9:.2f} GB on disk, by "
            f"the {len(done)} runs that are done"
        )
    else:
        lines.append("hours and disk: by the runs that are done, once there is one")
    return "\n".join(lines)


def _picture_count(plan: Plan, run: Run) -> int:
    templates = plan.tuning if run.stage == "rate" else plan.prompts
    count = len(templates) * plan.experiment.images_per_prompt + (2 if run.stage != PRETRAINED else 0)
    if run.stage != "rate":
        count += len(plan.unrelated)
    if run.stage == "scored":
        count += len([scale for scale in plan.scales if scale != 1]) * plan.experiment.scale_prompts
    return count


def experiment_yaml(plan: Plan) -> str:
    """The experiment with everything filled in, for the record."""
    rates = vars(plan.rates) if plan.rates else None
    parts = {
        "concepts": plan.concepts,
        "methods": plan.methods,
        "rates": rates and {k: _plain(v) for k, v in rates.items()},
    }
    return to_yaml(plan.experiment) + yaml.safe_dump(
        {name: part for name, part in parts.items() if part is not None},
        sort_keys=False,
        allow_unicode=True,
        width=119,
    )


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value


def _read(path: Path) -> Any:
    """A JSON file of a run; None where there is none."""
    try:
        return json.loads(path.read_text(encoding="utf-8")) if path.exists() else None
    except ValueError as error:
        raise UserError(f"{path}: cannot be read ({error})") from error


def _seconds_of(job: Job) -> float | None:
    return read_scores(job.done).get("seconds")


def _step_of(plan: Plan, job: Job) -> str:
    log, run = read_log(plan.run_folder(plan.named(job.name)) / LOG), plan.named(job.name)
    steps = plan.config(run).loop.max_train_steps
    return f"step {log[-1]['step']} of {steps}" if log else ""
