"""Every setting of a training run, with its default and the reason for it."""

from dataclasses import dataclass

from sd_atoms.atoms import FORMS
from sd_atoms.data.images import RESAMPLING
from sd_atoms.errors import UserError
from sd_atoms.generation import SCHEDULERS
from sd_atoms.settings import setting
from sd_atoms.tuner.config import BLOCK_LAYERS, SOLVERS

MODEL, DATA, TOKEN, ADAPTER, RUN, OPTIMISER = "model", "data", "token", "adapter", "run", "optimiser"
VALIDATION, PICTURES, MACHINE = "validation", "pictures at the end", "precision and logging"
METHODS = ("atoms",)
LR_SCHEDULES = ("linear", "cosine", "cosine_with_restarts", "polynomial", "constant", "constant_with_warmup")


@dataclass(frozen=True)
class TrainConfig:
    """Settings of `train_dreambooth_atoms.py`; names as in diffusers' DreamBooth scripts where they mean the same."""

    pretrained_model_name_or_path: str = setting(
        None, MODEL, "the base: pocket, a folder or a hub id such as CompVis/stable-diffusion-v1-4", required=True
    )
    revision: str | None = setting(None, MODEL, "git revision of a hub id; none = its main branch")
    variant: str | None = setting(None, MODEL, "file variant of the base such as fp16; none = the plain files")

    instance_data_dir: str = setting(
        None, DATA, "folder with the pictures of the concept, or pocket:castle, pocket:canal", required=True
    )
    instance_prompt: str = setting(None, DATA, 'what they show, such as "photo of a <castle>"', required=True)
    instance_prompts_file: str | None = setting(
        None, DATA, "templates with {} for the concept, one drawn for each picture; none = always instance_prompt"
    )
    resolution: int | None = setting(None, DATA, "side of the training pictures in pixels; none = the base's", low=32)
    center_crop: bool = setting(False, DATA, "crop in the middle; otherwise at a place drawn once per picture")
    image_interpolation_mode: str = setting("lanczos", DATA, "filter for resizing", choices=RESAMPLING)

    placeholder_token: str | None = setting(
        None, TOKEN, "new word for the concept, such as <castle>; none = no new word"
    )
    initializer_token: str | None = setting(None, TOKEN, "word of the base that the new word starts from")
    # without its own row the new word stays what the initializer is, and styles pull the concept back to it
    train_token_embedding: bool = setting(False, TOKEN, "also train the new word's embedding row")

    method: str = setting("atoms", ADAPTER, "what is trained", choices=METHODS)
    m: int = setting(9, ADAPTER, "atoms per layer; 9 of a 3x3 filter can move every tap; 0 = block atoms only", low=0)
    m1: int = setting(0, ADAPTER, "overcomplete: atoms mixed per input channel out of m1 each; 0 = shared", low=0)
    train_beta: bool = setting(True, ADAPTER, "also train the mixing of overcomplete atoms")
    kc: int = setting(0, ADAPTER, "block atoms over kc x kc channels on 1x1 and Linear layers; 0 = none", low=0)
    m_c: int = setting(0, ADAPTER, "block atoms per layer are m_c x kc x kc; 0 = exact", low=0)
    block_layers: str = setting("pointwise", ADAPTER, "which layers get block atoms", choices=BLOCK_LAYERS)
    solver: str = setting("svd", ADAPTER, "how the initial atoms are found", choices=SOLVERS)
    l1: float = setting(1e-3, ADAPTER, "sparsity of the sparse solver", low=0.0)
    target: str = setting(
        "conv3x3",
        ADAPTER,
        "layers to adapt: conv3x3, conv, conv+linear, attn, all-linear, or a regular expression over their names",
    )
    form: str = setting("auto", ADAPTER, "how an adapted convolution is computed; all give the same", choices=FORMS)

    output_dir: str = setting("runs/atoms", RUN, "run folder")
    overwrite: bool = setting(False, RUN, "replace the run that output_dir holds")
    resume_from_checkpoint: str | None = setting(None, RUN, "a checkpoint file of this run, or latest")
    seed: int = setting(0, RUN, "fixes everything that is drawn", low=0, high=2**32 - 1)
    train_batch_size: int = setting(4, RUN, "pictures per process and step", low=1)
    gradient_accumulation_steps: int = setting(1, RUN, "batches per optimiser step", low=1)
    max_train_steps: int = setting(300, RUN, "optimiser steps", low=1)
    num_train_epochs: int | None = setting(None, RUN, "passes over the pictures, in place of max_train_steps", low=1)
    checkpointing_steps: int = setting(100, RUN, "optimiser steps between checkpoints", low=1)
    checkpoints_total_limit: int | None = setting(None, RUN, "how many checkpoints stay; none = all", low=1)
    gradient_checkpointing: bool = setting(False, RUN, "less memory, about a third more time")

    # atoms are of unit norm and few, so they take steps a hundred times those of LoRA
    learning_rate: float = setting(1e-2, OPTIMISER, "of the atoms", low=0.0)
    token_learning_rate: float = setting(1e-3, OPTIMISER, "of the new word's embedding row", low=0.0)
    lr_scheduler: str = setting("cosine", OPTIMISER, "learning-rate schedule", choices=LR_SCHEDULES)
    lr_warmup_steps: int = setting(20, OPTIMISER, "optimiser steps of rising learning rate", low=0)
    lr_num_cycles: int = setting(1, OPTIMISER, "restarts of cosine_with_restarts", low=1)
    lr_power: float = setting(1.0, OPTIMISER, "power of polynomial", low=0.0)
    adam_beta1: float = setting(0.9, OPTIMISER, "decay of the mean of gradients", low=0.0, high=0.9999999)
    adam_beta2: float = setting(
        0.99, OPTIMISER, "decay of their squares; 0.999 looks back further than 300 steps", low=0.0, high=0.9999999
    )
    adam_weight_decay: float = setting(
        0.0, OPTIMISER, "pull of the changes towards zero; a few thousand numbers need none", low=0.0
    )
    adam_epsilon: float = setting(1e-8, OPTIMISER, "smallest divisor", low=0.0)
    max_grad_norm: float = setting(1.0, OPTIMISER, "gradients are scaled down to this norm; 0 = never", low=0.0)
    prediction_type: str | None = setting(
        None, OPTIMISER, "what the base predicts; none = as its scheduler says", choices=("epsilon", "v_prediction")
    )

    validation_prompt: str | None = setting(
        None, VALIDATION, "prompt of the pictures drawn on the way; none = no pictures"
    )
    validation_steps: int = setting(100, VALIDATION, "optimiser steps between them", low=1)
    num_validation_images: int = setting(4, VALIDATION, "how many", low=1)

    prompts_file: str | None = setting(
        None, PICTURES, "templates with {}; one picture each by the base and by the adapter"
    )
    num_instance_images: int = setting(20, PICTURES, "pictures of instance_prompt", low=1)
    guidance_scale: float = setting(7.5, PICTURES, "classifier-free guidance, also of validation", low=0.0)
    num_inference_steps: int = setting(25, PICTURES, "denoising steps, also of validation", low=1)
    scheduler: str = setting(
        "ddim", PICTURES, "sampler, also of validation; base = the base's own", choices=SCHEDULERS
    )
    clip_model_name_or_path: str | None = setting(
        None, PICTURES, "CLIP that scores them: pocket:clip, a folder or a hub id; none = no scores"
    )

    mixed_precision: str = setting(
        "no",
        MACHINE,
        "fp16 or bf16 for the frozen base; the trained numbers stay fp32",
        choices=("no", "fp16", "bf16"),
    )
    allow_tf32: bool = setting(False, MACHINE, "faster float32 products on recent NVIDIA cards, a little less exact")
    report_to: str = setting("tensorboard", MACHINE, "curves beside log.jsonl", choices=("tensorboard", "none"))

    def __post_init__(self):
        problems = []
        if self.placeholder_token and self.placeholder_token not in self.instance_prompt:
            problems.append(
                f"instance_prompt: {self.instance_prompt!r} lacks the placeholder {self.placeholder_token}"
            )
        if self.placeholder_token and not self.initializer_token:
            problems.append("initializer_token is required with placeholder_token: a word such as castle")
        if not self.m and not self.kc:
            problems.append("m=0, kc=0: no atoms at all; m=0 needs block atoms (kc from 1 on)")
        if self.train_token_embedding and not self.placeholder_token:
            problems.append("train_token_embedding needs a placeholder_token")
        for name in ("prompts_file", "instance_prompts_file"):
            if getattr(self, name) and not (self.placeholder_token or self.initializer_token):
                problems.append(
                    f"{name} needs a placeholder_token (or an initializer_token) to put in the place of {{}}"
                )
        if problems:
            raise UserError("; ".join(problems))
