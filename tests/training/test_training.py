"""What a training run does with its settings, on the tiny base where any base will do."""

import dataclasses
import json
import re
import shutil

import numpy as np
import pytest
import torch
import yaml
from accelerate import Accelerator
from helpers import CASTLE, tiny_base, train_config
from PIL import Image
from safetensors.torch import load_file, save_file

from sd_atoms.cli import main, train_main
from sd_atoms.data.checked import usable
from sd_atoms.data.concepts import Source
from sd_atoms.data.config import Concept, DataSettings
from sd_atoms.data.records import folder_images
from sd_atoms.errors import UserError
from sd_atoms.methods.adapters import adapters_off
from sd_atoms.pipeline import load_atoms, open_base, read_artefact
from sd_atoms.pipeline.inspection import inspect_adapter
from sd_atoms.settings import replaced
from sd_atoms.sources import packaged_path
from sd_atoms.training import examples, latents
from sd_atoms.training.adapter import open_adapter
from sd_atoms.training.batch import Texts, make_samples, sample_losses
from sd_atoms.training.dataset import make_dataset
from sd_atoms.training.denoiser import Denoiser
from sd_atoms.training.diffusion import add_adapters, prepare_texts
from sd_atoms.training.examples import Cropping, crop
from sd_atoms.training.objective import noising
from sd_atoms.training.optimiser import with_defaults
from sd_atoms.training.validation import validation_loss

SMALL = dict(
    **CASTLE,
    train_token_embedding=True,
    train_batch_size=1,
    max_train_steps=2,
    learning_rate=1e-2,
    lr_warmup_steps=0,
    num_instance_images=1,
    num_inference_steps=1,
    guidance_scale=3.0,
    report_to="none",
)
NAMED = "images/instance-00.png"
PLAIN = dict(placeholder_token=None, initializer_token=None, train_token_embedding=False, instance_prompt="a castle")


def run(folder, **settings):
    """Trains with SMALL and these settings; returns the run folder."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    path = folder.parent / f"{folder.name}.yaml"
    base = {"pretrained_model_name_or_path": tiny_base()}
    path.write_text(yaml.safe_dump({**SMALL, **base, "output_dir": str(folder), **settings}))
    assert train_main(["--config", str(path)]) == 0
    return folder


def numbers(folder):
    (file,) = folder.glob("*.safetensors")
    return load_file(file)


def same(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)


def log(folder):
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


def config_of(**settings):
    return with_defaults(train_config(**{**SMALL, "resolution": 128, **settings}))


def source_of(config, pictures=None):
    concept = config.all_concepts[0]
    found = pictures or folder_images(packaged_path(concept.instance_data_dir), config.data.captions)[0]
    return Source(concept, usable(found[:2], "error")[0])


def dataset_of(pipe, config, sources):
    how = Cropping(config.data, config.data.resolution, 32, config.loop.seed)
    return make_dataset(pipe.vae, sources, how, config.prior, config.validation.holdout_images)


def samples_of(numbers, config, examples, schedule, empty, **more):
    more.setdefault("caption_dropout", config.data.caption_dropout)
    return make_samples(numbers, examples, schedule, config.objective, config.loop.seed, empty=empty, **more)


def photos(folder, sizes, names=None):
    """Pictures of noise, so that every crop differs."""
    folder.mkdir()
    draws = np.random.default_rng(0)
    for number, (width, height) in enumerate(sizes):
        pixels = draws.integers(0, 256, (height, width, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / (names[number] if names else f"{number}.png"))
    return folder


CONCEPTS = [
    dict(
        instance_data_dir="pocket:castle",
        instance_prompt="photo of a <castle>.",
        placeholder_token="<castle>",
        initializer_token="castle",
    ),
    dict(
        instance_data_dir="pocket:canal",
        instance_prompt="photo of a <canal> <side>.",
        placeholder_token="<canal> <side>",
        initializer_token="canal street",
        repeats=2,
    ),
]


def _concepts():
    return [Concept(**entry) for entry in CONCEPTS]


ONE_CONCEPT = ("instance_data_dir", "instance_prompt", "placeholder_token", "initializer_token")


def test_several_concepts_and_tokens_are_trained_in_one_run_and_no_other_row_moves(tmp_path):
    pipe = open_base(tiny_base())
    (tmp_path / "t.txt").write_text("a {} by a lake\n")
    folder = run(
        tmp_path / "run",
        **dict.fromkeys(ONE_CONCEPT),
        concepts=CONCEPTS,
        max_train_steps=3,
        train_batch_size=2,
        prompts_file=str(tmp_path / "t.txt"),
        clip_model_name_or_path="pocket:clip",
    )
    before = pipe.text_encoder.get_input_embeddings().weight.detach().clone()
    starts = {token: before[pipe.tokenizer.convert_tokens_to_ids(f"{word}</w>")] for token, word in
              (("<castle>", "castle"), ("<canal>", "canal"), ("<side>", "street"))}  # fmt: skip
    artefact = load_atoms(pipe, folder / "adapter")
    assert set(artefact.tokens) == {"<castle>", "<canal>", "<side>"}
    for token, row in artefact.tokens.items():
        assert not torch.equal(row, starts[token])
    after = pipe.text_encoder.get_input_embeddings().weight.detach()
    assert torch.equal(after[: len(before)][: pipe.tokenizer.vocab_size], before[: pipe.tokenizer.vocab_size])
    names = {path.name for path in (folder / "images").iterdir()}
    assert {"castle-grid.png", "canal-grid.png", "castle-instance-00.png", "canal-base-prompt-00.png"} <= names
    metrics = json.loads((folder / "metrics.json").read_text())
    assert set(metrics["clip_by_concept"]) == {"castle", "canal"}
    assert (folder / "castle_canal.safetensors").exists()


def test_every_concept_is_shown_under_its_own_prompts_and_as_often_as_asked(pocket):
    config = config_of(**dict.fromkeys(ONE_CONCEPT), concepts=tuple(_concepts()))
    sources = [
        Source(concept, usable(folder_images(packaged_path(concept.instance_data_dir), False)[0][:2], "error")[0])
        for concept in config.all_concepts
    ]
    dataset = dataset_of(pocket, config, sources)
    shown = [dataset.prompts[example.prompts[0]] for example in dataset.examples]
    assert shown == ["photo of a <castle>."] * 2 + ["photo of a <canal> <side>."] * 4
    assert dataset.prompts[dataset.empty] == ""


def test_class_prompts_belong_to_their_own_concept(pocket):
    concepts = [dataclasses.replace(c, class_prompt=f"class {n}") for n, c in enumerate(_concepts())]
    config = config_of(**dict.fromkeys(ONE_CONCEPT), concepts=tuple(concepts), prior="teacher")
    sources = [
        Source(concept, folder_images(packaged_path(concept.instance_data_dir), False)[0][:1])
        for concept in config.all_concepts
    ]
    dataset = dataset_of(pocket, config, sources)
    assert [dataset.prompts[example.prompts[0]] for example in dataset.prior] == ["class 0", "class 1"]


def test_captions_take_the_place_of_the_prompt_and_must_name_the_concept(pocket, tmp_path):
    folder = photos(tmp_path / "photos", [(64, 64), (64, 64)])
    (folder / "0.txt").write_text("a {} in snow")
    (folder / "1.txt").write_text("<castle> at night")
    config = config_of(instance_data_dir=str(folder), captions=True)
    dataset = dataset_of(pocket, config, [source_of(config, folder_images(folder, True)[0])])
    assert [dataset.prompts[example.prompts[0]] for example in dataset.examples] == [
        "a <castle> in snow",
        "<castle> at night",
    ]
    (folder / "0.txt").write_text("snow")
    (folder / "1.txt").write_text("night")
    with pytest.raises(UserError, match="none of 2 contains the placeholder <castle>"):
        dataset_of(pocket, config, [source_of(config, folder_images(folder, True)[0])])


def test_captions_that_are_asked_for_and_not_there_are_an_error(tmp_path, capsys):
    path = tmp_path / "c.yaml"
    path.write_text(yaml.safe_dump({**SMALL, "captions": True, "output_dir": str(tmp_path / "run")}))
    assert train_main(["--config", str(path)]) == 2
    assert "captions: pocket:castle holds neither NAME.txt or NAME.caption files" in capsys.readouterr().err


def test_a_table_of_datasets_trains_as_a_folder_does(tmp_path):
    datasets = pytest.importorskip("datasets")
    paths = sorted(packaged_path("pocket:castle").glob("*.png"))[:2]
    table = datasets.Dataset.from_dict(
        {"picture": [str(path) for path in paths], "words": ["a <castle>", "the <castle>"]}
    ).cast_column("picture", datasets.Image())
    table.save_to_disk(tmp_path / "table")
    of_table = run(
        tmp_path / "a", instance_data_dir=None, dataset_name=str(tmp_path / "table"), image_column="picture",
        caption_column="words", center_crop=True,
    )  # fmt: skip
    folder = tmp_path / "photos"
    folder.mkdir()
    for number, (path, text) in enumerate(zip(paths, ["a <castle>", "the <castle>"], strict=True)):
        shutil.copy(path, folder / f"{number}{path.suffix}")
        (folder / f"{number}.txt").write_text(text)
    of_folder = run(tmp_path / "b", instance_data_dir=str(folder), captions=True, center_crop=True)
    assert same(numbers(of_table), numbers(of_folder))


def test_flipping_is_opt_in_and_mirrors_half_of_the_samples(pocket):
    plain, flipped = config_of(), config_of(random_flip=True)
    assert dataset_of(pocket, plain, [source_of(plain)]).examples[0].mirrored is None
    dataset = dataset_of(pocket, flipped, [source_of(flipped)])
    schedule = noising(pocket.scheduler, None)
    one = samples_of(range(40), plain, dataset.examples, schedule, 0)
    unmirrored = [example._replace(mirrored=None) for example in dataset.examples]
    other = samples_of(range(40), plain, unmirrored, schedule, 0)
    moved = sum(not torch.equal(a.noisy, b.noisy) for a, b in zip(one, other, strict=True))
    assert 10 < moved < 30


def test_pictures_keep_their_shape_in_buckets_and_train_together(tmp_path):
    folder = photos(tmp_path / "photos", [(256, 128), (128, 256), (200, 200)])
    out = run(
        tmp_path / "run", instance_data_dir=str(folder), aspect_ratio_buckets=True, train_batch_size=3,
        prior="teacher", class_prompt="photo of a castle", max_train_steps=1,
    )  # fmt: skip
    assert numbers(out)["atoms_delta.9x9"].any()
    how = Cropping(DataSettings(aspect_ratio_buckets=True), 128, 32, 0)
    sizes = [crop(picture, how).size for picture in folder_images(folder, False)[0]]
    assert sizes[0][0] > sizes[0][1]
    assert sizes[1] == sizes[0][::-1]
    assert sizes[2] == (128, 128)


def test_cached_latents_and_states_give_the_same_run_and_nothing_is_encoded_twice(tmp_path, monkeypatch):
    settings = dict(PLAIN, cache_dir=str(tmp_path / "cache"), instance_prompt="a castle by a lake")
    plain = run(tmp_path / "plain", **{**settings, "cache_dir": None})
    first = run(tmp_path / "first", **settings)
    kept = {path: path.read_bytes() for path in (tmp_path / "cache").rglob("*.safetensors")}
    assert {path.relative_to(tmp_path / "cache").parts[0] for path in kept} == {"images", "latents", "text"}

    def fail(*_):
        raise AssertionError("encoded again")

    monkeypatch.setattr(examples, "_text_states", fail)
    monkeypatch.setattr(latents, "to_tensor", fail)
    second = run(tmp_path / "second", **settings)
    assert same(numbers(plain), numbers(first))
    assert same(numbers(first), numbers(second))
    assert {path: path.read_bytes() for path in (tmp_path / "cache").rglob("*.safetensors")} == kept


def test_a_broken_file_of_the_cache_is_made_anew(tmp_path):
    settings = dict(PLAIN, cache_dir=str(tmp_path / "cache"))
    first = run(tmp_path / "first", **settings)
    for path in (tmp_path / "cache").rglob("*.safetensors"):
        path.write_bytes(path.read_bytes()[:20])
    assert same(numbers(first), numbers(run(tmp_path / "second", **settings)))


def adapted(pipe, config):
    """Everything that the loop makes before its first step."""
    add_adapters(pipe, config)
    dataset = dataset_of(pipe, config, [source_of(config)])
    return dataset, prepare_texts(pipe, config, dataset), noising(pipe.scheduler, None)


def test_the_teacher_is_the_base_itself(pipe, pocket):
    config = config_of(prior="teacher", class_prompt="photo of a castle")
    dataset, texts, schedule = adapted(pipe, config)
    plain = Denoiser(pipe.unet, pipe.text_encoder)
    batch = samples_of(range(3), config, dataset.prior, schedule, dataset.empty, purpose="prior", from_teacher=True)
    # an adapter that changes nothing has nothing to unlearn
    assert not sample_losses(batch, plain, plain, texts, config.objective, torch.device("cpu")).any()
    for name, parameter in pipe.unet.named_parameters():
        if "atoms_delta" in name:
            torch.nn.init.normal_(parameter, std=0.05)
    losses = sample_losses(batch, plain, plain, texts, config.objective, torch.device("cpu"))
    assert (losses > 0).all()
    states = pocket.text_encoder(
        pocket.tokenizer(["photo of a castle"], padding="max_length", max_length=77, return_tensors="pt").input_ids
    )[0]
    noisy = torch.stack([sample.noisy for sample in batch])
    timesteps = torch.tensor([sample.timestep for sample in batch])
    with torch.no_grad():
        base = pocket.unet(noisy, timesteps, states.expand(3, -1, -1)).sample
        ours = pipe.unet(noisy, timesteps, states.expand(3, -1, -1)).sample
        with adapters_off(pipe.unet):
            assert torch.equal(pipe.unet(noisy, timesteps, states.expand(3, -1, -1)).sample, base)
    torch.testing.assert_close(losses.detach(), (ours - base).square().flatten(1).mean(1), rtol=1e-4, atol=1e-7)


def test_class_pictures_are_drawn_once_used_exactly_and_never_overwritten(tmp_path):
    classes = tmp_path / "class"
    settings = dict(prior="images", class_prompt="photo of a castle", class_data_dir=str(classes), num_class_images=2)
    first = run(tmp_path / "a", **settings)
    drawn = {path: (path.read_bytes(), path.stat().st_mtime_ns) for path in classes.iterdir()}
    assert len(drawn) == 2
    second = run(tmp_path / "b", **settings)
    assert {path: (path.read_bytes(), path.stat().st_mtime_ns) for path in classes.iterdir()} == drawn
    assert same(numbers(first), numbers(second))
    without = run(tmp_path / "c")
    assert not same(numbers(first), numbers(without))
    weightless = numbers(run(tmp_path / "d", **settings, prior_loss_weight=0.0))
    torch.testing.assert_close(
        weightless["atoms_delta.9x9"], numbers(without)["atoms_delta.9x9"], rtol=0.02, atol=1e-5
    )


def test_dropped_captions_are_seen_as_the_empty_prompt(pocket):
    config = config_of(caption_dropout=0.5)
    dataset = dataset_of(pocket, config, [source_of(config)])
    drawn = samples_of(range(100), config, dataset.examples, noising(pocket.scheduler, None), dataset.empty)
    assert 30 < sum(sample.prompt == dataset.empty for sample in drawn) < 70


def test_validation_loss_is_deterministic_and_takes_nothing_from_training(tmp_path, capsys):
    plain = run(tmp_path / "plain")
    measured = run(tmp_path / "measured", validation_loss_steps=1)
    assert same(numbers(plain), numbers(measured))
    again = run(tmp_path / "again", validation_loss_steps=2, gradient_checkpointing=True)
    losses = [entry["validation_loss"] for entry in log(measured)]
    assert losses[1] == log(again)[1]["validation_loss"]
    change = inspect_adapter(measured)["relative_change"]
    told = json.loads((measured / "metrics.json").read_text())["training"]["relative_change"]
    assert (log(measured)[1]["relative_change"], told) == pytest.approx((change, change), rel=1e-4)
    assert f"|ΔF|/|F| = {change:.1%}" in capsys.readouterr().out
    assert "validation_loss" not in log(again)[0]


def test_a_run_tells_at_every_checkpoint_how_far_the_filters_have_moved(tmp_path, capsys):
    folder = run(tmp_path / "far", learning_rate=0.5, checkpointing_steps=2)
    entries, said = log(folder), capsys.readouterr().out
    assert ["relative_change" in entry for entry in entries] == [entry["step"] % 2 == 0 for entry in entries]
    assert (
        entries[-1]["relative_change"]
        == json.loads((folder / "metrics.json").read_text())["training"]["relative_change"]
    )
    assert said.count("beyond 0.7 nothing is known") == 1
    near = run(tmp_path / "near", checkpointing_steps=2)
    assert 0 < log(near)[-1]["relative_change"] < 0.7
    assert "nothing is known" not in capsys.readouterr().out


def test_validation_loss_leaves_every_module_in_the_mode_it_trains_in(pipe):
    config = config_of(**PLAIN)
    dataset, texts, schedule = adapted(pipe, config)
    plain = Denoiser(pipe.unet, pipe.text_encoder)
    pipe.unet.train()
    modes = {name: module.training for name, module in plain.named_modules() if name}
    validation_loss(plain, dataset.examples[:1], texts, config.objective, 0, schedule, Accelerator(cpu=True))
    assert {name: module.training for name, module in plain.named_modules() if name} == modes
    assert not plain.text_encoder.training


def test_held_out_pictures_are_not_learned_from(pocket):
    config = config_of(holdout_images=1, validation_loss_steps=1)
    dataset = dataset_of(pocket, config, [source_of(config)])
    assert (len(dataset.examples), len(dataset.held_out)) == (1, 1)
    assert not torch.equal(dataset.examples[0].latents.mean, dataset.held_out[0].latents.mean)
    with pytest.raises(UserError, match="holdout_images: 2 of 2 pictures leave none to learn from"):
        dataset_of(pocket, replaced(config, holdout_images=2), [source_of(config)])


def test_held_out_pictures_are_not_shown_to_the_teacher_either(pocket):
    settings = dict(prior="teacher", class_prompt="photo of a castle", validation_loss_steps=1)
    means = {}
    for count in (0, 1):
        config = config_of(holdout_images=count, **settings)
        dataset = dataset_of(pocket, config, [source_of(config)])
        means[count] = [example.latents.mean for example in dataset.prior]
    assert [len(own) for own in means.values()] == [2, 1]
    assert torch.equal(means[1][0], dataset.examples[0].latents.mean)


def test_the_best_step_is_kept_where_training_goes_wrong(tmp_path):
    # such steps only ever do harm after the first
    folder = run(
        tmp_path / "run", learning_rate=2.0, lr_scheduler="constant", max_train_steps=3, validation_loss_steps=1,
        keep="best", checkpointing_steps=1,
    )  # fmt: skip
    losses = [entry["validation_loss"] for entry in log(folder)]
    kept = json.loads((folder / "metrics.json").read_text())["training"]["kept_step"]
    assert kept == losses.index(min(losses)) + 1 < 3
    checkpoint = load_file(folder / "checkpoints" / f"checkpoint-{kept}.safetensors")
    layer = "unet.down_blocks.0.resnets.0.conv1"
    saved = load_file(folder / "adapter" / "adapter_model.safetensors")
    ours = saved["base_model.model.down_blocks.0.resnets.0.conv1.atoms_delta"]
    assert torch.equal(ours, checkpoint[f"parameter.{layer}.atoms_delta.default"])
    last = str(folder / "checkpoints" / "checkpoint-3.safetensors")
    assert same(open_adapter(last).state, read_artefact(folder / "adapter").state)
    own = open_adapter(last, of_step=True).state
    trained = load_file(last)[f"parameter.{layer}.atoms_delta.default"]
    assert torch.equal(own["down_blocks.0.resnets.0.conv1.atoms_delta"], trained)


def test_the_running_mean_is_what_is_saved_and_what_is_validated(tmp_path):
    plain = run(tmp_path / "plain", checkpointing_steps=1)
    mean = run(tmp_path / "mean", ema_decay=0.5, checkpointing_steps=1)
    steps = [load_file(plain / "checkpoints" / f"checkpoint-{n}.safetensors") for n in (1, 2)]
    name = "unet.down_blocks.0.resnets.0.conv1.atoms_delta.default"
    one, two = (step[f"parameter.{name}"] for step in steps)
    expected = 0.0 * one
    for number, value in ((1, one), (2, two)):
        d = min(0.5, number / (number + 9))
        expected = d * expected + (1 - d) * value
    saved = load_file(mean / "adapter" / "adapter_model.safetensors")
    torch.testing.assert_close(saved["base_model.model.down_blocks.0.resnets.0.conv1.atoms_delta"], expected)


@pytest.mark.parametrize(
    "settings",
    [
        dict(snr_gamma=5.0, noise_offset=0.1, loss_type="huber"),
        dict(loss_type="smooth_l1", prediction_type="v_prediction", rescale_betas_zero_snr=True, snr_gamma=1.0),
        dict(optimizer="prodigy", learning_rate=None),
        dict(m1=3, beta_learning_rate=1e-3),
        dict(m=0, kc=2, target="attn"),
        dict(on_bad_image="skip", center_crop=True),
        dict(num_train_epochs=1, train_batch_size=3),
    ],
)
def test_every_objective_optimiser_and_mode_trains(tmp_path, settings):
    found = numbers(run(tmp_path / "run", **settings))
    changes = [value for key, value in found.items() if "delta" in key]
    assert changes
    assert all(torch.isfinite(value).all() for value in found.values())
    assert any(value.any() for value in changes)


def test_bad_pictures_are_skipped_only_if_asked_for(tmp_path, capsys):
    folder = photos(tmp_path / "photos", [(64, 64)] * 3)
    (folder / "1.png").write_bytes((folder / "1.png").read_bytes()[:200])
    run(tmp_path / "run", instance_data_dir=str(folder), on_bad_image="skip", max_train_steps=1)
    assert "Skipped: " in capsys.readouterr().out
    path = tmp_path / "c.yaml"
    path.write_text(yaml.safe_dump({**SMALL, "instance_data_dir": str(folder), "output_dir": str(tmp_path / "other")}))
    assert train_main(["--config", str(path)]) == 2
    assert "1.png: cannot be read" in capsys.readouterr().err


def nearly(one, other):
    """To 1e-6 of the atoms as they are, and of the rest; of the change alone rounding is a little more."""

    def whole(key):
        return one[key] + one[key.replace("delta", "initial")] if "delta" in key else one[key]

    return all((one[key] - other[key]).norm() <= 1e-6 * whole(key).norm() for key in one)


def test_an_effective_batch_of_four_gives_the_same_adapter_however_it_is_split(tmp_path):
    # with the default warm-up: Adam's very first steps have the size of the rate whatever the gradient, which
    # magnifies the rounding of entries that hardly have any
    settings = dict(max_train_steps=10, lr_warmup_steps=20)
    whole = numbers(run(tmp_path / "whole", train_batch_size=4, **settings))
    for batch in (1, 2):
        parts = run(
            tmp_path / f"by{batch}", train_batch_size=batch, gradient_accumulation_steps=4 // batch, **settings
        )
        assert nearly(whole, numbers(parts))


def test_the_shape_of_what_texts_hold(pipe):
    config = config_of(**PLAIN)
    dataset, texts, _ = adapted(pipe, config)
    assert isinstance(texts, Texts)
    states = [texts.state_of(prompt) for prompt in range(len(dataset.prompts))]  # nothing of the text encoder moves
    assert {state.shape[0] for state in states} == {77}
    assert texts.of([0, 1], torch.device("cpu"))["states"].equal(torch.stack(states[:2]))


@pytest.mark.parametrize("precision", ["bf16", pytest.param("fp16", marks=pytest.mark.slow)])
def test_a_half_precision_run_resumes_in_place_with_float32_numbers(tmp_path, precision):
    # small, since many CPUs only emulate half precision
    settings = dict(mixed_precision=precision, checkpointing_steps=1, lr_scheduler="constant", resolution=32)
    folder = run(tmp_path / "run", **settings, max_train_steps=1)
    first = numbers(folder)
    for steps in (2, 3):  # resumed twice: steps are counted over the whole run
        words = ["--resume_from_checkpoint", "latest", "--max_train_steps", str(steps)]
        assert train_main(["--config", str(folder / "config.yaml"), *words]) == 0
    assert [entry["step"] for entry in log(folder)] == [1, 2, 3]
    assert {value.dtype for value in numbers(folder).values()} == {torch.float32}
    assert same(numbers(folder), numbers(run(tmp_path / "straight", **settings, max_train_steps=3)))
    assert not same(numbers(folder), first)  # a resumed run does not write the old adapter again
    checkpoint = load_file(folder / "checkpoints" / "checkpoint-3.safetensors")
    assert {value.dtype for key, value in checkpoint.items() if key.startswith("optimizer")} == {torch.float32}
    # and it is the one adapter still, no `default_0` beside it
    assert all(key.endswith(".default") or ".trained." in key for key in checkpoint if key.startswith("parameter"))


def test_a_run_that_learned_nothing_fails_loudly(tmp_path, capsys):
    path = tmp_path / "c.yaml"
    path.write_text(yaml.safe_dump({**SMALL, "learning_rate": 1e-50, "output_dir": str(tmp_path / "run")}))
    assert train_main(["--config", str(path)]) == 2
    assert "training changed no parameter of atoms" in capsys.readouterr().err
    assert not (tmp_path / "run" / "adapter").exists()


@pytest.mark.parametrize(("batch", "accumulation", "steps"), [(1, 1, 10), (2, 1, 5), (2, 2, 3)])
def test_epochs_are_counted_in_pictures_whatever_the_batch(tmp_path, batch, accumulation, steps):
    folder = run(
        tmp_path / "run", max_train_steps=99, num_train_epochs=2, train_batch_size=batch,
        gradient_accumulation_steps=accumulation, lr_scheduler="linear", resolution=32,
    )  # fmt: skip
    rates = [entry["learning_rate"] for entry in log(folder)]
    assert len(rates) == steps  # the concept has five pictures
    expected = [1e-2 * (1 - (step + 0.5) / steps) for step in range(steps)]
    np.testing.assert_allclose(rates, expected)


def test_pictures_on_the_way_are_drawn_by_the_pipeline_that_knows_the_new_word(tmp_path, monkeypatch):
    from sd_atoms.commands import train

    seen = []

    def watched(pipe, requests, *rest):
        seen.append((pipe.tokenizer(requests[0].prompt).input_ids, pipe.tokenizer.convert_tokens_to_ids("<castle>")))
        return generate(pipe, requests, *rest)

    generate = train.generate
    monkeypatch.setattr(train, "generate", watched)
    run(tmp_path / "run", validation_prompt="a <castle> at night", validation_steps=1, num_validation_images=1)
    assert len(seen) == 2
    for ids, token in seen:
        assert ids.count(token) == 1


def test_half_precision_falls_back_to_float32_with_one_line_on_a_mac(monkeypatch, capsys):
    from sd_atoms.machine import precision_here

    assert precision_here("bf16") == "bf16"
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    assert precision_here("no") == "no"
    assert capsys.readouterr().err == ""
    for wanted in ("fp16", "bf16"):
        assert precision_here(wanted) == "no"
        assert capsys.readouterr().err.count("\n") == 1


@pytest.mark.parametrize("kind", ["atoms", "lora"])
def test_the_text_encoder_is_adapted_too_and_comes_along(tmp_path, kind):
    pipe = open_base(tiny_base())
    folder = run(
        tmp_path / "run", **PLAIN, train_text_encoder=True, text_adapter=kind, checkpointing_steps=1,
        validation_loss_steps=1, prior="teacher", class_prompt="photo of a castle",
    )  # fmt: skip
    trained = json.loads((folder / "metrics.json").read_text())["training"]["trained_text_numbers"]
    assert trained > 0
    before = pipe.text_encoder(torch.tensor([[1, 2, 3]]))[0]
    artefact = load_atoms(pipe, folder / "run.safetensors")
    assert sum(value.numel() for key, value in artefact.text_state.items() if "initial" not in key) == trained
    assert not torch.equal(pipe.text_encoder(torch.tensor([[1, 2, 3]]))[0], before)
    # the base's pictures are those of the untouched text encoder
    plain = run(tmp_path / "plain", **PLAIN)
    for name in ("base-instance-00.png", "instance-00.png"):
        one, other = (Image.open(path / "images" / name).tobytes() for path in (folder, plain))
        assert (one == other) == name.startswith("base")
    # and it resumes
    words = ["--resume_from_checkpoint", "checkpoint-1"]
    first = numbers(folder)
    assert train_main(["--config", str(folder / "config.yaml"), *words]) == 0
    assert same(numbers(folder), first)


def test_latest_without_a_checkpoint_begins_at_the_start(tmp_path, capsys):
    first = run(tmp_path / "run", resume_from_checkpoint="latest")
    assert "there is no checkpoint yet" in capsys.readouterr().out
    assert same(numbers(first), numbers(run(tmp_path / "other")))
    shutil.rmtree(first / "checkpoints")  # finished: nothing of it may be lost
    assert train_main(["--config", str(first / "config.yaml"), "--resume_from_checkpoint", "latest"]) == 2
    assert "holds no checkpoint" in capsys.readouterr().err
    shutil.rmtree(first / "adapter")
    assert train_main(["--config", str(first / "config.yaml"), "--resume_from_checkpoint", "latest"]) == 2
    for path in (first / "metrics.json", *first.glob("*.safetensors")):  # as if killed before its first checkpoint
        path.unlink(missing_ok=True)
    assert train_main(["--config", str(first / "config.yaml"), "--resume_from_checkpoint", "latest"]) == 0


def test_data_that_changed_since_the_checkpoint_are_named_and_refused_if_asked_for(tmp_path, capsys):
    folder = photos(tmp_path / "photos", [(128, 128)] * 3)
    first = run(tmp_path / "run", instance_data_dir=str(folder))
    words = ["--config", str(first / "config.yaml"), "--resume_from_checkpoint", "latest", "--max_train_steps", "3"]
    shutil.copy(folder / "0.png", folder / "1.png")
    (folder / "2.png").rename(folder / "3.png")
    assert train_main([*words, "--strict_resume"]) == 2
    told = "new: 3.png of <castle>; gone: 2.png of <castle>; changed: 1.png of <castle>"
    assert f"checkpoint-2.safetensors learned from other data; {told};" in capsys.readouterr().err
    assert len(log(first)) == 2
    assert train_main(words) == 0
    assert f"learned from other data; {told}" in capsys.readouterr().out
    assert train_main([*words, "--strict_resume", "--max_train_steps", "4"]) == 0  # the same as its last checkpoint


def test_checkpoints_of_an_abandoned_branch_are_set_aside(tmp_path, capsys):
    whole = run(tmp_path / "run", checkpointing_steps=1, max_train_steps=3)
    words = [
        "--config",
        str(whole / "config.yaml"),
        "--resume_from_checkpoint",
        "checkpoint-1",
        "--max_train_steps",
        "2",
    ]
    assert train_main(words) == 0
    assert "abandoned: checkpoint-2.safetensors, checkpoint-3.safetensors" in capsys.readouterr().out
    names = {path.name for path in (whole / "checkpoints").glob("*.safetensors")}
    assert names == {"checkpoint-1.safetensors", "checkpoint-2.safetensors"}
    assert [entry["step"] for entry in log(whole)] == [1, 2]


def test_concepts_whose_files_would_have_one_name_are_refused(tmp_path, capsys):
    concepts = [
        dict(instance_data_dir="pocket:castle", instance_prompt=f"a {token}", placeholder_token=token,
             initializer_token="castle")
        for token in ("<x>", "*X*")
    ]  # fmt: skip
    path = tmp_path / "c.yaml"
    settings = {key: value for key, value in SMALL.items() if key not in ONE_CONCEPT}
    path.write_text(yaml.safe_dump({**settings, "concepts": concepts, "output_dir": str(tmp_path / "run")}))
    assert train_main(["--config", str(path)]) == 2
    assert "their files would be called x, X;" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("part", "weight", "message"),
    [
        (
            "vae",
            "encoder.conv_in.weight",
            "the latents of .*1.png are not finite; the autoencoder of the base is broken",
        ),
        ("unet", "conv_in.weight", "conv_in.weight of the base's UNet: weights are not finite; the base is broken"),
        ("vae", "decoder.conv_in.weight", "the pixels of .* are not finite"),
    ],
)
def test_numbers_that_are_none_are_named_where_they_arise(tmp_path, capsys, part, weight, message):
    base = shutil.copytree(packaged_path("pocket"), tmp_path / "base")
    file = base / part / "diffusion_pytorch_model.safetensors"
    tensors = load_file(file)
    tensors[weight].view(-1)[0] = float("nan")
    save_file(tensors, file)
    cache = tmp_path / "cache"
    words = {**SMALL, "pretrained_model_name_or_path": str(base), "cache_dir": str(cache)}
    path = tmp_path / "c.yaml"
    path.write_text(yaml.safe_dump({**words, "output_dir": str(tmp_path / "run")}))
    assert train_main(["--config", str(path)]) == 2
    assert re.search(message, capsys.readouterr().err)
    if "latents" in message:
        # nothing unsound is kept, only what was seen of the photos
        assert {path.relative_to(cache).parts[0] for path in cache.rglob("*.safetensors")} <= {"images"}


def test_pictures_of_a_training_are_drawn_by_any_sampler_and_again_from_the_file_alone(tmp_path):
    few = dict(num_inference_steps=3, scheduler="euler_a")
    folder = run(tmp_path / "stochastic", **few)
    drawn = np.asarray(Image.open(folder / NAMED))
    assert not np.array_equal(drawn, np.asarray(Image.open(run(tmp_path / "ddim", num_inference_steps=3) / NAMED)))
    (file,) = folder.glob("*.safetensors")
    again = ["generate", "--adapter", str(file), "--base", tiny_base(), "--prompt", CASTLE["instance_prompt"]]
    assert main([*again, "--seeds", "0", "--out", str(tmp_path / "again")]) == 0
    assert np.array_equal(drawn, np.asarray(Image.open(next((tmp_path / "again").glob("prompt*.png")))))


def test_a_sampler_that_cannot_take_so_many_steps_is_refused_before_the_training(tmp_path, capsys):
    path = tmp_path / "run.yaml"
    settings = dict(scheduler="tcd", num_inference_steps=60, output_dir=str(tmp_path / "run"))
    path.write_text(yaml.safe_dump({**SMALL, "pretrained_model_name_or_path": tiny_base(), **settings}))
    assert train_main(["--config", str(path)]) == 2
    assert "scheduler: tcd at 60 steps: " in capsys.readouterr().err
    assert not (tmp_path / "run").exists()
    assert main(["doctor", "--config", str(path)]) == 2
    assert "error    scheduler: tcd at 60 steps: " in capsys.readouterr().out
