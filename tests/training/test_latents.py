"""Latents and prompt states of a run: where they are kept, and that it changes nothing."""

import dataclasses
import os
import subprocess
import sys

import pytest
import torch
from accelerate.state import AcceleratorState, GradientState, PartialState
from safetensors import safe_open
from safetensors.torch import load_file
from tiny import one_core, write_photos, write_tiny_base

from sd_atoms.cli import train_main
from sd_atoms.data.checked import usable
from sd_atoms.data.config import DataSettings
from sd_atoms.data.records import folder_images
from sd_atoms.pipeline import open_base
from sd_atoms.training import examples, latents
from sd_atoms.training.examples import Cropping, prompt_states, tokenize
from sd_atoms.training.latents import Shards, encode_images, latents_bytes


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("latents")
    write_tiny_base(folder / "tiny")
    write_photos(folder / "photos")
    with one_core():
        yield folder


@pytest.fixture(scope="module")
def base(place):
    return open_base(str(place / "tiny"))


@pytest.fixture
def records(place):
    return usable(folder_images(place / "photos", captions=False)[0], "error")[0]


def how(**settings):
    return Cropping(DataSettings(**settings), 64, 16, 0)


def words(place, out, *more):
    fixed = ["--pretrained_model_name_or_path", place / "tiny", "--instance_data_dir", place / "photos"]
    fixed += ["--instance_prompt", "a castle", "--max_train_steps", 4, "--train_batch_size", 2, "--report_to", "none"]
    fixed += ["--num_instance_images", 1, "--num_inference_steps", 1, "--lr_warmup_steps", 0, "--random_flip"]
    return [str(word) for word in [*fixed, "--output_dir", out, *more]]


def train(place, out, *more):
    for state in (AcceleratorState, GradientState, PartialState):
        state._reset_state()
    assert train_main(words(place, out, *more)) == 0
    (file,) = out.glob("*.safetensors")
    return load_file(file)


def same(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)


@pytest.mark.parametrize("settings", [{}, dict(random_flip=True), dict(aspect_ratio_buckets=True)])
def test_shards_hold_what_memory_holds(base, records, tmp_path, settings):
    plain = encode_images(base.vae, records, how(**settings))
    stored = encode_images(base.vae, records, how(**settings, latents_in_memory=0), tmp_path)
    cached = encode_images(base.vae, records, how(**settings, cache_dir=str(tmp_path / "cache")))
    assert isinstance(stored, Shards)
    assert len(plain) == len(stored) == len(cached) == 3
    for pairs in zip(plain, stored, cached, strict=True):
        parts = [[*own, *(mirrored or ())] for own, mirrored in pairs]
        for others in parts[1:]:
            assert len(others) == len(parts[0])
            assert all(torch.equal(one, other) for one, other in zip(parts[0], others, strict=True))
    total = sum(part.nbytes for own, mirrored in plain for part in (*own, *(mirrored or ())))
    assert latents_bytes(base.vae, records, how(**settings)) == total


def test_only_what_is_missing_is_encoded(base, records, tmp_path, monkeypatch):
    encoded = []
    encode = latents._encode
    monkeypatch.setattr(latents, "_encode", lambda vae, image, name: encoded.append(name) or encode(vae, image, name))
    monkeypatch.setattr(latents, "SHARD_IMAGES", 1)
    settings = how(cache_dir=str(tmp_path))
    whole = [own.mean.clone() for own, _ in encode_images(base.vae, records, settings)]
    assert len(encoded) == 3
    shards = sorted(tmp_path.rglob("*.safetensors"))
    assert len(shards) == 3
    shards[0].unlink()  # as a killed run leaves it
    shards[1].write_bytes(shards[1].read_bytes()[:40])  # as a broken disk does
    encoded.clear()
    again = encode_images(base.vae, records, settings)
    assert len(encoded) == 2
    assert all(torch.equal(mean, own.mean) for mean, (own, _) in zip(whole, again, strict=True))
    encoded.clear()
    encode_images(base.vae, list(reversed(records))[:2], settings)
    assert encoded == []  # another set with some of the images
    for other in (dict(center_crop=True), dict(aspect_ratio_buckets=True), dict(image_interpolation_mode="box")):
        encode_images(base.vae, records[:1], how(cache_dir=str(tmp_path), **other))
    assert len(encoded) == 3  # another crop, shape or filter is another image
    with safe_open(next(tmp_path.rglob("*.safetensors")), "pt") as file:
        assert all(len(key) == latents.KEY_DIGITS for key in file.keys())  # noqa: SIM118 (not a dict)


def test_another_autoencoder_or_seed_finds_nothing(base, records, tmp_path):
    settings = how(cache_dir=str(tmp_path))
    encode_images(base.vae, records, settings)
    before = set(tmp_path.rglob("*.safetensors"))
    encode_images(base.vae, records, dataclasses.replace(settings, seed=1))
    assert len(set(tmp_path.rglob("*.safetensors")) - before) == 1


def test_a_run_whose_latents_do_not_fit_is_the_same_run_and_tidies_up(place, tmp_path):
    plain = train(place, tmp_path / "plain")
    tight = train(place, tmp_path / "tight", "--latents_in_memory", 0)
    assert same(plain, tight)
    assert not (tmp_path / "tight" / "latents").exists()


def test_a_run_that_was_killed_while_encoding_starts_where_it_stopped(place, tmp_path, monkeypatch):
    plain = train(place, tmp_path / "plain")
    monkeypatch.setattr(latents, "SHARD_IMAGES", 1)
    encode = latents._encode

    def killed(vae, image, name):
        if name.endswith("3.png"):
            raise KeyboardInterrupt
        return encode(vae, image, name)

    out = tmp_path / "killed"
    with monkeypatch.context() as patch:
        patch.setattr(latents, "_encode", killed)
        assert train_main(words(place, out, "--latents_in_memory", 0)) != 0
    assert len(list((out / "latents").rglob("*.safetensors"))) == 2
    assert same(plain, train(place, out, "--latents_in_memory", 0))


@pytest.mark.slow
def test_two_processes_encode_together_and_learn_the_same(place, tmp_path):
    one = train(place, tmp_path / "one", "--latents_in_memory", 0)
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    more = ["--latents_in_memory", "0", "--train_batch_size", "1"]
    done = subprocess.run(
        [*launch, "train_dreambooth_atoms.py", *words(place, tmp_path / "two", *more)],
        env=dict(os.environ, ACCELERATE_USE_CPU="true"), capture_output=True, text=True, check=False, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    (file,) = (tmp_path / "two").glob("*.safetensors")
    two = load_file(file)
    assert all((one[key] - two[key]).norm() <= 1e-5 * one[key].norm() for key in one)


def test_states_of_prompts_are_made_when_asked_for_and_as_many_kept_as_fit(base, tmp_path, monkeypatch):
    ids = tokenize(base.tokenizer, ["a castle", "a lake", ""])
    made = []
    states = examples._text_states
    monkeypatch.setattr(examples, "_text_states", lambda *given: made.append(1) or states(*given))
    monkeypatch.setattr(examples, "STATES_IN_MEMORY", 2 * 77 * 16 * 4)
    state_of = prompt_states(base.text_encoder, ids, None)
    assert made == []
    first = state_of(0)
    assert first.equal(base.text_encoder(ids[:1])[0][0])
    assert state_of(0).equal(first)
    assert len(made) == 1
    for prompt in (1, 2, 0):  # the third drives out the first
        state_of(prompt)
    assert len(made) == 4
    cached = prompt_states(base.text_encoder, ids, tmp_path)
    assert cached(0).equal(first)
    assert len(list((tmp_path / "text").iterdir())) == 1
