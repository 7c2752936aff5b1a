"""The parts of training, each against a formula or an independent count."""

import json

import pytest
import torch
from diffusers import DDIMScheduler
from torch import nn

from sd_atoms.errors import UserError
from sd_atoms.training.checkpoint import checkpoints, find_checkpoint, load_checkpoint, save_checkpoint
from sd_atoms.training.denoiser import TrainedRows
from sd_atoms.training.draws import draw, generator, sample_numbers
from sd_atoms.training.objective import losses, noising, target
from sd_atoms.training.run_folder import cut_log, read_log


def scheduler(**kwargs):
    return DDIMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", **kwargs)


def test_targets_follow_their_definitions():
    latents, noise = torch.randn(3, 4, 8, 8), torch.randn(3, 4, 8, 8)
    timesteps = torch.tensor([0, 500, 999])
    alphas = scheduler().alphas_cumprod[timesteps].view(-1, 1, 1, 1)
    assert torch.equal(target(noising(scheduler(), None), latents, noise, timesteps), noise)
    velocity = target(noising(scheduler(prediction_type="v_prediction"), None), latents, noise, timesteps)
    torch.testing.assert_close(velocity, alphas.sqrt() * noise - (1 - alphas).sqrt() * latents)
    assert torch.equal(velocity, target(noising(scheduler(), "v_prediction"), latents, noise, timesteps))
    with pytest.raises(ValueError, match="the base predicts 'sample'"):
        noising(scheduler(prediction_type="sample"), None)


def test_losses_are_per_picture_and_in_float32():
    prediction, wanted = torch.randn(3, 4, 8, 8), torch.randn(3, 4, 8, 8)
    expected = torch.stack([((a - b) ** 2).mean() for a, b in zip(prediction, wanted, strict=True)])
    torch.testing.assert_close(losses(prediction, wanted), expected)
    assert losses(prediction.bfloat16(), wanted).dtype == torch.float32


def test_an_epoch_shows_every_picture_once_and_each_in_another_order():
    order = [draw(0, n, 5, 2, 1000, (1,)).image for n in range(20)]
    epochs = [order[start : start + 5] for start in range(0, 20, 5)]
    assert all(sorted(epoch) == [0, 1, 2, 3, 4] for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) > 1


def test_what_is_drawn_depends_on_seed_and_sample_number_alone():
    one, again, other, seed = (draw(*a, 5, 2, 1000, (2, 3)) for a in ((0, 7), (0, 7), (0, 8), (1, 7)))
    assert torch.equal(one.noise, again.noise)
    assert one[:3] == again[:3]
    assert not torch.equal(one.noise, other.noise)
    assert not torch.equal(one.noise, seed.noise)
    assert not torch.equal(one.noise, one.latent_noise)


def test_timesteps_and_templates_cover_their_range():
    draws = [draw(0, n, 5, 3, 1000, (1,)) for n in range(600)]
    assert {d.template for d in draws} == {0, 1, 2}
    steps = torch.tensor([d.timestep for d in draws]).float()
    assert steps.min() < 20
    assert steps.max() > 979
    assert abs(steps.mean() - 499.5) < 40


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
    path = save_checkpoint(tmp_path, 3, parameters, optimizer, None, None)
    restored, other = adam(5.0)
    assert load_checkpoint(path, restored, other, None) == 3
    for _ in range(3):
        step(parameters, optimizer)
        step(restored, other)
    assert torch.equal(parameters["a"], restored["a"])


def test_the_scaler_comes_back(tmp_path):
    parameters, optimizer = adam()
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    path = save_checkpoint(tmp_path, 1, parameters, optimizer, scaler, None)
    other = torch.amp.GradScaler("cpu", init_scale=2.0)
    load_checkpoint(path, *adam(), other)
    assert other.state_dict() == scaler.state_dict()


def test_a_limit_removes_the_oldest_by_number_and_never_the_newest(tmp_path):
    parameters, optimizer = adam()
    for number in (100, 20, 9):
        save_checkpoint(tmp_path, number, parameters, optimizer, None, None)
    save_checkpoint(tmp_path, 1000, parameters, optimizer, None, 2)
    assert [path.name for path in checkpoints(tmp_path)] == [
        "checkpoint-100.safetensors",
        "checkpoint-1000.safetensors",
    ]
    assert find_checkpoint("latest", tmp_path).name == "checkpoint-1000.safetensors"
    assert find_checkpoint("checkpoint-100", tmp_path).name == "checkpoint-100.safetensors"


def test_checkpoints_that_cannot_be_used(tmp_path):
    parameters, optimizer = adam()
    with pytest.raises(UserError, match="holds no checkpoint"):
        find_checkpoint("latest", tmp_path)
    with pytest.raises(UserError, match="neither 'latest' nor a checkpoint file"):
        find_checkpoint("checkpoint-7", tmp_path)
    path = save_checkpoint(tmp_path, 1, parameters, optimizer, None, None)
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
