"""Every setting of a training run, with its default and the reason for it."""

from dataclasses import dataclass, fields

from sd_atoms.atoms import FORMS
from sd_atoms.data.images import RESAMPLING
from sd_atoms.errors import UserError
from sd_atoms.generation import SCHEDULERS
from sd_atoms.settings import setting
from sd_atoms.tuner.config import BLOCK_LAYERS, SOLVERS

MODEL, DATA, TOKEN, PRIOR = "model", "data", "token and text encoder", "prior preservation"
ADAPTER, RUN, OBJECTIVE, OPTIMISER = "adapter", "run", "objective", "optimiser"
VALIDATION, PICTURES, MACHINE, SHARING = "validation", "pictures at the end", "precision and logging", "sharing"
METHODS = ("atoms",)
LR_SCHEDULES = ("linear", "cosine", "cosine_with_restarts", "polynomial", "constant", "constant_with_warmup")
OPTIMISERS = ("adamw", "adamw8bit", "prodigy")
PRIORS = ("none", "images", "teacher")
LOSSES = ("l2", "huber", "smooth_l1")
TEXT_ADAPTERS = ("atoms", "lora")


@dataclass(frozen=True)
class Concept:
    """One thing to learn: an entry of `concepts`, or what the flags of the same names say."""

    instance_data_dir: str | None = setting(None, DATA, "folder with its pictures, or pocket:castle, pocket:canal")
    instance_prompt: str | None = setting(None, DATA, 'what they show, such as "photo of a <castle>"')
    instance_prompts_file: str | None = setting(None, DATA, "templates with {}, one drawn for each picture")
    placeholder_token: str | None = setting(None, TOKEN, "new word, or several with spaces between")
    initializer_token: str | None = setting(None, TOKEN, "word the new one starts from, or one for each")
    class_prompt: str | None = setting(None, PRIOR, "what the prior is kept of")
    class_data_dir: str | None = setting(None, PRIOR, "folder of class pictures")
    repeats: int = setting(1, DATA, "how often its pictures come per epoch", low=1, high=10_000)

    @property
    def tokens(self) -> tuple[str, ...]:
        """The placeholder tokens."""
        return tuple((self.placeholder_token or "").split())

    @property
    def initializers(self) -> tuple[str, ...]:
        """The words they start from, one for each."""
        words = tuple((self.initializer_token or "").split()) if self.tokens else ()
        return words * len(self.tokens) if len(words) == 1 else words

    @property
    def word(self) -> str:
        """What takes the place of {} in templates."""
        return self.placeholder_token or self.initializer_token or ""

    @property
    def plain_word(self) -> str:
        """The same for the base, which does not know the new word."""
        return self.initializer_token or self.word

    def problems(self, where: str) -> list[str]:
        """What is wrong with it, each problem beginning with `where`."""
        found = []
        if not self.instance_prompt:
            found.append('instance_prompt is required: what the pictures show, such as "photo of a <castle>"')
        missing = [token for token in self.tokens if token not in (self.instance_prompt or "")]
        if self.instance_prompt and missing:
            found.append(f"instance_prompt: {self.instance_prompt!r} lacks the placeholder {' '.join(missing)}")
        if self.tokens and not self.initializer_token:
            found.append("initializer_token is required with placeholder_token: a word such as castle")
        elif self.tokens and len(self.initializers) != len(self.tokens):
            found.append(
                f"initializer_token: {self.initializer_token!r} has {len(self.initializers)} words for "
                f"{len(self.tokens)} placeholder tokens; one for all or one for each is allowed"
            )
        if self.instance_prompts_file and not self.word:
            found.append(
                "instance_prompts_file needs a placeholder_token (or an initializer_token) to put in the place of {}"
            )
        return [where + problem for problem in found]


OF_CONCEPT = tuple(field.name for field in fields(Concept) if field.name != "repeats")


@dataclass(frozen=True)
class TrainConfig:
    """Settings of `train_dreambooth_atoms.py`; names as in diffusers' DreamBooth scripts where they mean the same."""

    pretrained_model_name_or_path: str = setting(
        None, MODEL, "the base: pocket, a folder or a hub id such as CompVis/stable-diffusion-v1-4", required=True
    )
    revision: str | None = setting(None, MODEL, "git revision of a hub id; none = its main branch")
    variant: str | None = setting(None, MODEL, "file variant of the base such as fp16; none = the plain files")

    instance_data_dir: str | None = setting(
        None,
        DATA,
        "folder with the pictures of the concept, or pocket:castle, pocket:canal",
        required=True,
        unless=("concepts", "dataset_name"),
    )
    instance_prompt: str | None = setting(
        None, DATA, 'what they show, such as "photo of a <castle>"', required=True, unless=("concepts",)
    )
    instance_prompts_file: str | None = setting(
        None, DATA, "templates with {} for the concept, one drawn for each picture; none = always instance_prompt"
    )
    concepts: tuple[Concept, ...] | None = setting(
        None, DATA, "several concepts in one run, in place of the flags about one", item=Concept
    )
    captions: bool = setting(
        False, DATA, "prompts from NAME.txt beside each picture or metadata.jsonl; {} in them is the concept"
    )
    dataset_name: str | None = setting(
        None, DATA, "data set for `datasets` in place of instance_data_dir: a folder or a hub id"
    )
    dataset_config_name: str | None = setting(None, DATA, "configuration of the data set; none = its only one")
    dataset_split: str = setting("train", DATA, "split of the data set")
    image_column: str = setting("image", DATA, "column of its pictures")
    caption_column: str | None = setting(None, DATA, "column of its captions; none = instance_prompt for all")
    max_train_samples: int | None = setting(None, DATA, "only so many of its rows; none = all", low=1)
    caption_dropout: float = setting(0.0, DATA, "share of samples with an empty prompt", low=0.0, high=1.0)
    resolution: int | None = setting(
        None, DATA, "side of the training pictures in pixels; none = the base's", low=32, high=4096
    )
    aspect_ratio_buckets: bool = setting(
        False, DATA, "keep each picture's shape, at the nearest of some sizes of the same area"
    )
    center_crop: bool = setting(False, DATA, "crop in the middle; otherwise at a place drawn once per picture")
    # many subjects are not symmetric
    random_flip: bool = setting(False, DATA, "mirror half of the samples")
    image_interpolation_mode: str = setting("lanczos", DATA, "filter for resizing", choices=RESAMPLING)
    on_bad_image: str = setting("error", DATA, "what a picture that cannot be read means", choices=("error", "skip"))
    cache_dir: str | None = setting(None, DATA, "keep latents and text states there for later runs; none = do not")

    placeholder_token: str | None = setting(
        None, TOKEN, "new word for the concept, such as <castle>, or several with spaces between; none = no new word"
    )
    initializer_token: str | None = setting(
        None, TOKEN, "word of the base that the new word starts from, or one for each"
    )
    # without its own row the new word stays what the initializer is, and styles pull the concept back to it
    train_token_embedding: bool = setting(False, TOKEN, "also train the new word's embedding row")
    train_text_encoder: bool = setting(False, TOKEN, "also adapt the text encoder's attention")
    text_adapter: str = setting("atoms", TOKEN, "how: block atoms or LoRA", choices=TEXT_ADAPTERS)
    text_kc: int = setting(4, TOKEN, "block atoms of the text encoder over text_kc x text_kc channels", low=1)
    text_rank: int = setting(4, TOKEN, "rank of its LoRA", low=1)

    prior: str = setting(
        "none", PRIOR, "keep the class: by pictures of it, or by the base's own predictions", choices=PRIORS
    )
    with_prior_preservation: bool = setting(False, PRIOR, "diffusers' name of --prior images")
    class_prompt: str | None = setting(None, PRIOR, 'what is kept, such as "photo of a castle"')
    class_prompts_file: str | None = setting(
        None, PRIOR, "prompts for the teacher, one per line, in place of class_prompt"
    )
    class_data_dir: str | None = setting(None, PRIOR, "folder of class pictures; missing ones are drawn by the base")
    num_class_images: int = setting(100, PRIOR, "class pictures that are used", low=1)
    prior_loss_weight: float = setting(1.0, PRIOR, "weight of the prior against the concept", low=0.0)

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

    prediction_type: str | None = setting(
        None, OBJECTIVE, "what the base predicts; none = as its scheduler says", choices=("epsilon", "v_prediction")
    )
    snr_gamma: float | None = setting(None, OBJECTIVE, "min-SNR weights, 5 is usual; none = all alike", low=0.0)
    loss_type: str = setting("l2", OBJECTIVE, "distance of prediction and target", choices=LOSSES)
    huber_c: float = setting(0.1, OBJECTIVE, "where huber and smooth_l1 turn from squares to lines", low=1e-6)
    noise_offset: float = setting(0.0, OBJECTIVE, "noise of a whole channel, for darker and lighter pictures", low=0.0)
    rescale_betas_zero_snr: bool = setting(
        False, OBJECTIVE, "last timestep is pure noise; needs a base that predicts v"
    )

    optimizer: str = setting("adamw", OPTIMISER, "adamw8bit and prodigy are extras", choices=OPTIMISERS)
    # atoms are of unit norm and few, so they take steps a hundred times those of LoRA
    learning_rate: float | None = setting(None, OPTIMISER, "of the atoms; none = by mode, see docs", low=0.0)
    beta_learning_rate: float | None = setting(None, OPTIMISER, "of β; none = by mode", low=0.0)
    token_learning_rate: float | None = setting(None, OPTIMISER, "of the new word's embedding row", low=0.0)
    text_learning_rate: float | None = setting(None, OPTIMISER, "of the text encoder's adapter", low=0.0)
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
    ema_decay: float = setting(
        0.0, OPTIMISER, "save a running mean of the trained numbers, such as 0.99; 0 = the last ones", low=0.0,
        high=0.99999,
    )  # fmt: skip

    validation_prompt: str | None = setting(
        None, VALIDATION, "prompt of the pictures drawn on the way; none = no pictures"
    )
    validation_steps: int = setting(100, VALIDATION, "optimiser steps between them", low=1)
    num_validation_images: int = setting(4, VALIDATION, "how many", low=1, high=10_000)
    validation_loss_steps: int | None = setting(
        None, VALIDATION, "optimiser steps between losses at fixed noise and timesteps; none = no such loss", low=1
    )
    holdout_images: int = setting(
        0, VALIDATION, "pictures kept out of training for that loss; 0 = it is of all", low=0
    )
    keep: str = setting(
        "last", VALIDATION, "which step becomes the adapter; best = of the lowest such loss", choices=("last", "best")
    )

    prompts_file: str | None = setting(
        None, PICTURES, "templates with {}; one picture each by the base and by the adapter"
    )
    num_instance_images: int = setting(20, PICTURES, "pictures of instance_prompt", low=1, high=10_000)
    guidance_scale: float = setting(7.5, PICTURES, "classifier-free guidance, also of validation", low=0.0)
    num_inference_steps: int = setting(25, PICTURES, "denoising steps, also of validation", low=1, high=1000)
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

    push_to_hub: bool = setting(False, SHARING, "upload the adapter with a model card; log in with `hf auth login`")
    hub_model_id: str | None = setting(None, SHARING, "where to, owner/name; none = your name and the run folder's")
    hub_private_repo: bool = setting(False, SHARING, "make the repository private")

    def __post_init__(self):
        if self.with_prior_preservation and self.prior == "none":
            object.__setattr__(self, "prior", "images")
        problems = []
        if self.concepts is not None:
            both = [name for name in (*OF_CONCEPT, "dataset_name") if getattr(self, name) is not None]
            shared = {"class_prompt"}
            if set(both) - shared:
                problems.append(f"concepts: each has its own {', '.join(x for x in both if x not in shared)}")
            if not self.concepts:
                problems.append("concepts: one or more are needed")
        for number, concept in enumerate(self.all_concepts):
            where = f"concepts[{number}]: " if self.concepts is not None else ""
            problems += concept.problems(where)
            if self.dataset_name is None and not concept.instance_data_dir:
                problems.append(f"{where}instance_data_dir is required: a folder with pictures")
            if self.prior != "none" and not (concept.class_prompt or self.class_prompts_file):
                problems.append(f"{where}class_prompt is required with prior={self.prior}")
            if self.prior == "images" and not concept.class_data_dir:
                problems.append(f"{where}class_data_dir is required with prior=images: a folder, which may be empty")
        words = [token for concept in self.all_concepts for token in concept.tokens]
        if len(set(words)) < len(words):
            problems.append(f"placeholder_token: every token once is allowed, got {' '.join(words)}")
        if self.prior != "teacher" and self.class_prompts_file:
            problems.append("class_prompts_file needs prior=teacher")
        if self.prior == "none" and (self.class_data_dir or self.class_prompt):
            problems.append("class_prompt and class_data_dir need a prior: images or teacher")
        if self.dataset_name is not None and (self.instance_data_dir or self.captions):
            problems.append("dataset_name stands in place of instance_data_dir and captions (see caption_column)")
        if self.dataset_name is None and self.caption_column:
            problems.append("caption_column needs dataset_name")
        if not self.m and not self.kc:
            problems.append("m=0, kc=0: no atoms at all; m=0 needs block atoms (kc from 1 on)")
        if self.train_token_embedding and not words:
            problems.append("train_token_embedding needs a placeholder_token")
        if self.prompts_file and not all(concept.word for concept in self.all_concepts):
            problems.append(
                "prompts_file needs a placeholder_token (or an initializer_token) to put in the place of {}"
            )
        if self.keep == "best" and self.validation_loss_steps is None:
            problems.append("keep=best needs validation_loss_steps")
        if self.holdout_images and self.validation_loss_steps is None:
            problems.append("holdout_images needs validation_loss_steps")
        if self.hub_model_id and not self.push_to_hub:
            problems.append("hub_model_id needs push_to_hub")
        if problems:
            raise UserError("; ".join(problems))

    @property
    def all_concepts(self) -> tuple[Concept, ...]:
        """`concepts`, or the one that the flags describe; class_prompt counts for each that has none."""
        if self.concepts is None:
            return (Concept(**{name: getattr(self, name) for name in OF_CONCEPT}),)
        return tuple(
            Concept(**{**vars(concept), "class_prompt": concept.class_prompt or self.class_prompt})
            for concept in self.concepts
        )
