"""The training loop: optimiser steps over sample numbers, the same on a CPU, one card or many.

It knows neither images nor diffusion: whoever calls it says what the loss of some sample numbers is.
"""

import json
import math
import os
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import NamedTuple

import torch
from torch import nn

from sd_atoms.errors import UserError
from sd_atoms.progress import progress_bar
from sd_atoms.training.checkpoint import Progress, find_checkpoint, load_checkpoint, save_checkpoint, set_aside_later
from sd_atoms.training.interrupt import Interrupted, listening
from sd_atoms.training.noise import sample_numbers
from sd_atoms.training.optimiser import load_values, make_optimizer, rate_schedule, swapped_in, update_mean
from sd_atoms.training.run_folder import CHECKPOINTS, LOG, cut_log, read_log
from sd_atoms.training.sections import LoopSettings, OptimiserSettings, OutputSettings, ValidationSettings


class Hooks(NamedTuple):
    """What a kind of training does besides the loss; all are called on every process.

    begin: once all is ready; until then nothing is written. measure: the log's entries at every checkpoint and
    validation, and what the bar says of them. validate: the log's entries on how far the training is, a
    `validation_loss` that can be compared between steps among them. show: the step at which images are wanted.
    """

    begin: Callable[[], None]
    measure: Callable[[], tuple[dict[str, float], dict[str, str]]]
    validate: Callable[[], dict[str, float]]
    show: Callable[[int], None]


def run_steps(
    network: nn.Module,
    loss_of: Callable[[nn.Module, range], torch.Tensor],
    groups: list[dict],
    accelerator,
    folder: Path,
    *,
    examples: int,
    loop: LoopSettings,
    optimiser: OptimiserSettings,
    validation: ValidationSettings,
    output: OutputSettings,
    hooks: Hooks,
    data: Mapping[str, str],
) -> Progress:
    """Trains what requires gradients in a network, and leaves the values that are kept in it.

    Args:
        network: what is trained; on the accelerator's device.
        loss_of: (the network as training wraps it, sample numbers) -> mean loss, a scalar.
        groups: the trained parameters for the optimiser, each group with its learning rate.
        accelerator: made with the accumulation of `loop`.
        folder: the run folder; log and checkpoints go there.
        examples: how many samples make an epoch.
        loop, optimiser, validation, output: settings.
        hooks: what else is done on the way.
        data: digests of what is learned from, for the checkpoints.

    Returns:
        How far the run has come; `best_step` says whose values are kept, if not the last one's.

    Raises:
        UserError: a checkpoint does not fit, or the loss is not finite.
        Interrupted: on Ctrl-C or SIGTERM, after a checkpoint was written.
    """
    main, device = accelerator.is_main_process, accelerator.device
    parameters = {name: p for name, p in network.named_parameters() if p.requires_grad}
    base_rates = [group["lr"] for group in groups]
    optimizer = make_optimizer(groups, optimiser)
    batch, accumulation = loop.train_batch_size, loop.gradient_accumulation_steps
    total_steps = steps_of(loop, examples, accelerator.num_processes)
    rate_factor = rate_schedule(optimiser, total_steps)
    wrapped, optimizer = accelerator.prepare(network, optimizer)
    progress, checkpoint = Progress(), None
    if optimiser.ema_decay:
        progress.mean = {name: p.detach().clone() for name, p in parameters.items()}
    if output.resume_from_checkpoint:
        checkpoint = find_checkpoint(output.resume_from_checkpoint, folder / CHECKPOINTS)
        progress = load_checkpoint(checkpoint, parameters, optimizer, accelerator.scaler)
        if bool(progress.mean) != bool(optimiser.ema_decay):
            raise UserError(f"{checkpoint}: belongs to a run with another ema_decay")
        if progress.step > total_steps:
            raise UserError(f"{checkpoint}: is of step {progress.step}, beyond the {total_steps} steps asked for")
    progress.data = dict(data)
    hooks.begin()
    if checkpoint is not None:
        if main:
            cut_log(folder / LOG, progress.step)
            later = set_aside_later(folder / CHECKPOINTS, progress.step)
            if later:
                print(f"Set aside in {CHECKPOINTS}/abandoned: {', '.join(path.name for path in later)}")
        accelerator.print(f"Resuming {checkpoint.name} at step {progress.step}")
    accelerator.wait_for_everyone()

    earlier = read_log(folder / LOG)
    started = time.perf_counter() - (earlier[-1]["seconds"] if earlier else 0.0)
    first_step = progress.step
    bar, notes = progress_bar(total_steps, "Training", "step", first_step, main), {}
    with listening() as stop, bar, open(folder / LOG if main else os.devnull, "a", encoding="utf-8") as log:
        for step in range(first_step, total_steps):
            for group, rate in zip(optimizer.param_groups, base_rates, strict=True):
                group["lr"] = rate * rate_factor(step + 0.5)  # at a step's middle, so that none is taken at rate 0
            step_loss = torch.zeros((), device=device)
            for micro_batch in range(accumulation):
                numbers = sample_numbers(
                    step, micro_batch, accelerator.process_index, accelerator.num_processes, batch, accumulation
                )
                with accelerator.accumulate(wrapped):
                    loss = loss_of(wrapped, numbers)
                    accelerator.backward(loss)
                    step_loss += loss.detach() / accumulation
                    if accelerator.sync_gradients:
                        max_norm = optimiser.max_grad_norm or math.inf
                        grad_norm = accelerator.clip_grad_norm_(parameters.values(), max_norm)
                    optimizer.step()
                    optimizer.zero_grad()
            mean_loss = accelerator.reduce(step_loss, "mean").item()
            if not math.isfinite(mean_loss):
                raise UserError(
                    f"the loss is {mean_loss} at step {step + 1}; lower learning_rate={optimiser.learning_rate} or "
                    f"use mixed_precision no, then resume or start again"
                )
            done = progress.step = step + 1
            if optimiser.ema_decay:
                update_mean(progress.mean, parameters, optimiser.ema_decay, done)
            entry = {
                "step": done,
                "loss": mean_loss,
                "learning_rate": optimizer.param_groups[0]["lr"],
                "grad_norm": float(grad_norm),
                "seconds": round(time.perf_counter() - started, 3),
            }
            saves = done % output.checkpointing_steps == 0 or done == total_steps
            validates = validation.validation_loss_steps and done % validation.validation_loss_steps == 0
            if saves or validates:
                with swapped_in(parameters, progress.mean):
                    measures, notes = hooks.measure()
                    entry |= measures | (hooks.validate() if validates else {})
                    better = validates and validation.keep == "best"
                    if better and entry["validation_loss"] < progress.best_loss:
                        progress.best = {name: p.detach().clone() for name, p in parameters.items()}
                        progress.best_loss, progress.best_step = entry["validation_loss"], done
            if main:
                log.write(json.dumps(entry) + "\n")
                log.flush()
                curves = {key: value for key, value in entry.items() if key not in ("step", "seconds")}
                accelerator.log(curves, step=done)
            bar.set_postfix(loss=f"{mean_loss:.3f}", **notes, refresh=False)
            bar.update()
            # a signal may reach one process only; all stop after the same step
            asked = int(accelerator.gather(torch.tensor([stop.signal_number], device=device)).max())
            if main and (saves or asked):
                save_checkpoint(
                    folder / CHECKPOINTS, progress, parameters, optimizer, accelerator.scaler,
                    output.checkpoints_total_limit,
                )  # fmt: skip
            if asked:
                raise Interrupted(done, folder, asked)
            if validation.validation_prompt and done % validation.validation_steps == 0:
                with swapped_in(parameters, progress.mean):
                    hooks.show(done)
    load_values(parameters, progress.best or progress.mean)
    return progress


def steps_of(loop: LoopSettings, examples: int, processes: int) -> int:
    """How many optimiser steps a run has."""
    if loop.num_train_epochs is None:
        return loop.max_train_steps
    per_step = loop.train_batch_size * loop.gradient_accumulation_steps * processes
    return math.ceil(loop.num_train_epochs * examples / per_step)
