"""What an experiment consists of: methods × concepts × seeds, each an ordinary run; first those that choose rates."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sd_atoms.errors import UserError
from sd_atoms.settings import resolve, setting
from sd_atoms.training.config import TrainConfig

WHAT, SCORES, PAGE = "what is compared", "how it is scored", "pictures of the report"
PRETRAINED = "pretrained"


@dataclass(frozen=True)
class Experiment:
    """Settings of an experiment besides `settings`, `concepts`, `methods` and `rates`."""

    output_dir: str = setting(None, WHAT, "folder of all runs and of the report", required=True)
    seeds: str = setting("0", WHAT, "of the trainings, such as 0-2: as many runs of each method and concept")
    against: str | None = setting(
        None, WHAT, "the method that all others are set against in pairs; none = lora, or else the first"
    )

    prompts_file: str = setting("few_shot", SCORES, "templates with {}, as for sd-atoms generate", file=True)
    images_per_prompt: int = setting(
        1, SCORES, "pictures of each prompt; picture j of prompt n has seed 1000·j + n", low=1, high=1000
    )
    unrelated_prompts_file: str | None = setting(
        None, SCORES, "prompts about other things, which an adapter should leave alone; none = no drift", file=True
    )
    networks: str = setting(
        None,
        SCORES,
        "what makes features, comma-separated, as for sd-atoms evaluate; judges disagree, so take two",
        required=True,
    )
    fidelity: str | None = setting(None, SCORES, "which of them judges the likeness; none = the first")
    text: str | None = setting(None, SCORES, "which of them judges the text; none = the first that knows texts")
    metrics: str = setting("subject,copying,diversity,text", SCORES, "as for sd-atoms evaluate")

    scales: str = setting(
        "0,0.25,0.5,0.75,1,1.25", PAGE, "adapter strengths to draw the first prompts at; empty = none"
    )
    scale_prompts: int = setting(4, PAGE, "how many prompts are drawn at them", low=0)
    shown_prompts: str | None = setting(
        None, PAGE, "numbers of the prompts of the small grid, from 0 on; none = 1,2,8,9, or else the first four"
    )


@dataclass(frozen=True)
class Rates:
    """How the learning rate of each method is chosen: by runs on other seeds and prompts than the scored ones.

    factors: of the usual rate; empty where every method lists its own.
    """

    factors: tuple[float, ...]
    concepts: tuple[str, ...]
    seeds: tuple[int, ...]
    prompts_file: str


@dataclass(frozen=True)
class Run:
    """One run of an experiment.

    stage: pretrained, rate or scored. values: its settings; with the first of the learning rates to be tried where one
    is still to be chosen.
    needs: runs that must be done before. rate_runs: those that choose its rate, so far as they can be done.
    """

    name: str
    stage: str
    concept: str
    method: str
    seed: int
    values: Mapping[str, Any]
    needs: tuple[str, ...] = ()
    rate_runs: tuple[str, ...] = ()


class Runs:
    """What every plan of runs has: `experiment` with output_dir, networks and metrics, `runs`, and `drawn_by`."""

    @property
    def folder(self) -> Path:
        """Of all runs and of the report."""
        return Path(self.experiment.output_dir)

    def run_folder(self, run: Run) -> Path:
        """An ordinary run folder."""
        return self.folder / "runs" / run.name

    def config(self, run: Run, rate: float | None = None) -> TrainConfig:
        """All settings of a run; `rate` is the learning rate that was chosen for it."""
        values = dict(run.values) | {"output_dir": str(self.run_folder(run)), "seed": run.seed}
        if rate is not None:
            values["learning_rate"] = rate
        return resolve(TrainConfig, values)

    def named(self, name: str) -> Run:
        """The run of that name.

        Raises:
            UserError: there is none.
        """
        found = next((run for run in self.runs if run.name == name), None)
        if found is None:
            raise UserError(f"run: {name!r} is none of this experiment's; --dry_run lists them")
        return found

    @property
    def networks(self) -> list[str]:
        """Names of what makes features."""
        return [name.strip() for name in self.experiment.networks.split(",") if name.strip()]

    @property
    def metrics(self) -> list[str]:
        """Names of groups of figures."""
        return [name.strip() for name in self.experiment.metrics.split(",")]


@dataclass(frozen=True)
class Plan(Runs):
    """An experiment with all its runs.

    concepts: name -> settings. methods: label -> settings. prompts: templates that are scored. tuning: those of the
    runs that choose rates. unrelated: prompts about other things.
    """

    experiment: Experiment
    runs: tuple[Run, ...]
    concepts: Mapping[str, Mapping[str, Any]]
    methods: Mapping[str, Mapping[str, Any]]
    rates: Rates | None
    prompts: tuple[str, ...]
    tuning: tuple[str, ...]
    unrelated: tuple[str, ...]

    def templates(self, run: Run) -> tuple[str, ...]:
        """Those that a run is scored by."""
        return self.tuning if run.stage == "rate" else self.prompts

    def drawn_by(self, run: Run) -> dict[str, Any]:
        """What a run draws, as its scores say it."""
        unrelated = () if run.stage == "rate" else self.unrelated
        count = self.experiment.images_per_prompt
        return {"prompts": list(self.templates(run)), "unrelated": list(unrelated), "images_per_prompt": count}

    @property
    def shown_prompts(self) -> list[int]:
        """Numbers of the prompts of the small grid."""
        text = self.experiment.shown_prompts
        if text is None:
            return [1, 2, 8, 9] if len(self.prompts) > 9 else list(range(min(4, len(self.prompts))))
        return [int(part) for part in text.split(",") if part.strip()]

    @property
    def against(self) -> str:
        """The method that the others are set against in pairs."""
        return self.experiment.against or ("lora" if "lora" in self.methods else next(iter(self.methods)))

    @property
    def scales(self) -> list[float]:
        """Strengths that the first prompts are drawn at."""
        return [float(text) for text in self.experiment.scales.split(",") if text.strip()]


def chosen_rate(plan: Plan, run: Run, score_of: Callable[[Run], float | None]) -> float | None:
    """The learning rate of the best of the runs that choose it: of the highest mean score over concepts and seeds.

    Args:
        plan: the experiment.
        run: a scored one.
        score_of: the score of a finished run, None where it has none.

    Raises:
        UserError: no run that chooses has a score.
    """
    if not run.rate_runs:
        return None
    scores: dict[float, list[float]] = {}
    for name in run.rate_runs:
        score = score_of(plan.named(name))
        if score is not None:
            scores.setdefault(plan.named(name).values["learning_rate"], []).append(score)
    if not scores:
        raise UserError(f"rates: none of {', '.join(run.rate_runs)} has a score to choose by")
    # a rate that failed on one concept is not as good as one that held on all
    most = max(map(len, scores.values()))
    full = {rate: sum(found) / most for rate, found in scores.items() if len(found) == most}
    return max(full, key=lambda rate: full[rate])
