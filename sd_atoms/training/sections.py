"""The settings of a training run in sections by who uses them, each with its default and the reason for it."""

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

from sd_atoms.atoms import FORMS
from sd_atoms.data.config import PRIOR, TOKEN
from sd_atoms.errors import UserError
from sd_atoms.methods import Method, from_peft_config, get_method
from sd_atoms.methods.table import METHODS, RATES
from sd_atoms.pipeline.sampling import SAMPLERS, Sampling
from sd_atoms.settings import setting
from sd_atoms.tuner.config import BLOCK_LAYERS, SOLVERS
from sd_atoms.tuner.targets import TARGET_SETS

MODEL, ADAPTER, RUN, OBJECTIVE, OPTIMISER = "model", "adapter", "run", "objective", "optimiser"
VALIDATION, PICTURES, MACHINE, SHARING = "validation", "pictures at the end", "precision and logging", "sharing"
LR_SCHEDULES = ("linear", "cosine", "cosine_with_restarts", "polynomial", "constant", "constant_with_warmup")
OPTIMISERS = ("adamw", "adamw8bit", "prodigy")
PRIORS = ("none", "images", "teacher")
LOSSES = ("l2", "huber", "smooth_l1")
TEXT_ADAPTERS = ("atoms", "lora")
# of the text encoder's adapter; as usual elsewhere, since none stood out in a sweep on the pocket base (docs/sweep.md)
TEXT_RATES = {"atoms": 1e-3, "lora": 1e-4}
KIND_RATES = {kind: rate for kind, rate in RATES.items() if kind not in ("beta", "row")}


def _listed(rates: Mapping[str, float]) -> str:
    return ", ".join(f"{kind} {rate:g}" for kind, rate in rates.items())


@dataclass(frozen=True)
class BaseSettings:
    """The model that is adapted."""

    pretrained_model_name_or_path: str = setting(
        None,
        MODEL,
        "the base: pocket, a folder, one .safetensors file, or a hub id such as CompVis/stable-diffusion-v1-4",
        required=True,
        aliases=["base"],
    )
    base_config: str | None = setting(
        None, MODEL, "for a base in one file: a folder or hub id with the configs and tokenizer of that kind of model"
    )
    revision: str | None = setting(None, MODEL, "git revision of a hub id; none = its main branch")
    variant: str | None = setting(None, MODEL, "file variant of the base such as fp16; none = the plain files")


@dataclass(frozen=True)
class TextSettings:
    """The new words, and what is trained of the text encoder."""

    placeholder_token: str | None = setting(
        None, TOKEN, "new word for the concept, such as <castle>, or several separated by spaces; none = no new word"
    )
    initializer_token: str | None = setting(
        None, TOKEN, "word of the base that the new word starts from, or one for each"
    )
    # without its own row the new word stays what the initializer is, and styles pull the concept back to it
    train_token_embedding: bool = setting(False, TOKEN, "also train the new word's embedding row")
    train_text_encoder: bool = setting(False, TOKEN, "also adapt the text encoder's attention")
    text_adapter: str = setting(
        "atoms",
        TOKEN,
        "adapter of the text encoder: block atoms or LoRA",
        choices=TEXT_ADAPTERS,
        needs=["train_text_encoder"],
    )
    text_kc: int = setting(
        4,
        TOKEN,
        "its block atoms are over text_kc x text_kc channels",
        low=1,
        needs=["train_text_encoder", "text_adapter=atoms"],
    )
    text_rank: int = setting(4, TOKEN, "rank of its LoRA", low=1, needs=["train_text_encoder", "text_adapter=lora"])


@dataclass(frozen=True)
class PriorSettings:
    """How what the base knows of the class is kept."""

    prior: str = setting(
        "none",
        PRIOR,
        "keep the class: by pictures of it, or by the base's own predictions",
        choices=PRIORS,
        aliases={"with_prior_preservation": "images"},
    )
    class_prompt: str | None = setting(None, PRIOR, 'prompt of the class to keep, such as "photo of a castle"')
    class_prompts_file: str | None = setting(
        None,
        PRIOR,
        "prompts for the teacher, one per line, in place of class_prompt",
        file=True,
        needs=["prior=teacher"],
    )
    class_data_dir: str | None = setting(None, PRIOR, "folder of class pictures; missing ones are drawn by the base")
    num_class_images: int = setting(100, PRIOR, "class pictures to use", low=1, needs=["prior=images"])
    prior_loss_weight: float = setting(
        1.0, PRIOR, "weight of the prior against the concept", low=0.0, needs=["prior=images|teacher"]
    )


@dataclass(frozen=True)
class MethodSettings:
    """What is trained in the UNet."""

    method: str = setting("atoms", ADAPTER, f"what is trained: {', '.join(METHODS)}, or one of another package")
    peft_config: str | None = setting(
        None, ADAPTER, "adapter_config.json of any other tuner that PEFT has, in place of method; needs learning_rate",
        file=True,
    )  # fmt: skip
    budget: str | None = setting(
        None, ADAPTER, "trained parameters, such as 4000, 100k or 1M: sets the method's size to come near it"
    )
    rank: int | None = setting(None, ADAPTER, "rank of LoRA, LoCon, LoHa and LoKr; none = 4", low=1)
    alpha: float | None = setting(None, ADAPTER, "their change is multiplied by alpha/rank; none = rank", low=1e-9)
    factor: int | None = setting(
        None, ADAPTER, "of LoKr: smaller side of the Kronecker product; none = -1, near square"
    )
    block_size: int | None = setting(None, ADAPTER, "of OFT: inputs rotated together; none = 32", low=2)
    m: int = setting(9, ADAPTER, "atoms per layer; 9 of a 3x3 filter can move every tap; 0 = block atoms only", low=0)
    m1: int = setting(
        0,
        ADAPTER,
        "overcomplete: each atom of an input channel mixes m1 trained ones; 0 = all channels share their atoms",
        low=0,
    )
    train_beta: bool = setting(True, ADAPTER, "also train the mixing of overcomplete atoms")
    kc: int = setting(
        0,
        ADAPTER,
        "block atoms over kc x kc channels on 1x1 and Linear layers, for target=conv+linear; 0 = none",
        low=0,
    )
    m_c: int = setting(
        0, ADAPTER, "a layer has m_c x kc x kc block atoms; 0 = as many as make them exact", low=0, needs=["kc"]
    )
    block_layers: str = setting(
        "pointwise", ADAPTER, "which layers get block atoms", choices=BLOCK_LAYERS, needs=["kc"]
    )
    solver: str = setting("svd", ADAPTER, "how the initial atoms are found", choices=SOLVERS)
    l1: float = setting(1e-3, ADAPTER, "sparsity of the sparse solver", low=0.0, needs=["solver=sparse"])
    target: str | None = setting(
        None,
        ADAPTER,
        f"layers to adapt: {', '.join(TARGET_SETS)}, or a regular expression over names; none = the method's own",
    )
    form: str = setting("auto", ADAPTER, "how an adapted convolution is computed; all give the same", choices=FORMS)

    def given(self) -> dict[str, Any]:
        """The settings of a method, its name and its target aside, that somebody set to other than their default."""
        own = fields(self)
        return {
            f.name: getattr(self, f.name)
            for f in own
            if f.name not in ("method", "peft_config", "budget", "target") and getattr(self, f.name) != f.default
        }

    def chosen(self) -> Method:
        """The method.

        Raises:
            UserError: there is none of that name, or PEFT refuses its config.
        """
        if self.peft_config is None:
            return get_method(self.method)
        if self.method != "atoms":
            raise UserError(f"peft_config stands in place of method={self.method}")
        return from_peft_config(self.peft_config)


@dataclass(frozen=True)
class LoopSettings:
    """How many samples make a step, how many steps a run, and the seed of all that is random."""

    seed: int = setting(0, RUN, "fixes everything that is drawn", low=0, high=2**32 - 1)
    train_batch_size: int = setting(4, RUN, "pictures per process and forward pass", low=1)
    gradient_accumulation_steps: int = setting(
        1, RUN, "batches per optimiser step", low=1, environment="ACCELERATE_GRADIENT_ACCUMULATION_STEPS"
    )
    max_train_steps: int = setting(300, RUN, "optimiser steps", low=1)
    num_train_epochs: int | None = setting(None, RUN, "passes over the pictures, in place of max_train_steps", low=1)
    gradient_checkpointing: bool = setting(False, RUN, "less memory, about a third more time")


@dataclass(frozen=True)
class ObjectiveSettings:
    """What the network should say, and how far off it is."""

    prediction_type: str | None = setting(
        None,
        OBJECTIVE,
        "what the base predicts; none = as its scheduler config says",
        choices=("epsilon", "v_prediction"),
    )
    snr_gamma: float | None = setting(
        None, OBJECTIVE, "gamma of min-SNR weighting, 5 is usual; none = no weighting", low=0.0
    )
    loss_type: str = setting("l2", OBJECTIVE, "distance between prediction and target", choices=LOSSES)
    huber_c: float = setting(
        0.1,
        OBJECTIVE,
        "where huber and smooth_l1 turn from squares to lines",
        low=1e-6,
        needs=["loss_type=huber|smooth_l1"],
    )
    mask_weight: float = setting(
        0.1,
        OBJECTIVE,
        "loss weight outside the mask, where the subject has 1; the loss is the weighted mean",
        low=0.0,
        high=1.0,
        needs=["masks"],
    )
    noise_offset: float = setting(
        0.0,
        OBJECTIVE,
        "strength of extra noise that is constant over each channel, for darker and lighter pictures",
        low=0.0,
    )
    rescale_betas_zero_snr: bool = setting(
        False, OBJECTIVE, "make the last timestep pure noise (zero terminal SNR); needs a base that predicts v"
    )


@dataclass(frozen=True)
class OptimiserSettings:
    """How trained parameters move."""

    optimizer: str = setting(
        "adamw", OPTIMISER, "adamw8bit needs sd-atoms[8bit], prodigy sd-atoms[prodigy]", choices=OPTIMISERS,
        aliases={"use_8bit_adam": "adamw8bit"},
    )  # fmt: skip
    # atoms are of unit norm and few, so they take steps a hundred times those of LoRA
    learning_rate: float | None = setting(
        None, OPTIMISER, f"for what the method trains in the UNet; none = by its kind: {_listed(KIND_RATES)}", low=0.0
    )
    beta_learning_rate: float | None = setting(
        None, OPTIMISER, f"of β; none = {RATES['beta']:g}", low=0.0, needs=["m1"]
    )
    token_learning_rate: float | None = setting(
        None,
        OPTIMISER,
        f"of the new word's embedding row; none = {RATES['row']:g}",
        low=0.0,
        needs=["train_token_embedding"],
    )
    text_learning_rate: float | None = setting(
        None,
        OPTIMISER,
        f"of the text encoder's adapter; none = by its kind: {_listed(TEXT_RATES)}",
        low=0.0,
        needs=["train_text_encoder"],
    )
    lr_scheduler: str = setting("cosine", OPTIMISER, "learning-rate schedule", choices=LR_SCHEDULES)
    lr_warmup_steps: int = setting(20, OPTIMISER, "optimiser steps over which the learning rate rises", low=0)
    lr_num_cycles: int = setting(
        1, OPTIMISER, "restarts of cosine_with_restarts", low=1, needs=["lr_scheduler=cosine_with_restarts"]
    )
    lr_power: float = setting(1.0, OPTIMISER, "power of polynomial", low=0.0, needs=["lr_scheduler=polynomial"])
    adam_beta1: float = setting(0.9, OPTIMISER, "decay of the mean of gradients", low=0.0, high=0.9999999)
    adam_beta2: float = setting(
        0.99, OPTIMISER, "decay of their squares; 0.999 looks back further than 300 steps", low=0.0, high=0.9999999
    )
    adam_weight_decay: float = setting(0.0, OPTIMISER, "weight decay; a few thousand numbers need none", low=0.0)
    adam_epsilon: float = setting(1e-8, OPTIMISER, "added to the divisor", low=0.0)
    max_grad_norm: float = setting(1.0, OPTIMISER, "clip the norm of the gradient to this; 0 = never", low=0.0)
    ema_decay: float = setting(
        0.0, OPTIMISER, "save a running mean of the trained numbers, such as 0.99; 0 = the last ones", low=0.0,
        high=0.99999,
    )  # fmt: skip


@dataclass(frozen=True)
class ValidationSettings:
    """What is looked at on the way."""

    validation_prompt: str | None = setting(
        None, VALIDATION, "prompt of pictures drawn during training; none = no pictures"
    )
    validation_steps: int = setting(
        100, VALIDATION, "optimiser steps between pictures of validation_prompt", low=1, needs=["validation_prompt"]
    )
    num_validation_images: int = setting(
        4, VALIDATION, "how many of them", low=1, high=10_000, needs=["validation_prompt"]
    )
    validation_loss_steps: int | None = setting(
        None, VALIDATION, "optimiser steps between losses at fixed noise and timesteps; none = no such loss", low=1
    )
    holdout_images: int = setting(
        0,
        VALIDATION,
        "pictures kept out of training for the validation loss; 0 = it is measured on all",
        low=0,
        needs=["validation_loss_steps"],
    )
    keep: str = setting(
        "last",
        VALIDATION,
        "which step becomes the adapter; best = the one of lowest validation loss",
        choices=("last", "best"),
        needs=["validation_loss_steps"],
    )


@dataclass(frozen=True)
class ImageSettings:
    """The images at the end and their scores."""

    prompts_file: str | None = setting(
        None, PICTURES, "prompts with {} for the concept; one picture each by the base and by the adapter", file=True
    )
    num_instance_images: int = setting(20, PICTURES, "pictures of instance_prompt", low=1, high=10_000)
    guidance_scale: float = setting(7.5, PICTURES, "classifier-free guidance, also of validation", low=0.0)
    num_inference_steps: int = setting(25, PICTURES, "denoising steps, also of validation", low=1, high=1000)
    scheduler: str = setting("ddim", PICTURES, "sampler, also of validation; base = the base's own", choices=SAMPLERS)
    generation_batch_size: int = setting(
        1, PICTURES, "pictures a process draws at once; may change their last bits", low=1
    )
    contact_sheet: bool = setting(
        False, PICTURES, "also draw every checkpoint at several strengths on one sheet, as sd-atoms sheet does"
    )
    clip_model_name_or_path: str | None = setting(
        None, PICTURES, "CLIP that scores the pictures: pocket:clip, a folder or a hub id; none = no scores"
    )

    @property
    def sampling(self) -> Sampling:
        """How they are drawn, at the base's own size."""
        return Sampling(self.guidance_scale, self.num_inference_steps, self.scheduler)


@dataclass(frozen=True)
class OutputSettings:
    """The run folder and its checkpoints."""

    output_dir: str = setting("runs/atoms", RUN, "run folder")
    overwrite: bool = setting(False, RUN, "replace the run that output_dir holds")
    resume_from_checkpoint: str | None = setting(None, RUN, "a checkpoint file of this run, or latest")
    strict_resume: bool = setting(False, RUN, "refuse to resume, instead of warning, if pictures or prompts changed")
    checkpointing_steps: int = setting(100, RUN, "optimiser steps between checkpoints", low=1)
    checkpoints_total_limit: int | None = setting(None, RUN, "keep so many checkpoints; none = all", low=1)
    report_to: str = setting(
        "tensorboard",
        MACHINE,
        "trackers of curves and validation pictures, such as tensorboard,wandb; all = those installed, none = none",
    )


@dataclass(frozen=True)
class PrecisionSettings:
    """The precision of the frozen base."""

    mixed_precision: str = setting(
        "no",
        MACHINE,
        "fp16 or bf16 for the frozen base; the trained numbers stay fp32",
        choices=("no", "fp16", "bf16"),
        environment="ACCELERATE_MIXED_PRECISION",
    )
    allow_tf32: bool = setting(
        False,
        MACHINE,
        "faster, slightly less exact float32 matrix products on recent NVIDIA GPUs; PyTorch's convolutions use it "
        "anyway",
    )


@dataclass(frozen=True)
class HubSettings:
    """Where the adapter is shared."""

    push_to_hub: bool = setting(False, SHARING, "upload the adapter with a model card; log in with `hf auth login`")
    hub_model_id: str | None = setting(
        None, SHARING, "where to, owner/name; none = your name and the run folder's", needs=["push_to_hub"]
    )
    hub_private_repo: bool = setting(False, SHARING, "make the repository private", needs=["push_to_hub"])


def budget_of(text: str) -> int:
    """4000, 4k, 100k, 1.5M as a number; raises ValueError for anything else."""
    unit = {"k": 10**3, "m": 10**6}.get(text[-1:].lower(), 1)
    number = float(text[:-1] if unit > 1 else text) * unit
    if number < 1 or number != int(number):
        raise ValueError(text)
    return int(number)


def budget_problems(text: str) -> list[str]:
    """What is wrong with a budget."""
    try:
        budget_of(text)
    except (ValueError, OverflowError):
        return [f"budget: {text!r} is no number of parameters, such as 4000, 100k or 1M"]
    return []
