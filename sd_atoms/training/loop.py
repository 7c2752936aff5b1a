"""The training loop of a concept: one function, top to bottom, the same on a CPU, one card or many."""

import json
import math
import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from peft import LoraConfig
from tqdm import tqdm

from sd_atoms.errors import UserError
from sd_atoms.pipeline import DTYPES, add_placeholder_tokens
from sd_atoms.pipeline.adapters import add_text_adapter
from sd_atoms.pipeline.tokens import initializer_rows
from sd_atoms.training.batch import Texts, loss_of, samples
from sd_atoms.training.checkpoint import Progress, find_checkpoint, load_checkpoint, save_checkpoint
from sd_atoms.training.config import TrainConfig
from sd_atoms.training.dataset import Dataset
from sd_atoms.training.denoiser import Denoiser, TrainedRows
from sd_atoms.training.draws import sample_numbers
from sd_atoms.training.examples import encode_prompts, tokenize
from sd_atoms.training.interrupt import Interrupted, listening
from sd_atoms.training.objective import noising
from sd_atoms.training.optimiser import make_optimizer, parameter_groups, put, rate_schedule, update_mean, values_of
from sd_atoms.training.run_folder import CHECKPOINTS, LOG, cut_log, read_log
from sd_atoms.training.validation import validation_loss
from sd_atoms.tuner import AtomsConfig

# settings of a run that are the adapter's under the same name
ADAPTER_SETTINGS = ("m", "m1", "train_beta", "kc", "m_c", "block_layers", "solver", "l1", "seed", "form")
TEXT_TARGETS = ["q_proj", "k_proj", "v_proj", "out_proj"]
MOST_KEPT_PROMPTS = 256  # states of more prompts are made anew at each step: one takes 236 KB with SD v1-4


@dataclass(frozen=True)
class Outcome:
    """What a training run says about itself."""

    steps: int
    trained_numbers: int  # entries of all ΔD, β and block atoms in the UNet
    trained_token_numbers: int  # entries of trained embedding rows
    trained_text_numbers: int = 0  # entries of the text encoder's adapter
    kept_step: int | None = None  # whose numbers are saved, if not the last one's


def attach(pipe, config: TrainConfig) -> None:
    """Freezes a pipeline, in the dtype of the run, and adds the placeholder tokens and the adapters.

    Raises:
        UserError: a token or the target does not fit the base.
    """
    for concept in config.all_concepts:
        add_placeholder_tokens(pipe, initializer_rows(pipe, concept.tokens, concept.initializers))
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
    if config.train_text_encoder:
        if config.text_adapter == "lora":
            settings = LoraConfig(
                r=config.text_rank, lora_alpha=config.text_rank, target_modules=TEXT_TARGETS, init_lora_weights=True
            )
        else:
            settings = AtomsConfig(m=0, kc=config.text_kc, seed=config.seed, target_modules=TEXT_TARGETS)
        add_text_adapter(pipe.text_encoder, settings)


def train(
    config: TrainConfig,
    pipe,
    accelerator,
    dataset: Dataset,
    folder: Path,
    begin: Callable[[], None],
    validate: Callable[[int], None],
) -> Outcome:
    """Trains the adapter that `attach` put into `pipe`.

    Args:
        config: settings, with learning rates.
        pipe: the pipeline, adapted, on the accelerator's device; on return it carries the trained adapter and rows.
        accelerator: made with the config's mixed precision and accumulation.
        dataset: what to learn from.
        folder: the run folder; log and checkpoints go there.
        begin: called on every process when all is ready; until then nothing is written.
        validate: called on every process with the step after each `validation_steps`, when a prompt is set.

    Raises:
        UserError: a checkpoint does not fit, the loss is not finite, or nothing was learned.
        Interrupted: on Ctrl-C or SIGTERM, after a checkpoint was written.
    """
    main, device = accelerator.is_main_process, accelerator.device
    schedule = noising(pipe.scheduler, config.prediction_type, config.rescale_betas_zero_snr)
    texts = prepare_texts(pipe, config, dataset)
    if config.mixed_precision != "no":
        pipe.vae.to(dtype=pipe.unet.dtype)  # from here on it only decodes

    # Model: what is trained is float32, whatever the base is
    rows = None
    if config.train_token_embedding:
        row_ids = [pipe.tokenizer.convert_tokens_to_ids(token) for c in config.all_concepts for token in c.tokens]
        rows = TrainedRows(pipe.text_encoder.get_input_embeddings(), row_ids).to(device)
        pipe.text_encoder.set_input_embeddings(rows)
    if config.gradient_checkpointing:
        pipe.unet.enable_gradient_checkpointing()
    pipe.unet.train()

    # Optimiser: each kind of numbers at a learning rate of its own
    plain = Denoiser(pipe.unet, pipe.text_encoder)
    parameters = {name: p for name, p in plain.named_parameters() if p.requires_grad}
    groups = parameter_groups(parameters, config)
    base_rates = [group["lr"] for group in groups]
    optimizer = make_optimizer(groups, config)
    batch, accumulation = config.train_batch_size, config.gradient_accumulation_steps
    per_step = batch * accelerator.num_processes * accumulation
    total_steps = config.max_train_steps
    if config.num_train_epochs is not None:
        total_steps = math.ceil(config.num_train_epochs * len(dataset.examples) / per_step)
    rate_factor = rate_schedule(config, total_steps)
    denoiser, optimizer = accelerator.prepare(plain, optimizer)

    # Resume
    progress = Progress()
    if config.ema_decay:
        progress.mean = {name: p.detach().clone() for name, p in parameters.items()}
    if config.resume_from_checkpoint:
        path = find_checkpoint(config.resume_from_checkpoint, folder / CHECKPOINTS)
        keeps_mean = bool(progress.mean)
        progress = load_checkpoint(path, parameters, optimizer, accelerator.scaler)
        if bool(progress.mean) != keeps_mean:
            raise UserError(f"{path}: belongs to a run with another ema_decay")
    begin()
    if config.resume_from_checkpoint:
        if main:
            cut_log(folder / LOG, progress.step)
        accelerator.print(f"Resuming {path.name} at step {progress.step}")
    accelerator.wait_for_everyone()

    # Train
    earlier = read_log(folder / LOG)
    started = time.perf_counter() - (earlier[-1]["seconds"] if earlier else 0.0)
    first_step, saved = progress.step, None
    bar = tqdm(total=total_steps, initial=first_step, desc="Training", unit="step", disable=None if main else True)
    with listening() as stop, bar, open(folder / LOG if main else os.devnull, "a", encoding="utf-8") as log:
        for step in range(first_step, total_steps):
            for group, rate in zip(optimizer.param_groups, base_rates, strict=True):
                group["lr"] = rate * rate_factor(step + 0.5)  # at a step's middle, so that none is taken at rate 0
            step_loss = torch.zeros((), device=device)
            for micro_batch in range(accumulation):
                numbers = sample_numbers(
                    step, micro_batch, accelerator.process_index, accelerator.num_processes, batch, accumulation
                )
                drawn = samples(numbers, config, dataset.examples, schedule, dataset.empty)
                if dataset.prior:
                    drawn += samples(
                        numbers, config, dataset.prior, schedule, dataset.empty, purpose="prior",
                        weight=config.prior_loss_weight, taught=config.prior == "teacher",
                    )  # fmt: skip
                with accelerator.accumulate(denoiser):
                    loss = loss_of(drawn, denoiser, plain, texts, config, device).sum() / batch
                    accelerator.backward(loss)
                    step_loss += loss.detach() / accumulation
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
            done = progress.step = step + 1
            if config.ema_decay:
                update_mean(progress.mean, parameters, config.ema_decay, done)
            entry = {
                "step": done,
                "loss": mean_loss,
                "learning_rate": optimizer.param_groups[0]["lr"],
                "grad_norm": float(grad_norm),
                "seconds": round(time.perf_counter() - started, 3),
            }
            if config.validation_loss_steps and done % config.validation_loss_steps == 0:
                with values_of(parameters, progress.mean):
                    entry["validation_loss"] = validation_loss(
                        plain, dataset.held_out or dataset.examples, texts, config, schedule, accelerator
                    )
                    if config.keep == "best" and entry["validation_loss"] < progress.best_loss:
                        progress.best = {name: p.detach().clone() for name, p in parameters.items()}
                        progress.best_loss, progress.best_step = entry["validation_loss"], done
            if main:
                log.write(json.dumps(entry) + "\n")
                log.flush()
                curves = {key: value for key, value in entry.items() if key not in ("step", "seconds")}
                accelerator.log(curves, step=done)
            bar.set_postfix(loss=f"{mean_loss:.3f}", refresh=False)
            bar.update()
            # a signal may reach one process only; all stop after the same step
            asked = int(accelerator.gather(torch.tensor([stop.signal_number], device=device)).max())
            if main and (done % config.checkpointing_steps == 0 or done == total_steps or asked):
                saved = save_checkpoint(
                    folder / CHECKPOINTS, progress, parameters, optimizer, accelerator.scaler,
                    config.checkpoints_total_limit,
                )  # fmt: skip
            if asked:
                raise Interrupted(done, saved, asked)
            if config.validation_prompt and done % config.validation_steps == 0:
                with values_of(parameters, progress.mean):
                    validate(done)

    # Hand the pipeline back as it was, plus what was learned
    put(parameters, progress.best or progress.mean)
    if rows is not None:
        pipe.text_encoder.set_input_embeddings(rows.write_back())
    if config.gradient_checkpointing:
        pipe.unet.disable_gradient_checkpointing()
    pipe.unet.eval()
    atoms = {name: p for name, p in parameters.items() if name.startswith("unet.")}
    if config.learning_rate > 0 and not any(p.detach().any() for name, p in atoms.items() if "_delta" in name):
        raise UserError("training changed no atom: the adapter would have no effect; raise learning_rate")
    text = [p for name, p in parameters.items() if name.startswith("text_encoder.") and ".trained." not in name]
    return Outcome(
        steps=total_steps,
        trained_numbers=sum(p.numel() for p in atoms.values()),
        trained_token_numbers=rows.rows.numel() if rows is not None else 0,
        trained_text_numbers=sum(p.numel() for p in text),
        kept_step=progress.best_step if progress.best else None,
    )


def prepare_texts(pipe, config: TrainConfig, dataset: Dataset) -> Texts:
    """All prompts as token ids, or as states where they are few and nothing of the text encoder is trained."""
    ids = tokenize(pipe.tokenizer, dataset.prompts)
    cache = Path(config.cache_dir) if config.cache_dir else None
    base_states = None
    if config.prior == "teacher":
        # before the text side moves; prompts of no prior example are never looked up
        used = sorted({prompt for example in dataset.prior for prompt in example.prompts})
        made = encode_prompts(pipe.text_encoder, ids[used], None)
        base_states = made.new_zeros(len(ids), *made.shape[1:])
        base_states[used] = made
    moves = config.train_token_embedding or config.train_text_encoder
    if moves or (len(ids) > MOST_KEPT_PROMPTS and cache is None):
        return Texts(ids, dataset.empty, base_states)
    return Texts(encode_prompts(pipe.text_encoder, ids, cache), dataset.empty, base_states)
