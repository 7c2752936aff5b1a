"""`sd-atoms drift`: what an adapter does to pictures of other things."""

import json
from pathlib import Path

import pytest
import torch

from sd_atoms import AtomsConfig, save_atoms
from sd_atoms.cli import main
from sd_atoms.commands.drift import Settings, drift_by_prompt, drift_text, measure_drift
from sd_atoms.data.prompts import load_prompts
from sd_atoms.errors import UserError
from sd_atoms.evaluation.clip import ClipFeatures
from sd_atoms.machine import make_accelerator
from sd_atoms.pipeline.sampling import Sampling
from sd_atoms.tuner import AtomsLayer

UNRELATED = Path(__file__).parents[2] / "prompts" / "unrelated.txt"
HEADER = dict(base="pocket", sampling=dict(guidance_scale=3.0, num_inference_steps=2, scheduler="ddim"))
PROMPTS = "# other things\nA church under a starry night sky.\n\nA barn in the snow.\n"


def adapter(pipe, path, size, about=HEADER):
    """Saves an adapter whose atoms moved by random numbers of that size; it stays in `pipe`."""
    generator = torch.Generator().manual_seed(0)
    pipe.unet.add_adapter(AtomsConfig(m=9))
    for layer in pipe.unet.modules():
        if isinstance(layer, AtomsLayer):
            delta = layer.atoms_delta["default"]
            delta.data.add_(size * torch.randn(delta.shape, generator=generator))
    return str(save_atoms(pipe, path, about=about))


@pytest.fixture
def prompts(tmp_path):
    (tmp_path / "prompts.txt").write_text(PROMPTS)
    return str(tmp_path / "prompts.txt")


def test_an_adapter_that_changes_nothing_does_not_drift(pipe, prompts, tmp_path):
    source = adapter(pipe, tmp_path / "a.safetensors", 0.0)
    asked = Settings(adapter=source, prompts=prompts, seeds="0-1", clip_model_name_or_path="pocket:clip")
    result = measure_drift(asked, make_accelerator())
    assert 0 <= result["drift"] < 1e-6
    assert all(0 <= value < 1e-6 for value in result["per_prompt"].values())
    assert list(result["per_prompt"]) == ["A church under a starry night sky.", "A barn in the snow."]
    assert (result["base"], result["seeds"], result["sampling"]["num_inference_steps"]) == ("pocket", [0, 1], 2)


def test_the_command_says_how_far_a_strong_one_drifts(pipe, prompts, tmp_path, capsys):
    source, file = adapter(pipe, tmp_path / "a.safetensors", 0.1), tmp_path / "drift.json"
    words = ["drift", "--adapter", source, "--prompts", prompts, "--seeds", "0,5", "--json", str(file)]
    assert main([*words, "--clip_model_name_or_path", "pocket:clip"]) == 0
    result = json.loads(file.read_text())
    assert 1e-3 < result["drift"] < 1
    assert result["drift"] == pytest.approx(sum(result["per_prompt"].values()) / 2)
    printed = capsys.readouterr().out
    assert printed.strip() == drift_text(result)
    lines = printed.splitlines()
    worst = max(result["per_prompt"], key=result["per_prompt"].get)
    assert lines[2].startswith(worst)
    assert lines[4].split() == ["mean", f"{result['drift']:.4f}"]
    # on the pipeline itself it is the same, and the adapter is on afterwards
    sampling = Sampling(guidance_scale=3.0, num_inference_steps=2)
    features = ClipFeatures("pocket:clip")
    values = drift_by_prompt(pipe, list(result["per_prompt"]), [0, 5], sampling, features)
    assert values == pytest.approx(list(result["per_prompt"].values()), abs=1e-6)
    assert pipe.get_active_adapters() == ["default"]
    assert not any(layer.disable_adapters for layer in pipe.unet.modules() if isinstance(layer, AtomsLayer))


def test_a_prompt_of_two_lines_counts_once(pipe, tmp_path):
    (tmp_path / "prompts.txt").write_text("A barn\nA barn\n")
    source = adapter(pipe, tmp_path / "a.safetensors", 0.1)
    words = dict(prompts=str(tmp_path / "prompts.txt"), seeds="0", clip_model_name_or_path="pocket:clip")
    result = measure_drift(Settings(adapter=source, **words), make_accelerator())
    assert result["per_prompt"] == {"A barn": result["drift"]}


@pytest.mark.parametrize(
    ("changed", "problem"),
    [
        (dict(adapter="none.safetensors"), "none.safetensors"),
        (dict(prompts="none.txt"), "none.txt: cannot be read"),
        (dict(prompts="braces.txt"), "braces.txt, line 2: 'photo of a {}.': expected a plain prompt without braces"),
        (dict(seeds="3-1"), "seeds '3-1': range '3-1' runs backwards"),
        (
            dict(pretrained_model_name_or_path="pocket", clip_model_name_or_path="./none"),
            "clip_model_name_or_path: './none'",
        ),
        (dict(pretrained_model_name_or_path="./none"), "pretrained_model_name_or_path: './none'"),
        (dict(), "pretrained_model_name_or_path (--base) is required: "),
        (dict(prompts=None), "prompts is required"),
    ],
    ids=str,
)
def test_bad_input_is_one_line_and_exit_code_2(pipe, prompts, tmp_path, capsys, monkeypatch, changed, problem):
    source = adapter(pipe, tmp_path / "a.safetensors", 0.0, about=None)
    monkeypatch.chdir(tmp_path)
    Path("braces.txt").write_text("A barn.\nphoto of a {}.\n")
    words = dict(adapter=source, prompts=prompts, clip_model_name_or_path="pocket:clip", json="out.json") | changed
    flags = [word for key, value in words.items() if value is not None for word in (f"--{key}", value)]
    assert main(["drift", *flags]) == 2
    error = capsys.readouterr().err.strip()
    assert problem in error
    assert len(error.splitlines()) == 1
    assert not Path("out.json").exists()


def test_the_unrelated_prompts_are_ten_and_of_other_things():
    lines = load_prompts(UNRELATED)
    assert len(lines) == len(set(lines)) == 10
    assert not [line for line in lines if "castle" in line.lower() or "canal" in line.lower()]


@pytest.mark.parametrize("line", ["{}", "a {x}", "}", "a {"])
def test_plain_prompts_have_no_braces(tmp_path, line):
    path = tmp_path / "prompts.txt"
    path.write_bytes("\ufeff# {}\r\n\r\n  A barn. \r\n".encode())
    assert load_prompts(path) == ["A barn."]
    path.write_text(f"# {{}}\n\nA barn.\n{line}\n")
    with pytest.raises(UserError) as error:
        load_prompts(path)
    assert str(error.value).startswith(f"{path}, line 4: {line!r}: ")


def test_a_file_without_prompts_is_one_line(tmp_path):
    path = tmp_path / "prompts.txt"
    path.write_text("# nothing\n")
    with pytest.raises(UserError) as error:
        load_prompts(path)
    assert str(error.value) == f"{path}: no prompts; expected one per line"
