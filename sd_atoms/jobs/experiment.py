"""An experiment: methods × concepts × seeds, each an ordinary run, and before them the runs that choose their rates.

output_dir: runs/compare/castle
settings: {pretrained_model_name_or_path: pocket, max_train_steps: 300}    # of every run, as for sd-atoms train
concepts:
  castle: {config: pocket/castle}                                         # a file of settings, or settings
methods:
  atoms:                                                                  # the method of that name
  atoms (9, 4): {method: atoms, m1: 4}
  lora: {rank: 4}
rates: {factors: [0.33, 1, 3]}                                            # times each method's usual rate
seeds: 0-2
networks: pocket:clip,efficientnet-lite0
"""

import itertools
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sd_atoms.data.prompts import load_prompts, load_templates, parse_seeds
from sd_atoms.errors import UserError
from sd_atoms.evaluation.folder import GROUPS
from sd_atoms.methods import get_method
from sd_atoms.settings import fields_of, read_config, resolve, setting, shown
from sd_atoms.training.config import MethodSettings, OptimiserSettings, TextSettings, TrainConfig
from sd_atoms.training.optimiser import with_defaults

WHAT, SCORES, PAGE = "what is compared", "how it is scored", "pictures of the report"
MAPPINGS = ("settings", "concepts", "methods", "rates")
# what an experiment decides for its runs, which draw next to nothing themselves
FORCED = dict(overwrite=False, resume_from_checkpoint=None, num_instance_images=1, prompts_file=None)
FORCED |= dict(clip_model_name_or_path=None, validation_prompt=None, push_to_hub=False, hub_model_id=None)
NOT_OF_RUNS = (*FORCED, "output_dir", "strict_resume", "hub_private_repo", "concepts", "seed")
PRETRAINED = "pretrained"
UNSAFE = re.compile(r"[^\w.+-]+")  # in the name of a folder
# what a method may bring of its own; all else would make runs that are not alike
OF_METHODS = {*fields_of(MethodSettings), *fields_of(OptimiserSettings), *fields_of(TextSettings)}


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
    """How the learning rate of each method is chosen: by runs on other seeds and prompts than the scored ones."""

    factors: tuple[float, ...]
    concepts: tuple[str, ...]
    seeds: tuple[int, ...]
    prompts_file: str


@dataclass(frozen=True)
class Run:
    """One run of an experiment.

    stage: pretrained, rate or scored. values: its settings, without a learning rate that is still to be chosen.
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


@dataclass(frozen=True)
class Plan:
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


def read_plan(path: str, flags: Mapping[str, Any]) -> Plan:
    """An experiment from its file and the flags that win over it.

    Raises:
        UserError: everything that is wrong, in one line.
    """
    entries = dict(read_config(path))
    parts = {name: entries.pop(name, None) for name in MAPPINGS}
    experiment = _resolved(path, entries, flags)
    problems = [
        f"{name}: `name: value` lines are needed, got {shown(value)}"
        for name, value in parts.items()
        if value is not None and not isinstance(value, dict)
    ]
    problems += [f"{name} is required" for name in ("concepts", "methods") if parts[name] is None]
    if problems:
        raise UserError(f"{path}: {'; '.join(problems)}")
    shared = parts["settings"] or {}
    concepts = {str(name): _of_concept(path, str(name), shared, own) for name, own in parts["concepts"].items()}
    methods = {str(label): _of_method(path, str(label), own) for label, own in parts["methods"].items()}
    if not concepts or not methods:
        raise UserError(f"{path}: concepts and methods: one or more are needed")
    rates = _rates(path, parts["rates"], concepts)
    seeds = parse_seeds(experiment.seeds)
    runs, problems = _runs(concepts, methods, rates, seeds)
    plan = Plan(
        experiment,
        tuple(runs),
        concepts,
        methods,
        rates,
        tuple(load_templates(experiment.prompts_file)),
        tuple(load_templates(rates.prompts_file)) if rates else (),
        tuple(dict.fromkeys(load_prompts(experiment.unrelated_prompts_file))) if experiment.unrelated_prompts_file
        else (),
    )  # fmt: skip
    problems += _wrong_in(plan)
    for run in runs:
        try:
            plan.config(run)
        except UserError as error:
            problems.append(f"{run.name}: {error}")
    if problems:
        # a mistake in what all share comes with every run
        distinct = {}
        for problem in problems:
            distinct.setdefault(problem.partition(": ")[2], problem)
        raise UserError(f"{path}: {'; '.join(distinct.values())}")
    return plan


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


def _runs(
    concepts: Mapping[str, Mapping[str, Any]],
    methods: Mapping[str, Mapping[str, Any]],
    rates: Rates | None,
    seeds: Sequence[int],
) -> tuple[list[Run], list[str]]:
    """All runs, those first that others need, and what is wrong with the methods."""
    first, choosing, scored, problems = [], [], [], []
    for concept, of_concept in concepts.items():
        first.append(Run(f"{_safe(concept)}/{PRETRAINED}", PRETRAINED, concept, PRETRAINED, 0, of_concept))
    for label, of_method in methods.items():
        own = []
        if rates is not None and "learning_rate" not in of_method:
            for concept in rates.concepts:
                values = concepts[concept] | of_method
                usual = _usual_rate(values)
                if usual is None:
                    problems.append(f"methods.{label}: has no usual rate to multiply; give its learning_rate")
                    break
                for rate, seed in itertools.product([_short(usual * factor) for factor in rates.factors], rates.seeds):
                    name = f"rates/{_safe(concept)}/{_safe(label)}/{rate:g}/seed-{seed}"
                    own.append(Run(name, "rate", concept, label, seed, values | {"learning_rate": rate}))
        names = tuple(run.name for run in own)
        choosing += own
        for concept, seed in itertools.product(concepts, seeds):
            name = f"{_safe(concept)}/{_safe(label)}/seed-{seed}"
            needs = (f"{_safe(concept)}/{PRETRAINED}",)
            scored.append(Run(name, "scored", concept, label, seed, concepts[concept] | of_method, needs, names))
    runs = [*first, *choosing, *scored]
    names = [run.name.lower() for run in runs]
    twice = dict.fromkeys(run.name for run in runs if names.count(run.name.lower()) > 1)
    return runs, [*problems, *(f"methods: {name}: two runs would have this folder" for name in twice)]


def _resolved(path: str, entries: Mapping[str, Any], flags: Mapping[str, Any]) -> Experiment:
    """The scalar settings; lists in the file stand for commas."""
    entries = dict(entries)
    for name in ("prompts_file", "unrelated_prompts_file"):
        if isinstance(entries.get(name), str):
            entries[name] = _beside(path, entries[name])
    given = {**entries, **{name: value for name, value in flags.items() if value is not None}}
    listed = {
        name: ",".join(map(str, value)) if isinstance(value, (list, tuple)) else str(value)
        for name, value in given.items()
        if name in ("seeds", "networks", "metrics", "scales", "shown_prompts")
        and (isinstance(value, (list, tuple)) or _is_number(value))
    }
    try:
        return resolve(Experiment, {**given, **listed})
    except UserError as error:
        raise UserError(f"{path}: {str(error).replace('--', '')}") from error


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _of_concept(path: str, name: str, shared: Mapping[str, Any], values: Any) -> dict[str, Any]:
    """Settings of a concept's runs: of the file that its `config` names, of all runs, its own; later ones win."""
    own = _checked(path, f"concepts.{name}", values)
    file, from_file = own.pop("config", None), {}
    if file is not None:
        file = _beside(path, str(file))
        from_file = read_config(file)
        if "concepts" in from_file:
            raise UserError(f"{path}: concepts.{name}: {file} has several; name one for each here")
        idle = [key for key, (_, field) in fields_of(TrainConfig).items() if FORCED.keys() & field.metadata["needs"]]
        from_file = {key: value for key, value in _with_files(file, from_file).items() if key not in idle}
    values = {"report_to": "none"} | from_file | _checked(path, "settings", shared) | own | FORCED
    if "learning_rate" in values:
        raise UserError(f"{path}: concepts.{name}: learning_rate: each method has its own, under methods or by rates")
    return values


def _of_method(path: str, label: str, values: Any) -> dict[str, Any]:
    """Settings of a method; without `method` or `peft_config` it is the one called like its label."""
    own = _checked(path, f"methods.{label}", {} if values is None else values)
    known = fields_of(TrainConfig)
    foreign = [name for name in own if name in known and name not in OF_METHODS]
    if foreign:
        raise UserError(f"{path}: methods.{label}: {', '.join(foreign)}: goes under settings, alike for all methods")
    if _safe(label) == PRETRAINED:
        raise UserError(f"{path}: methods.{label}: is what the base's own row is called; choose another name")
    return own if "peft_config" in own else {"method": label} | own


def _checked(path: str, where: str, values: Any) -> dict[str, Any]:
    """The values, if they are settings that an experiment leaves open; files may be named from where its own lies."""
    if not isinstance(values, dict):
        raise UserError(f"{path}: {where}: `name: value` lines are needed, got {shown(values)}")
    decided = [str(name) for name in values if name in NOT_OF_RUNS]
    if decided:
        raise UserError(f"{path}: {where}: {', '.join(decided)}: the experiment decides it for all runs")
    return _with_files(path, values)


def _with_files(path: str, values: Mapping[str, Any]) -> dict[str, Any]:
    """The values, files named from where another lies."""
    files = {name for name, (_, field) in fields_of(TrainConfig).items() if field.metadata["file"]}
    return {
        name: _beside(path, value) if name in files and isinstance(value, str) else value
        for name, value in values.items()
    }


def _beside(path: str, name: str) -> str:
    """A file that lies where another does, as a setting of a YAML file names it; else the name as it is."""
    beside = Path(path).parent / name
    return str(beside) if beside.is_file() else name


def _rates(path: str, entries: Mapping[str, Any] | None, concepts: Mapping[str, Any]) -> Rates | None:
    if entries is None:
        return None
    unknown = [name for name in entries if name not in ("factors", "concepts", "seeds", "prompts_file")]
    factors = entries.get("factors")
    problems = [f"rates: unknown key {name!r}" for name in unknown]
    if not isinstance(factors, list) or not factors or not all(_is_number(f) and f > 0 for f in factors):
        problems.append(f"rates: factors: a list of numbers above 0 is needed, got {shown(factors)}")
    chosen = entries.get("concepts", list(concepts)[:1])
    if not isinstance(chosen, list) or not chosen or not set(chosen) <= set(concepts):
        problems.append(f"rates: concepts: of {', '.join(concepts)}, got {shown(chosen)}")
    if problems:
        raise UserError(f"{path}: {'; '.join(problems)}")
    seeds = entries.get("seeds", 100)
    seeds = parse_seeds(",".join(map(str, seeds)) if isinstance(seeds, list) else str(seeds))
    return Rates(
        tuple(factors), tuple(chosen), tuple(seeds), _beside(path, str(entries.get("prompts_file", "tuning")))
    )


def _wrong_in(plan: Plan) -> list[str]:
    """What does not go together."""
    experiment, problems = plan.experiment, []
    unknown = [name.strip() for name in experiment.metrics.split(",") if name.strip() not in GROUPS]
    problems += [f"metrics: {name!r}: of {', '.join(GROUPS)}, with commas between" for name in unknown]
    if not plan.networks:
        problems.append("networks: one or more are needed")
    if plan.rates is not None and not {"subject", "text"} <= {name.strip() for name in experiment.metrics.split(",")}:
        problems.append("metrics: rates are chosen by subject and text")
    for name in ("fidelity", "text"):
        own = getattr(experiment, name)
        if own is not None and own not in plan.networks:
            problems.append(f"{name}: {own!r} is not among networks: {', '.join(plan.networks)}")
    if experiment.against is not None and experiment.against not in plan.methods:
        problems.append(f"against: {experiment.against!r} is not among methods: {', '.join(plan.methods)}")
    try:
        wrong = [scale for scale in plan.scales if not -10 <= scale <= 10]
        problems += [f"scales: {scale:g} is out of range, -10 to 10 is allowed" for scale in wrong]
    except ValueError:
        problems.append(f"scales: {experiment.scales!r}: numbers with commas between are needed")
    try:
        beyond = [number for number in plan.shown_prompts if not 0 <= number < len(plan.prompts)]
        problems += [f"shown_prompts: {number}: 0 to {len(plan.prompts) - 1} is allowed" for number in beyond]
    except ValueError:
        problems.append(f"shown_prompts: {experiment.shown_prompts!r}: numbers with commas between are needed")
    if plan.rates is not None:
        both = set(plan.rates.seeds) & set(parse_seeds(experiment.seeds))
        same = set(plan.tuning) & set(plan.prompts)
        problems += [f"rates: seeds: {', '.join(map(str, sorted(both)))} are scored too; take others"] if both else []
        problems += [f"rates: prompts_file: {sorted(same)[0]!r} is scored too; take others"] if same else []
    return problems


def _usual_rate(values: Mapping[str, Any]) -> float | None:
    """The learning rate that a run of these settings has if nobody says; None if it has none or they are wrong."""
    try:
        method = get_method(str(values.get("method", "atoms")))
        return with_defaults(resolve(TrainConfig, dict(values))).optimiser.learning_rate if method.rates else None
    except UserError:
        return None  # said with the runs themselves


def _short(rate: float) -> float:
    """Two digits of a rate: 0.0033, not 0.0033000000000000004."""
    return float(f"{rate:.2g}")


def _safe(label: str) -> str:
    return UNSAFE.sub("_", label).strip("._-") or "_"
