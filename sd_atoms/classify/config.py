"""All settings of a classifier's training."""

from dataclasses import dataclass
from typing import Any, ClassVar

from sd_atoms.classify.models import NORMALISATIONS
from sd_atoms.errors import UserError
from sd_atoms.methods import Method
from sd_atoms.methods.registry import all_methods, check_settings
from sd_atoms.methods.table import METHODS
from sd_atoms.settings import section, setting, unmet_needs
from sd_atoms.training.sections import (
    LR_SCHEDULES,
    LoopSettings,
    MethodSettings,
    OutputSettings,
    PrecisionSettings,
    budget_problems,
)

MODEL, DATA, ADAPTER, OPTIMISER, RUN = "the network", "what it learns", "what is trained", "optimiser", "run"
TESTED = "what it is tested on"
HEAD_RATE = 3e-3
HEAD = "head"  # the method that trains nothing else
HEAD_ALONE = Method(
    name=HEAD,
    help="a linear probe: the head alone",
    build=lambda model, settings, target: None,
    kind=lambda name: HEAD,
    main_kinds=(HEAD,),
    rates={HEAD: HEAD_RATE},
)
# target modules of a classifier, where it has other layers than a UNet
TARGETS = {"atoms": "spatial", "lora-conv": "spatial", "oft": "all-linear"} | dict.fromkeys(
    ("lora", "locon", "loha", "lokr", "lycoris-locon", "lycoris-loha", "lycoris-lokr"), "dense"
)
# by kind, among the best of those tried (docs/classify.md), as HEAD_RATE is; the methods' own rates are of diffusion
RATES = {"atoms": 1e-3, "block": 1e-3, "beta": 1e-4, "lora": 3e-3, "bias": 1e-2, "norm": 1e-2, "full": 1e-4}
NOT_OFFERED = ("token", "difffit")  # of prompts, and of the transformer blocks of a UNet


@dataclass(frozen=True)
class ModelSettings:
    """The pretrained network."""

    model: str = setting(
        None, MODEL, "efficientnet-lite0, a folder or hub id of transformers, or timm:NAME", required=True
    )
    keep_head: bool = setting(
        False, MODEL, "go on with the pretrained head, which must have as many classes, instead of a new one"
    )
    head_dropout: float = setting(0.0, MODEL, "dropout before the head", low=0.0, high=0.9)
    size_px: int | None = setting(None, MODEL, "side of the images; none = the model's own", low=32, high=2048)
    normalisation: str = setting(
        "model", MODEL, "of pixels: the model's own, or another", choices=tuple(NORMALISATIONS)
    )


@dataclass(frozen=True)
class ClassDataSettings:
    """Labelled images, and what a sample is of one."""

    data: str = setting(
        None,
        DATA,
        "vtab:TASK, or a folder or CSV file: train/CLASS/ with test/CLASS/, CLASS/, path,label, CUB-200-2011, "
        "CIFAR-100",
        required=True,
    )
    dataset_dir: str | None = setting(None, DATA, "the images of vtab:TASK: a folder, or an id for `datasets`")
    test_data: str | None = setting(None, DATA, "folder of classes or CSV file to test on; none = as `data` has it")
    test_share: float = setting(
        0.2, DATA, "share of each class kept for testing, if there are no test images", low=0.01, high=0.9
    )
    max_train_samples: int | None = setting(None, DATA, "learn from so many images only, drawn by the seed", low=1)
    max_test_samples: int | None = setting(None, DATA, "test on so many only, drawn by the seed", low=2)
    random_flip: bool = setting(False, DATA, "mirror half of the samples")
    crop_scale: float = setting(
        1.0, DATA, "smallest share of an image that a sample's crop has, such as 0.08; 1 = no crop", low=0.01, high=1.0
    )
    on_bad_image: str = setting("error", DATA, "an image that cannot be read", choices=("error", "skip"))
    cache_dir: str | None = setting(None, DATA, "folder in which what was seen of the images stays")


@dataclass(frozen=True)
class ClassMethodSettings(MethodSettings):
    """What is trained besides the head."""

    method: str = setting(
        "atoms",
        ADAPTER,
        f"head, or {', '.join(name for name in METHODS if name not in NOT_OFFERED)}, or one of another package",
    )

    def chosen(self) -> Method:
        """The method; raises UserError as the original does."""
        if self.peft_config is not None:
            return super().chosen()
        offered = [name for name in all_methods() if name not in NOT_OFFERED]
        if self.method != HEAD and self.method not in offered:
            raise UserError(f"method={self.method!r}: one of {HEAD}, {', '.join(offered)} is allowed")
        return HEAD_ALONE if self.method == HEAD else super().chosen()


@dataclass(frozen=True)
class ClassOptimiserSettings:
    """How trained parameters move."""

    learning_rate: float | None = setting(
        None, OPTIMISER, "of what is trained in the network; none = the method's", low=0.0
    )
    beta_learning_rate: float | None = setting(None, OPTIMISER, "of β; none = as usual", low=0.0, needs=["m1"])
    head_learning_rate: float = setting(HEAD_RATE, OPTIMISER, "of the head", low=0.0)
    lr_scheduler: str = setting("cosine", OPTIMISER, "learning-rate schedule", choices=LR_SCHEDULES)
    lr_warmup_steps: int = setting(20, OPTIMISER, "optimiser steps of rising learning rate", low=0)
    lr_warmup_epochs: float | None = setting(None, OPTIMISER, "the same in passes over the images", low=0.0)
    lr_num_cycles: int = setting(
        1, OPTIMISER, "restarts of cosine_with_restarts", low=1, needs=["lr_scheduler=cosine_with_restarts"]
    )
    lr_power: float = setting(1.0, OPTIMISER, "power of polynomial", low=0.0, needs=["lr_scheduler=polynomial"])
    adam_beta1: float = setting(0.9, OPTIMISER, "decay of the mean of gradients", low=0.0, high=0.9999999)
    adam_beta2: float = setting(0.999, OPTIMISER, "decay of their squares", low=0.0, high=0.9999999)
    adam_weight_decay: float = setting(0.0, OPTIMISER, "pull of what is trained towards zero", low=0.0)
    adam_epsilon: float = setting(1e-8, OPTIMISER, "smallest divisor", low=0.0)
    max_grad_norm: float = setting(1.0, OPTIMISER, "gradients are scaled down to this norm; 0 = never", low=0.0)
    ema_decay: float = setting(
        0.0, OPTIMISER, "save a running mean, such as 0.99; 0 = the last", low=0.0, high=0.99999
    )
    label_smoothing: float = setting(0.0, OPTIMISER, "share of the target spread over all classes", low=0.0, high=0.9)
    optimizer: ClassVar[str] = "adamw"


@dataclass(frozen=True)
class PlanSettings:
    """Whether anything is done."""

    dry_run: bool = setting(False, RUN, "only say what would be trained on what, as far as both are here")


@dataclass(frozen=True)
class NoValidation:
    """What `run_steps` asks of validation: there is none on the way."""

    validation_loss_steps: ClassVar[None] = None
    validation_prompt: ClassVar[None] = None
    keep: ClassVar[str] = "last"


@dataclass(frozen=True)
class ClassifyConfig:
    """Settings of `sd-atoms classify train`."""

    network: ModelSettings = section(ModelSettings)
    data: ClassDataSettings = section(ClassDataSettings)
    method: ClassMethodSettings = section(ClassMethodSettings)
    loop: LoopSettings = section(LoopSettings)
    optimiser: ClassOptimiserSettings = section(ClassOptimiserSettings)
    output: OutputSettings = section(OutputSettings)
    precision: PrecisionSettings = section(PrecisionSettings)
    plan: PlanSettings = section(PlanSettings)

    def __post_init__(self):
        method, given = self.method.chosen(), self.method.given()
        if method is HEAD_ALONE:
            problems = [f"{name}: method head has no settings" for name in given]
        else:
            problems = [*check_settings(method, given)]
        if method.name == "atoms" and not self.method.m and not self.method.kc:
            problems.append("m=0, kc=0: no atoms at all; m=0 needs block atoms (kc from 1 on)")
        if self.optimiser.learning_rate is None and not method.rates:
            problems.append(f"learning_rate is required: method {method.name} has no usual one")
        if self.method.budget is not None:
            problems += budget_problems(self.method.budget)
        if self.method.target is not None and method is HEAD_ALONE:
            problems.append("target: method head has none to choose")
        # HEAD_RATE stands in the config.yaml of older runs
        if method is HEAD_ALONE and self.optimiser.learning_rate not in (None, HEAD_RATE):
            problems.append("learning_rate: method head trains nothing that it is of; there is head_learning_rate")
        if self.loop.gradient_checkpointing:
            problems.append("gradient_checkpointing is of Stable Diffusion alone")
        problems += unmet_needs(self, self.usual_rates())
        if problems:
            raise UserError("; ".join(problems))

    def usual_rates(self) -> dict[str, Any]:
        """What each learning rate is if nobody says otherwise."""
        method = self.method.chosen()
        rates = {**method.rates, **RATES}
        own = None if method is HEAD_ALONE else rates.get(method.main_kinds[0])
        return {"learning_rate": own, "beta_learning_rate": rates.get("beta")}


@dataclass(frozen=True)
class TestedSettings:
    """Labelled images that trained classifiers are tried on."""

    data: str | None = setting(None, TESTED, "labelled images, as for `classify train`; its test images count")
    dataset_dir: str | None = setting(None, TESTED, "the images of vtab:TASK: a folder, or an id for `datasets`")
    test_data: str | None = setting(
        None,
        TESTED,
        "folder of classes or CSV file, all of which counts, in the place of `data` or of its test images",
    )
    test_share: float | None = setting(
        None, TESTED, "of each class, where there are no test images; none = as in training", low=0.01, high=0.9
    )
    seed: int | None = setting(None, TESTED, "of that share; none = as in training", low=0)
