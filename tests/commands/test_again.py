"""`sd-atoms generate` with every option, and `again`: the text of a picture is enough to draw it bit for bit."""

import json
import shlex

import numpy as np
import pytest
import torch
from adapters import write_adapter
from diffusers import StableDiffusionInpaintPipeline, UNet2DConditionModel
from files import LINEAR, kohya_file, lora
from helpers import tiny_base
from PIL import Image
from safetensors.torch import load_file, save_file

from sd_atoms.cli import main, train_main
from sd_atoms.generation import image_notes, save_image
from sd_atoms.pipeline import open_base

BASE = tiny_base()
MAKERS = ["--num_inference_steps", "3", "--guidance_scale", "4", "--seeds", "3,5"]


@pytest.fixture
def place(tmp_path, monkeypatch):
    """A folder with two concepts, a LoRA file of another program, a picture and a mask; names count from there."""
    monkeypatch.chdir(tmp_path)
    write_adapter("castle.safetensors", BASE, "atoms")
    write_adapter("canal", BASE, "atoms", size=0.2, tokens=("<canal>",))
    kohya_file("style.safetensors", {LINEAR: lora(open_base(BASE).unet.get_submodule(LINEAR).weight.detach())[0]})
    pixels = np.add.outer(np.arange(64) * 3, np.arange(96)) % 256
    Image.fromarray(np.stack([pixels, pixels[::-1], pixels[:, ::-1]], axis=2).astype(np.uint8)).save("photo.png")
    mask = Image.new("L", (96, 64))
    mask.paste(255, (20, 10, 50, 60))
    mask.save("mask.png")
    return tmp_path


def pixels(path):
    return np.asarray(Image.open(path))


def draw(*words, out="o"):
    return main(["generate", *MAKERS, *map(str, words), "--out", out])


WAYS = {
    "two concepts": ["--adapter", "castle.safetensors=0.8", "--adapter", "canal=0.6",
                     "--prompt", "a <castle> beside a <canal>", "--negative_prompt", "a lake"],
    "with a LoRA file": ["--adapter", "castle.safetensors", "--adapter", "style.safetensors=-0.5",
                         "--adapter_scale", "0.7", "--prompt", "a {} at night"],
    "img2img": ["--adapter", "castle.safetensors=0.8", "--prompt", "a {}", "--image", "photo.png",
                "--image_strength", "0.7"],
    "inpainting": ["--adapter", "castle.safetensors", "--adapter", "canal", "--prompt", "a <canal>",
                   "--image", "photo.png", "--mask_image", "mask.png", "--scheduler", "euler_a"],
    "a sampler with options, a size": ["--adapter", "castle.safetensors", "--prompt", "a {}", "--width", "96",
                                       "--height", "48", "--scheduler", "EulerDiscreteScheduler",
                                       "--scheduler_options", "use_karras_sigmas=true,timestep_spacing=trailing"],
    "the base alone": ["--base", BASE, "--prompt", "a castle, 'quoted' -- and \"more\""],
}  # fmt: skip


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("batch", [1, 2])
def test_again_draws_the_same_bit_for_bit(place, capsys, way, batch):
    assert draw(*WAYS[way], "--generation_batch_size", batch) == 0
    for seed in (3, 5):
        assert main(["again", f"o/prompt00-seed{seed}.png"]) == 0
        assert f"o/prompt00-seed{seed}-again.png: the same, bit for bit" in capsys.readouterr().out
        assert (pixels(f"o/prompt00-seed{seed}.png") == pixels(f"o/prompt00-seed{seed}-again.png")).all()
    assert (pixels("o/prompt00-seed3.png") != pixels("o/prompt00-seed5.png")).any()
    notes = image_notes("o/prompt00-seed3-again.png")
    assert notes.pop("again") == "prompt00-seed3.png"  # which `evaluate` passes over
    assert notes == image_notes("o/prompt00-seed3.png")
    assert main(["again", "o/prompt00-seed3.png"]) == 2
    assert "exists; pass --overwrite" in capsys.readouterr().err


def test_the_command_in_a_picture_draws_it_too(place):
    assert draw(*WAYS["two concepts"], "--compare_base") == 0
    for name, prompt in (("prompt00-seed5", "a <castle> beside a <canal>"), ("base-prompt00-seed5", None)):
        words = shlex.split(image_notes(f"o/{name}.png")["command"])
        assert words[:2] == ["sd-atoms", "generate"]
        assert "--seeds=5" in words
        assert prompt is None or f"--prompt={prompt}" in words
        kept = [word for word in words[1:] if not word.startswith("--out")]
        assert main([*kept, "--out", name]) == 0
        assert (pixels(f"{name}/prompt00-seed5.png") == pixels(f"o/{name}.png")).all()
    assert "a castle beside a castle" in image_notes("o/base-prompt00-seed5.png")["prompt"]
    assert main(["again", "o/base-prompt00-seed5.png"]) == 0
    assert (pixels("o/base-prompt00-seed5-again.png") == pixels("o/base-prompt00-seed5.png")).all()


@pytest.fixture
def inpainting_base(place):
    """A base whose UNet sees mask and picture, as a folder of diffusers'."""
    pipe = open_base(BASE)
    unet, state = UNet2DConditionModel.from_config({**pipe.unet.config, "in_channels": 9}), pipe.unet.state_dict()
    unet.load_state_dict(state | {"conv_in.weight": torch.cat([state["conv_in.weight"]] * 3, dim=1)[:, :9]})
    made = StableDiffusionInpaintPipeline(**pipe.components | {"unet": unet}, requires_safety_checker=False)
    made.save_pretrained(place / "inpainting")
    return "inpainting"


def test_a_base_for_inpainting_draws_in_masks_alone(place, inpainting_base, capsys):
    words = ["--adapter", "castle.safetensors", "--base", inpainting_base, "--prompt", "a {}", "--image", "photo.png"]
    assert draw(*words, "--mask_image", "mask.png") == 0
    assert main(["again", "o/prompt00-seed3.png"]) == 0
    assert "the same, bit for bit" in capsys.readouterr().out
    assert draw(*words, out="p") == 2
    assert "mask_image: this base is one for inpainting; image and mask_image are required" in capsys.readouterr().err
    trains = ["--pretrained_model_name_or_path", inpainting_base, "--instance_data_dir", "pocket:castle"]
    assert train_main([*trains, "--instance_prompt", "a castle", "--output_dir", "run"]) == 2
    assert "it is a StableDiffusionInpaintPipeline; a StableDiffusionPipeline" in capsys.readouterr().err


@pytest.mark.parametrize("option", ["--adapter", "--negative_prompt", "--image_strength", "--width", "--scheduler"])
def test_a_folder_of_other_pictures_is_not_mixed(place, capsys, option):
    other = {
        "--adapter": ["--adapter", "castle.safetensors=0.5"],
        "--negative_prompt": ["--negative_prompt", "a lake"],
        "--image_strength": ["--image_strength", "0.5"],
        "--width": ["--width", "48", "--height", "64"],
        "--scheduler": ["--scheduler_options", "timestep_spacing=trailing"],
    }[option]
    usual = [
        "--prompt",
        "a {}",
        "--image",
        "photo.png",
        *(["--adapter", "castle.safetensors"] * (option != "--adapter")),
    ]
    assert draw(*usual, *(["--adapter", "castle.safetensors"] * (option == "--adapter"))) == 0
    before = pixels("o/prompt00-seed3.png")
    assert draw(*usual, *other) == 2
    assert "pass --overwrite" in capsys.readouterr().err
    assert draw(*usual, *other, "--overwrite") == 0
    after = pixels("o/prompt00-seed3.png")
    assert before.shape != after.shape or (before != after).any()


def test_files_missing_or_changed_since_are_named_in_one_line(place, capsys):
    assert draw(*WAYS["inpainting"]) == 0
    capsys.readouterr()
    picture = "o/prompt00-seed3.png"
    (place / "mask.png").rename(place / "kept.png")
    assert main(["again", picture]) == 2
    assert capsys.readouterr().err == (
        f"error: {picture}: was drawn with mask.png, which is not there; names count from the folder that it was "
        "drawn in\n"
    )
    Image.open("kept.png").transpose(Image.Transpose.FLIP_LEFT_RIGHT).save("mask.png")
    assert main(["again", picture]) == 2
    assert f"error: {picture}: mask.png has changed since (SHA-256 " in capsys.readouterr().err
    (place / "kept.png").rename(place / "mask.png")
    for name in ("castle.safetensors", "canal"):
        file = place / name if (place / name).is_file() else place / name / "adapter_model.safetensors"
        content, tensors = file.read_bytes(), load_file(file)
        with_header = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])["__metadata__"]
        save_file({key: value * 1.01 for key, value in tensors.items()}, file, metadata=with_header)
        assert main(["again", picture]) == 2
        assert f"error: {picture}: {name} has changed since (SHA-256 " in capsys.readouterr().err
        file.write_bytes(content)
    assert not (place / "o" / "prompt00-seed3-again.png").exists()
    assert main(["again", picture]) == 0


def test_a_picture_that_is_not_the_same_says_how_far_it_is(place, capsys):
    assert draw(*WAYS["img2img"]) == 0
    picture = place / "o" / "prompt00-seed3.png"
    notes, image = image_notes(picture), Image.open(picture)
    image.load()
    image.putpixel((0, 0), tuple((value + 9) % 256 for value in image.getpixel((0, 0))))
    made = json.loads(notes["made_with"])
    made["libraries"]["torch"] = "1.0"
    save_image(picture, image, notes | {"made_with": json.dumps(made)})
    assert main(["again", str(picture)]) == 0
    assert "of 255 apart (torch " in capsys.readouterr().out


@pytest.mark.parametrize("kind", ["none", "text", "plain", "other command", "broken"])
def test_what_says_no_command_is_refused_in_one_line(place, capsys, kind):
    image = Image.open("photo.png")
    notes = {
        "other command": {"command": "rm -rf /", "made_with": "{}"},
        "broken": {"command": "sd-atoms generate --prompt=a", "made_with": '{"files": 3}'},
    }.get(kind, {})
    if kind == "text":
        (place / "x.png").write_text("no picture")
    elif kind != "none":
        save_image("x.png", image, notes)
    assert main(["again", "x.png"]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: x.png: ")
    assert error.count("\n") == 1
    assert not (place / "x-again.png").exists()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--prompt", "a {}"], "adapter is required: "),
        (["--adapter", "castle.safetensors"], "prompts is required: "),
        (["--base", BASE, "--prompt", "a {}"], "token is required: "),
        (["--adapter", "style.safetensors", "--base", BASE, "--prompt", "a {}"], "style.safetensors brings no word"),
        (["--adapter", "castle.safetensors=big", "--prompt", "a"], "'big' is no strength; PATH or PATH=0.8"),
        (["--adapter", "castle.safetensors", "--prompt", "a", "--mask_image", "mask.png"], "mask_image needs image"),
        (["--adapter", "castle.safetensors", "--prompt", "a", "--image_strength", "0.5"], "needs image"),
        (["--base", BASE, "--prompt", "a", "--compare_base"], "compare_base needs adapter"),
        (["--base", BASE, "--prompt", "a", "--width", "60"], "width: 60 is not a multiple of 8, which this base"),
        (["--base", BASE, "--prompt", "a", "--image", "none.png"], "none.png: cannot be read"),
        (["--base", BASE, "--prompt", "a", "--image", "photo.png", "--image_strength", "0.1"], "of 3 steps is none"),
        (["--base", BASE, "--prompt", "a", "--scheduler", "palace"], "'palace' is not one of ddim"),
        (["--base", BASE, "--prompt", "a", "--negative_prompt", "b", "--guidance_scale", "1"], "does nothing at"),
        (["--base", BASE, "--prompts", "lines.txt"], "lines.txt, line 2: "),
    ],
)
def test_what_cannot_be_drawn_is_one_line_and_writes_nothing(place, capsys, words, message):
    (place / "lines.txt").write_text("a castle\na {castle}\n")
    assert draw(*words) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
    assert not (place / "o").exists()


def test_lines_of_a_file_may_name_the_words_themselves(place):
    (place / "lines.txt").write_text("a <castle> beside a <canal>\na {} at night\n")
    words = ["--adapter", "castle.safetensors", "--adapter", "canal", "--prompts", "lines.txt", "--seeds", "0"]
    assert draw(*words) == 0
    prompts = [image_notes(f"o/prompt0{index}-seed0.png")["prompt"] for index in (0, 1)]
    assert prompts == ["a <castle> beside a <canal>", "a <castle> at night"]
    (place / "plain.txt").write_text("a castle at night\n")
    assert draw("--adapter", "style.safetensors", "--base", BASE, "--prompts", "plain.txt", out="plain") == 0
    assert draw(*words[:4], "--prompts", "plain.txt", out="p") == 2


def test_adapters_of_a_yaml_file_are_a_list_or_one(place):
    (place / "c.yaml").write_text("adapter: [castle.safetensors=0.8, canal]\nprompt: a <castle>\nseeds: '0'\nout: o\n")
    assert main(["generate", "--config", "c.yaml", "--num_inference_steps", "2"]) == 0
    assert image_notes("o/prompt00-seed0.png")["adapter_scale"] == "0.8, 1.0"
