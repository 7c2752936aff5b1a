"""The commands as people type them."""

import contextlib
import errno
import io
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import torch
import yaml
from helpers import CASTLE
from PIL import Image
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from sd_atoms.cli import COMMANDS, VERBS, main, train_main
from sd_atoms.generation import image_notes
from sd_atoms.pipeline import read_artefact
from sd_atoms.sources import packaged_path
from sd_atoms.training.adapter import open_adapter

SMALL = dict(
    **CASTLE,
    train_token_embedding=True,
    train_batch_size=1,
    max_train_steps=3,
    checkpointing_steps=2,
    num_instance_images=2,
    num_inference_steps=2,
    guidance_scale=3.0,
)
TEMPLATES = "photo of a {}.\nThe {} overlooks a serene lake.\n"


def write(tmp_path, name="c.yaml", **settings):
    path = tmp_path / name
    path.write_text(yaml.safe_dump({**SMALL, "output_dir": str(tmp_path / "run"), **settings}))
    return str(path)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A finished small run with templates, scores and validation pictures."""
    folder = tmp_path_factory.mktemp("trained")
    (folder / "templates.txt").write_text(TEMPLATES)
    config = write(
        folder,
        prompts_file=str(folder / "templates.txt"),
        clip_model_name_or_path="pocket:clip",
        validation_prompt="a <castle>",
        validation_steps=2,
        num_validation_images=2,
    )
    assert train_main(["--config", config]) == 0
    return folder / "run"


def tensors(run):
    return load_file(run / "castle.safetensors")


def same(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)


def test_a_run_folder_is_complete(trained):
    names = {path.name for path in trained.iterdir()}
    assert names == {
        "adapter", "castle.safetensors", "checkpoints", "config.yaml", "env.json", "images", "log.jsonl", "logs",
        "metrics.json",
    }  # fmt: skip
    config = yaml.safe_load((trained / "config.yaml").read_text())
    assert (config["m"], config["resolution"], config["form"]) == (9, 128, "auto")
    log = [json.loads(line) for line in (trained / "log.jsonl").read_text().splitlines()]
    assert [entry["step"] for entry in log] == [1, 2, 3]
    assert all(entry["loss"] > 0 and entry["grad_norm"] > 0 for entry in log)
    metrics = json.loads((trained / "metrics.json").read_text())
    assert metrics["training"]["trained_numbers"] == 28 * 81
    assert set(metrics["clip"]["adapted"]) == {"image", "text", "match", "diversity"}
    assert {path.name for path in (trained / "checkpoints").iterdir()} == {
        "checkpoint-2.safetensors",
        "checkpoint-3.safetensors",
    }
    assert (trained / "images" / "validation-000002.png").exists()
    (events,) = (trained / "logs").rglob("*tfevents*")
    shown = EventAccumulator(str(events), {"images": 0}).Reload()
    assert {"loss", "learning_rate"} <= set(shown.Tags()["scalars"])
    assert shown.Tags()["images"] == ["validation"]
    assert not [path for path in trained.rglob(".*") if path.is_file()]  # no temporary file stays


def test_the_environment_names_no_folder_of_the_machine(trained):
    assert str(Path.home()) not in (trained / "env.json").read_text()


def test_pictures_of_a_new_process_equal_those_of_the_training_process(trained, tmp_path):
    (tmp_path / "t.txt").write_text("photo of a {}.\n")
    command = ["generate", "--adapter", str(trained / "castle.safetensors"), "--prompts", str(tmp_path / "t.txt")]
    environment = dict(os.environ, PYTHONPATH=os.getcwd())
    run = subprocess.run(
        [
            sys.executable,
            "-m",
            "sd_atoms",
            *command,
            "--token",
            "<castle>",
            "--seeds",
            "0-1",
            "--out",
            str(tmp_path / "o"),
        ],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0, run.stderr
    for seed in (0, 1):
        ours = Image.open(trained / "images" / f"instance-{seed:02d}.png")
        theirs = Image.open(tmp_path / "o" / f"prompt00-seed{seed}.png")
        assert ours.tobytes() == theirs.tobytes()
    base = Image.open(trained / "images" / "base-instance-00.png")
    assert base.tobytes() != theirs.tobytes()


def test_generation_stops_and_continues_and_says_how_pictures_were_made(trained, tmp_path, capsys):
    (tmp_path / "t.txt").write_text(TEMPLATES)
    words = ["generate", "--adapter", str(trained / "adapter"), "--prompts", str(tmp_path / "t.txt")]
    words += ["--seeds", "3,5", "--out", str(tmp_path / "o"), "--compare-base"]
    assert main(words) == 0
    out = tmp_path / "o"
    assert len(list(out.glob("prompt*.png"))) == len(list(out.glob("base-prompt*.png"))) == 4
    notes = image_notes(out / "prompt01-seed5.png")
    assert notes["prompt"] == "The <castle> overlooks a serene lake."
    assert (notes["seed"], notes["adapter"], notes["guidance_scale"]) == ("5", "adapter", "3.0")
    assert image_notes(out / "base-prompt01-seed5.png")["prompt"] == "The castle overlooks a serene lake."
    kept = out / "prompt00-seed3.png"
    before = (kept.stat().st_mtime_ns, (out / "prompt01-seed3.png").read_bytes())
    (out / "prompt01-seed3.png").unlink()
    assert main(words) == 0
    assert (kept.stat().st_mtime_ns, (out / "prompt01-seed3.png").read_bytes()) == before
    assert main([*words[:-3], "--out", str(out), "--seeds", "3"]) == 0  # another grid of the same pictures
    assert main([*words, "--guidance_scale", "5"]) == 2
    assert "exists with guidance_scale='3.0', asked is '5.0'; pass --overwrite" in capsys.readouterr().err


def test_a_prompt_that_loses_its_placeholder_is_not_drawn(trained, tmp_path, capsys):
    (tmp_path / "t.txt").write_text("a house " * 40 + "by a {}\n")
    words = ["generate", "--adapter", str(trained), "--prompts", str(tmp_path / "t.txt"), "--out", str(tmp_path / "o")]
    assert main(words) == 2
    assert "tokens, of 77 that are read: lost from 'house a" in capsys.readouterr().err
    assert not (tmp_path / "o").exists()


def test_a_word_that_nobody_knows_is_drawn_with_a_warning(trained, tmp_path, capsys):
    words = [
        "generate",
        "--adapter",
        str(trained),
        "--seeds",
        "0",
        "--num_inference_steps",
        "1",
        "--out",
        str(tmp_path),
    ]
    assert main([*words, "--prompt", "a <castel>", "--prompt", "a <castle>"]) == 0
    said = [line for line in capsys.readouterr().err.splitlines() if line.startswith("warning:")]
    assert said == ["warning: <castel>: is no word of the adapters, they bring <castle>"]


def test_a_checkpoint_is_the_adapter_of_its_step(trained, tmp_path, capsys):
    (tmp_path / "t.txt").write_text("photo of a {}.\n")
    checkpoints = trained / "checkpoints"
    last, earlier = (open_adapter(str(path)) for path in (checkpoints, checkpoints / "checkpoint-2.safetensors"))
    ours = read_artefact(trained / "adapter")
    assert last.digest() == ours.digest() != earlier.digest()
    assert last.about["tokens"] == ours.about["tokens"]
    words = ["generate", "--prompts", str(tmp_path / "t.txt"), "--seeds", "0", "--out", str(tmp_path / "o")]
    assert main([*words, "--adapter", str(checkpoints / "checkpoint-2.safetensors")]) == 0
    assert image_notes(tmp_path / "o" / "prompt00-seed0.png")["adapter_digest"] == earlier.digest()
    results = [tmp_path / "of_checkpoint.json", tmp_path / "of_adapter.json"]
    for source, result in zip((checkpoints, trained / "castle.safetensors"), results, strict=True):
        assert main(["inspect", str(source), "--json", str(result)]) == 0
    ours, theirs = (json.loads(result.read_text()) for result in results)
    for key in ("adapter", "about", "bytes"):
        ours.pop(key)
        theirs.pop(key)
    assert ours == theirs
    (tmp_path / "checkpoint-2.safetensors").write_bytes((checkpoints / "checkpoint-2.safetensors").read_bytes())
    assert main([*words, "--adapter", str(tmp_path / "checkpoint-2.safetensors")]) == 2
    assert "is read with the config.yaml of its run" in capsys.readouterr().err


def test_a_grid_that_generate_did_not_make_is_not_replaced(trained, tmp_path, capsys):
    (tmp_path / "t.txt").write_text("photo of a {}.\n")
    words = ["generate", "--adapter", str(trained / "adapter"), "--prompts", str(tmp_path / "t.txt"), "--seeds", "0"]
    own = tmp_path / "o" / "grid.png"
    own.parent.mkdir()
    own.write_bytes((trained / "images" / "grid.png").read_bytes())
    assert main([*words, "--out", str(own.parent)]) == 2
    assert f"error: {own}: exists and is no grid" in capsys.readouterr().err
    assert list(own.parent.iterdir()) == [own]
    assert own.read_bytes() == (trained / "images" / "grid.png").read_bytes()
    assert main([*words, "--out", str(own.parent), "--overwrite"]) == 0


def test_a_token_in_place_of_the_adapters_own_must_make_sense(trained, tmp_path, capsys):
    (tmp_path / "t.txt").write_text("photo of a castle\n")
    words = ["generate", "--adapter", str(trained / "adapter"), "--prompts", str(tmp_path / "t.txt"), "--out", "x"]
    assert main(words) == 2
    assert "t.txt, line 1: " in capsys.readouterr().err


@pytest.mark.parametrize("split", [dict(train_batch_size=1, gradient_accumulation_steps=2), dict(form="weight")])
def test_the_same_steps_however_they_are_computed(tmp_path, split):
    for name, settings in (("one", dict(train_batch_size=2)), ("two", dict(train_batch_size=2) | split)):
        config = write(tmp_path, name + ".yaml", **settings, output_dir=str(tmp_path / name), num_instance_images=1)
        assert train_main(["--config", config]) == 0
    one, two = tensors(tmp_path / "one"), tensors(tmp_path / "two")
    for key in one:
        torch.testing.assert_close(one[key], two[key], rtol=2e-3, atol=1e-5)


def test_half_precision_bases_train_float32_numbers(tmp_path):
    config = write(
        tmp_path, mixed_precision="bf16", num_instance_images=1, validation_prompt="a <castle>", validation_steps=1,
        resolution=32,
    )  # fmt: skip
    assert train_main(["--config", config]) == 0
    assert {value.dtype for value in tensors(tmp_path / "run").values()} == {torch.float32}
    assert tensors(tmp_path / "run")["atoms_delta.9x9"].abs().max() > 0


def test_gradient_checkpointing_and_validation_change_no_number(tmp_path):
    plain = write(tmp_path, "a.yaml", output_dir=str(tmp_path / "a"), num_instance_images=1)
    other = write(
        tmp_path,
        "b.yaml",
        output_dir=str(tmp_path / "b"),
        num_instance_images=1,
        gradient_checkpointing=True,
        validation_prompt="a <castle>",
        validation_steps=1,
        num_validation_images=1,
    )
    assert train_main(["--config", plain]) == train_main(["--config", other]) == 0
    assert same(tensors(tmp_path / "a"), tensors(tmp_path / "b"))


@pytest.mark.parametrize("number", [signal.SIGTERM, pytest.param(signal.SIGINT, marks=pytest.mark.slow)])
def test_a_signal_saves_a_checkpoint_and_resume_equals_never_having_stopped(tmp_path, number):
    whole = write(
        tmp_path, "whole.yaml", max_train_steps=20, num_instance_images=1, output_dir=str(tmp_path / "whole")
    )
    assert train_main(["--config", whole]) == 0
    stopped = write(tmp_path, max_train_steps=20, num_instance_images=1, checkpointing_steps=1000)
    process = subprocess.Popen(
        [sys.executable, "train_dreambooth_atoms.py", "--config", stopped], stderr=subprocess.PIPE, text=True
    )
    log = tmp_path / "run" / "log.jsonl"
    deadline = time.monotonic() + 120
    while not (log.exists() and log.read_text().count("\n") >= 2):
        assert process.poll() is None, process.stderr.read()
        assert time.monotonic() < deadline
        time.sleep(0.02)
    process.send_signal(number)
    message = process.communicate()[1]
    assert process.returncode == 128 + number, message
    assert f"--config {tmp_path / 'run'}/config.yaml --resume_from_checkpoint latest" in message
    assert "Traceback" not in message
    assert not (tmp_path / "run" / "adapter").exists()
    resolved = str(tmp_path / "run" / "config.yaml")
    assert train_main(["--config", resolved, "--resume_from_checkpoint", "latest"]) == 0
    assert same(tensors(tmp_path / "run"), tensors(tmp_path / "whole"))
    assert [json.loads(line)["step"] for line in log.read_text().splitlines()] == list(range(1, 21))
    # and once more: a finished run goes on when it is made longer, and its pictures are drawn anew
    before = (tmp_path / "run" / "images" / "instance-00.png").read_bytes()
    assert train_main(["--config", stopped, "--resume_from_checkpoint", "latest", "--max_train_steps", "21"]) == 0
    assert not same(tensors(tmp_path / "run"), tensors(tmp_path / "whole"))
    assert (tmp_path / "run" / "images" / "instance-00.png").read_bytes() != before


@pytest.mark.slow
@pytest.mark.parametrize("whom", ["the launcher", "the whole group"])
def test_sigterm_to_accelerate_launch_saves_a_checkpoint_and_leaves_no_process(tmp_path, whom):
    config = write(tmp_path, max_train_steps=500, num_instance_images=1, checkpointing_steps=1000)
    launch = ["accelerate.commands.launch", "--cpu", "--num_processes", "1", "train_dreambooth_atoms.py"]
    process = subprocess.Popen(
        [sys.executable, "-m", *launch, "--config", config],
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    log = tmp_path / "run" / "log.jsonl"
    deadline = time.monotonic() + 120
    while not (log.exists() and log.read_text().count("\n") >= 2):
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.02)
    (child,) = psutil.Process(process.pid).children()
    if whom == "the launcher":
        process.terminate()
    else:
        os.killpg(process.pid, signal.SIGTERM)
    process.wait(timeout=60)
    child.wait(timeout=60)
    steps = log.read_text().count("\n")
    assert steps < 500
    assert [path.name for path in (tmp_path / "run" / "checkpoints").iterdir()] == [f"checkpoint-{steps}.safetensors"]


@pytest.mark.slow
def test_two_processes_make_the_steps_of_one(tmp_path):
    one = write(tmp_path, "one.yaml", train_batch_size=2, num_instance_images=1, output_dir=str(tmp_path / "one"))
    assert train_main(["--config", one]) == 0
    two = write(tmp_path, "two.yaml", train_batch_size=1, num_instance_images=3, output_dir=str(tmp_path / "two"))
    command = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    run = subprocess.run(
        [sys.executable, *command, "train_dreambooth_atoms.py", "--config", two],
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
        env=dict(os.environ, ACCELERATE_USE_CPU="true"),
    )
    assert run.returncode == 0, run.stderr
    assert json.loads((tmp_path / "two" / "env.json").read_text())["processes"] == 2
    first, second = tensors(tmp_path / "one"), tensors(tmp_path / "two")
    for key in first:
        torch.testing.assert_close(first[key], second[key], rtol=2e-3, atol=1e-5)
    assert len(list((tmp_path / "two" / "images").glob("instance-*.png"))) == 3


def pictures(folder, *names):
    folder.mkdir()
    for name in names:
        Image.new("RGB", (64, 64), "red").save(folder / name)
    return folder


BAD = {
    "missing folder": (dict(instance_data_dir="{tmp}/none"), "none: no such folder"),
    "empty folder": (dict(instance_data_dir="{tmp}/empty"), "no images (it is empty)"),
    "no images": (dict(instance_data_dir="{tmp}/texts"), "no images (1 .txt file: a.txt)"),
    "truncated": (dict(instance_data_dir="{tmp}/truncated"), "b.jpg: cannot be read"),
    "tiny": (dict(instance_data_dir="{tmp}/tiny"), "1 x 1 px is too small"),
    "unknown key": (dict(lerning_rate=1, foo=2), "2 problems: unknown key 'foo'; unknown key 'lerning_rate'"),
    "unknown method": (dict(method="magic"), "method='magic': one of atoms, lora, locon"),
    "m=0": (dict(m=0), "m=0, kc=0: no atoms at all"),
    "m > K": (dict(m=10), "has filters of 9 taps, fewer than m=10"),
    "no target": (dict(target="nothing_like_this"), "target='nothing_like_this'"),
    "known token": (
        dict(placeholder_token="castle", instance_prompt="a castle", initializer_token="house"),
        "placeholder_token: 'castle' exists",
    ),
    "no such initializer": (dict(initializer_token="qqqqzzzz"), "initializer_token: 'qqqqzzzz' is"),
    "prompt without placeholder": (dict(instance_prompt="photo of a castle"), "lacks the placeholder <castle>"),
    "template without braces": (dict(prompts_file="{tmp}/plain.txt"), "plain.txt, line 1"),
    "no base": (dict(pretrained_model_name_or_path="./nowhere"), "neither an existing path nor a hub id"),
    "hub without network": (
        dict(pretrained_model_name_or_path="CompVis/stable-diffusion-v1-4"),
        "not in the local cache",
    ),
    "resolution": (dict(resolution=100), "resolution: 100 is not a multiple of 32"),
    "unknown packaged name": (dict(instance_data_dir="pocket:tower"), "'pocket:tower' is not packaged"),
    "nothing to resume": (dict(resume_from_checkpoint="checkpoint-3"), "holds no run to resume"),
    "output is a file": (dict(output_dir="{tmp}/plain.txt"), "plain.txt is a file"),
    "output holds files": (dict(output_dir="{tmp}/texts"), "holds files that are not a run"),
    "no clip": (dict(clip_model_name_or_path="./nowhere"), "clip_model_name_or_path: './nowhere'"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_one_line_and_exit_code_2_and_nothing_is_written(tmp_path, capsys, case):
    (tmp_path / "empty").mkdir()
    (tmp_path / "texts").mkdir()
    (tmp_path / "texts" / "a.txt").write_text("x")
    (tmp_path / "plain.txt").write_text("no braces\n")
    truncated = pictures(tmp_path / "truncated", "a.png", "b.jpg") / "b.jpg"
    truncated.write_bytes(truncated.read_bytes()[:400])
    pictures(tmp_path / "tiny")
    Image.new("RGB", (1, 1)).save(tmp_path / "tiny" / "a.png")
    settings, message = BAD[case]
    settings = {k: v.format(tmp=tmp_path) if isinstance(v, str) else v for k, v in settings.items()}
    before = sorted(tmp_path.rglob("*"))
    config = write(tmp_path, **settings)
    assert train_main(["--config", config]) == 2
    error = capsys.readouterr().err.strip()
    assert message in error
    assert len(error.splitlines()) == 1
    assert sorted(path for path in tmp_path.rglob("*") if str(path) != config) == before


@pytest.mark.parametrize("words", [["--foo", "1"], ["--m"], ["--resolutoin=5"], ["--config", "nowhere.yaml"]])
def test_bad_flags_are_one_line_and_exit_code_2(words, capsys):
    assert train_main(words) == 2
    error = capsys.readouterr().err.strip()
    assert error.startswith("error: ")
    assert len(error.splitlines()) == 1
    assert main(["nonsense"]) == 2
    assert capsys.readouterr().err == "error: no command 'nonsense'; see sd-atoms --help\n"
    assert main(["classify", "trian"]) == 2
    assert capsys.readouterr().err == "error: no command 'trian' (did you mean train?); see sd-atoms classify --help\n"


@pytest.mark.parametrize(("words", "names"), [([], COMMANDS), *(([name], own) for name, own in VERBS.items())])
def test_help_says_what_each_command_does(words, names, capsys):
    with pytest.raises(SystemExit):
        main([*words, "--help"])
    said = capsys.readouterr().out.partition("COMMAND\n")[2]
    for name in names:
        assert re.search(rf"^    {name}\s+[A-Z]\w+", said, re.MULTILINE)


def test_a_run_is_never_overwritten_by_accident(trained, tmp_path, capsys):
    before = {path: path.read_bytes() for path in trained.rglob("*") if path.is_file()}
    config = write(tmp_path, output_dir=str(trained))
    assert train_main(["--config", config]) == 2
    assert "holds another run; pass --overwrite to replace it" in capsys.readouterr().err
    assert train_main(["--config", config, "--resume_from_checkpoint", "latest", "--max_train_steps", "1"]) == 2
    assert "beyond the 1 steps asked for" in capsys.readouterr().err
    assert train_main(["--config", config, "--resume_from_checkpoint", "latest", "--learning_rate", "0.5"]) == 2
    assert "learning_rate was 0.01, now 0.5" in capsys.readouterr().err
    # a mistake found late must not have removed the old run either
    assert train_main(["--config", config, "--overwrite", "--target", "nothing"]) == 2
    assert {path: path.read_bytes() for path in trained.rglob("*") if path.is_file()} == before


def test_overwrite_replaces_all_of_the_old_run(tmp_path):
    config = write(tmp_path, num_instance_images=2)
    assert train_main(["--config", config]) == 0
    assert train_main(["--config", config, "--overwrite", "--num_instance_images", "1", "--max_train_steps", "1"]) == 0
    assert [path.name for path in (tmp_path / "run" / "checkpoints").iterdir()] == ["checkpoint-1.safetensors"]
    assert not (tmp_path / "run" / "images" / "instance-01.png").exists()


def test_files_beside_the_pictures_are_ignored_and_said_once(tmp_path, capsys):
    folder = tmp_path / "photos"
    folder.mkdir()
    for path in packaged_path("pocket:castle").glob("*.png"):
        (folder / path.name).write_bytes(path.read_bytes())
    for name in (".DS_Store", "Thumbs.db", ".hidden.png", "1.txt"):
        (folder / name).write_text("x")
    (folder / "nested_pictures").mkdir()
    config = write(tmp_path, instance_data_dir=str(folder), num_instance_images=1, max_train_steps=1)
    assert train_main(["--config", config]) == 0
    printed = capsys.readouterr().out
    for name in (".DS_Store", "Thumbs.db", "1.txt", "nested_pictures"):
        assert printed.count(name) == 1


@pytest.mark.parametrize("kind", ["corrupt", "pickle", "missing"])
def test_a_bad_adapter_is_one_line_and_exit_code_2(tmp_path, capsys, kind):
    (tmp_path / "t.txt").write_text(TEMPLATES)
    adapter = tmp_path / {"corrupt": "a.safetensors", "pickle": "a.bin", "missing": "none"}[kind]
    if kind == "corrupt":
        adapter.write_bytes(b"not tensors")
    if kind == "pickle":
        torch.save({}, adapter)
    words = ["--adapter", str(adapter), "--prompts", str(tmp_path / "t.txt"), "--out", str(tmp_path / "out")]
    assert main(["generate", *words]) == 2
    error = capsys.readouterr().err.strip()
    assert str(adapter) in error
    assert len(error.splitlines()) == 1
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("encoding", ["ascii", "cp1252"])
@pytest.mark.parametrize("words", [["train", "--help"], ["doctor", "--help"], ["sweep", "--help"], ["inspect"]])
def test_every_sign_is_printed_or_has_a_plain_substitute(trained, monkeypatch, words, encoding):
    out, err = (io.TextIOWrapper(io.BytesIO(), encoding=encoding) for _ in range(2))
    monkeypatch.setattr(sys, "stdout", out)
    monkeypatch.setattr(sys, "stderr", err)
    with contextlib.suppress(SystemExit):  # --help ends by it
        assert main([*words, str(trained)] if words == ["inspect"] else words) == 0
    out.flush()
    text = out.buffer.getvalue().decode(encoding)
    assert "?" not in text
    assert ("of beta" if words[0] == "train" else "|dF|" if words[0] == "inspect" else "...") in text or (
        encoding == "cp1252" and "…" in text
    )


@pytest.mark.slow
def test_a_locale_that_can_name_no_such_file_is_one_line_at_the_start(tmp_path):
    settings = dict(placeholder_token="<été>", instance_prompt="an <été>", output_dir=str(tmp_path / "run"))
    environment = dict(os.environ, PYTHONUTF8="0", PYTHONCOERCECLOCALE="0", LC_ALL="C", PYTHONPATH=os.getcwd())
    run = subprocess.run(
        [sys.executable, "-m", "sd_atoms", "train", "--config", write(tmp_path, **settings)],
        env=environment, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert run.returncode == 2
    assert run.stderr.startswith("error: placeholder_token: the locale (ascii) can name no file 'ete'")
    assert len(run.stderr.splitlines()) == 1
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("top", ["1", "0"])
def test_a_reader_that_leaves_early_is_no_error(trained, monkeypatch, capsys, top):
    """sd-atoms inspect … | head -1"""
    reader, writer = os.pipe()
    os.close(reader)
    with os.fdopen(writer, "w") as stream:
        monkeypatch.setattr(sys, "stdout", stream)
        assert main(["inspect", str(trained), "--top", top]) == 128 + signal.SIGPIPE
    assert capsys.readouterr().err == ""


def test_help_lists_every_setting(capsys):
    with pytest.raises(SystemExit) as stop:
        train_main(["--help"])
    assert stop.value.code == 0
    text = capsys.readouterr().out
    for flag in ("--pretrained_model_name_or_path", "--placeholder_token", "--no-train_token_embedding", "--form"):
        assert flag in text
    groups = ("model:", "data:", "token and text encoder:", "prior preservation:", "adapter:", "run:", "objective:",
              "optimiser:", "validation:", "pictures at the end:", "precision and logging:", "sharing:")  # fmt: skip
    assert "by its kind: atoms 0.01, block 0.01, lora 0.0001" in " ".join(text.split())
    assert "embedding row; none = 0.001" in " ".join(text.split())
    places = [text.index(f"\n{group}\n") for group in groups]
    assert places == sorted(places)
    assert len(text[: places[0]].splitlines()) < 12


def test_a_disk_that_fills_up_under_a_log_ends_in_one_line(tmp_path, monkeypatch, capsys):
    class Full(io.StringIO):
        def write(self, text):
            raise OSError(errno.ENOSPC, "No space left on device")

    def opened(path, *mode, **settings):
        return Full() if Path(path).name == "log.jsonl" else open(path, *mode, **settings)

    monkeypatch.setattr("sd_atoms.training.steps.open", opened, raising=False)
    assert train_main(["--config", write(tmp_path)]) == 2
    error = capsys.readouterr().err.strip()
    assert error.splitlines()[-1].startswith("error: no space left on the disk")
    assert "Traceback" not in error
