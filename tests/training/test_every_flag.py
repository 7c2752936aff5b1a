"""No setting of a training is silently without effect: each changes what the run makes, or is refused by its name.

The settings come from the dataclass, so a new one is tested as soon as it is there, and fails by its name where it
does nothing.
"""

import hashlib
import json
import re
from pathlib import Path

import datasets
import pytest
import torch
from accelerate.state import AcceleratorState, GradientState, PartialState
from diffusers import UNet2DConditionModel
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file
from tiny import PHOTOS, SIDE, one_core, write_photos, write_tiny_base

from sd_atoms.commands import train
from sd_atoms.data.config import Concept
from sd_atoms.errors import UserError
from sd_atoms.machine import make_accelerator
from sd_atoms.settings import build, fields_of
from sd_atoms.training.config import TrainConfig

NAMES = list(fields_of(TrainConfig))
# paths are relative to the folder of the test
SMALL = dict(
    pretrained_model_name_or_path="tiny",
    instance_data_dir="photos",
    instance_prompt="photo of a <castle>.",
    placeholder_token="<castle>",
    initializer_token="castle",
    train_batch_size=1,
    max_train_steps=2,
    lr_warmup_steps=0,
    num_instance_images=1,
    num_inference_steps=1,
    report_to="none",
)
IMAGES = dict(prior="images", class_prompt="a castle", class_data_dir="classes", num_class_images=1)
TEACHER = dict(prior="teacher", class_prompt="a castle")
TABLE = dict(dataset_name="table", instance_data_dir=None)
NO_CONCEPT = dict.fromkeys(("instance_data_dir", "instance_prompt", "placeholder_token", "initializer_token"))
TASK = NO_CONCEPT | dict(dataset_name="vtab:patch_camelyon", dataset_dir="labelled", max_train_steps=3)
VALIDATED = dict(validation_prompt="a <castle>", validation_steps=1, num_validation_images=1)
TEXT = dict(train_text_encoder=True)
PUSHED = dict(push_to_hub=True, hub_model_id="me/castle")
# name -> another value, where that is not simply another choice, the opposite, or a number beside the default
OTHER = dict(
    pretrained_model_name_or_path="pocket",
    base_config="pocket",
    revision="v1",
    variant="fp16",
    instance_data_dir="few",
    instance_prompt="a drawing of <castle>.",
    instance_prompts_file="templates.txt",
    concepts=tuple(Concept("photos", f"photo of a <{n}>.", None, f"<{n}>", "castle") for n in ("a", "b")),
    dataset_name="table",
    dataset_config_name="large",
    dataset_dir="labelled/fewer",
    dataset_split="test",
    image_column="other",
    label_column="other_label",
    caption_column="text",
    max_train_samples=1,
    caption_dropout=1.0,
    resolution=2 * SIDE,
    mask_weight=0.5,
    latents_in_memory=0,
    cache_dir="cache",
    placeholder_token="<castle> <tower>",
    initializer_token="canal",
    text_kc=2,
    prior="teacher",
    class_prompt="a castle at night",
    class_prompts_file="prompts.txt",
    class_data_dir="more",
    method="bitfit",
    peft_config="adapter_config.json",
    budget="300",
    block_size=2,
    factor=2,
    m=4,
    kc=2,
    target="conv",
    optimizer="prodigy",
    adam_beta1=0.5,
    adam_beta2=0.5,
    max_grad_norm=0.01,
    ema_decay=0.9,
    validation_prompt="a <castle>",
    validation_steps=2,
    validation_loss_steps=1,
    num_train_epochs=1,
    checkpointing_steps=1,
    checkpoints_total_limit=1,
    prediction_type="v_prediction",
    max_train_steps=3,
    prompts_file="templates.txt",
    clip_model_name_or_path="pocket:clip",
    output_dir="runs/other",
    resume_from_checkpoint="latest",
    report_to="tensorboard",
    mixed_precision="bf16",
    hub_model_id="me/other",
)
# names -> what these are tried with, without and with the other value
BESIDE = {
    "dataset_config_name dataset_split image_column caption_column max_train_samples": TABLE,
    "dataset_dir label_column class_balanced": TASK,
    "placeholder_token": dict(instance_prompt="photo of a <castle> <tower>."),
    "text_adapter text_kc text_learning_rate": TEXT,
    "text_rank": TEXT | dict(text_adapter="lora"),
    "masks": dict(instance_data_dir="masked"),
    "mask_weight": dict(instance_data_dir="masked", masks=True),
    "class_data_dir num_class_images prior_loss_weight": IMAGES,
    "image_interpolation_mode": dict(max_train_steps=3),
    "class_prompt class_prompts_file": TEACHER,
    "peft_config": dict(learning_rate=1e-2),
    "rank alpha": dict(method="lora"),
    "factor": dict(method="lokr"),
    "block_size": dict(method="oft", block_size=4),
    "train_beta beta_learning_rate": dict(m1=2),
    "kc": dict(target="conv"),
    "m_c block_layers": dict(target="conv", kc=2),
    "l1": dict(solver="sparse", l1=0.1),
    "token_learning_rate": dict(train_token_embedding=True),
    "huber_c": dict(loss_type="huber"),
    "rescale_betas_zero_snr": dict(prediction_type="v_prediction"),
    "lr_num_cycles": dict(lr_scheduler="cosine_with_restarts"),
    "lr_power": dict(lr_scheduler="polynomial"),
    "validation_steps num_validation_images": VALIDATED,
    "holdout_images keep": dict(validation_loss_steps=1),
    "generation_batch_size": dict(num_instance_images=2),
    "checkpoints_total_limit": dict(checkpointing_steps=1),
    "strict_resume": dict(resume_from_checkpoint="latest", max_train_steps=3),
    "push_to_hub hub_model_id hub_private_repo": PUSHED,
}
BESIDE = {name: settings for names, settings in BESIDE.items() for name in names.split()}
# name -> what else changes with it, such as what it stands in the place of
INSTEAD = dict(
    concepts=NO_CONCEPT,
    dataset_name=dict(instance_data_dir=None),
    class_prompts_file=dict(class_prompt=None),
    prior=dict(class_prompt="a castle"),
    push_to_hub=dict(hub_model_id=None),
)

REFUSED_WITHOUT = ("overwrite", "resume_from_checkpoint", "on_bad_image", "kc")  # only with it is there a run


def another(name):
    """Another value of a setting than its default."""
    if name in OTHER:
        return OTHER[name]
    _, field = fields_of(TrainConfig)[name]
    default = SMALL.get(name, BESIDE.get(name, {}).get(name, field.default))
    if isinstance(default, bool):
        return not default
    if field.metadata["choices"]:
        return next(choice for choice in field.metadata["choices"] if choice != default)
    if default is None:
        return 2
    assert isinstance(default, (int, float)), f"{name}: OTHER needs another value of it"
    return default + 1 if isinstance(default, int) else 2 * default or 0.5


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    """What the settings name: a base, pictures, tables, prompts."""
    folder = tmp_path_factory.mktemp("inputs")
    write_tiny_base(folder / "tiny")
    for name in ("photos", "few", "classes", "more", "masked"):
        write_photos(folder / name)
    half = Image.new("L", PHOTOS["1"][:2], 255)
    half.paste(0, (0, 0, 48, 64))
    half.save(folder / "masked" / "1.mask.png")
    (folder / "few" / "1.png").unlink()
    (folder / "classes" / "1.png").rename(folder / "classes" / "4.png")
    (folder / "templates.txt").write_text("a {} at night\n")
    (folder / "prompts.txt").write_text("a castle in snow\n")
    (folder / "adapter_config.json").write_text(
        json.dumps({"peft_type": "LORA", "r": 2, "target_modules": ["to_q", "to_v"]})
    )
    rows = [str(folder / "photos" / f"{n}.png") for n in (1, 2)]
    columns = {"image": rows, "other": rows[::-1], "text": ["a <castle>", "the <castle>"]}
    table = datasets.Dataset.from_dict(columns)
    for column in ("image", "other"):
        table = table.cast_column(column, datasets.Image())
    datasets.DatasetDict(train=table, test=table.select([1])).save_to_disk(folder / "table")
    labels = {"image": [*rows, rows[0]], "label": [0, 1, 1], "other_label": [1, 0, 1]}
    table = datasets.Dataset.from_dict(labels).cast_column("image", datasets.Image())
    for place, chosen in (("labelled", table), ("labelled/fewer", table.select([0, 1]))):
        datasets.DatasetDict(train=chosen).save_to_disk(folder / place)
    return folder


@pytest.fixture
def place(inputs, tmp_path, monkeypatch):
    """A working folder with the inputs, where nothing reaches the hub."""
    for path in inputs.iterdir():
        (tmp_path / path.name).symlink_to(path)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(train, "who_may_push", lambda: ["me"])
    monkeypatch.setattr(train, "own_repo_id", lambda folder: "me/castle")
    with one_core():
        yield tmp_path


def contents(path):
    """Of a file that a run made, without what time it took and on which machine."""
    if path.suffix == ".safetensors":
        with safe_open(path, "pt") as file:
            values = [
                hashlib.sha256(file.get_tensor(key).numpy().tobytes()).hexdigest() for key in sorted(file.keys())
            ]
            return sorted(file.keys()), values, file.metadata()
    if path.suffix in (".json", ".jsonl"):
        return re.sub(r'"seconds": [\d.]+', "", path.read_text())
    return path.read_bytes()


def outcome(place, monkeypatch, capsys, settings):
    """All that a run does, as it is seen from outside: its files, what it prints and what it asks of others."""
    asked, forward = [], UNet2DConditionModel.forward
    with monkeypatch.context() as patch:

        def record(module, name):
            before = getattr(module, name)

            def recorded(*args, **more):
                asked.append((name, str(args[1:]), str(more)))
                return before(*args, **more)

            patch.setattr(module, name, recorded)

        def seen(self, sample, *args, **more):
            asked.append(("forward", sample.shape))
            return forward(self, sample, *args, **more)

        record(UNet2DConditionModel, "enable_gradient_checkpointing")
        patch.setattr(UNet2DConditionModel, "forward", seen)
        patch.setattr(train, "push", lambda folder, *args: asked.append(("push", args)) or "the hub")
        remove = train.remove_scratch
        patch.setattr(
            train, "remove_scratch", lambda folder: asked.append(("scratch", folder.exists())) or remove(folder)
        )
        try:
            train.run(build(TrainConfig, {**SMALL, "output_dir": "runs/castle", **settings}))
        except UserError as error:
            return str(error)
    asked.append(torch.backends.cuda.matmul.allow_tf32)
    printed = re.sub(r"\d+ s;|\.\d+ s\b", "", capsys.readouterr().out)
    files = {}
    for folder in (place / "runs", place / "cache"):
        for path in sorted(folder.rglob("*")):
            if path.is_file() and path.name not in ("config.yaml", "env.json", "README.md"):
                own = "logs" in path.parts
                files["logs" if own else str(path.relative_to(place))] = None if own else contents(path)
    return asked, printed, files


def before(name, place):
    """What has to be there before a setting can do something."""
    run = Path("runs/castle")
    if name in ("overwrite", "resume_from_checkpoint", "strict_resume"):
        train.run(build(TrainConfig, {**SMALL, "output_dir": str(run)}))
    if name in ("strict_resume", "on_bad_image"):
        (place / "photos").unlink()
        write_photos(place / "photos")
        (place / "photos" / "1.png").write_bytes(b"")
    if name == "strict_resume":
        (place / "photos" / "1.png").write_bytes((place / "photos" / "2.png").read_bytes())


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", NAMES)
def test_every_setting_changes_what_a_run_does_or_is_refused_by_name(name, place, inputs, monkeypatch, capsys):
    beside = BESIDE.get(name, {})
    changed = {**beside, **INSTEAD.get(name, {}), name: another(name)}
    found = []
    for turn, settings in enumerate((beside, changed)):
        own = place / str(turn)
        own.mkdir()
        for path in inputs.iterdir():
            (own / path.name).symlink_to(path)
        monkeypatch.chdir(own)
        before(name, own)
        capsys.readouterr()
        found.append(outcome(own, monkeypatch, capsys, settings))
    plain, other = found
    assert not isinstance(plain, str) or name in REFUSED_WITHOUT, plain
    if isinstance(other, str):
        assert name in other, f"{name}: refused without its name: {other}"
    else:
        assert other != plain, f"{name}: {changed[name]!r} changes nothing"


@pytest.mark.parametrize("name", [name for name in BESIDE if fields_of(TrainConfig)[name][1].metadata["needs"]])
def test_a_setting_that_would_do_nothing_is_refused_by_its_name(name):
    with pytest.raises(UserError, match=rf"(^|; ){name}(=\S+)? needs "):
        build(TrainConfig, {**SMALL, name: another(name) or 0})


@pytest.mark.slow  # tracing takes its time
@pytest.mark.filterwarnings("ignore")
def test_the_compiler_that_the_launcher_names_is_used_and_makes_the_same(place, monkeypatch, capsys):
    plain = outcome(place, monkeypatch, capsys, dict(output_dir="runs/plain"))
    used = []
    compiled = torch.compile
    monkeypatch.setattr(
        torch, "compile", lambda *args, **more: used.append(more["backend"]) or compiled(*args, **more)
    )
    monkeypatch.setenv("ACCELERATE_DYNAMO_BACKEND", "EAGER")
    for state in (AcceleratorState, GradientState, PartialState):
        state._reset_state()
    outcome(place, monkeypatch, capsys, {})
    assert used == ["eager"]
    before, after = (load_file(place / "runs" / name / "castle.safetensors") for name in ("plain", "castle"))
    for key, value in before.items():
        torch.testing.assert_close(after[key], value)
    assert not isinstance(plain, str)


def test_the_launchers_choice_of_the_cpu_holds(monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    assert make_accelerator().device.type == "cpu"
