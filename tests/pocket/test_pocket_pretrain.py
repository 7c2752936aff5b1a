import dataclasses
import json
import math
import random
import shutil
import subprocess
import sys

import pytest
import torch
from accelerate import PartialState
from diffusers import AutoencoderKL, StableDiffusionPipeline
from safetensors import safe_open
from safetensors.torch import load_file
from transformers import CLIPModel, CLIPTokenizer

from sd_atoms.commands import pretrain_pocket
from sd_atoms.errors import UserError
from sd_atoms.pocket import pretrain
from sd_atoms.pocket.manifest import WEIGHTS_FOLDER, file_entries
from sd_atoms.pocket.pretrain import clip, images, judge, loop, tokenizer, unet, vae
from sd_atoms.pocket.pretrain.checkpoint import load_checkpoint, save_checkpoint
from sd_atoms.pocket.pretrain.stages import (
    STAGES,
    ClipSettings,
    JudgeSettings,
    TokenizerSettings,
    UnetSettings,
    VaeSettings,
)
from sd_atoms.pocket.world import caption, sample
from sd_atoms.settings import resolve
from sd_atoms.sources import packaged_path

# The real stages at a size that a second trains: as deep as the real ones, but narrow.
TINY = {
    "tokenizer": {"caption_count": 300},
    "vae": {
        "batch_size": 2,
        "whole_picture_batch_size": 1,
        "latent_channels": 4,
        "channels": (4, 4, 4, 4),
        "norm_groups": 2,
        "log_every_steps": 1,
    },
    "clip": {"batch_size": 4, "width": 32, "layers": 1},
    "unet": {"batch_size": 2, "channels": (8, 8, 8), "norm_groups": 4},
    "judge": {
        "batch_size": 4,
        "landmark_count": 12,
        "views_per_landmark": 2,
        "rendered_views": 2,
        "held_out_groups": 1,
        "held_out_landmarks": 4,
        "held_out_of_class": 2,
        "widths": (8, 8, 8, 8),
    },
}


def run_command(*arguments):
    pretrain_pocket.run(
        resolve(
            pretrain_pocket.Settings,
            {
                "stage": arguments[0],
                **dict(
                    zip((flag.removeprefix("--") for flag in arguments[1::2]), map(str, arguments[2::2]), strict=True)
                ),
            },
        )
    )


@pytest.fixture(scope="module", autouse=True)
def tiny_stages():
    with pytest.MonkeyPatch.context() as patch:
        for name, changes in TINY.items():
            settings = dataclasses.replace(STAGES[name].settings, **changes)
            patch.setitem(STAGES, name, dataclasses.replace(STAGES[name], settings=settings))
        threads = torch.get_num_threads()
        torch.set_num_threads(1)  # more only wait for each other on networks so small
        yield
        torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def work_dir(tmp_path_factory, tiny_stages):
    folder = tmp_path_factory.mktemp("pretrain")
    run_command("all", "--work_dir", folder, "--max_steps", 2, "--count", 8)
    return folder


def test_all_stages_end_in_a_pipeline_that_draws(work_dir):
    pipeline = StableDiffusionPipeline.from_pretrained(work_dir / "weights" / "pocket-sd")
    assert {part.dtype for part in (pipeline.unet, pipeline.vae, pipeline.text_encoder)} == {torch.float32}
    image = pipeline("photo of a castle.", num_inference_steps=2, output_type="np").images[0]
    assert image.shape == (128, 128, 3)
    assert not math.isnan(image.sum())


def test_all_stages_end_in_a_clip_that_compares(work_dir):
    folder = work_dir / "weights" / "pocket-clip"
    model = CLIPModel.from_pretrained(folder).eval()
    texts = CLIPTokenizer.from_pretrained(folder)(["a castle", "the canal"], padding=True, return_tensors="pt")
    pixels = clip.normalise_pixels(images.Pictures(work_dir, "held").batch(range(3)))
    with torch.no_grad():
        output = model(pixel_values=pixels, **texts)
    assert output.logits_per_image.shape == (3, 2)
    assert output.logits_per_image.isfinite().all()


def test_assembled_weights_are_half_precision_and_match_their_manifest(work_dir):
    weights = sorted((work_dir / "weights").rglob("*.safetensors"))
    assert len(weights) == 5
    for path in weights:
        tensors = load_file(path).values()
        assert {tensor.dtype for tensor in tensors if tensor.is_floating_point()} == {torch.float16}
    manifest = json.loads((work_dir / "weights" / "manifest.json").read_text("utf-8"))
    assert manifest["files"] == file_entries(work_dir / "weights")
    assert manifest["stages"]["unet"]["figures"]["steps"] == 2
    assert str(work_dir) not in json.dumps(manifest)


def test_no_assembled_file_names_a_folder_of_this_machine(work_dir):
    for path in (work_dir / "weights").rglob("*.json"):
        assert str(work_dir) not in path.read_text("utf-8")


def test_assembled_folder_has_the_files_of_the_packaged_one(work_dir):
    def names(folder):
        return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}

    for folder in (path for path in WEIGHTS_FOLDER.iterdir() if path.is_dir()):
        assert names(work_dir / "weights" / folder.name) == names(folder)


def test_finished_stages_are_skipped(work_dir, capsys):
    before = {path: path.stat().st_mtime_ns for path in work_dir.rglob("*") if path.is_file()}
    run_command("all", "--work_dir", work_dir)
    assert {path: path.stat().st_mtime_ns for path in work_dir.rglob("*") if path.is_file()} == before
    assert capsys.readouterr().out.count("finished, skipped") == len(STAGES)


def link_finished(work_dir, target, *stages):
    """Makes `target` a work folder in which these stages of `work_dir` are finished."""
    (target / "finished").mkdir()
    for stage in stages:
        (target / stage).symlink_to(work_dir / stage)
        (target / "finished" / f"{stage}.json").symlink_to(work_dir / "finished" / f"{stage}.json")


TRAINED = [
    ("vae", vae, "edge_loss", "diffusion_pytorch_model.safetensors"),
    ("clip", clip, "name_attributes", "model.safetensors"),
    ("unet", unet, "update_ema", "diffusion_pytorch_model.safetensors"),
    ("judge", judge, "contrastive_loss", "model.safetensors"),
]


@pytest.mark.parametrize(("stage", "module", "function", "result"), TRAINED)
def test_an_interrupted_stage_goes_on_at_its_stored_step_and_ends_as_if_unbroken(
    work_dir, tmp_path, monkeypatch, capsys, stage, module, function, result
):
    """Stopped in its second step, of which a stage draws and computes everything anew."""
    link_finished(work_dir, tmp_path, *STAGES[stage].needs)
    settings = dataclasses.replace(STAGES[stage].settings, checkpoint_every_seconds=0)
    monkeypatch.setitem(STAGES, stage, dataclasses.replace(STAGES[stage], settings=settings))
    calls_per_step = 2 if stage == "clip" else 1
    original = getattr(module, function)
    calls = []

    def stop_in_second_step(*arguments):
        calls.append(arguments)
        if len(calls) > calls_per_step:
            raise KeyboardInterrupt
        return original(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(module, function, stop_in_second_step)
        with pytest.raises(KeyboardInterrupt):
            run_command(stage, "--work_dir", tmp_path, "--max_steps", 2)
    assert not (tmp_path / "finished" / f"{stage}.json").exists()
    with safe_open(tmp_path / stage / loop.CHECKPOINT_NAME, framework="pt") as file:
        assert json.loads(file.metadata()["scalars"])["step"] == 1

    run_command(stage, "--work_dir", tmp_path, "--max_steps", 2)
    assert f"{stage}: goes on at step 1" in capsys.readouterr().out
    assert json.loads((tmp_path / "finished" / f"{stage}.json").read_text("utf-8"))["figures"]["steps"] == 2
    resumed, unbroken = load_file(tmp_path / stage / result), load_file(work_dir / stage / result)
    assert resumed.keys() == unbroken.keys()
    for name, tensor in unbroken.items():
        torch.testing.assert_close(resumed[name], tensor, rtol=0, atol=1e-6)


def test_the_unet_goes_on_from_the_packaged_weights(work_dir, tmp_path, monkeypatch):
    link_finished(work_dir, tmp_path, *STAGES["unet"].needs)
    packaged = tmp_path / "packaged"
    shutil.copytree(work_dir / "weights", packaged)
    monkeypatch.setattr(unet, "WEIGHTS_FOLDER", packaged)
    # as many steps as those have behind them: none is left
    pretrain.pretrain("unet", tmp_path, max_steps=2, from_packaged=True)
    found = json.loads((tmp_path / "finished" / "unet.json").read_text("utf-8"))
    assert (found["figures"]["first_step"], found["figures"]["steps"]) == (2, 2)
    assert found["command"].endswith("--max_steps 2 --from_packaged")
    name = "diffusion_pytorch_model.safetensors"
    start, end = load_file(packaged / "pocket-sd" / "unet" / name), load_file(tmp_path / "unet" / name)
    assert all(torch.equal(end[key], start[key].float()) for key in start)

    wider = dataclasses.replace(STAGES["unet"].settings, channels=(16, 16, 16))
    monkeypatch.setitem(STAGES, "unet", dataclasses.replace(STAGES["unet"], settings=wider))
    (tmp_path / "finished" / "unet.json").unlink()
    with pytest.raises(UserError, match="from_packaged: the packaged UNet has other sizes"):
        pretrain.pretrain("unet", tmp_path, max_steps=2, from_packaged=True)


def make_run(folder, settings):
    model = torch.nn.Linear(2, 1)
    optimizer = torch.optim.AdamW(model.parameters())
    return model, loop.TrainingRun(folder, settings, PartialState(), {"model": model}, optimizer)


def test_the_time_budget_counts_the_seconds_of_all_resumes(tmp_path, monkeypatch):
    now = [0.0]
    monkeypatch.setattr(loop.time, "monotonic", lambda: now[0])
    settings = dataclasses.replace(VaeSettings(), budget_seconds=100, log_every_steps=1)

    def train(last_step):
        model, run = make_run(tmp_path, settings)
        for step in run:
            now[0] += 10
            run.update(model(torch.ones(1, 2)).sum())
            if step == last_step:
                run.step += 1
                run.used_seconds += 10
                run.save()  # as if the interval had just passed
                return run
        return run

    assert train(last_step=3).step == 4
    now[0] += 1000  # time between the runs does not count
    run = train(last_step=None)
    assert run.step == 10
    rates = [json.loads(line)["learning_rate"] for line in (tmp_path / "log.jsonl").read_text("utf-8").splitlines()]
    assert rates[-1] < rates[-2] < rates[-3]  # annealed by the end of the budget


@pytest.mark.slow  # two more interpreters load everything
def test_two_processes_average_their_gradients_and_one_of_them_writes(tmp_path):
    script = tmp_path / "train.py"
    script.write_text(f"""
import dataclasses, pathlib, torch
from sd_atoms.pocket.pretrain import loop, pretrain
from sd_atoms.pocket.pretrain.stages import STAGES
settings = dataclasses.replace(STAGES["vae"].settings, **{TINY["vae"]!r})
STAGES["vae"] = dataclasses.replace(STAGES["vae"], settings=settings)
work_dir = pathlib.Path({str(tmp_path)!r})
pretrain("images", work_dir, picture_count=8)
pretrain("vae", work_dir, max_steps=2)
parameter = torch.nn.Parameter(torch.zeros(3))
parameter.grad = torch.full((3,), float(loop.PartialState().process_index))
loop.average_gradients([parameter])
assert parameter.grad.tolist() == [0.5, 0.5, 0.5]
""")
    launch = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", str(script)]
    finished = subprocess.run(launch, capture_output=True, text=True, check=False)
    assert finished.returncode == 0, finished.stderr
    assert finished.stdout.count("vae: finished") == 1
    assert json.loads((tmp_path / "finished" / "vae.json").read_text("utf-8"))["processes"] == 2
    steps = [json.loads(line)["step"] for line in (tmp_path / "vae" / "log.jsonl").read_text("utf-8").splitlines()]
    assert steps == [1, 2]


def test_learning_rate_rises_to_its_peak_and_falls_to_almost_nothing():
    settings = ClipSettings(learning_rate=1e-3, warm_up_share=0.05)
    assert loop.learning_rate(0, settings) == pytest.approx(1e-7)
    assert loop.learning_rate(0.05, settings) == pytest.approx(1e-3, rel=0.01)
    assert loop.learning_rate(0.5, settings) == pytest.approx(0.5e-3, rel=0.01)
    assert loop.learning_rate(1, settings) == pytest.approx(1e-7)


def test_with_a_decay_share_the_learning_rate_stays_at_its_peak_until_the_decay():
    settings = ClipSettings(learning_rate=1e-3, decay_share=0.4)
    assert loop.learning_rate(0.6, settings) == pytest.approx(1e-3, rel=1e-3)
    assert loop.learning_rate(0.8, settings) == pytest.approx(0.5e-3, rel=1e-3)
    assert loop.learning_rate(1, settings) == pytest.approx(1e-7)


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
def test_timestep_weights_bound_what_nearly_clean_latents_count(prediction_type):
    settings = UnetSettings(prediction_type=prediction_type)
    snr = torch.tensor([100.0, 5.0, 1.0, 0.01], dtype=torch.float64)
    weights = unet.timestep_weights(snr / (1 + snr), settings)
    if prediction_type == "epsilon":
        expected = [5 / 100, 1, 1, 1]
    else:
        expected = [6 / 101, 1, 1, 1]
    torch.testing.assert_close(weights, torch.tensor(expected, dtype=torch.float64))


def test_a_damaged_checkpoint_is_an_error_that_names_the_file(tmp_path):
    model = torch.nn.Linear(2, 1)
    optimizer = torch.optim.AdamW(model.parameters())
    path = tmp_path / loop.CHECKPOINT_NAME
    save_checkpoint(path, {"model": model}, optimizer, {"step": 3})
    path.write_bytes(path.read_bytes()[:-4])
    with pytest.raises(UserError, match=r"checkpoint\.safetensors: cannot be resumed"):
        load_checkpoint(path, {"model": model}, optimizer)


def test_a_checkpoint_of_another_model_is_an_error_that_names_the_file(tmp_path):
    model, other = torch.nn.Linear(2, 1), torch.nn.Linear(3, 1)
    optimizer = torch.optim.AdamW(model.parameters())
    path = tmp_path / loop.CHECKPOINT_NAME
    save_checkpoint(path, {"model": model}, optimizer, {"step": 3})
    with pytest.raises(UserError, match=r"checkpoint\.safetensors: cannot be resumed"):
        load_checkpoint(path, {"model": other}, torch.optim.AdamW(other.parameters()))


def read_manifest():
    return json.loads((WEIGHTS_FOLDER / "manifest.json").read_text("utf-8"))


def settings_of(kind, values):
    """The settings that a manifest records, as far as this version still has them."""
    known = {field.name for field in dataclasses.fields(kind)}
    return kind(**{name: tuple(v) if isinstance(v, list) else v for name, v in values.items() if name in known})


def test_the_settings_in_the_manifest_build_the_packaged_networks():
    packaged = packaged_path("pocket")
    made = {name: entry["settings"] for name, entry in read_manifest()["stages"].items()}
    autoencoder = vae.build_vae(settings_of(VaeSettings, made["vae"]))
    tokens = CLIPTokenizer.from_pretrained(packaged / "tokenizer")
    comparer = clip.build_clip(settings_of(ClipSettings, made["clip"]), tokens)
    denoiser = unet.build_unet(
        settings_of(UnetSettings, made["unet"]), autoencoder.config, comparer.config.text_config.hidden_size
    )
    models = [
        (autoencoder, packaged / "vae" / "diffusion_pytorch_model.safetensors"),
        (denoiser, packaged / "unet" / "diffusion_pytorch_model.safetensors"),
        (comparer, packaged_path("pocket:clip") / "model.safetensors"),
    ]
    if "judge" in made:
        arbiter = judge.build_judge(settings_of(JudgeSettings, made["judge"]))
        models.append((arbiter, packaged_path("pocket:judge") / "model.safetensors"))
    for model, file in models:
        stored = {name: tensor.shape for name, tensor in load_file(file).items()}
        assert {name: tensor.shape for name, tensor in model.state_dict().items()} == stored
    for built, part in ((denoiser.config, "unet"), (autoencoder.config, "vae")):
        stored = json.loads((packaged / part / "config.json").read_text("utf-8"))
        measured_or_made = {"_class_name", "_diffusers_version", "_name_or_path", "scaling_factor"}
        for field in stored.keys() - measured_or_made:
            assert json.loads(json.dumps(built[field])) == stored[field], field


def test_the_tokenizer_stage_makes_the_packaged_vocabulary_and_the_same_one_each_time(tmp_path):
    settings = TokenizerSettings()
    texts = tokenizer.training_texts(settings)
    merges = tokenizer.train_merges(texts, settings.largest_vocabulary)
    assert merges == tokenizer.train_merges(texts, settings.largest_vocabulary)
    vocabulary = tokenizer.build_vocabulary(merges)
    packaged = CLIPTokenizer.from_pretrained(packaged_path("pocket") / "tokenizer")
    assert set(vocabulary) == set(packaged.get_vocab())
    again = CLIPTokenizer(vocab=vocabulary, merges=merges, model_max_length=settings.context_length)
    rng = random.Random(0)
    captions = [caption(sample(rng), rng) for _ in range(1000)]
    assert again(captions).input_ids == packaged(captions).input_ids


def test_packaged_vae_reconstructs_held_out_pictures_as_its_manifest_says(tmp_path, monkeypatch):
    monkeypatch.setattr(vae, "TEST_PICTURES", 8)
    settings = images.ImagesSettings(picture_count=1, held_out_count=8)
    images.run(tmp_path, settings, PartialState())
    model = AutoencoderKL.from_pretrained(packaged_path("pocket") / "vae").eval()
    manifest = json.loads((WEIGHTS_FOLDER / "manifest.json").read_text("utf-8"))
    stated_db = manifest["stages"]["vae"]["figures"]["held_out_psnr_db"]
    assert vae.measure_psnr(model, images.Pictures(tmp_path, "held")) == pytest.approx(stated_db, abs=1)


def test_a_stage_without_its_needs_says_which(tmp_path):
    with pytest.raises(UserError, match="stage 'clip' needs stage 'images'"):
        run_command("clip", "--work_dir", tmp_path, "--max_steps", 1)
    assert list(tmp_path.iterdir()) == []


def test_pictures_of_another_count_are_not_mixed_in(tmp_path):
    settings = images.ImagesSettings(picture_count=2, held_out_count=1)
    images.run(tmp_path, settings, PartialState())
    with pytest.raises(UserError, match=r"train-000000-000002\.npy: left by a run with another --count"):
        images.run(tmp_path, dataclasses.replace(settings, picture_count=3), PartialState())


@pytest.mark.parametrize(
    ("stage", "arguments", "message"),
    [
        ("paint", {}, "stage 'paint' is unknown; there is images, tokenizer"),
        ("images", {"budget_seconds": 5}, "budget_seconds: stage 'images' trains nothing"),
        ("assemble", {"max_steps": 5}, "max_steps: stage 'assemble' trains nothing"),
        ("vae", {"max_steps": 0}, "max_steps is 0; it must be positive"),
        ("vae", {"budget_seconds": -1.0}, "budget_seconds is -1.0; it must be positive"),
        ("vae", {"budget_seconds": 5, "max_steps": 5}, "give one of them"),
        ("vae", {"picture_count": 5}, "count: stage 'vae' renders nothing"),
        ("vae", {"from_packaged": True}, "from_packaged: stage 'vae' trains no UNet"),
        ("all", {"picture_count": 0}, "count is 0; it must be positive"),
    ],
)
def test_bad_arguments_are_refused_before_anything_is_written(tmp_path, stage, arguments, message):
    with pytest.raises(UserError, match=message):
        pretrain.pretrain(stage, tmp_path / "work", **arguments)
    assert not (tmp_path / "work").exists()


def test_the_budget_of_all_is_split_in_the_proportions_of_the_defaults():
    resolved = pretrain.resolve_settings("all", 1000, None, None)
    seconds = {name: resolved[name].budget_seconds for name in ("vae", "clip", "unet", "judge")}
    assert sum(seconds.values()) == pytest.approx(1000)
    defaults = (VaeSettings().budget_seconds, UnetSettings().budget_seconds)
    assert seconds["vae"] / seconds["unet"] == pytest.approx(defaults[0] / defaults[1])
