"""Trackers: which there are, and what they are shown."""

from types import SimpleNamespace

import pytest
from helpers import CASTLE, train_config
from PIL import Image

from sd_atoms.errors import UserError
from sd_atoms.training import tracking
from sd_atoms.training.run_folder import open_run
from sd_atoms.training.tracking import TRACKERS, start_trackers, track_images, trackers_of


@pytest.fixture(autouse=True)
def installed(monkeypatch):
    monkeypatch.setattr(tracking, "get_available_trackers", lambda: ["tensorboard", "wandb"])


def test_every_tracker_that_accelerate_knows_is_known():
    assert {"tensorboard", "wandb", "comet_ml", "mlflow", "aim", "clearml", "dvclive", "swanlab"} <= set(TRACKERS)


@pytest.mark.parametrize(
    ("report_to", "names"),
    [
        ("none", []),
        ("tensorboard", ["tensorboard"]),
        ("wandb, tensorboard,wandb", ["wandb", "tensorboard"]),
        ("all", ["tensorboard", "wandb"]),
    ],
)
def test_trackers_come_alone_in_lists_or_all(report_to, names):
    assert trackers_of(report_to) == names


@pytest.mark.parametrize(
    ("report_to", "message"),
    [
        ("wandbb", "'wandbb' has 'wandbb' in it; none, all, or a list of aim, "),
        ("wandb,none", "has 'none' in it"),
        ("wandb,", "has '' in it"),
        ("wandb,comet_ml", "comet_ml is not installed; `pip install comet-ml`"),
    ],
)
def test_a_tracker_that_is_not_there_is_one_line(report_to, message):
    with pytest.raises(UserError, match="^report_to: ") as error:
        trackers_of(report_to)
    assert message in str(error.value)


def test_images_go_to_every_tracker_that_takes_them():
    seen = []

    def tracker(name):
        return SimpleNamespace(name=name, log_images=lambda values, **more: seen.append((name, values, more)))

    images = [Image.new("RGB", (8, 8), colour) for colour in ("red", "blue")]
    trackers = [tracker(name) for name in ("tensorboard", "wandb", "aim")] + [SimpleNamespace(name="dvclive")]
    track_images(SimpleNamespace(trackers=trackers), "validation", images, 3)
    assert [name for name, _, _ in seen] == ["tensorboard", "wandb", "aim", "aim"]
    assert seen[0][1]["validation"].shape == (2, 8, 8, 3)
    assert seen[0][2] == {"step": 3, "dataformats": "NHWC"}
    assert seen[1][1:] == ({"validation": images}, {"step": 3})
    assert [values for _, values, _ in seen[2:]] == [{"validation 0": images[0]}, {"validation 1": images[1]}]


def contents(folder):
    return {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("there", ["an old run", "nothing"])
def test_a_tracker_that_cannot_begin_leaves_the_old_run_as_it_was(there, tmp_path):
    run, ended = tmp_path / "run", []
    config = train_config(**CASTLE, output_dir=str(run), overwrite=True)
    names = (
        "adapter/a.safetensors",
        "checkpoints/checkpoint-1.safetensors",
        "logs/sd-atoms/old",
        "config.yaml",
        "log.jsonl",
    )
    for name in names if there == "an old run" else ():
        (run / name).parent.mkdir(parents=True, exist_ok=True)
        (run / name).write_text(name)

    def without_login(project, init_kwargs):
        for place in ("sd-atoms", "other"):
            (run / "logs" / place).mkdir(exist_ok=True)
            (run / "logs" / place / "new").touch()
        raise RuntimeError("no login\nfound")

    accelerator = SimpleNamespace(
        init_trackers=without_login, trackers=[SimpleNamespace(finish=lambda: ended.append(True))]
    )
    before = contents(tmp_path)
    with pytest.raises(UserError, match=r"^report_to: a tracker cannot begin \(no login found\)"):
        open_run(config, 1, lambda folder: start_trackers(accelerator, folder, "run"))
    assert contents(tmp_path) == before
    assert not run.exists() or [path.name for path in run.rglob("*")].count("new") == 0
    assert ended == [True]
    accelerator.init_trackers = lambda project, init_kwargs: (run / "logs" / "new").touch()
    open_run(config, 1, lambda folder: start_trackers(accelerator, folder, "run"))
    assert {str(path) for path in contents(run)} == {"config.yaml", "env.json", "logs/new"}
    assert not (run / "logs" / "wandb").exists()
