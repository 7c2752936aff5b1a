"""The real sizes: a folder shaped like Stable Diffusion v1-4 with random weights, trained, saved, loaded and drawn."""

import json

import numpy as np
import pytest
import torch
from adapters import write_adapter
from diffusers import AutoencoderKL, PNDMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from files import LINEAR, kohya_file, lora
from PIL import Image
from transformers import CLIPTextConfig, CLIPTextModel

from sd_atoms.cli import main, train_main
from sd_atoms.generation import image_notes
from sd_atoms.pipeline import open_base, read_artefact
from sd_atoms.pipeline.architectures import unet_config

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def base(tmp_path_factory, pocket):
    """859.5 M UNet, 123 M text encoder, 83.7 M VAE; the pocket's tokenizer with CLIP's table of 49,408 rows."""
    torch.manual_seed(0)
    ids = {name: getattr(pocket.tokenizer, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    text = CLIPTextConfig(
        vocab_size=49408, hidden_size=768, intermediate_size=3072, num_hidden_layers=12, num_attention_heads=12, **ids
    )
    vae = AutoencoderKL(
        block_out_channels=(128, 256, 512, 512),
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        layers_per_block=2,
        sample_size=512,
    )
    scheduler = PNDMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", skip_prk_steps=True)
    pipe = StableDiffusionPipeline(
        unet=UNet2DConditionModel.from_config(unet_config("sd-v1-4")),
        text_encoder=CLIPTextModel(text),
        vae=vae,
        tokenizer=pocket.tokenizer,
        scheduler=scheduler,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    folder = tmp_path_factory.mktemp("sd") / "sd-v1-4-shaped"
    pipe.save_pretrained(folder, safe_serialization=True)
    return folder


def test_trains_saves_loads_and_generates_at_256_px(base, tmp_path):
    words = ["--pretrained_model_name_or_path", str(base), "--instance_data_dir", "pocket:castle"]
    words += ["--instance_prompt", "photo of a <castle>.", "--placeholder_token", "<castle>"]
    words += ["--initializer_token", "castle", "--train_token_embedding", "--resolution", "256"]
    words += ["--train_batch_size", "1", "--max_train_steps", "2", "--num_instance_images", "1"]
    words += ["--num_inference_steps", "2", "--output_dir", str(tmp_path / "run")]
    assert train_main(words) == 0
    metrics = json.loads((tmp_path / "run" / "metrics.json").read_text())
    assert metrics["training"]["trained_numbers"] == 4212
    assert metrics["training"]["trained_token_numbers"] == 768
    file = tmp_path / "run" / "castle.safetensors"
    artefact = read_artefact(file)
    assert len(artefact.layers) == 52
    assert file.stat().st_size - 4 * 768 <= 40_000
    (tmp_path / "t.txt").write_text("photo of a {}.\n")
    words = ["generate", "--adapter", str(file), "--prompts", str(tmp_path / "t.txt"), "--seeds", "0"]
    assert main([*words, "--out", str(tmp_path / "out")]) == 0
    ours, theirs = tmp_path / "run" / "images" / "instance-00.png", tmp_path / "out" / "prompt00-seed0.png"
    assert Image.open(ours).tobytes() == Image.open(theirs).tobytes()


@pytest.fixture(scope="module")
def concepts(base, tmp_path_factory):
    """Two concepts of filter atoms and a LoRA file of another program, with a photo and a mask."""
    folder = tmp_path_factory.mktemp("concepts")
    write_adapter(folder / "castle.safetensors", str(base), "atoms", size=0.02)
    write_adapter(folder / "canal.safetensors", str(base), "atoms", size=0.02, tokens=("<canal>",))
    weight = open_base(str(base)).unet.get_submodule(LINEAR).weight.detach()
    kohya_file(folder / "style.safetensors", {LINEAR: lora(weight)[0]})
    pixels = np.random.RandomState(0).randint(0, 256, (20, 30, 3)).astype(np.uint8)
    Image.fromarray(pixels).resize((300, 200)).save(folder / "photo.png")
    mask = Image.new("L", (300, 200))
    mask.paste(255, (40, 30, 200, 160))
    mask.save(folder / "mask.png")
    return folder


@pytest.mark.parametrize(
    "words",
    [
        ["--adapter", "canal.safetensors=0.6", "--adapter", "style.safetensors=0.5", "--negative_prompt", "a lake",
         "--width", "256", "--height", "192", "--scheduler", "euler_a", "--scheduler_options",
         "timestep_spacing=trailing"],
        ["--image", "photo.png", "--image_strength", "0.7", "--resolution", "192"],
        ["--adapter", "canal.safetensors", "--image", "photo.png", "--mask_image", "mask.png", "--resolution", "192"],
    ],
    ids=["two concepts and a LoRA file", "img2img", "inpainting"],
)  # fmt: skip
def test_every_way_to_draw_and_again(base, concepts, tmp_path, monkeypatch, words):
    monkeypatch.chdir(concepts)
    words = ["generate", "--adapter", "castle.safetensors=0.8", *words, "--base", str(base)]
    prompt = "a <castle> beside a <canal>" if "canal.safetensors" in "".join(words) else "a <castle>"
    out = tmp_path / "out"
    words += ["--prompt", prompt, "--seeds", "3", "--num_inference_steps", "3", "--out", str(out)]
    assert main(words) == 0
    assert main(["again", str(out / "prompt00-seed3.png")]) == 0
    ours, theirs = (np.asarray(Image.open(out / f"prompt00-seed3{end}.png")) for end in ("", "-again"))
    assert (ours == theirs).all()
    assert ours.std() > 1
    assert image_notes(out / "prompt00-seed3.png")["command"].startswith("sd-atoms generate --adapter=castle")


def test_starting_settings_masks_sheet_and_pick(base, tmp_path):
    run, prompts = tmp_path / "run", tmp_path / "one.txt"
    prompts.write_text("a {} in snow\n")
    words = ["--config", "sd14/castle", "--base", str(base), "--instance_data_dir", "pocket:castle", "--masks"]
    words += ["--resolution", "128", "--mixed_precision", "no", "--gradient_accumulation_steps", "1"]
    words += ["--max_train_steps", "2", "--checkpointing_steps", "1", "--num_inference_steps", "2"]
    words += ["--prompts_file", str(prompts), "--num_instance_images", "1", "--output_dir", str(run)]
    assert train_main(words) == 0
    sheet = ["sheet", str(run), "--strengths", "0.5,1", "--prompts", str(prompts), "--seeds", "0"]
    assert main(sheet) == 0
    width, height = Image.open(run / "sheet" / "sheet.png").size
    assert width > 2 * 128
    assert height > 2 * 128
    assert main(["pick", str(run), "--step", "1", "--strength", "0.5"]) == 0
    (picked,) = (run / "picked").glob("*.safetensors")
    words = ["generate", "--adapter", str(picked), "--base", str(base), "--prompt", "a {} in snow", "--seeds", "0"]
    assert main([*words, "--num_inference_steps", "2", "--out", str(tmp_path / "out")]) == 0
    assert len(read_artefact(picked).layers) == 52
