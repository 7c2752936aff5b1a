"""Settings: one table of defaults behind flags and YAML, and every mistake at once."""

import importlib
from pathlib import Path

import pytest
from helpers import train_config

from sd_atoms.cli import COMMANDS
from sd_atoms.data.prompts import load_templates
from sd_atoms.errors import UserError
from sd_atoms.settings import fields_of, launcher_notes, resolve, to_yaml
from sd_atoms.training.config import TrainConfig
from sd_atoms.training.optimiser import with_defaults

NEEDED = dict(pretrained_model_name_or_path="pocket", instance_data_dir="photos", instance_prompt="a <c>")


def test_the_command_line_wins_over_the_file_and_the_file_over_defaults(tmp_path):
    path = tmp_path / "c.yaml"
    path.write_text("m: 4\nlearning_rate: 5e-3\ntrain_batch_size: 2\n")
    config = resolve(TrainConfig, NEEDED | {"m": "6"}, str(path))
    assert (config.method.m, config.optimiser.learning_rate, config.loop.train_batch_size, config.loop.seed) == (
        6,
        5e-3,
        2,
        0,
    )


def test_the_written_settings_read_back_the_same(tmp_path):
    config = resolve(
        TrainConfig, NEEDED | {"placeholder_token": "<c>", "initializer_token": "castle", "overwrite": True}
    )
    (tmp_path / "c.yaml").write_text(to_yaml(config))
    assert resolve(TrainConfig, {}, str(tmp_path / "c.yaml")) == config


def test_every_mistake_is_reported_at_once_with_the_nearest_name(tmp_path):
    path = tmp_path / "c.yaml"
    path.write_text("learning_rat: 1\nm: -1\nseed: 1.5\noverwrite: maybe\nsolver: qr\nlearning_rate: nan\nmethod: 3\n")
    with pytest.raises(UserError) as caught:
        resolve(TrainConfig, {}, str(path), ["--outptu_dir", "x"])
    text = str(caught.value)
    assert "\n" not in text
    for part in (
        "11 problems",
        "unknown flag --outptu_dir (did you mean output_dir?)",
        "unknown key 'learning_rat' (did you mean learning_rate?)",
        "m: -1 is out of range, 0 or more is allowed",
        "seed: 1.5 is not a whole number",
        "overwrite: 'maybe' is not true or false",
        "solver: 'qr' is not one of svd",
        "learning_rate: nan is out of range",
        "method: 3 is a int, text is needed",
        "pretrained_model_name_or_path (--base) is required",
        "instance_data_dir is required",
    ):
        assert part in text, part


def test_numbers_as_people_write_them():
    for text, value in (("1e-2", 0.01), ("1", 1.0), (".5", 0.5)):
        assert resolve(TrainConfig, NEEDED | {"learning_rate": text}).optimiser.learning_rate == value
    assert resolve(TrainConfig, NEEDED | {"num_train_epochs": None}).loop.num_train_epochs is None


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("a: [", "not valid YAML"),
        ("- a", "must hold `name: value` lines"),
        ("\xff", "cannot be read"),
        (None, "cannot be read"),
    ],
)
def test_files_that_hold_no_settings(tmp_path, content, message):
    path = tmp_path / "c.yaml"
    if content is not None:
        path.write_bytes(content.encode("latin-1"))
    with pytest.raises(UserError, match=message):
        resolve(TrainConfig, {}, str(path))


def test_settings_that_do_not_go_together_are_reported_at_once():
    with pytest.raises(UserError) as caught:
        train_config(**NEEDED, placeholder_token="<castle>", prompts_file="p.txt")
    assert "lacks the placeholder <castle>" in str(caught.value)
    assert "initializer_token is required" in str(caught.value)
    with pytest.raises(UserError, match="train_token_embedding needs a placeholder_token"):
        train_config(**NEEDED, train_token_embedding=True)


@pytest.mark.parametrize("name", ["castle", "canal", "castle_blocks", "canal_blocks"])
def test_the_packaged_configurations_are_valid(name):
    word = f"<{name.removesuffix('_blocks')}>"
    assert resolve(TrainConfig, {}, f"configs/pocket/{name}.yaml").text.placeholder_token == word


def test_several_concepts_come_from_yaml_and_go_back_into_it(tmp_path):
    path = tmp_path / "c.yaml"
    path.write_text(
        "pretrained_model_name_or_path: pocket\n"
        "concepts:\n"
        "- {instance_data_dir: a, instance_prompt: photo of <a>, placeholder_token: <a>, initializer_token: castle}\n"
        "- {instance_data_dir: b, instance_prompt: photo of b, repeats: 3}\n"
    )
    config = resolve(TrainConfig, {}, str(path))
    assert [concept.repeats for concept in config.data.concepts] == [1, 3]
    assert config.data.concepts[0].tokens == ("<a>",)
    again = tmp_path / "again.yaml"
    again.write_text(to_yaml(config))
    assert resolve(TrainConfig, {}, str(again)) == config


def test_files_of_a_concept_count_from_the_file_that_names_them(tmp_path):
    path, prompts = tmp_path / "c.yaml", tmp_path / "lines.txt"
    prompts.touch()
    entry = "{instance_data_dir: a, instance_prompt: a cat, initializer_token: cat, instance_prompts_file: %s}"
    path.write_text(
        f"pretrained_model_name_or_path: pocket\nconcepts: [{entry % 'lines.txt'}, {entry % 'few_shot'}]\n"
    )
    found = [concept.instance_prompts_file for concept in resolve(TrainConfig, {}, str(path)).data.concepts]
    assert found == [str(prompts), "few_shot"]


def test_who_takes_another_programs_name_is_told_ours():
    with pytest.raises(UserError) as caught:
        resolve(TrainConfig, {"base": "pocket"}, None, ["--network_dim=4", "--min_snr_gamma", "--enable_bucket"])
    for theirs, ours in (("network_dim=4", "rank"), ("min_snr_gamma", "snr_gamma"), ("enable_bucket", "aspect_ratio")):
        assert f"unknown flag --{theirs} (here: {ours}" in str(caught.value)
    with pytest.raises(UserError) as caught:
        resolve(TrainConfig, {}, None, ["--network_args", "--save_every_n_epochs"])
    assert "did you mean" not in str(caught.value)
    flags = {"base": "pocket", "instance_data_dir": "a", "instance_prompt": "a cat", "use_8bit_adam": True}
    assert resolve(TrainConfig, flags).optimiser.optimizer == "adamw8bit"


def test_every_mistake_in_a_list_of_concepts_is_reported_at_once(tmp_path):
    path = tmp_path / "c.yaml"
    path.write_text(
        "pretrained_model_name_or_path: pocket\nconcepts: [{instance_promt: a, repeats: 0}, {repeats: x}]\n"
    )
    with pytest.raises(UserError) as caught:
        resolve(TrainConfig, {}, str(path))
    for part in (
        "concepts: [0] unknown key 'instance_promt' (did you mean instance_prompt?)",
        "[0] repeats: 0 is out of range",
        "[1] repeats: 'x' is not a whole number",
    ):
        assert part in str(caught.value)
    path.write_text("pretrained_model_name_or_path: pocket\nconcepts: 3\n")
    with pytest.raises(UserError, match="concepts: 3 is not a list"):
        resolve(TrainConfig, {}, str(path))


def test_a_switch_that_stands_for_a_value_is_one(tmp_path):
    path = tmp_path / "c.yaml"
    prior = dict(class_prompt="a castle", class_data_dir="classes")
    path.write_text("with_prior_preservation: true\n")
    assert resolve(TrainConfig, NEEDED | prior, str(path)).prior.prior == "images"
    assert resolve(TrainConfig, NEEDED | prior | {"with_prior_preservation": True}).prior.prior == "images"
    teacher = {"prior": "teacher", "class_prompt": "a castle"}
    assert resolve(TrainConfig, NEEDED | teacher, str(path)).prior.prior == "teacher"
    path.write_text("with_prior_preservation: false\n")
    assert resolve(TrainConfig, NEEDED, str(path)).prior.prior == "none"
    path.write_text("with_prior_preservation: maybe\n")
    with pytest.raises(UserError, match="unknown key 'with_prior_preservation'|is not true or false"):
        resolve(TrainConfig, NEEDED, str(path))


def test_flags_win_over_the_file_the_file_over_the_launcher_and_the_launcher_over_defaults(tmp_path, monkeypatch):
    path = tmp_path / "c.yaml"
    path.write_text("mixed_precision: fp16\n")
    assert resolve(TrainConfig, NEEDED).precision.mixed_precision == "no"
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    monkeypatch.setenv("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "4")
    config = resolve(TrainConfig, NEEDED)
    assert (config.precision.mixed_precision, config.loop.gradient_accumulation_steps) == ("bf16", 4)
    assert launcher_notes(config) == [
        "gradient_accumulation_steps: 4, as accelerate launch says",
        "mixed_precision: bf16, as accelerate launch says",
    ]
    config = resolve(TrainConfig, NEEDED, str(path))
    assert config.precision.mixed_precision == "fp16"
    assert "mixed_precision: fp16, as set here; accelerate launch says bf16" in launcher_notes(config)
    assert resolve(TrainConfig, NEEDED | {"mixed_precision": "no"}, str(path)).precision.mixed_precision == "no"
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "fp8")
    with pytest.raises(UserError, match="ACCELERATE_MIXED_PRECISION: 'fp8' is not one of no, fp16, bf16"):
        resolve(TrainConfig, NEEDED)


def test_a_file_named_in_a_configuration_counts_from_there(tmp_path, monkeypatch):
    folder = tmp_path / "configs"
    folder.mkdir()
    (folder / "templates.txt").write_text("a {}\n")
    (folder / "c.yaml").write_text("prompts_file: templates.txt\nplaceholder_token: <c>\ninitializer_token: castle\n")
    monkeypatch.chdir(tmp_path)
    config = resolve(TrainConfig, NEEDED, "configs/c.yaml")
    assert Path(config.images.prompts_file).resolve() == folder / "templates.txt"


def test_the_word_none_switches_a_file_off():
    assert resolve(TrainConfig, {"prompts_file": "none"}, "pocket/castle").images.prompts_file is None
    assert resolve(TrainConfig, {"prompts_file": "./none"}, "pocket/castle").images.prompts_file == "./none"


def test_packaged_files_go_by_short_names(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert resolve(TrainConfig, {}, "pocket/castle").text.placeholder_token == "<castle>"
    assert len(load_templates("few_shot")) == 20
    assert len(load_templates(resolve(TrainConfig, {}, "sd14/style").images.prompts_file)) == 12
    with pytest.raises(UserError, match="pocket/palace: cannot be read"):
        resolve(TrainConfig, {}, "pocket/palace")


def test_every_command_calls_its_base_alike():
    takes = []
    for command in COMMANDS:
        settings = getattr(importlib.import_module(f"sd_atoms.commands.{command.replace('-', '_')}"), "Settings", None)
        fields = {} if settings is None else fields_of(settings)
        if "pretrained_model_name_or_path" in fields:
            assert "base" in fields["pretrained_model_name_or_path"][1].metadata["aliases"], command
            takes.append(command)
    assert takes == ["train", "doctor", "generate", "drift", "sheet", "pick", "inspect", "export", "import", "extract"]
    config = resolve(TrainConfig, {"base": "pocket", "instance_data_dir": "photos", "instance_prompt": "a <c>"})
    assert config.base.pretrained_model_name_or_path == "pocket"


@pytest.mark.parametrize("path", sorted(path.stem for path in Path("configs/sd14").glob("*.yaml")))
def test_starting_settings_for_stable_diffusion_are_whole(path):
    config = with_defaults(resolve(TrainConfig, {}, f"sd14/{path}"))
    assert config.base.pretrained_model_name_or_path == "CompVis/stable-diffusion-v1-4"
    assert config.method.method == "atoms"
