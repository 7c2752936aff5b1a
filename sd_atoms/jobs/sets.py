"""The plan of whole data sets: image sets × methods × seeds, each an ordinary run, and the base itself on each set.

data_dir: demo                                                   # holds dsprites_loc/, fashion_mnist/, …
tasks: dsprites_loc,dsprites_ori,fashion_mnist                   # tasks of one image set are one run
methods: [atoms, lora]                                           # or `label: {settings}`, as for sd-atoms compare
settings: {pretrained_model_name_or_path: pocket, max_train_steps: 300}    # of every run, as for sd-atoms train
output_dir: runs/vtab/demo
images: 1000
networks: pocket:clip,efficientnet-lite0
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from sd_atoms.data.prompts import parse_seeds
from sd_atoms.data.vtab import PREFIX, Task, image_sets, load_tasks
from sd_atoms.errors import UserError
from sd_atoms.evaluation.folder import SETS
from sd_atoms.files import safe_name
from sd_atoms.jobs.experiment import FORCED, settings_of_method, settings_of_runs
from sd_atoms.jobs.plan import PRETRAINED, Run, Runs
from sd_atoms.settings import read_config, resolve, setting
from sd_atoms.training.optimiser import with_defaults
from sd_atoms.values import shown

WHAT, SCORES, COST = "what is tuned", "how it is scored", "what --dry_run reckons with"
MAPPINGS = ("settings", "methods")
OWN = ("dataset_name", "dataset_dir", "instance_data_dir", "instance_prompt", "placeholder_token", "learning_rate")


@dataclass(frozen=True)
class SetExperiment:
    """Settings of an experiment on image sets besides `settings` and `methods`."""

    output_dir: str = setting(None, WHAT, "folder of all runs and of the report", required=True)
    data_dir: str = setting(None, WHAT, "folder that holds the folders of the tasks", required=True)
    tasks: str = setting("all", WHAT, "all, natural, specialized, structured, demo, or names with commas between")
    seeds: str = setting("0", WHAT, "of the trainings, such as 0-2: as many runs of each method and set")

    images: int = setting(1000, SCORES, "generated images of each run", low=2, high=10**6)
    per_class: str = setting(
        "as_test", SCORES, "how many of each class: as the test split has them, or equal", choices=("as_test", "equal")
    )
    reference_images: int | None = setting(
        None, SCORES, "only so many of the test split, spread over it; none = all", low=2
    )
    networks: str = setting(None, SCORES, "what makes features, as for sd-atoms evaluate; take two", required=True)
    metrics: str = setting("fid,kid,cmmd,prdc", SCORES, f"comma-separated, of {', '.join(SETS)}")
    columns: int = setting(10, SCORES, "of the figure of a set: its first classes, or samples", low=1, high=50)

    step_seconds: float | None = setting(None, COST, "of a training step, as long as no run is done", low=0.0)
    image_seconds: float | None = setting(None, COST, "of a generated image, as long as no run is done", low=0.0)


@dataclass(frozen=True)
class SetPlan(Runs):
    """An experiment on image sets with all its runs.

    sets: image set -> its tasks; the first one's images and prompts are trained with. methods: label -> settings.
    A run's `concept` is its image set.
    """

    experiment: SetExperiment
    runs: tuple[Run, ...]
    sets: Mapping[str, Sequence[Task]]
    methods: Mapping[str, Mapping[str, Any]]

    def task(self, run: Run) -> Task:
        """The task whose images and prompts a run learns from."""
        return self.sets[run.concept][0]

    def drawn_by(self, run: Run) -> dict[str, Any]:
        """What a run draws and what it is set against, as its scores say it."""
        experiment = self.experiment
        return {
            "images": experiment.images,
            "per_class": experiment.per_class,
            "task": self.task(run).name,
            "reference_asked": experiment.reference_images,
        }


def read_set_plan(path: str, flags: Mapping[str, Any]) -> SetPlan:
    """An experiment from its file, or without one ("") from flags alone; flags win over the file.

    Raises:
        UserError: everything that is wrong, in one line.
    """
    entries = dict(read_config(path)) if path else {}
    before, where = f"{path}: " if path else "", path or "flags"
    shared, methods = (entries.pop(name, None) for name in MAPPINGS)
    flags = dict(flags)
    asked = flags.pop("methods", None)
    lists = {name: ",".join(map(str, own)) for name, own in entries.items() if isinstance(own, list)}
    numbers = {name: str(own) for name, own in entries.items() if name == "seeds" and isinstance(own, int)}
    try:
        experiment = resolve(SetExperiment, {**entries, **lists, **numbers, **flags})
    except UserError as error:
        raise UserError(f"{before}{str(error).replace('--', '')}") from error
    shared = settings_of_runs(where, "settings", {} if shared is None else shared)
    decided = [name for name in OWN if name in shared]
    if decided:
        raise UserError(f"{before}settings: {', '.join(decided)}: the sets and the methods decide it")
    of_methods = _methods(where, methods, asked)
    sets = image_sets(load_tasks(experiment.tasks))
    names = [name.strip() for name in experiment.metrics.split(",")]
    unknown = [name for name in names if name not in SETS]
    if unknown:
        raise UserError(f"{before}metrics: {', '.join(map(repr, unknown))}: of {', '.join(SETS)} with commas between")
    plan = SetPlan(experiment, tuple(_runs(experiment, shared, of_methods, sets)), sets, of_methods)
    if not plan.networks:
        raise UserError(f"{before}networks: one or more are needed")
    problems = {}
    for run in plan.runs:
        try:
            with_defaults(plan.config(run))
        except UserError as error:
            problems.setdefault(str(error), run.name)  # a mistake in what all share comes with every run
    if problems:
        raise UserError(before + "; ".join(f"{name}: {problem}" for problem, name in problems.items()))
    return plan


def _methods(path: str, given: Any, asked: str | None) -> dict[str, dict[str, Any]]:
    """Label -> settings of the methods of a file, those of them that a flag names, or others by their names."""
    if isinstance(given, str):
        given = given.split(",")
    if isinstance(given, list):
        given = {str(name).strip(): None for name in given}
    if given is None:
        given = {}
    if not isinstance(given, dict):
        raise UserError(f"{path}: methods: names or `label: settings` lines are needed, got {shown(given)}")
    if asked is not None:
        names = [name.strip() for name in asked.split(",") if name.strip()]
        given = {name: given.get(name) for name in names}
    if not given:
        raise UserError(f"{path}: methods: one or more are needed, such as atoms,lora")
    labels = [safe_name(str(label)).lower() for label in given]
    if len(set(labels)) < len(labels):
        raise UserError(f"{path}: methods: two of {', '.join(map(str, given))} would have one folder")
    return {str(label): settings_of_method(path, str(label), own) for label, own in given.items()}


def _runs(
    experiment: SetExperiment,
    shared: Mapping[str, Any],
    methods: Mapping[str, Any],
    sets: Mapping[str, Sequence[Task]],
) -> list[Run]:
    """Set by set the base and every method, so that a set is whole as early as can be."""
    runs = []
    for name, tasks in sets.items():
        own = {"report_to": "none"} | dict(shared) | FORCED
        own |= {"dataset_name": f"{PREFIX}{tasks[0].name}", "dataset_dir": experiment.data_dir}
        runs.append(Run(f"{safe_name(name)}/{PRETRAINED}", PRETRAINED, name, PRETRAINED, 0, own))
        for label, of_method in methods.items():
            for seed in parse_seeds(experiment.seeds):
                folder = f"{safe_name(name)}/{safe_name(label)}/seed-{seed}"
                runs.append(Run(folder, "scored", name, label, seed, own | of_method))
    return runs
