"""The parts of training, each against a formula or an independent count."""

import dataclasses
import json
import math
import signal
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler
from diffusers.training_utils import compute_snr
from helpers import CASTLE, train_config
from safetensors import SafetensorError
from torch import nn

from sd_atoms.data.config import Concept
from sd_atoms.errors import UserError
from sd_atoms.training.checkpoint import Progress, checkpoints, find_checkpoint, load_checkpoint, save_checkpoint
from sd_atoms.training.denoiser import TrainedRows
from sd_atoms.training.interrupt import listening
from sd_atoms.training.noise import generator, image_number, sample_noise, sample_numbers
from sd_atoms.training.objective import losses, noising, offset, prediction_target, snr_weights
from sd_atoms.training.optimiser import (
    make_optimizer,
    parameter_groups,
    rate_schedule,
    swapped_in,
    update_mean,
    with_defaults,
)
from sd_atoms.training.run_folder import cut_log, read_log

BASE = dict(pretrained_model_name_or_path="pocket", instance_data_dir="pocket:castle", instance_prompt="a castle")
ROW = dict(**CASTLE, train_token_embedding=True)


def scheduler(**kwargs):
    return DDIMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", **kwargs)


def test_targets_follow_their_definitions():
    latents, noise = torch.randn(3, 4, 8, 8), torch.randn(3, 4, 8, 8)
    timesteps = torch.tensor([0, 500, 999])
    alphas = scheduler().alphas_cumprod[timesteps].view(-1, 1, 1, 1)
    assert torch.equal(prediction_target(noising(scheduler(), None), latents, noise, timesteps), noise)
    velocity = prediction_target(noising(scheduler(prediction_type="v_prediction"), None), latents, noise, timesteps)
    torch.testing.assert_close(velocity, alphas.sqrt() * noise - (1 - alphas).sqrt() * latents)
    assert torch.equal(velocity, prediction_target(noising(scheduler(), "v_prediction"), latents, noise, timesteps))
    with pytest.raises(UserError, match="the base predicts 'sample'"):
        noising(scheduler(prediction_type="sample"), None)


def test_zero_terminal_snr_ends_in_pure_noise_and_needs_v_prediction():
    schedule = noising(scheduler(), "v_prediction", zero_snr=True)
    assert schedule.alphas_cumprod[-1] < 1e-6
    latents, noise, last = torch.randn(1, 4, 8, 8), torch.randn(1, 4, 8, 8), torch.tensor([999])
    torch.testing.assert_close(schedule.add_noise(latents, noise, last), noise, rtol=0, atol=1e-3)
    torch.testing.assert_close(prediction_target(schedule, latents, noise, last), -latents, rtol=0, atol=1e-3)
    # the first timestep stays as it was (Lin et al. 2023, algorithm 1)
    torch.testing.assert_close(schedule.alphas_cumprod[0], noising(scheduler(), None).alphas_cumprod[0])
    with pytest.raises(UserError, match="needs a base that predicts v_prediction"):
        noising(scheduler(), None, zero_snr=True)


def test_losses_are_per_picture_and_in_float32():
    prediction, wanted = torch.randn(3, 4, 8, 8), torch.randn(3, 4, 8, 8)
    expected = torch.stack([((a - b) ** 2).mean() for a, b in zip(prediction, wanted, strict=True)])
    torch.testing.assert_close(losses(prediction, wanted), expected)
    assert losses(prediction.bfloat16(), wanted).dtype == torch.float32


def test_huber_losses_follow_their_formulas_and_their_limits():
    prediction, wanted, c = torch.randn(3, 4, 8, 8), torch.randn(3, 4, 8, 8), 0.3
    squares = (prediction.double() - wanted.double()) ** 2
    formula = 2 * c * ((squares + c * c).sqrt() - c)
    torch.testing.assert_close(losses(prediction, wanted, "huber", c).double(), formula.flatten(1).mean(1))
    torch.testing.assert_close(losses(prediction, wanted, "smooth_l1", c).double(), formula.flatten(1).mean(1) / c)
    near, far = torch.full((1, 1), 1e-4), torch.full((1, 1), 1e4)
    zero = torch.zeros(1, 1)
    torch.testing.assert_close(losses(near, zero, "huber", c), losses(near, zero))  # d² near zero
    torch.testing.assert_close(losses(far, zero, "smooth_l1", c), 2 * far[0], rtol=1e-3, atol=0)  # 2|d| far from it


@pytest.mark.parametrize(
    ("prediction", "zero_snr"), [("epsilon", False), ("v_prediction", False), ("v_prediction", True)]
)
def test_min_snr_weights_are_those_of_the_loss_on_x0(prediction, zero_snr):
    schedule = noising(scheduler(), prediction, zero_snr)
    timesteps = torch.tensor([0, 10, 300, 700, 998])
    snr = compute_snr(schedule, timesteps).double()
    # a loss on x0 is weighted min(SNR, gamma): |eps - eps'|^2 = SNR |x0 - x0'|^2, |v - v'|^2 = (SNR + 1) |x0 - x0'|^2
    expected = snr.clamp(max=5.0) / (snr if prediction == "epsilon" else snr + 1)
    torch.testing.assert_close(snr_weights(schedule, timesteps, 5.0).double(), expected, rtol=1e-4, atol=1e-7)
    last = snr_weights(schedule, torch.tensor([999]), 5.0)
    assert torch.isfinite(last).all()
    if zero_snr:
        assert last < 1e-6


def test_noise_offset_moves_whole_channels():
    noise, whole = torch.randn(2, 4, 8, 8), torch.randn(2, 4, 1, 1)
    torch.testing.assert_close(
        (offset(noise, whole, 0.1) - noise) / 0.1, whole.expand(2, 4, 8, 8), rtol=1e-3, atol=1e-5
    )
    assert offset(noise, whole, 0.0) is noise


def test_an_epoch_shows_every_picture_once_and_each_in_another_order():
    order = [image_number(0, n, 5) for n in range(20)]
    epochs = [order[start : start + 5] for start in range(0, 20, 5)]
    assert all(sorted(epoch) == [0, 1, 2, 3, 4] for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) > 1
    assert [image_number(0, n, 5) for n in reversed(range(20))] == order[::-1]
    assert [image_number(0, n, 5, "prior") for n in range(20)] != order


def test_what_is_drawn_depends_on_seed_sample_number_and_purpose_alone():
    def one(seed, n, purpose="sample"):
        return sample_noise(seed, n, 2, (2, 3, 3), 1000, purpose)

    first, again, other, seed, prior = one(0, 7), one(0, 7), one(0, 8), one(1, 7), one(0, 7, "prior")
    assert torch.equal(first.noise, again.noise)
    assert first[:2] == again[:2]
    assert (first.mirrored, first.dropped) == (again.mirrored, again.dropped)
    for different in (other, seed, prior):
        assert not torch.equal(first.noise, different.noise)
    assert not torch.equal(first.noise, first.latent_noise)
    assert first.whole_noise.shape == (2, 1, 1)


def test_timesteps_prompts_and_chances_cover_their_range():
    draws = [sample_noise(0, n, 3, (1,), 1000) for n in range(600)]
    assert {d.prompt for d in draws} == {0, 1, 2}
    steps = torch.tensor([d.timestep for d in draws]).float()
    assert steps.min() < 20
    assert steps.max() > 979
    assert abs(steps.mean() - 499.5) < 40
    for name in ("mirrored", "dropped"):
        values = np.array([getattr(d, name) for d in draws])
        assert values.min() < 0.02
        assert values.max() > 0.98
        assert abs(values.mean() - 0.5) < 0.05


def test_training_seeds_never_equal_those_of_pictures():
    assert all(generator(seed, "sample", n).initial_seed() >= 2**62 for seed in range(3) for n in range(50))


@pytest.mark.parametrize(
    ("processes", "batch", "accumulation"), [(1, 4, 1), (1, 1, 4), (2, 2, 1), (2, 1, 2), (4, 1, 1)]
)
def test_an_effective_batch_of_four_is_the_same_four_samples_however_it_is_split(processes, batch, accumulation):
    for step in range(3):
        numbers = [
            n
            for micro in range(accumulation)
            for rank in range(processes)
            for n in sample_numbers(step, micro, rank, processes, batch, accumulation)
        ]
        assert numbers == list(range(4 * step, 4 * step + 4))


@pytest.mark.parametrize("schedule", ["linear", "cosine", "constant_with_warmup", "polynomial"])
def test_a_schedule_counts_optimiser_steps_and_ends_with_the_run(schedule):
    # neither processes nor accumulation come into it: the loop asks once per optimiser step
    factor = rate_schedule(train_config(**BASE, lr_scheduler=schedule, lr_warmup_steps=10).optimiser, 100)
    assert factor(0) == 0
    assert factor(5) == 0.5
    assert factor(10) == 1
    assert factor(99.5) < 0.01 or schedule == "constant_with_warmup"


def named():
    names = ("unet.a.atoms_delta.default", "unet.a.atoms_beta.default", "unet.b.atoms_block_delta.default",
             "text_encoder.embeddings.trained.0", "text_encoder.q_proj.lora_A.default.weight")  # fmt: skip
    return {name: nn.Parameter(torch.zeros(2)) for name in names}


def test_every_kind_of_number_has_a_learning_rate_of_its_own():
    rates = dict(learning_rate=1.0, beta_learning_rate=2.0, token_learning_rate=3.0, text_learning_rate=4.0)
    config = train_config(**CASTLE, **rates, m1=3, train_token_embedding=True, train_text_encoder=True)
    parameters = named()
    groups = parameter_groups(parameters, config.optimiser, config.method.chosen())
    found = {id(p): group["lr"] for group in groups for p in group["params"]}
    assert [found[id(p)] for p in parameters.values()] == [1.0, 2.0, 1.0, 3.0, 4.0]


@pytest.mark.parametrize("settings", [{}, dict(m1=3), dict(m=0, kc=2), dict(optimizer="prodigy")])
def test_open_learning_rates_are_filled_in_and_set_ones_stay(settings):
    config = with_defaults(train_config(**ROW, **settings, token_learning_rate=0.5))
    assert config.optimiser.token_learning_rate == 0.5
    rates = (config.optimiser.learning_rate, config.optimiser.beta_learning_rate, config.optimiser.text_learning_rate)
    assert all(rate is not None and rate > 0 for rate in rates)
    assert (config.optimiser.learning_rate == 1.0) == ("optimizer" in settings)


def test_optimisers_that_cannot_be_used_say_so(monkeypatch):
    config = with_defaults(train_config(**ROW, optimizer="prodigy", token_learning_rate=0.5))
    with pytest.raises(UserError, match="prodigy takes one learning rate for all, got 0.5, 1.0"):
        make_optimizer(parameter_groups(named(), config.optimiser, config.method.chosen()), config.optimiser)
    config = train_config(**BASE, optimizer="adamw8bit", learning_rate=1.0)
    with pytest.raises(UserError, match="adamw8bit needs a graphics card"):
        make_optimizer([{"params": [nn.Parameter(torch.zeros(2))], "lr": 1.0}], config.optimiser)
    monkeypatch.setitem(__import__("sys").modules, "prodigyopt", None)
    config = with_defaults(train_config(**BASE, optimizer="prodigy"))
    with pytest.raises(UserError, match='pip install "sd-atoms\\[prodigy\\]"'):
        make_optimizer(parameter_groups(named(), config.optimiser, config.method.chosen()), config.optimiser)


def test_the_running_mean_is_the_weighted_mean_of_all_steps():
    parameter, decay = nn.Parameter(torch.zeros(3, dtype=torch.float64)), 0.9
    mean, expected = {"a": torch.zeros(3, dtype=torch.float64)}, 0.0
    for step in range(1, 200):
        value = math.sin(step)
        parameter.data.fill_(value)
        update_mean(mean, {"a": parameter}, decay, step)
        d = min(decay, step / (step + 9))
        expected = d * expected + (1 - d) * value
    torch.testing.assert_close(mean["a"], torch.full((3,), expected, dtype=torch.float64))


def test_other_values_are_taken_back_whatever_happens():
    parameters = {"a": nn.Parameter(torch.ones(2)), "b": nn.Parameter(torch.ones(2))}

    def stop():
        with swapped_in(parameters, {"a": torch.zeros(2)}):
            assert not parameters["a"].any()
            assert parameters["b"].all()
            raise RuntimeError("stop")

    with pytest.raises(RuntimeError, match="stop"):
        stop()
    assert parameters["a"].all()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (dict(prior="teacher"), "class_prompt is required with prior=teacher"),
        (dict(prior="images", class_prompt="a"), "class_data_dir is required with prior=images"),
        (dict(class_prompt="a"), "class_prompt and class_data_dir need a prior"),
        (dict(prior="teacher", class_prompt="a", class_data_dir="d"), "class_data_dir needs prior=images"),
        (
            dict(prior="teacher", class_prompt="a", class_prompts_file="f"),
            "class_prompts_file stands in place of class_prompt",
        ),
        (
            dict(captions=True, instance_prompts_file="t", initializer_token="a"),
            "captions stand in place of instance_prompts_file",
        ),
        (dict(initializer_token="castle"), "initializer_token needs a placeholder_token, or templates"),
        (
            dict(instance_data_dir=None, instance_prompt=None, concepts=(Concept("d", "a", class_prompt="a"),)),
            "class_prompt and class_data_dir need a prior",
        ),
        (dict(keep="best"), "keep=best needs validation_loss_steps"),
        (dict(holdout_images=1), "holdout_images needs validation_loss_steps"),
        (dict(dataset_name="x"), "dataset_name stands in place of instance_data_dir"),
        (dict(caption_column="x"), "caption_column needs dataset_name"),
        (dict(hub_model_id="a/b"), "hub_model_id needs push_to_hub"),
        (dict(placeholder_token="<a> <b>", instance_prompt="<a> <b>", initializer_token="x y z"), "has 3 words for 2"),
        (dict(placeholder_token="<a> <b>", instance_prompt="a <a>", initializer_token="x"), "lacks the placeholder"),
        (dict(concepts=()), "concepts: one or more are needed"),
        (dict(concepts=(Concept("d", "a"),)), "concepts: each has its own instance_data_dir, instance_prompt"),
    ],
)  # fmt: skip
def test_settings_that_do_not_go_together_are_refused(settings, message):
    with pytest.raises(UserError, match=message):
        train_config(**{**BASE, **settings})


def test_all_that_is_wrong_is_said_at_once():
    with pytest.raises(UserError) as stop:
        train_config(pretrained_model_name_or_path="pocket", keep="best", prior="images")
    for part in ("instance_data_dir is", "instance_prompt is", "keep=best", "class_prompt is", "class_data_dir is"):
        assert part in str(stop.value)


def test_several_tokens_take_one_word_each_or_one_for_all():
    concept = Concept("d", "<a> <b>", placeholder_token="<a> <b>", initializer_token="old castle")
    assert list(zip(concept.tokens, concept.initializers, strict=True)) == [("<a>", "old"), ("<b>", "castle")]
    assert dataclasses.replace(concept, initializer_token="castle").initializers == ("castle", "castle")
    assert (concept.word, concept.plain_word) == ("<a> <b>", "old castle")
    assert Concept("d", "a", initializer_token="old castle").initializers == ()


def test_trained_rows_act_as_the_table_would_and_leave_the_rest_alone():
    table = nn.Embedding(10, 6).requires_grad_(False)
    before = table.weight.clone()
    rows = TrainedRows(table, [8, 9])
    ids = torch.tensor([[1, 8, 9, 2], [9, 9, 0, 7]])
    assert torch.equal(rows(ids), table(ids))
    rows(ids)[0].sum().backward()
    assert torch.equal(rows.rows.grad, torch.ones(2, 6))
    assert table.weight.grad is None
    rows.rows.data += 1
    rows.write_back()
    assert torch.equal(table.weight[:8], before[:8])
    assert torch.equal(table.weight[8:], before[8:] + 1)


def adam(value=1.0):
    parameter = nn.Parameter(torch.full((3,), value))
    return {"a": parameter}, torch.optim.AdamW([parameter], lr=0.1)


def step(parameters, optimizer):
    parameters["a"].square().sum().backward()
    optimizer.step()
    optimizer.zero_grad()


def test_a_restored_checkpoint_goes_on_bit_for_bit(tmp_path):
    parameters, optimizer = adam()
    for _ in range(3):
        step(parameters, optimizer)
    path = save_checkpoint(tmp_path, Progress(3), parameters, optimizer, None, None)
    restored, other = adam(5.0)
    assert load_checkpoint(path, restored, other, None).step == 3
    for _ in range(3):
        step(parameters, optimizer)
        step(restored, other)
    assert torch.equal(parameters["a"], restored["a"])


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("step", torch.tensor(True)),
        ("step", torch.ones(2)),
        ("exp_avg", torch.ones(3).bool()),
        ("exp_avg", torch.ones(2)),
    ],
)
def test_what_no_optimiser_keeps_is_refused(name, value, tmp_path):
    parameters, optimizer = adam()
    step(parameters, optimizer)
    assert parameters["a"].shape == (3,)
    optimizer.state[parameters["a"]][name] = value
    path = save_checkpoint(tmp_path, Progress(1), parameters, optimizer, None, None)
    with pytest.raises(UserError, match="belongs to a run with another optimiser"):
        load_checkpoint(path, *adam(), None)


def test_the_scaler_comes_back(tmp_path):
    parameters, optimizer = adam()
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    path = save_checkpoint(tmp_path, Progress(1), parameters, optimizer, scaler, None)
    other = torch.amp.GradScaler("cpu", init_scale=2.0)
    load_checkpoint(path, *adam(), other)
    assert other.state_dict() == scaler.state_dict()


def test_a_limit_removes_the_oldest_by_number_and_never_the_newest(tmp_path):
    parameters, optimizer = adam()
    for number in (100, 20, 9):
        save_checkpoint(tmp_path, Progress(number), parameters, optimizer, None, None)
    save_checkpoint(tmp_path, Progress(1000), parameters, optimizer, None, 2)
    assert [path.name for path in checkpoints(tmp_path)] == [
        "checkpoint-100.safetensors",
        "checkpoint-1000.safetensors",
    ]
    assert find_checkpoint("latest", tmp_path).name == "checkpoint-1000.safetensors"
    assert find_checkpoint("checkpoint-100", tmp_path).name == "checkpoint-100.safetensors"


def test_the_newest_checkpoint_stays_even_if_its_number_is_the_lowest(tmp_path):
    parameters, optimizer = adam()
    save_checkpoint(tmp_path, Progress(100), parameters, optimizer, None, None)
    # resumed from an older file: step 50 comes after step 100
    newest = save_checkpoint(tmp_path, Progress(50), parameters, optimizer, None, 1)
    assert newest in checkpoints(tmp_path)


def test_a_full_disk_costs_no_checkpoint(tmp_path, monkeypatch):
    parameters, optimizer = adam()
    kept = save_checkpoint(tmp_path, Progress(1), parameters, optimizer, None, 1)

    def full(*_, **__):
        raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")

    monkeypatch.setattr("sd_atoms.training.checkpoint.save_file", full)
    with pytest.raises(UserError, match="checkpoint-2.safetensors: no space left on the disk"):
        save_checkpoint(tmp_path, Progress(2), parameters, optimizer, None, 1)
    assert [path.name for path in tmp_path.iterdir()] == [kept.name]


def test_mean_best_and_what_an_optimiser_keeps_beside_its_state_come_back(tmp_path):
    parameters, config = {"a": nn.Parameter(torch.ones(3))}, with_defaults(train_config(**BASE, optimizer="prodigy"))
    optimizer = make_optimizer([{"params": [parameters["a"]], "lr": 1.0}], config.optimiser)
    for _ in range(5):
        step(parameters, optimizer)
    progress = Progress(5, {"a": torch.full((3,), 0.25)}, {"a": torch.full((3,), 0.75)}, 0.125, 4)
    path = save_checkpoint(tmp_path, progress, parameters, optimizer, None, None)
    restored = {"a": nn.Parameter(torch.zeros(3))}
    other = make_optimizer([{"params": [restored["a"]], "lr": 1.0}], config.optimiser)
    back = load_checkpoint(path, restored, other, None)
    assert (back.step, back.best_loss, back.best_step) == (5, 0.125, 4)
    assert torch.equal(back.mean["a"], progress.mean["a"])
    assert torch.equal(back.best["a"], progress.best["a"])
    assert other.param_groups[0]["d"] == optimizer.param_groups[0]["d"] != 1e-6
    for _ in range(3):
        step(parameters, optimizer)
        step(restored, other)
    assert torch.equal(parameters["a"], restored["a"])


def test_checkpoints_that_cannot_be_used(tmp_path):
    parameters, optimizer = adam()
    with pytest.raises(UserError, match="holds no checkpoint"):
        find_checkpoint("latest", tmp_path)
    with pytest.raises(UserError, match="neither 'latest' nor a checkpoint file"):
        find_checkpoint("checkpoint-7", tmp_path)
    path = save_checkpoint(tmp_path, Progress(1), parameters, optimizer, None, None)
    with pytest.raises(UserError, match="other trained parameters"):
        load_checkpoint(path, {"b": parameters["a"]}, optimizer, None)
    path.write_bytes(path.read_bytes()[:50])
    with pytest.raises(UserError, match="corrupt or not a checkpoint"):
        load_checkpoint(path, parameters, optimizer, None)


def test_half_a_last_line_of_a_log_is_no_entry(tmp_path):
    log = tmp_path / "log.jsonl"
    log.write_text("".join(json.dumps({"step": n, "loss": 0.1}) + "\n" for n in range(1, 6)) + '{"step": 6, "lo')
    assert [entry["step"] for entry in read_log(log)] == [1, 2, 3, 4, 5]
    cut_log(log, 3)
    assert [entry["step"] for entry in read_log(log)] == [1, 2, 3]
    assert log.read_text().endswith("\n")


def test_a_second_signal_ends_a_run_at_once_and_the_launchers_death_is_no_second_one(monkeypatch):
    with listening() as stop:
        assert stop.signal_number == 0
        monkeypatch.setattr("sd_atoms.training.interrupt._orphaned", SimpleNamespace(is_set=lambda: True))
        assert stop.signal_number == signal.SIGTERM
        signal.raise_signal(signal.SIGTERM)
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGTERM)
