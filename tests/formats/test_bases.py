"""Bases in one file: the same numbers as the folder they were made from, and everything that a folder can."""

import shutil

import pytest
import torch
from adapters import TOKEN
from diffusers import DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from files import kohya_file, lora
from helpers import CASTLE, tiny_base
from safetensors.torch import save_file
from tiny import one_core, write_photos
from transformers import CLIPTextConfig, CLIPTextModel

import sd_atoms
from sd_atoms.cli import main, train_main
from sd_atoms.errors import AtomsWarning, UserError
from sd_atoms.methods import get_method
from sd_atoms.methods.adapters import add_adapter
from sd_atoms.pipeline import open_base, read_artefact, save_adapter
from sd_atoms.pipeline.single_file import ldm_state

PARTS = ("unet", "vae", "text_encoder")


def write_single(pipe, path):
    state = ldm_state(pipe, len(pipe.tokenizer))
    save_file({key: value.contiguous().clone() for key, value in state.items()}, path)
    return str(path)


def assert_same_numbers(one, other):
    for part in PARTS:
        ours, theirs = getattr(one, part).state_dict(), getattr(other, part).state_dict()
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(ours[key], theirs[key]) for key in ours), part


def v2_base(folder):
    """A pipeline of the make of Stable Diffusion v2: an OpenCLIP text encoder, Linear projections, v-prediction."""
    pipe = open_base(tiny_base())
    ids = {name: getattr(pipe.tokenizer, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    torch.manual_seed(0)
    text = CLIPTextConfig(
        vocab_size=len(pipe.tokenizer), hidden_size=16, intermediate_size=32, num_hidden_layers=2,
        num_attention_heads=2, projection_dim=16, hidden_act="gelu", **ids,
    )  # fmt: skip
    unet = UNet2DConditionModel.from_config({**pipe.unet.config, "use_linear_projection": True})
    scheduler = DDIMScheduler.from_config({**pipe.scheduler.config, "prediction_type": "v_prediction"})
    pipe = StableDiffusionPipeline(
        pipe.vae, CLIPTextModel(text), pipe.tokenizer, unet, scheduler, None, None, requires_safety_checker=False
    )
    pipe.save_pretrained(folder)
    return str(folder)


@pytest.mark.parametrize("kind", ["v1", "v2"])
def test_a_file_is_the_folder_it_was_made_from(tmp_path, kind):
    folder = tiny_base() if kind == "v1" else v2_base(tmp_path / "v2")
    pipe = open_base(folder)
    file = write_single(pipe, tmp_path / "model.safetensors")
    single = open_base(file, base_config=folder)
    assert_same_numbers(single, pipe)
    assert single.scheduler.config.prediction_type == ("epsilon" if kind == "v1" else "v_prediction")
    half = open_base(file, base_config=folder, dtype=torch.float16)
    assert all(getattr(half, part).dtype == torch.float16 for part in PARTS)


@pytest.mark.parametrize("kind", ["v1", "v2"])
def test_it_trains_saves_loads_and_exports(tmp_path, capsys, kind):
    folder = tiny_base() if kind == "v1" else v2_base(tmp_path / "v2")
    file = write_single(open_base(folder), tmp_path / "model.safetensors")
    run = tmp_path / "castle"
    words = {
        **CASTLE, "pretrained_model_name_or_path": file, "base_config": folder, "resolution": 64,
        "instance_data_dir": write_photos(tmp_path / "photos"), "max_train_steps": 2, "train_batch_size": 1,
        "lr_warmup_steps": 0, "num_instance_images": 1, "num_inference_steps": 1, "report_to": "none",
        "output_dir": run,
    }  # fmt: skip
    flags = [str(word) for name, value in words.items() for word in (f"--{name}", value)]
    with one_core():
        assert train_main(flags) == 0
        prompts = tmp_path / "prompts.txt"
        prompts.write_text("photo of a {}\n")
        draw = ("generate", "--adapter", run, "--prompts", prompts, "--seeds", "0", "--out", tmp_path / "drawn")
        assert main([str(word) for word in draw]) == 0
        assert main([str(word) for word in ("export", run, "--to", "checkpoint", "--dtype", "fp32")]) == 0
    capsys.readouterr()
    merged = run / "export" / "castle-checkpoint"
    assert_same_numbers(open_base(f"{merged}.safetensors", base_config=folder), without_words(open_base(str(merged))))
    pipe = open_base(file, base_config=folder)
    sd_atoms.load_adapter(pipe, run)
    assert TOKEN in pipe.tokenizer.get_vocab()


def without_words(pipe):
    """Without the rows of the words that a checkpoint's folder has beside its base's."""
    pipe.text_encoder.resize_token_embeddings(len(open_base(tiny_base()).tokenizer))
    return pipe


def test_what_is_no_base_is_one_line(tmp_path):
    pipe = open_base(tiny_base())
    file = write_single(pipe, tmp_path / "model.safetensors")
    part = kohya_file(tmp_path / "lora.safetensors", {"conv_in": lora(torch.zeros(8, 4, 3, 3))[0]})
    shutil.copy(file, tmp_path / "model.ckpt")
    (tmp_path / "cut.safetensors").write_bytes((tmp_path / "model.safetensors").read_bytes()[:5000])
    state = ldm_state(pipe, len(pipe.tokenizer))
    state = {key: value.contiguous().clone() for key, value in state.items() if "middle_block" not in key}
    save_file(state, tmp_path / "lacks.safetensors")
    (tmp_path / "empty").mkdir()
    for name, settings, message in (
        (file, {}, "pass --base_config, a folder that has them"),
        (file, {"base_config": str(tmp_path / "empty")}, "lacks model_index.json"),
        (file, {"base_config": "pocket"}, "does not fit the configs in base_config=pocket"),
        (file, {"variant": "fp16", "base_config": tiny_base()}, "variant: 'fp16' is for a hub id or folder"),
        (tiny_base(), {"base_config": tiny_base()}, "is for a base in one file"),
        (part, {}, "it is no whole model but adapter: lora"),
        (tmp_path / "model.ckpt", {}, "pickles (.ckpt, .pt, .bin) can run code"),
        (tmp_path / "cut.safetensors", {}, "corrupt or not a safetensors file"),
        (tmp_path / "lacks.safetensors", {"base_config": tiny_base()}, "lacks"),
    ):
        with pytest.raises(UserError) as error:
            open_base(str(name), **settings)
        assert message in str(error.value)
        assert "\n" not in str(error.value)


def test_an_inpainting_unet_takes_what_fits(tmp_path):
    pipe, wide = open_base(tiny_base()), open_base(tiny_base())
    wide.register_modules(unet=UNet2DConditionModel.from_config({**pipe.unet.config, "in_channels": 9}))
    state = pipe.unet.state_dict()
    wide.unet.load_state_dict({key: value for key, value in state.items() if key != "conv_in.weight"}, strict=False)
    add_adapter(pipe.unet, get_method("locon").make_config(pipe.unet))
    with torch.no_grad():
        for name, parameter in pipe.unet.named_parameters():
            if "lora_" in name:
                parameter.fill_(0.1)
    file = save_adapter(pipe, tmp_path / "a.safetensors", about={"method": "locon"})
    with pytest.warns(AtomsWarning, match="conv_in is of another width in this base; left out"):
        loaded = sd_atoms.load_adapter(wide, file)
    assert "conv_in" not in loaded.layers
    assert len(loaded.layers) == len(read_artefact(file).layers) - 1
    name = "conv_out"
    ours, theirs = (each.unet.get_submodule(name).get_delta_weight("default") for each in (wide, pipe))
    assert torch.equal(ours, theirs)
