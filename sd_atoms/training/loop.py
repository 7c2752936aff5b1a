"""The training loop of a concept: one function, top to bottom, the same on a CPU, one card or many."""

import json
import math
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from diffusers.optimization import get_scheduler
from tqdm import tqdm

from sd_atoms.data.prompts import fill, load_templates
from sd_atoms.errors import UserError
from sd_atoms.pipeline import DTYPES, add_placeholder_tokens
from sd_atoms.pipeline.tokens import initializer_row
from sd_atoms.training.checkpoint import find_checkpoint, load_checkpoint, save_checkpoint
from sd_atoms.training.config import TrainConfig
from sd_atoms.training.denoiser import Denoiser, TrainedRows
from sd_atoms.training.draws import draw, sample_numbers
from sd_atoms.training.examples import encode_images, tokenize
from sd_atoms.training.interrupt import Interrupted, listening
from sd_atoms.training.objective import losses, noising, target
from sd_atoms.training.run_folder import CHECKPOINTS, LOG, cut_log, read_log
from sd_atoms.tuner import AtomsConfig

# settings of a run that are the adapter's under the same name
ADAPTER_SETTINGS = ("m", "m1", "train_beta", "kc", "m_c", "block_layers", "solver", "l1", "seed", "form")


@dataclass(frozen=True)
class Outcome:
    """What a training run says about itself."""

    steps: int
    trained_numbers: int  # entries of all ΔD
    trained_token_numbers: int  # entries of trained embedding rows


def prompts_of(config: TrainConfig) -> list[str]:
    """The prompts that training draws from."""
    if config.instance_prompts_file is None:
        return [config.instance_prompt]
    concept = config.placeholder_token or config.initializer_token
    return [fill(template, concept) for template in load_templates(config.instance_prompts_file)]


def attach(pipe, config: TrainConfig) -> None:
    """Freezes a pipeline, in the dtype of the run, and adds the placeholder token and the adapter.

    Raises:
        UserError: the token or the target does not fit the base.
    """
    if config.placeholder_token:
        add_placeholder_tokens(pipe, {config.placeholder_token: initializer_row(pipe, config.initializer_token)})
    for module in (pipe.unet, pipe.vae, pipe.text_encoder):
        module.requires_grad_(False)
    if config.mixed_precision != "no":
        for module in (pipe.unet, pipe.text_encoder):  # not the VAE: it overflows in fp16, and encodes only once
            module.to(dtype=DTYPES[config.mixed_precision])
    try:
        settings = AtomsConfig(
            **{name: getattr(config, name) for name in ADAPTER_SETTINGS}, target_modules=config.target
        )
        pipe.unet.add_adapter(settings)
    except ValueError as error:
        raise UserError(f"target={config.target!r}, m={config.m}: {error}") from error


def train(
    config: TrainConfig,
    pipe,
    accelerator,
    photos: Sequence[Path],
    folder: Path,
    validate: Callable[[int], None],
) -> Outcome:
    """Trains the adapter that `attach` put into `pipe`.

    Args:
        config: settings.
        pipe: the pipeline, adapted, on the accelerator's device; on return it carries the trained adapter and rows.
        accelerator: made with the config's mixed precision and accumulation.
        photos: the pictures to learn from.
        folder: the run folder; log and checkpoints go there.
        validate: called on every process with the step after each `validation_steps`, when a prompt is set.

    Raises:
        UserError: a checkpoint does not fit, the loss is not finite, or nothing was learned.
        Interrupted: on Ctrl-C or SIGTERM, after a checkpoint was written.
    """
    main = accelerator.is_main_process

    # Data: latents and token ids, once
    schedule = noising(pipe.scheduler, config.prediction_type)
    latents = encode_images(
        pipe.vae,
        photos,
        config.resolution,
        config.center_crop,
        config.image_interpolation_mode,
        config.seed,
    )
    token_ids = tokenize(pipe.tokenizer, prompts_of(config))
    if config.mixed_precision != "no":
        pipe.vae.to(dtype=pipe.unet.dtype)  # from here on it only decodes

    # Model: what is trained is float32, whatever the base is
    rows = None
    if config.train_token_embedding:
        row_id = pipe.tokenizer.convert_tokens_to_ids(config.placeholder_token)
        rows = TrainedRows(pipe.text_encoder.get_input_embeddings(), [row_id]).to(accelerator.device)
        pipe.text_encoder.set_input_embeddings(rows)
    if config.gradient_checkpointing:
        pipe.unet.enable_gradient_checkpointing()
    pipe.unet.train()

    # Optimiser: two groups with learning rates of their own
    denoiser = Denoiser(pipe.unet, pipe.text_encoder)
    parameters = {name: p for name, p in denoiser.named_parameters() if p.requires_grad}
    atoms = [p for name, p in parameters.items() if "atoms_delta" in name]
    groups = [{"params": atoms, "lr": config.learning_rate}]
    if rows is not None:
        groups.append({"params": [rows.rows], "lr": config.token_learning_rate})
    base_rates = [group["lr"] for group in groups]
    optimizer = torch.optim.AdamW(
        groups,
        betas=(config.adam_beta1, config.adam_beta2),
        weight_decay=config.adam_weight_decay,
        eps=config.adam_epsilon,
    )
    per_step = config.train_batch_size * accelerator.num_processes * config.gradient_accumulation_steps
    total_steps = config.max_train_steps
    if config.num_train_epochs is not None:
        total_steps = math.ceil(config.num_train_epochs * len(latents.mean) / per_step)
    rate_factor = get_scheduler(
        config.lr_scheduler,
        optimizer,
        num_warmup_steps=config.lr_warmup_steps,
        num_training_steps=total_steps,
        num_cycles=config.lr_num_cycles,
        power=config.lr_power,
    ).lr_lambdas[0]
    denoiser, optimizer = accelerator.prepare(denoiser, optimizer)

    # Resume
    first_step = 0
    if config.resume_from_checkpoint:
        path = find_checkpoint(config.resume_from_checkpoint, folder / CHECKPOINTS)
        first_step = load_checkpoint(path, parameters, optimizer, accelerator.scaler)
        if main:
            cut_log(folder / LOG, first_step)
        accelerator.print(f"Resuming {path.name} at step {first_step}")

    def checkpoint(step: int) -> Path | None:
        if not main:
            return None
        return save_checkpoint(
            folder / CHECKPOINTS, step, parameters, optimizer, accelerator.scaler, config.checkpoints_total_limit
        )

    # Train
    earlier = read_log(folder / LOG)
    started = time.perf_counter() - (earlier[-1]["seconds"] if earlier else 0.0)
    bar = tqdm(total=total_steps, initial=first_step, desc="Training", unit="step", disable=None if main else True)
    with listening() as stop, bar, open(folder / LOG if main else os.devnull, "a", encoding="utf-8") as log:
        for step in range(first_step, total_steps):
            for group, rate in zip(optimizer.param_groups, base_rates, strict=True):
                group["lr"] = rate * rate_factor(step + 0.5)  # at a step's middle, so that none is taken at rate 0
            step_loss = torch.zeros((), device=accelerator.device)
            for micro_batch in range(config.gradient_accumulation_steps):
                numbers = sample_numbers(
                    step,
                    micro_batch,
                    accelerator.process_index,
                    accelerator.num_processes,
                    config.train_batch_size,
                    config.gradient_accumulation_steps,
                )
                draws = [
                    draw(
                        config.seed,
                        n,
                        len(latents.mean),
                        len(token_ids),
                        schedule.config.num_train_timesteps,
                        latents.mean.shape[1:],
                    )
                    for n in numbers
                ]
                clean = torch.stack([latents.sample(d.image, d.latent_noise) for d in draws]).to(accelerator.device)
                noise = torch.stack([d.noise for d in draws]).to(accelerator.device)
                timesteps = torch.tensor([d.timestep for d in draws], device=accelerator.device)
                ids = token_ids[[d.template for d in draws]].to(accelerator.device)
                noisy = schedule.add_noise(clean, noise, timesteps)
                with accelerator.accumulate(denoiser):
                    prediction = denoiser(noisy.to(pipe.unet.dtype), timesteps, ids)
                    loss = losses(prediction, target(schedule, clean, noise, timesteps)).mean()
                    accelerator.backward(loss)
                    step_loss += loss.detach() / config.gradient_accumulation_steps
                    if accelerator.sync_gradients:
                        max_norm = config.max_grad_norm or math.inf
                        grad_norm = accelerator.clip_grad_norm_(parameters.values(), max_norm)
                    optimizer.step()
                    optimizer.zero_grad()
            mean_loss = accelerator.reduce(step_loss, "mean").item()
            if not math.isfinite(mean_loss):
                raise UserError(
                    f"the loss is {mean_loss} at step {step + 1}; lower learning_rate={config.learning_rate} or use "
                    f"mixed_precision no, then resume or start again"
                )
            if main:
                entry = {
                    "step": step + 1,
                    "loss": mean_loss,
                    "learning_rate": optimizer.param_groups[0]["lr"],
                    "grad_norm": float(grad_norm),
                    "seconds": round(time.perf_counter() - started, 3),
                }
                log.write(json.dumps(entry) + "\n")
                log.flush()
                accelerator.log({key: entry[key] for key in ("loss", "learning_rate", "grad_norm")}, step=step + 1)
            bar.set_postfix(loss=f"{mean_loss:.3f}", refresh=False)
            bar.update()
            done = step + 1
            # a signal may reach one process only; all stop after the same step
            asked = int(accelerator.gather(torch.tensor([stop.signal_number], device=accelerator.device)).max())
            if done % config.checkpointing_steps == 0 or done == total_steps or asked:
                saved = checkpoint(done)
            if asked:
                raise Interrupted(done, saved, asked)
            if config.validation_prompt and done % config.validation_steps == 0:
                validate(done)

    # Hand the pipeline back as it was, plus what was learned
    if rows is not None:
        pipe.text_encoder.set_input_embeddings(rows.write_back())
    if config.gradient_checkpointing:
        pipe.unet.disable_gradient_checkpointing()
    pipe.unet.eval()
    if config.learning_rate > 0 and not any(p.detach().any() for p in atoms):
        raise UserError("training changed no atom: the adapter would have no effect; raise learning_rate")
    return Outcome(
        steps=total_steps,
        trained_numbers=sum(p.numel() for p in atoms),
        trained_token_numbers=rows.rows.numel() if rows is not None else 0,
    )
