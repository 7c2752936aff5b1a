"""Every setting of a training run (`sections` has them), and what does not go together among them."""

from dataclasses import dataclass

from sd_atoms.data.config import OF_CONCEPT, Concept, DataSettings
from sd_atoms.errors import UserError
from sd_atoms.methods import check_settings
from sd_atoms.methods.table import RATES
from sd_atoms.settings import flat, section, unmet_needs
from sd_atoms.training.sections import (
    TEXT_RATES,
    BaseSettings,
    HubSettings,
    ImageSettings,
    LoopSettings,
    MethodSettings,
    ObjectiveSettings,
    OptimiserSettings,
    OutputSettings,
    PrecisionSettings,
    PriorSettings,
    TextSettings,
    ValidationSettings,
    budget_problems,
)


@dataclass(frozen=True)
class TrainConfig:
    """Settings of `train_dreambooth_atoms.py`; names as in diffusers' DreamBooth scripts where they mean the same."""

    base: BaseSettings = section(BaseSettings)
    data: DataSettings = section(DataSettings)
    text: TextSettings = section(TextSettings)
    prior: PriorSettings = section(PriorSettings)
    method: MethodSettings = section(MethodSettings)
    loop: LoopSettings = section(LoopSettings)
    objective: ObjectiveSettings = section(ObjectiveSettings)
    optimiser: OptimiserSettings = section(OptimiserSettings)
    validation: ValidationSettings = section(ValidationSettings)
    images: ImageSettings = section(ImageSettings)
    output: OutputSettings = section(OutputSettings)
    precision: PrecisionSettings = section(PrecisionSettings)
    hub: HubSettings = section(HubSettings)

    def __post_init__(self):
        problems = task_problems(self.data)
        if self.data.concepts is not None:
            given = flat(self)
            both = [name for name in (*OF_CONCEPT, "dataset_name") if given[name] is not None]
            shared = {"class_prompt"}
            if set(both) - shared:
                problems.append(f"concepts: each has its own {', '.join(x for x in both if x not in shared)}")
            if not self.data.concepts:
                problems.append("concepts: one or more are needed")
        for number, concept in enumerate(self.all_concepts):
            where = f"concepts[{number}]: " if self.data.concepts is not None else ""
            problems += concept.problems(where)
            if self.data.dataset_name is None and not concept.instance_data_dir:
                problems.append(f"{where}instance_data_dir is required: a folder with pictures")
            if self.prior.prior != "none" and not (concept.class_prompt or self.prior.class_prompts_file):
                problems.append(f"{where}class_prompt is required with prior={self.prior.prior}")
            if self.prior.prior == "images" and not concept.class_data_dir:
                problems.append(f"{where}class_data_dir is required with prior=images: a folder, which may be empty")
        words = self.tokens
        if len(set(words)) < len(words):
            problems.append(f"placeholder_token: every token once is allowed, got {' '.join(words)}")
        if self.prior.prior == "none" and any(own.class_data_dir or own.class_prompt for own in self.all_concepts):
            problems.append("class_prompt and class_data_dir need a prior: images or teacher")
        if self.prior.prior == "teacher" and any(own.class_data_dir for own in self.all_concepts):
            problems.append("class_data_dir needs prior=images; prior=teacher needs no pictures")
        if self.prior.class_prompts_file and any(own.class_prompt for own in self.all_concepts):
            problems.append("class_prompts_file stands in place of class_prompt")
        if self.data.dataset_name is not None and (self.data.instance_data_dir or self.data.captions):
            problems.append("dataset_name stands in place of instance_data_dir and captions (see caption_column)")
        captions = "captions" if self.data.captions else "caption_column" if self.data.caption_column else None
        if captions and any(own.instance_prompts_file for own in self.all_concepts):
            problems.append(f"{captions} stand in place of instance_prompts_file")
        templates = captions or self.images.prompts_file
        for concept in self.all_concepts:
            if concept.initializer_token and not (concept.tokens or concept.instance_prompts_file or templates):
                problems.append("initializer_token needs a placeholder_token, or templates or captions with {}")
        method = self.method.chosen()
        problems += check_settings(method, self.method.given()) + unmet_needs(self, self.usual_rates())
        if method.name == "atoms" and not self.method.m and not self.method.kc:
            problems.append("m=0, kc=0: no atoms at all; m=0 needs block atoms (kc from 1 on)")
        if method.name == "token" and not self.text.train_token_embedding:
            problems.append("method=token needs train_token_embedding and a placeholder_token")
        if self.optimiser.learning_rate is None and not method.rates and self.optimiser.optimizer != "prodigy":
            problems.append(f"learning_rate is required: method {method.name} has no usual one")
        if self.method.budget is not None:
            problems += budget_problems(self.method.budget)
        if self.text.train_token_embedding and not words:
            problems.append("train_token_embedding needs a placeholder_token")
        if self.images.prompts_file and not all(concept.word for concept in self.all_concepts):
            problems.append(
                "prompts_file needs a placeholder_token (or an initializer_token) to put in the place of {}"
            )
        if problems:
            raise UserError("; ".join(problems))

    def usual_rates(self) -> dict[str, float | None]:
        """What each learning rate is if nobody says otherwise."""
        method = self.method.chosen()
        usual = {
            "learning_rate": method.rates.get(method.main_kinds[0]),
            "beta_learning_rate": method.rates.get("beta", RATES["beta"]),
            "token_learning_rate": RATES["row"],  # of method token, what learning_rate says
            "text_learning_rate": TEXT_RATES[self.text.text_adapter],
        }
        if self.optimiser.optimizer == "prodigy":
            usual = dict.fromkeys(usual, 1.0)  # it finds its own rate and wants 1
        if method.main_kinds == ("row",) and self.optimiser.learning_rate is not None:
            usual["token_learning_rate"] = self.optimiser.learning_rate
        return usual

    @property
    def tokens(self) -> list[str]:
        """The placeholder tokens of all concepts."""
        return [token for concept in self.all_concepts for token in concept.tokens]

    @property
    def all_concepts(self) -> tuple[Concept, ...]:
        """`concepts`, or the one that the flags describe; class_prompt counts for each that has none."""
        if self.data.concepts is None:
            values = flat(self)
            if self.data.task is not None:
                values["instance_prompt"] = self.data.task.prompts[0]
            return (Concept(**{name: values[name] for name in OF_CONCEPT}),)
        return tuple(
            Concept(**{**vars(concept), "class_prompt": concept.class_prompt or self.prior.class_prompt})
            for concept in self.data.concepts
        )


def task_problems(data: DataSettings) -> list[str]:
    """What is wrong with the settings of a task of VTAB; a task that there is none of raises UserError."""
    if data.task is None:
        return ["dataset_dir needs dataset_name=vtab:TASK, such as vtab:dtd"] if data.dataset_dir else []
    name = f"dataset_name={data.dataset_name}"
    if data.dataset_dir is None:
        return [f"dataset_dir is required with {name}: the folder of the task, or one that holds it"]
    given = [key for key in ("instance_prompt", "instance_prompts_file", "caption_column") if getattr(data, key)]
    return [f"{name} stands in place of {key}: each picture has the prompt of its class" for key in given]
