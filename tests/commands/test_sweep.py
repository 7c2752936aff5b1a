"""`sd-atoms sweep`: a grid of runs, each of them the run that it would be alone."""

import json
import shutil
from pathlib import Path

import pytest
import yaml
from helpers import CASTLE
from safetensors import safe_open

from sd_atoms.cli import main
from sd_atoms.commands.sweep import grid_points, parse_vary, read_entry, sweep, usual_rates
from sd_atoms.errors import UserError
from sd_atoms.report.sweep import Entry, harmonic_mean, sweep_figure, sweep_markdown

SMALL = dict(
    **CASTLE,
    train_token_embedding=True,
    resolution=64,
    train_batch_size=1,
    max_train_steps=2,
    num_instance_images=1,
    num_inference_steps=2,
    guidance_scale=3.0,
    report_to="none",
)
RATES = "learning_rate=0.01,3e-3"


def write(folder, **settings):
    (folder / "c.yaml").write_text(yaml.safe_dump({**SMALL, "output_dir": str(folder / "sweep"), **settings}))
    return ["--config", str(folder / "c.yaml")]


@pytest.fixture(scope="module")
def swept(tmp_path_factory):
    """A finished sweep of two rates, scored."""
    folder = tmp_path_factory.mktemp("swept")
    (folder / "templates.txt").write_text("photo of a {}.\nThe {} overlooks a serene lake.\n")
    # smaller, or in fewer steps, there is nothing to see that could be scored
    scored = dict(clip_model_name_or_path="pocket:clip", num_inference_steps=8, resolution=128)
    words = write(folder, prompts_file=str(folder / "templates.txt"), **scored)
    assert main(["sweep", *words, "--vary", RATES]) == 0
    return folder / "sweep"


def content(run):
    """The adapter of a run as bytes by name; its file has its entries in no fixed order."""
    with safe_open(run / "castle.safetensors", "np") as file:
        return {key: file.get_tensor(key).tobytes() for key in file.keys()} | file.metadata()  # noqa: SIM118


def rows_of(markdown):
    lines = [line for line in markdown.splitlines() if line.startswith("|")]
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    return cells[0], cells[2:]


def test_the_table_holds_what_the_runs_say(swept):
    names = ["learning_rate=0.003", "learning_rate=0.01"]
    assert sorted(path.name for path in swept.iterdir()) == [*names, "queue", "sweep.json", "sweep.md", "sweep.png"]
    result = json.loads((swept / "sweep.json").read_text())
    assert result["vary"] == {"learning_rate": [0.01, 0.003]}
    assert [point["name"] for point in result["points"]] == names  # sorted, whatever the order of training
    for point in result["points"]:
        metrics = json.loads((swept / point["name"] / "metrics.json").read_text())
        training, clip = metrics["training"], metrics["clip"]["adapted"]
        assert point["values"] == {"learning_rate": float(point["name"].partition("=")[2])}
        assert all(point[key] == training[key] for key in ("steps", "seconds", "last_loss"))
        assert all(point[key] == clip[key] for key in ("image", "text", "match"))
        assert point["diversity"] is None  # of one picture there is none
        assert point["validation_loss"] is None
        assert point["trained_numbers"] == training["trained_numbers"] + training["trained_token_numbers"]
        assert point["score"] == pytest.approx(2 / (1 / clip["image"] + 1 / clip["text"]), abs=1e-4)
        assert point["failure"] is None
    text = (swept / "sweep.md").read_text()
    assert "score: 2 · image · text / (image + text)" in text
    header, rows = rows_of(text)
    assert header == [
        r"learning\_rate", "steps", "seconds", "last loss", "CLIP image", "CLIP text", "match", "trained numbers",
        "score",
    ]  # fmt: skip
    assert [row[:2] for row in rows] == [["0.003", "2"], ["0.01", "2"]]
    best = max(point["score"] for point in result["points"])
    for row, point in zip(rows, result["points"], strict=True):
        shown = f"{point['score']:.4f}"
        assert row[-1] == (f"**{shown}**" if point["score"] == best else shown)
    assert (swept / "sweep.png").read_bytes().startswith(b"\x89PNG")


def test_the_validation_loss_is_that_of_the_kept_step(swept, tmp_path):
    folder = shutil.copytree(swept, tmp_path / "moved")
    flags = {**yaml.safe_load((swept.parent / "c.yaml").read_text()), "output_dir": str(folder)}
    point = grid_points(parse_vary([RATES]), flags, None)[0]
    log = [
        json.loads((folder / point.name / "log.jsonl").read_text().splitlines()[0]) | dict(step=n) for n in (1, 2, 3)
    ]
    log[0]["validation_loss"], log[1]["validation_loss"] = 0.2, 0.3
    (folder / point.name / "log.jsonl").write_text("".join(json.dumps(entry) + "\n" for entry in log))
    assert read_entry(point).validation_loss == 0.3
    metrics = json.loads((folder / point.name / "metrics.json").read_text())
    metrics["training"]["kept_step"] = 1
    (folder / point.name / "metrics.json").write_text(json.dumps(metrics))
    assert read_entry(point).validation_loss == 0.2
    assert "validation loss: of the kept step" in sweep_markdown([read_entry(point)], dict(learning_rate=[0.01]))
    (folder / point.name / "metrics.json").write_text("[]")
    with pytest.raises(UserError, match="metrics.json: cannot be read"):
        read_entry(point)


def test_a_sweep_goes_on_where_it_stopped(swept, capsys):
    config = ["--config", str(swept.parent / "c.yaml")]
    kept, lost = swept / "learning_rate=0.01", swept / "learning_rate=0.003"
    before = json.loads((swept / "sweep.json").read_text())
    adapters = [content(run) for run in (kept, lost)]
    times = {path: path.stat().st_mtime_ns for path in kept.rglob("*")}
    (lost / "metrics.json").unlink()
    assert main(["sweep", *config, "--vary", RATES]) == 0  # from its last checkpoint
    assert "2 points, 1 of them finished already" in capsys.readouterr().out
    assert "Resuming checkpoint-2.safetensors at step 2" in (swept / "queue/learning_rate=0.003.log").read_text()
    assert json.loads((swept / "sweep.json").read_text()) == before
    assert {path: path.stat().st_mtime_ns for path in kept.rglob("*")} == times
    assert [content(run) for run in (kept, lost)] == adapters


def test_runs_with_other_settings_are_not_taken_for_finished(swept, capsys):
    config = ["--config", str(swept.parent / "c.yaml")]
    before = {path: path.read_bytes() for path in swept.rglob("*") if path.is_file()}
    assert main(["sweep", *config, "--vary", RATES, "--seed", "5"]) == 2
    error = capsys.readouterr().err.strip()
    assert "learning_rate=0.01 (seed was 0, now 5), learning_rate=0.003 (seed was 0, now 5); pass --overwrite" in error
    assert len(error.splitlines()) == 1
    assert main(["sweep", *config, "--vary", RATES, "--output_dir", str(swept / "learning_rate=0.01")]) == 2
    assert "holds a run, and a sweep needs a folder of its own" in capsys.readouterr().err
    assert {path: path.read_bytes() for path in swept.rglob("*") if path.is_file()} == before


def test_a_point_that_fails_is_in_the_table_with_its_reason(swept, tmp_path):
    folder = shutil.copytree(swept, tmp_path / "moved")
    words = ["--config", str(swept.parent / "c.yaml"), "--output_dir", str(folder)]
    assert main(["sweep", *words, "--vary", "learning_rate=1e30,0.01"]) == 0
    good, bad = json.loads((folder / "sweep.json").read_text())["points"]
    assert (good["failure"], good["steps"]) == (None, 2)
    assert (bad["values"], bad["steps"]) == ({"learning_rate": 1e30}, None)
    assert bad["failure"].startswith("the loss is nan at step 2")
    header, rows = rows_of((folder / "sweep.md").read_text())
    assert header[-1] == "why it failed"
    assert [row[0] for row in rows] == ["0.01", "1e+30"]
    assert rows[1][-1].startswith("the loss is nan at step 2")
    assert (folder / "learning_rate=1e+30" / "config.yaml").exists()
    assert (folder / "learning_rate=0.003" / "metrics.json").exists()  # no point of this grid, so it stays as it is


def test_what_is_finished_goes_on_or_begins_anew(swept, tmp_path, monkeypatch):
    folder = shutil.copytree(swept, tmp_path / "moved")
    asked = []

    def look(jobs, *_):
        asked.extend(job for job in jobs if not job.done.exists())
        raise KeyboardInterrupt

    monkeypatch.setattr("sd_atoms.commands.sweep.run_jobs", look)

    def again(*words):
        asked.clear()
        assert (
            main(
                [
                    "sweep",
                    "--config",
                    str(swept.parent / "c.yaml"),
                    "--vary",
                    RATES,
                    "--output_dir",
                    str(folder),
                    *words,
                ]
            )
            == 130
        )
        settings = [yaml.safe_load(Path(job.command[job.command.index("--config") + 1]).read_text()) for job in asked]
        return [(own["learning_rate"], own["seed"], job.command[-1]) for own, job in zip(settings, asked, strict=True)]

    assert again() == []
    (folder / "learning_rate=0.01" / "metrics.json").unlink()
    assert again() == [(0.01, 0, "latest")]
    shutil.rmtree(folder / "learning_rate=0.01")
    assert again() == [(0.01, 0, "latest")]
    assert again("--overwrite", "--seed", "5") == [(0.01, 5, "--overwrite"), (0.003, 5, "--overwrite")]


def test_status_tells_how_far_a_sweep_is(swept, capsys):
    words = ["sweep", "--config", str(swept.parent / "c.yaml"), "--vary", "learning_rate=0.01,3e-3,1"]
    assert main([*words, "--status"]) == 0
    text = capsys.readouterr().out
    assert "2 done" in text
    assert "1 waiting" in text
    metrics = swept / "learning_rate=0.01" / "metrics.json"
    kept = metrics.read_text()
    metrics.write_text("{}")
    assert main([*words, "--status"]) == 0
    assert "2 done" in capsys.readouterr().out
    metrics.write_text(kept)


def test_all_mistakes_in_what_is_varied_are_said_at_once(capsys, tmp_path):
    texts = [
        "learning_rate=1e-2,x,-1",
        "learning_rat=1",
        "m1",
        "m=4,04",
        "seed=1",
        "seed=2",
        "output_dir=a,b",
        "kc=1,",
    ]
    with pytest.raises(UserError) as error:
        parse_vary(texts)
    assert str(error.value) == (
        "--vary: 8 problems: learning_rate: 'x' is not a number, 0.0 or more is allowed; "
        "learning_rate: -1.0 is out of range, 0.0 or more is allowed; "
        "unknown key 'learning_rat' (did you mean learning_rate?); "
        "'m1': field=value,value,… is needed; m: 04 is there twice; seed: all its values go into one --vary; "
        "output_dir: cannot be varied; 'kc=1,': field=value,value,… is needed"
    )
    assert main(["sweep", *write(tmp_path), *(word for text in texts for word in ("--vary", text))]) == 2
    printed = capsys.readouterr().err
    assert printed == f"error: {error.value}\n"
    assert not (tmp_path / "sweep").exists()


@pytest.mark.parametrize(
    ("words", "problem"),
    [
        ([], "vary or preset is required"),
        (["--preset", "first", "--vary", "learning_rate=1e-3"], "preset: learning_rate decides the learning rate"),
        (["--preset", "first", "--vary", "method=atoms,lora"], "preset: method decides the learning rate"),
        (["--preset", "second"], "invalid choice: 'second'"),
        (["--vary", "m=0,9"], "m=0: m=0, kc=0: no atoms at all"),
        (["--vary", "m=9", "--keep", "first"], "--keep: 'first' is not one of last, best"),
        (["--vary", "m=9", "--nonsense", "1"], "unrecognized arguments: --nonsense 1"),
        (["--vary", "m=9", "--resume-from-checkpoint", "latest"], "resume_from_checkpoint: a sweep goes on by itself"),
        (["--vary", "m=9", "--push_to_hub"], "push_to_hub: not in a sweep"),
        (["--vary", "target=a/b,a:b"], "several points would have the same folder: target=a_b"),
        (["--vary", f"target={'a' * 300}"], "the name of its folder would be too long"),
    ],
    ids=str,
)
def test_bad_input_is_one_line_and_exit_code_2(tmp_path, capsys, words, problem):
    assert main(["sweep", *write(tmp_path), *words]) == 2
    error = capsys.readouterr().err.strip()
    assert problem in error
    assert len(error.splitlines()) == 1
    assert not (tmp_path / "sweep").exists()


def test_the_first_sweep_is_around_the_rate_that_a_run_would_have():
    assert usual_rates({"pretrained_model_name_or_path": "pocket"}, "pocket/castle") == ["0.0033", "0.01", "0.03"]
    assert usual_rates({"method": "lora"}, "pocket/castle") == ["3.3e-05", "0.0001", "0.0003"]
    assert usual_rates({"learning_rate": 0.3}, "pocket/castle") == ["0.1", "0.3", "0.9"]


def test_the_first_sweep_goes_with_others(tmp_path, capsys):
    words = ["sweep", "--preset", "first", "--vary", "m=4,9", "--status", *write(tmp_path)]
    assert main(words) == 0
    assert "6 waiting" in capsys.readouterr().out


def test_several_processes_are_refused(tmp_path, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UserError, match="starts its runs itself"):
        sweep(parse_vary(["m=9"]), {**SMALL, "output_dir": str(tmp_path / "sweep")})


def test_points_are_named_by_the_values_as_they_are_understood(tmp_path):
    vary = parse_vary(["learning_rate=1e-2,.003", "train_beta=true,false", "snr_gamma=none,5"])
    points = grid_points(vary, {**SMALL, "output_dir": str(tmp_path)}, None)
    assert len(points) == 8
    assert points[0].name == "learning_rate=0.01,train_beta=true,snr_gamma=none"
    assert points[-1].name == "learning_rate=0.003,train_beta=false,snr_gamma=5"
    assert points[-1].values == {"learning_rate": 0.003, "train_beta": False, "snr_gamma": 5.0}
    assert points[-1].config.output.output_dir == str(tmp_path / points[-1].name)
    assert points[-1].config.optimiser.learning_rate == 0.003


def test_a_score_needs_both_parts():
    assert harmonic_mean(0.8, 0.2) == 0.32
    assert harmonic_mean(0.8, None) is harmonic_mean(None, 0.2) is harmonic_mean(-0.1, 0.2) is None


def entry(image, **values):
    return Entry("", values, steps=1, image=image, text=0.3, score=harmonic_mean(image, 0.3))


def test_curves_are_over_the_first_number_that_varies():
    grid = dict(target=["conv", "conv3x3"], m=[9], learning_rate=[1e-3, 1e-2, 3e-2], m1=[0, 4])
    entries = [
        entry(0.5 + rate, target=target, m=9, learning_rate=rate, m1=m1)
        for target in grid["target"]
        for rate in (3e-2, 1e-3, 1e-2)
        for m1 in (0, 4)
    ]
    figure = sweep_figure(entries, grid)
    assert [axes.get_xscale() for axes in figure.axes] == ["log"] * 3
    assert [axes.get_title().split()[0] for axes in figure.axes] == ["score", "image:", "text:"]
    for axes in figure.axes:
        assert axes.get_xlabel() == "learning_rate"
        assert len(axes.lines) == 4
        assert [list(line.get_xdata()) for line in axes.lines] == [[1e-3, 1e-2, 3e-2]] * 4
    labels = [text.get_text() for text in figure.legends[0].get_texts()]
    assert labels[0] == "target=conv, m=9, m1=0"
    near = sweep_figure(entries, dict(grid, learning_rate=[1e-3]))  # of one value nothing is seen
    assert {axes.get_xlabel() for axes in near.axes} == {"m1"}
    assert {axes.get_xscale() for axes in near.axes} == {"linear"}
    assert sweep_figure([entry(None, m=9)], dict(m=[9, 6])) is not None  # one part is better than none
    assert sweep_figure([Entry("", dict(m=9))], dict(m=[9, 6])) is None
    assert sweep_figure([entry(0.5, target="conv")], dict(target=["conv", "conv3x3"])) is None


def test_rows_are_sorted_and_texts_stay_in_their_cells():
    grid = dict(target=["b|c", "a"], snr_gamma=[10.0, 9.0, None])
    entries = [entry(0.5, target=target, snr_gamma=value) for target in grid["target"] for value in grid["snr_gamma"]]
    text = sweep_markdown(entries, grid)
    assert "6 of 6 points." in text
    lines = [line for line in text.splitlines() if line.startswith("| ")][2:]
    assert [line.split(" | ")[:2] for line in lines] == [
        ["| a", "none"], ["| a", "9"], ["| a", "10"], [r"| b\|c", "none"], [r"| b\|c", "9"], [r"| b\|c", "10"],
    ]  # fmt: skip
