"""A concept taught to a diffusion pipeline: its adapters and tokens, its loss, and what comes out."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch
from peft import LoraConfig, PeftConfig
from torch import nn

from sd_atoms.errors import UserError
from sd_atoms.machine import check_finite
from sd_atoms.methods import find_budget
from sd_atoms.methods.adapters import add_adapter
from sd_atoms.pipeline import DTYPES, add_placeholder_tokens
from sd_atoms.pipeline.fingerprint import mark
from sd_atoms.pipeline.inspection import unet_change
from sd_atoms.pipeline.tokens import initializer_row
from sd_atoms.settings import replaced
from sd_atoms.training.batch import Texts, make_samples, sample_losses
from sd_atoms.training.config import TrainConfig
from sd_atoms.training.dataset import Dataset
from sd_atoms.training.denoiser import Denoiser, TrainedRows
from sd_atoms.training.examples import prompt_states, tokenize
from sd_atoms.training.objective import noising
from sd_atoms.training.optimiser import parameter_groups
from sd_atoms.training.sections import TextSettings, budget_of
from sd_atoms.training.steps import Hooks, run_steps
from sd_atoms.training.validation import validation_loss
from sd_atoms.tuner import AtomsConfig

MOST_CHANGE = 0.7  # |ΔF|/|F| of atoms up to which good pictures were seen (docs/training.md)
TEXT_TARGETS = ["q_proj", "k_proj", "v_proj", "out_proj"]


@dataclass(frozen=True)
class Outcome:
    """What a training run says about itself."""

    steps: int
    method: str
    trainable_params: int  # in the UNet
    trainable_token_params: int  # entries of trained embedding rows
    trainable_text_params: int = 0  # entries of the text encoder's adapter
    relative_change: float | None = None  # |ΔF|/|F| over the adapted weights of the UNet
    kept_step: int | None = None  # whose values are saved, if not the last one's
    rows: Mapping[str, torch.Tensor] = field(default_factory=dict)  # token -> trained row (d,), float32

    def entries(self) -> dict[str, int | float | None]:
        """The same for metrics.json."""
        return {
            "method": self.method,
            "steps": self.steps,
            "trained_numbers": self.trainable_params,
            "trained_token_numbers": self.trainable_token_params,
            "trained_text_numbers": self.trainable_text_params,
            "relative_change": self.relative_change,
            "kept_step": self.kept_step,
        }


def add_adapters(pipe, config: TrainConfig) -> None:
    """Freezes a pipeline, in the dtype of the run, and adds the placeholder tokens and the adapters.

    Raises:
        UserError: a token or the target does not fit the base.
    """
    for concept in config.all_concepts:
        words = zip(concept.tokens, concept.initializers, strict=True)
        add_placeholder_tokens(pipe, {token: initializer_row(pipe, word) for token, word in words})
    for module in (pipe.unet, pipe.vae, pipe.text_encoder):
        module.requires_grad_(False)
    if config.precision.mixed_precision != "no":
        for module in (pipe.unet, pipe.text_encoder):  # not the VAE: it overflows in fp16, and encodes only once
            module.to(dtype=DTYPES[config.precision.mixed_precision])
    for name, weight in pipe.unet.named_parameters():
        check_finite(weight, f"{name} of the base's UNet: weights", "the base is broken")
    adapter = adapter_config(pipe.unet, config)
    if adapter is not None:
        try:
            add_adapter(pipe.unet, adapter)
        except UserError as error:
            raise UserError(f"target={config.method.target!r}: {error}") from error
    if config.text.train_text_encoder:
        add_adapter(pipe.text_encoder, text_adapter_config(config.text, config.loop.seed))


def adapter_config(unet: nn.Module, config: TrainConfig) -> PeftConfig | None:
    """The settings of the UNet's adapter; None for a method that puts none there.

    Raises:
        UserError: they do not go together, or a layer cannot take them.
    """
    settings = config.method.given() | {"seed": config.loop.seed}
    return config.method.chosen().make_config(unet, settings, config.method.target)


def sized(config: TrainConfig, unet: nn.Module) -> TrainConfig:
    """The same settings, with the size of the method that comes nearest to the budget, if there is one.

    Raises:
        UserError: no size comes near it.
    """
    if config.method.budget is None:
        return config
    method, given = config.method.chosen(), config.method.given()
    found = find_budget(method, unet, budget_of(config.method.budget), given, config.method.target)
    return replaced(config, budget=None, **{name: found.settings[name] for name in found.settings if name != "seed"})


def text_adapter_config(text: TextSettings, seed: int) -> AtomsConfig | LoraConfig:
    """The settings of the text encoder's adapter."""
    if text.text_adapter == "lora":
        return LoraConfig(
            r=text.text_rank, lora_alpha=text.text_rank, target_modules=TEXT_TARGETS, init_lora_weights=True
        )
    return AtomsConfig(m=0, kc=text.text_kc, seed=seed, target_modules=TEXT_TARGETS)


def train_diffusion(
    config: TrainConfig,
    pipe,
    accelerator,
    dataset: Dataset,
    folder: Path,
    begin: Callable[[], None],
    show: Callable[[int], None],
) -> Outcome:
    """Trains the adapters that `add_adapters` put into `pipe`.

    Args:
        config: settings, with learning rates.
        pipe: the pipeline, adapted, on the accelerator's device; on return it carries what was learned.
        accelerator: made with the config's mixed precision and accumulation.
        dataset: what to learn from.
        folder: the run folder; log and checkpoints go there.
        begin, show: as in `Hooks`.

    Raises:
        UserError: a checkpoint does not fit, the loss is not finite, or nothing was learned.
        Interrupted: on Ctrl-C or SIGTERM, after a checkpoint was written.
    """
    device, seed, objective = accelerator.device, config.loop.seed, config.objective
    schedule = noising(pipe.scheduler, objective.prediction_type, objective.rescale_betas_zero_snr)
    texts = prepare_texts(pipe, config, dataset)
    if config.precision.mixed_precision != "no":
        pipe.vae.to(dtype=pipe.unet.dtype)  # from here on it only decodes

    rows, plain, parameters = trained_parts(pipe, config)
    if config.loop.gradient_checkpointing:
        pipe.unet.enable_gradient_checkpointing()
    pipe.unet.train()
    adapter = [p for name, p in parameters.items() if name.startswith("unet.")]
    start, method, told = [mark(p) for p in adapter], config.method.chosen(), []

    def loss_of(denoiser, numbers: range) -> torch.Tensor:
        common = dict(schedule=schedule, objective=objective, seed=seed, empty=dataset.empty)
        batch = make_samples(numbers, dataset.examples, caption_dropout=config.data.caption_dropout, **common)
        if dataset.prior:
            batch += make_samples(
                numbers, dataset.prior, purpose="prior", weight=config.prior.prior_loss_weight,
                from_teacher=config.prior.prior == "teacher", **common,
            )  # fmt: skip
        return sample_losses(batch, denoiser, plain, texts, objective, device).sum() / len(numbers)

    def measure() -> tuple[dict[str, float], dict[str, str]]:
        change = unet_change(pipe.unet)
        if change is None:
            return {}, {}
        if change > MOST_CHANGE and method.name == "atoms" and not told:
            told.append(change)
            accelerator.print(
                f"|ΔF|/|F| is {change:.2f}, and beyond {MOST_CHANGE} nothing is known of the pictures: take an "
                "earlier step, or a lower learning_rate (docs/training.md)"
            )
        return {"relative_change": change}, {"change": f"{change:.1%}"}

    def validate() -> dict[str, float]:
        examples = dataset.held_out or dataset.examples
        return {"validation_loss": validation_loss(plain, examples, texts, objective, seed, schedule, accelerator)}

    progress = run_steps(
        plain,
        loss_of,
        parameter_groups(parameters, config.optimiser, method),
        accelerator,
        folder,
        examples=len(dataset.examples),
        loop=config.loop,
        optimiser=config.optimiser,
        validation=config.validation,
        output=config.output,
        hooks=Hooks(begin, measure, validate, show),
        data=dataset.digests,
    )

    # the pipeline as it was, plus what was learned
    trained_rows = {}
    if rows is not None:
        pipe.text_encoder.set_input_embeddings(rows.write_back())
        trained_rows = dict(zip(config.tokens, rows.rows.detach(), strict=True))
    if config.loop.gradient_checkpointing:
        pipe.unet.disable_gradient_checkpointing()
    pipe.unet.eval()
    moved = any(not torch.equal(mark(p), before) for p, before in zip(adapter, start, strict=True))
    if adapter and config.optimiser.learning_rate > 0 and not moved:
        raise UserError(f"training changed no parameter of {method.name}: no effect; raise learning_rate")
    text = [p for name, p in parameters.items() if name.startswith("text_encoder.") and ".trained." not in name]
    return Outcome(
        steps=progress.step,
        method=method.name,
        trainable_params=sum(p.numel() for p in adapter),
        trainable_token_params=rows.rows.numel() if rows is not None else 0,
        trainable_text_params=sum(p.numel() for p in text),
        relative_change=unet_change(pipe.unet),
        kept_step=progress.best_step if progress.best else None,
        rows=trained_rows,
    )


def trained_parts(pipe, config: TrainConfig) -> tuple[TrainedRows | None, Denoiser, dict[str, nn.Parameter]]:
    """Of a pipeline after `add_adapters`: the rows in place of the embedding table, if they are trained, the whole
    network, and what is trained of it, float32 whatever the base is, under the names that checkpoints have."""
    rows = None
    if config.text.train_token_embedding:
        row_ids = [pipe.tokenizer.convert_tokens_to_ids(token) for token in config.tokens]
        rows = TrainedRows(pipe.text_encoder.get_input_embeddings(), row_ids).to(pipe.device)
        pipe.text_encoder.set_input_embeddings(rows)
    network = Denoiser(pipe.unet, pipe.text_encoder)
    return rows, network, {name: p for name, p in network.named_parameters() if p.requires_grad}


def prepare_texts(pipe, config: TrainConfig, dataset: Dataset) -> Texts:
    """All prompts as token ids, and their states where nothing of the text encoder is trained."""
    ids = tokenize(pipe.tokenizer, dataset.prompts)
    cache = Path(config.data.cache_dir) if config.data.cache_dir else None
    base_states = {}
    if config.prior.prior == "teacher":  # before the text side moves
        base_state_of = prompt_states(pipe.text_encoder, ids, None)
        base_states = {prompt: base_state_of(prompt) for prompt in {p for own in dataset.prior.prompts for p in own}}
    moves = config.text.train_token_embedding or config.text.train_text_encoder
    return Texts(ids, None if moves else prompt_states(pipe.text_encoder, ids, cache), base_states)
