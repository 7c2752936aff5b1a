"""`sd-atoms compare`: methods trained, drawn and scored alike, and what of it is left on disk."""

import contextlib
import csv
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import yaml
from PIL import Image
from tiny import write_photos, write_tiny_base
from torch.nn import functional as F

from sd_atoms.cli import main
from sd_atoms.commands.compare import comparison_of, do_run, plan_text
from sd_atoms.commands.runs import check_runs, seconds_of, step_of
from sd_atoms.errors import UserError
from sd_atoms.evaluation.clip import ClipFeatures
from sd_atoms.jobs.experiment import read_plan
from sd_atoms.jobs.queue import Job, held, note_failure
from sd_atoms.jobs.results import (
    QUEUE,
    SCORES,
    check_rates_settled,
    collected,
    merge_from,
    selection_score,
    steady_seconds,
)
from sd_atoms.report.comparison import write_report
from sd_atoms.report.comparison_figures import looks, pareto_figure
from sd_atoms.report.rows import first_sentence, mean_of, paired, rows_of

PROMPTS = ["photo of a {}.", "The {} overlooks a serene lake."]


def experiment(folder, **changes):
    """Writes an experiment on the tiny base, and what it needs; returns its file."""
    folder.mkdir(parents=True, exist_ok=True)
    if not (folder / "base").exists():
        write_tiny_base(folder / "base")
        write_photos(folder / "photos")
        (folder / "prompts.txt").write_text("\n".join(PROMPTS))
        (folder / "others.txt").write_text("a dog\na cat\n")
    entries = {
        "output_dir": str(folder / "out"),
        "settings": {
            "pretrained_model_name_or_path": str(folder / "base"),
            "max_train_steps": 2,
            "train_batch_size": 1,
            "num_inference_steps": 2,
            "guidance_scale": 2.0,
            "train_token_embedding": True,
        },
        "concepts": {
            "castle": {
                "instance_data_dir": str(folder / "photos"),
                "instance_prompt": "photo of a <castle>",
                "placeholder_token": "<castle>",
                "initializer_token": "castle",
            }
        },
        "methods": {"atoms": None, "lora": {"rank": 2, "learning_rate": 0.01}},
        "rates": {"factors": [1, 30], "seeds": [100]},
        "prompts_file": str(folder / "prompts.txt"),
        "unrelated_prompts_file": str(folder / "others.txt"),
        "images_per_prompt": 2,
        "networks": ["pocket:clip"],
        "scales": [0.5, 1],
        **changes,
    }
    (folder / "e.yaml").write_text(yaml.safe_dump(entries, sort_keys=False))
    return str(folder / "e.yaml")


@pytest.fixture(scope="module")
def compared(tmp_path_factory):
    """A finished experiment, its runs made one after the other in this process."""
    folder = tmp_path_factory.mktemp("compare")
    plan = read_plan(experiment(folder), {})
    for run in plan.runs:
        do_run(plan, run)
    results = write_report(comparison_of(plan, {}), plan.folder / "report")
    return plan, results


def scores_of(plan, name):
    return json.loads((plan.folder / "runs" / name / SCORES).read_text())


def test_each_run_is_an_ordinary_run_folder_at_the_rate_that_won_elsewhere(compared):
    plan, _ = compared
    tried = {0.01: selection_score(plan, plan.named("rates/castle/atoms/0.01/seed-100"))}
    tried[0.3] = selection_score(plan, plan.named("rates/castle/atoms/0.3/seed-100"))
    best = max(tried, key=tried.get)
    folder = plan.folder / "runs/castle/atoms/seed-0"
    assert yaml.safe_load((folder / "config.yaml").read_text())["learning_rate"] == best
    assert scores_of(plan, "castle/atoms/seed-0")["learning_rate"] == best
    assert (folder / "castle.safetensors").exists()
    tuned = scores_of(plan, "rates/castle/atoms/0.01/seed-100")["scored_by"]["prompts"]
    assert not set(tuned) & set(PROMPTS)


def test_scores_are_those_of_a_hand_made_loop(compared):
    plan, _ = compared
    clip = ClipFeatures("pocket:clip")
    drawn = plan.folder / "runs/castle/lora/seed-0/drawn"
    images = [Image.open(drawn / f"{number:02d}-{seed}.png").convert("RGB") for number in (0, 1) for seed in (0, 1)]
    photos = [Image.open(path).convert("RGB") for path in sorted((plan.folder.parent / "photos").glob("*.png"))]
    features, texts = clip.of_images(images), clip.of_texts([prompt.replace("{}", "castle") for prompt in PROMPTS])
    image = (features @ clip.of_images(photos).T).mean().item()
    text = F.cosine_similarity(features, texts.repeat_interleave(2, 0)).mean().item()
    bases = plan.folder / "runs/castle/pretrained/drawn"
    others = [
        clip.of_images([Image.open(folder / f"unrelated-{n:02d}.png").convert("RGB") for n in (0, 1)])
        for folder in (drawn, bases)
    ]
    drift = ((1 - F.cosine_similarity(*others)) / 2).mean().item()
    figures = scores_of(plan, "castle/lora/seed-0")["networks"]["pocket:clip"]["figures"]
    assert figures["image"]["value"] == pytest.approx(image, abs=1e-5)
    assert figures["text"]["value"] == pytest.approx(text, abs=1e-5)
    assert figures["drift"]["value"] == pytest.approx(drift, abs=1e-6)
    assert drift > 0


def test_adapter_and_base_cannot_be_swapped(compared):
    plan, _ = compared
    adapted, base = (
        {path.name: path.read_bytes() for path in (plan.folder / "runs/castle" / name / "drawn").glob("0*.png")}
        for name in ("lora/seed-0", "pretrained")
    )
    assert adapted.keys() == base.keys()
    assert all(adapted[name] != base[name] for name in base)
    drift = scores_of(plan, "castle/pretrained")["networks"]["pocket:clip"]["figures"]["drift"]
    assert drift["value"] == 0  # the base against itself
    scaled = plan.folder / "runs/castle/lora/seed-0/drawn/scale-0.5-00-0.png"
    assert Image.open(scaled).info["adapter_scale"] == "0.5"


def test_the_report_says_what_the_runs_say(compared):
    plan, results = compared
    report = plan.folder / "report"
    assert json.loads((report / "results.json").read_text()) == json.loads(json.dumps(results))
    with open(report / "table.csv", newline="") as file:
        rows = {row["method"]: row for row in csv.DictReader(file)}
    assert list(rows) == ["pretrained", "atoms", "lora"]
    for method in ("atoms", "lora"):
        own = scores_of(plan, f"castle/{method}/seed-0")
        assert float(rows[method]["pocket:clip image"]) == own["networks"]["pocket:clip"]["figures"]["image"]["value"]
        metrics = json.loads((plan.folder / f"runs/castle/{method}/seed-0/metrics.json").read_text())["training"]
        assert int(rows[method]["parameters"]) == metrics["trained_numbers"] + metrics["trained_token_numbers"]
        assert float(rows[method]["memory_gb"]) == pytest.approx(metrics["peak_memory_bytes"] / 1e9)
    text = (report / "table.md").read_text()
    assert text.startswith("# Comparison on base\n")  # not where on this machine it lies
    assert "## Against lora, on the same seeds, prompts and noise" in text
    for name in ("index.html", "plotly.min.js", "pareto.png", "curves.png", "grid-castle.png", "grid-all-castle.png"):
        assert (report / name).stat().st_size > 1000


def test_a_run_in_the_results_is_what_pefts_comparison_reads(compared):
    _, results = compared
    for run in results["runs"]:
        info, train, meta = run["run_info"], run["train_info"], run["meta_info"]
        assert {
            "created_at",
            "total_time",
            "experiment_name",
            "peft_branch",
            "train_config",
            "peft_config",
        } <= info.keys()
        assert info["train_config"]["model_id"]
        assert info["peft_config"]["peft_type"]
        assert train["status"] == "success"
        for key in ("reserved_avg", "max", "reserved_99th"):
            assert isinstance(train[f"accelerator_memory_{key}"], int)
        last = train["metrics"][-1]
        assert {"train loss", "train samples", "test dino_similarity", "drift"} <= last.keys()
        assert last["train samples"] == 2
        packages = ("peft", "transformers", "diffusers", "torch", "datasets")
        assert all(f"{name}-version" in meta["package_info"] for name in packages)


def test_a_finished_run_is_left_alone_and_another_one_refused(compared, tmp_path):
    plan, _ = compared
    folder = plan.folder / "runs/castle/lora/seed-0"
    before = (folder / SCORES).stat().st_mtime_ns
    do_run(plan, plan.named("castle/lora/seed-0"))
    assert (folder / SCORES).stat().st_mtime_ns == before
    other = read_plan(
        experiment(plan.folder.parent, methods={"atoms": None, "lora": {"rank": 3, "learning_rate": 0.01}}), {}
    )
    with pytest.raises(UserError, match="holds a run of other settings .rank was 2, now 3"):
        check_runs(other)
    experiment(plan.folder.parent)


def test_what_was_drawn_for_other_prompts_is_not_taken_for_done(compared):
    plan, _ = compared
    for flags, problem in (
        ({"images_per_prompt": 1}, "images_per_prompt"),
        ({"networks": "pocket:clip,efficientnet-lite0"}, "networks"),
        ({"unrelated_prompts_file": None, "prompts_file": "few_shot"}, "prompts"),
    ):
        other = read_plan(str(plan.folder.parent / "e.yaml"), flags)
        with pytest.raises(UserError, match=f"was drawn or scored with other {problem}; remove it"):
            check_runs(other)


def test_a_rate_is_not_chosen_before_all_that_choose_it_have_ended(compared, tmp_path):
    plan, _ = compared
    other = read_plan(str(plan.folder.parent / "e.yaml"), {"output_dir": str(tmp_path / "out")})
    run = other.named("castle/atoms/seed-0")
    for name in ("castle/pretrained", "rates/castle/atoms/0.01/seed-100"):
        with pytest.raises(
            UserError, match=f"needs {name}, which is not done" if name != run.rate_runs[0] else "needs"
        ):
            check_rates_settled(other, run)
        shutil.copytree(plan.folder / "runs" / name, other.folder / "runs" / name)
    with pytest.raises(UserError, match="needs rates/castle/atoms/0.3/seed-100, which is not done"):
        check_rates_settled(other, run)
    note_failure(other.folder / "queue", "rates/castle/atoms/0.3/seed-100", "the loss is nan")
    check_rates_settled(other, run)  # one that failed is no longer waited for


def test_what_is_gone_of_a_finished_run_is_named(compared, tmp_path):
    plan, _ = compared
    other = read_plan(str(plan.folder.parent / "e.yaml"), {"output_dir": str(tmp_path / "out"), "text": "pocket:clip"})
    shutil.copytree(plan.folder / "runs", other.folder / "runs")
    rate = other.named("rates/castle/atoms/0.3/seed-100")
    scores = json.loads((other.run_folder(rate) / SCORES).read_text())
    (other.run_folder(rate) / SCORES).write_text(json.dumps(scores | {"networks": {}}))
    with pytest.raises(UserError, match="seed-100/scores.json: was scored by other networks or metrics; remove it"):
        selection_score(other, rate)
    shutil.copy(plan.run_folder(rate) / SCORES, other.run_folder(rate))
    (other.run_folder(other.named("castle/atoms/seed-0")) / "metrics.json").unlink()
    with pytest.raises(UserError, match="metrics.json: is gone; remove scores.json beside it to finish the run anew"):
        collected(other)


def test_runs_of_another_machine_are_merged_unless_they_were_scored_otherwise(compared, tmp_path):
    plan, _ = compared
    elsewhere = read_plan(experiment(plan.folder.parent), {"output_dir": str(tmp_path / "here")})
    merge_from(elsewhere, plan.folder)
    assert json.loads((tmp_path / "here/runs/castle/lora/seed-0" / SCORES).read_text()) == scores_of(
        plan, "castle/lora/seed-0"
    )
    assert len(comparison_of(elsewhere, {}).runs) == 3
    changed = tmp_path / "changed"
    shutil.copytree(plan.folder, changed)
    path = changed / "runs/castle/lora/seed-0" / SCORES
    scores = json.loads(path.read_text())
    scores["scored_by"]["networks"]["pocket:clip"] = "another"
    path.write_text(json.dumps(scores))
    with pytest.raises(UserError, match="cannot stand beside .*: networks differ"):
        merge_from(elsewhere, changed)
    with pytest.raises(UserError, match="holds no finished run of this experiment"):
        merge_from(elsewhere, tmp_path)


def test_a_run_that_another_process_works_at_is_left_to_it(compared, tmp_path):
    plan, _ = compared
    elsewhere = read_plan(experiment(plan.folder.parent), {"output_dir": str(tmp_path / "here")})
    with held(elsewhere.folder / QUEUE, "castle/lora/seed-0"):
        merge_from(elsewhere, plan.folder)
    left = [run.name for run in elsewhere.runs if not (elsewhere.run_folder(run) / SCORES).exists()]
    assert left == ["castle/lora/seed-0"]


def test_how_far_a_run_has_come(compared, tmp_path):
    plan, _ = compared
    elsewhere = read_plan(experiment(plan.folder.parent), {"output_dir": str(tmp_path / "here")})
    run = elsewhere.named("castle/lora/seed-0")
    folder, job = elsewhere.run_folder(run), Job(run.name, elsewhere.run_folder(run) / SCORES, ())
    assert step_of(elsewhere, job) == ""
    folder.mkdir(parents=True)
    (folder / "log.jsonl").write_text('{"step": 1, "loss": 0.5}\n')
    assert step_of(elsewhere, job) == "step 1 of 2"
    passes = [replace(own, values={**own.values, "num_train_epochs": 1}) for own in elsewhere.runs]
    assert step_of(replace(elsewhere, runs=tuple(passes)), job) == "step 1"
    (folder / "metrics.json").write_text("{}")
    assert step_of(elsewhere, job) == "generates and scores"


def test_the_command_says_what_it_would_do_and_how_far_it_is(compared, capsys):
    plan, _ = compared
    path = str(plan.folder.parent / "e.yaml")
    assert main(["compare", path, "--dry_run"]) == 0
    text = capsys.readouterr().out
    assert "castle/atoms/seed-0" in text
    assert "2 runs: scored; 4 training steps" in text
    assert "hours at one run at a time" in text
    assert "told once" not in text
    elsewhere = ["compare", path, "--dry_run", "--output_dir", str(plan.folder.parent / "new")]
    assert main(elsewhere) == 0
    assert "image_seconds: hours and disk of pretrained, hours and disk of" in capsys.readouterr().out
    assert main([*elsewhere, "--step_seconds", "900", "--image_seconds", "0"]) == 0
    steps = sum(2 for run in plan.runs if run.stage != "pretrained")
    assert f"about {steps / 4:.1f} hours" in capsys.readouterr().out
    new = read_plan(path, {"output_dir": str(plan.folder.parent / "new")})
    passes = tuple(replace(own, values={**own.values, "num_train_epochs": 1}) for own in new.runs)
    text = plan_text(replace(new, runs=passes), 900, 0)
    assert "2 runs: scored; passes over the photos" in text
    assert "hours and disk of scored" in text
    assert main(["compare", path, "--step_seconds", "900"]) == 2
    assert "dry_run" in capsys.readouterr().err
    assert main(["compare", path, "--status"]) == 0
    assert "5 done" in capsys.readouterr().out
    base, trained = (
        Job(name, plan.run_folder(plan.named(name)) / SCORES, ())
        for name in ("castle/pretrained", "castle/lora/seed-0")
    )
    assert seconds_of(base) is None  # nothing was trained
    assert seconds_of(trained) > 0
    assert main(["compare", path, "--run", "castle/dora/seed-0"]) == 2
    assert "'castle/dora/seed-0' is none of this experiment's" in capsys.readouterr().err
    assert not (plan.folder / QUEUE / "castle/dora").exists()
    assert main(["compare", path, "--metrics", "beauty"]) == 2
    assert "metrics: 'beauty'" in capsys.readouterr().err
    words = ["compare", path, "--networks", "nowhere/none", "--output_dir", str(plan.folder.parent / "new")]
    assert main(words) == 2
    assert "nowhere/none" in capsys.readouterr().err
    assert not (plan.folder.parent / "new").exists()  # said before a training


def test_the_interval_of_a_mean_is_the_wider_of_images_and_seeds():
    narrow = [{"value": value, "low": value - 0.001, "high": value + 0.001} for value in (0.2, 0.4)]
    mean, low, high = mean_of(narrow)
    assert (mean, high - mean) == (pytest.approx(0.3), pytest.approx(12.706 * 0.1))  # t of 1, sd 0.1414 / sqrt 2
    assert mean - low == pytest.approx(high - mean)
    wide = [{"value": 0.3, "low": 0.1, "high": 0.5}] * 2
    assert mean_of(wide)[2] - 0.3 == pytest.approx(0.2)  # all seeds share their prompts and noise
    assert mean_of([{"value": 0.3, "low": None, "high": None}]) == (0.3, None, None)


def test_a_pause_does_not_count_as_training():
    assert steady_seconds([2.0, 3.0, 4.0, 64.0, 65.0]) == 5.0  # a minute asleep in step 4, a slow start
    assert steady_seconds([]) is None
    assert steady_seconds([0.0, 0.0]) is None  # a log that tells no time


def test_a_figure_has_a_row_of_panels_for_each_concept_and_looks_of_their_own_for_methods(tmp_path):
    sys.path.insert(0, str(Path(__file__).parents[1] / "report"))
    from comparisons import made_up

    comparison = made_up(tmp_path)
    figure = pareto_figure(comparison, rows_of(comparison))
    named = [axes.get_ylabel().partition(":")[0] for axes in figure.axes if axes.get_ylabel()]
    assert (named, len(figure.axes)) == (["castle", "canal"], 8)
    assert [len(axes.containers) for axes in figure.axes[:4]] == [4, 4, 3, 3]  # the base has no size and no time
    assert [text.get_text() for text in figure.legends[0].get_texts()] == list(comparison.methods)
    many = replace(comparison, methods=[f"method {number}" for number in range(60)])
    assert len(set(looks(many).values())) == 60


def test_a_difference_is_told_in_pairs(tmp_path):
    sys.path.insert(0, str(Path(__file__).parents[1] / "report"))
    from comparisons import made_up

    comparison = made_up(tmp_path)
    runs, others = comparison.of("castle", "lora"), comparison.of("castle", "atoms")
    mean, low, high = paired(comparison, runs, others)["fidelity"]
    assert (mean, low, high) == (pytest.approx(0.1), pytest.approx(0.1), pytest.approx(0.1))  # on every single image
    assert paired(comparison, runs[:1], others[1:]) == {}  # no seed in common
    row = next(row for row in rows_of(comparison) if (row.concept, row.method) == ("castle", "lora"))
    assert row.differences["fidelity"][0] == pytest.approx(0.1)
    assert row.seconds == 6.0  # by the median step, not by the clock
    assert first_sentence(comparison, rows_of(comparison)).startswith(
        "castle: likeness is highest with lora (0.510; in reach of the intervals of atoms), text with token (0.580"
    )


@pytest.mark.slow
def test_killed_at_random_moments_it_repeats_no_finished_run_and_ends_with_the_same_scores(tmp_path):
    whole = experiment(tmp_path / "whole")
    command = [sys.executable, "-m", "sd_atoms", "compare"]
    subprocess.run([*command, whole, "--jobs", "2"], check=True, capture_output=True)
    broken = experiment(tmp_path / "broken")
    moments, seen = random.Random(0), {}
    for _ in range(8):
        process = subprocess.Popen(
            [*command, broken, "--jobs", "2"], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        time.sleep(moments.uniform(4, 16))
        children = subprocess.run(["pgrep", "-P", str(process.pid)], capture_output=True, text=True).stdout.split()
        for number in [process.pid, *map(int, children)] if moments.random() < 0.7 else [process.pid]:
            with contextlib.suppress(ProcessLookupError):
                os.kill(number, signal.SIGKILL)
        process.wait()
        for path in (tmp_path / "broken/out/runs").rglob(SCORES):
            stamp = path.stat().st_mtime_ns
            assert seen.setdefault(path, stamp) == stamp, f"{path} was made twice"
    subprocess.run([*command, broken, "--jobs", "2"], check=True, capture_output=True)
    for path in (tmp_path / "whole/out/runs").rglob(SCORES):
        one, other = (
            json.loads((tmp_path / name / path.relative_to(tmp_path / "whole")).read_text())
            for name in ("whole", "broken")
        )
        for scores in (one, other):
            del scores["seconds"], scores["scored_by"]["base"]
        assert one == other, path


def test_surroundings_are_scored_with_the_masks_of_the_photos_whether_a_run_has_them_or_not(tmp_path):
    experiment(tmp_path)  # for its photos
    for path in (tmp_path / "photos").glob("*.png"):
        with Image.open(path) as photo:
            mask = Image.new("L", photo.size)
        mask.paste(255, (0, 0, mask.width // 2, mask.height))
        (tmp_path / "photos" / "masks").mkdir(exist_ok=True)
        mask.save(tmp_path / "photos" / "masks" / path.name)
    methods = {"atoms": None, "masked": {"method": "atoms", "masks": True}}
    file = experiment(
        tmp_path, methods=methods, rates=None, networks=["pocket:clip", "colours"], scales=[], images_per_prompt=1,
        metrics="subject,text,surroundings",
    )  # fmt: skip
    plan = read_plan(file, {})
    for run in plan.runs:
        do_run(plan, run)
    comparison = comparison_of(plan, {})
    write_report(comparison, plan.folder / "report")
    plain, masked = (
        scores_of(plan, f"castle/{name}/seed-0")["networks"]["colours"]["by_image"]["surroundings"]
        for name in ("atoms", "masked")
    )
    assert all(-1 <= value <= 1 for value in (*plain, *masked))
    settings = yaml.safe_load((plan.folder / "runs/castle/masked/seed-0/config.yaml").read_text())
    assert (settings["masks"], settings["mask_weight"]) == (True, 0.1)
    row = next(row for row in rows_of(comparison) if row.method == "masked")
    apart = [one - other for one, other in zip(masked, plain, strict=True)]
    assert row.differences["surroundings (colours)"][0] == pytest.approx(sum(apart) / 2)
    table = (plan.folder / "report" / "table.md").read_text()
    assert "| fidelity | text | surroundings (pocket:clip) | surroundings (colours) |" in table
    assert "what pretrained has is by chance" in table
    page = (plan.folder / "report" / "index.html").read_text()
    assert '<th scope="col">surroundings (colours)</th>' in page
