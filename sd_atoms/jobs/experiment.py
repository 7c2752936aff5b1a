"""The file of an experiment, and the plan that it means.

output_dir: runs/compare/castle
settings: {pretrained_model_name_or_path: pocket, max_train_steps: 300}    # of every run, as for sd-atoms train
concepts:
  castle: {config: pocket/castle}                                         # a file of settings, or settings
methods:
  atoms:                                                                  # the method of that name
  atoms (9, 4): {method: atoms, m1: 4}
  lora: {rank: 4}
  ia3: {peft_config: ia3.json, learning_rate: [1e-3, 1e-2]}               # these rates are tried
rates: {factors: [0.33, 1, 3]}                                            # times each other method's usual rate
seeds: 0-2
networks: pocket:clip,efficientnet-lite0
"""

import itertools
from collections.abc import Mapping, Sequence
from typing import Any

from sd_atoms.data.prompts import load_prompts, load_templates, parse_seeds
from sd_atoms.errors import UserError
from sd_atoms.evaluation.folder import MORE_GROUPS
from sd_atoms.files import safe_name
from sd_atoms.jobs.plan import PRETRAINED, Experiment, Plan, Rates, Run
from sd_atoms.settings import config_file, fields_of, read_config, replaced, resolve
from sd_atoms.training.config import TrainConfig
from sd_atoms.training.optimiser import with_defaults
from sd_atoms.training.sections import MethodSettings, OptimiserSettings, TextSettings
from sd_atoms.values import shown

MAPPINGS = ("settings", "concepts", "methods", "rates")
# what an experiment decides for its runs, which draw next to nothing themselves
FORCED = dict(overwrite=False, resume_from_checkpoint=None, num_instance_images=1, prompts_file=None)
FORCED |= dict(clip_model_name_or_path=None, validation_prompt=None, push_to_hub=False, hub_model_id=None)
NOT_OF_RUNS = (*FORCED, "output_dir", "strict_resume", "hub_private_repo", "concepts", "seed")
# what a method may bring of its own; all else would make runs that are not alike
OF_METHODS = {*fields_of(MethodSettings), *fields_of(OptimiserSettings), *fields_of(TextSettings)}
OF_METHODS |= {"masks", "mask_weight"}  # the same samples, weighed otherwise


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
    methods = {str(label): settings_of_method(path, str(label), own) for label, own in parts["methods"].items()}
    if not concepts or not methods:
        raise UserError(f"{path}: concepts and methods: one or more are needed")
    rates = _rates(path, parts["rates"], concepts)
    seeds = parse_seeds(experiment.seeds)
    runs, wrong_methods = _runs(concepts, methods, rates, seeds)
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
    problems = _wrong_in(plan)
    for run in runs:
        try:
            plan.config(run)
        except UserError as error:
            problems.append(f"{run.name}: {error}")
    problems += wrong_methods
    if problems:
        # a mistake in what all share, or in a concept, comes with every run and method
        distinct = {}
        for problem in problems:
            distinct.setdefault(problem.partition(": ")[2], problem)
        raise UserError(f"{path}: {'; '.join(distinct.values())}")
    return plan


def _runs(
    concepts: Mapping[str, Mapping[str, Any]],
    methods: Mapping[str, Mapping[str, Any]],
    rates: Rates | None,
    seeds: Sequence[int],
) -> tuple[list[Run], list[str]]:
    """All runs, those first that others need, and what is wrong with the methods."""
    first, choosing, scored, problems = [], [], [], []
    for concept, of_concept in concepts.items():
        first.append(Run(f"{safe_name(concept)}/{PRETRAINED}", PRETRAINED, concept, PRETRAINED, 0, of_concept))
    for label, of_method in methods.items():
        own = []
        try:
            tried = _rates_to_try(of_method, rates, concepts)
        except UserError as error:
            problems.append(f"methods.{label}: {error}")
            continue
        for concept, found in tried.items():
            for rate, seed in itertools.product(found, rates.seeds):
                name = f"rates/{safe_name(concept)}/{safe_name(label)}/{rate:g}/seed-{seed}"
                values = concepts[concept] | of_method | {"learning_rate": rate}
                own.append(Run(name, "rate", concept, label, seed, values))
        if own:
            of_method = {**of_method, "learning_rate": own[0].values["learning_rate"]}
        names = tuple(run.name for run in own)
        choosing += own
        for concept, seed in itertools.product(concepts, seeds):
            name = f"{safe_name(concept)}/{safe_name(label)}/seed-{seed}"
            needs = (f"{safe_name(concept)}/{PRETRAINED}",)
            scored.append(Run(name, "scored", concept, label, seed, concepts[concept] | of_method, needs, names))
    runs = [*first, *choosing, *scored]
    names = [run.name.lower() for run in runs]
    twice = dict.fromkeys(run.name for run in runs if names.count(run.name.lower()) > 1)
    return runs, [*problems, *(f"methods: {name}: two runs would have this folder" for name in twice)]


def _rates_to_try(
    of_method: Mapping[str, Any], rates: Rates | None, concepts: Mapping[str, Mapping[str, Any]]
) -> dict[str, list[float]]:
    """Concept -> the rates that are tried on it: those that a method lists, or its usual one times each factor."""
    listed = of_method.get("learning_rate")
    if listed is not None and not isinstance(listed, list):
        return {}
    if listed is not None:
        try:
            found = [float(rate) for rate in listed]
        except (TypeError, ValueError):
            found = []
        if rates is None or not found or not all(0 < rate < float("inf") for rate in found):
            raise UserError(f"learning_rate: a number, or with rates a list of numbers to try, got {shown(listed)}")
        return dict.fromkeys(rates.concepts, found)
    if rates is None:
        return {}
    if not rates.factors:
        raise UserError("has no learning_rate; give one, a list of them to try, or `factors` under rates")
    tried = {}
    for concept in rates.concepts:
        # any rate will do to see what else is said of the method
        config = resolve(TrainConfig, concepts[concept] | of_method | {"learning_rate": 1.0})
        known = config.method.chosen().rates
        usual = with_defaults(replaced(config, learning_rate=None)).optimiser.learning_rate if known else None
        if usual is None:
            raise UserError("has no usual rate to multiply; give its learning_rate, or a list of them to try")
        # 0.0033, not 0.0033000000000000004
        tried[concept] = [float(f"{usual * factor:.2g}") for factor in rates.factors]
    return tried


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
    own = settings_of_runs(path, f"concepts.{name}", values)
    file, from_file = own.pop("config", None), {}
    if file is not None:
        file = _beside(path, str(file))
        from_file = read_config(file)
        if "concepts" in from_file:
            raise UserError(f"{path}: concepts.{name}: {file} has several; name one for each here")
        idle = [key for key, (_, field) in fields_of(TrainConfig).items() if FORCED.keys() & field.metadata["needs"]]
        from_file = {key: value for key, value in _with_files(file, from_file).items() if key not in idle}
    values = {"report_to": "none"} | from_file | settings_of_runs(path, "settings", shared) | own | FORCED
    if "learning_rate" in values:
        raise UserError(f"{path}: concepts.{name}: learning_rate: each method has its own, under methods or by rates")
    return values


def settings_of_method(path: str, label: str, values: Any) -> dict[str, Any]:
    """Settings of a method; without `method` or `peft_config` it is the one called like its label."""
    own = settings_of_runs(path, f"methods.{label}", {} if values is None else values)
    known = fields_of(TrainConfig)
    foreign = [name for name in own if name in known and name not in OF_METHODS]
    if foreign:
        raise UserError(f"{path}: methods.{label}: {', '.join(foreign)}: goes under settings, alike for all methods")
    if safe_name(label) == PRETRAINED:
        raise UserError(f"{path}: methods.{label}: is what the base's own row is called; choose another name")
    return own if "peft_config" in own else {"method": label} | own


def settings_of_runs(path: str, where: str, values: Any) -> dict[str, Any]:
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
    beside = config_file(path).parent / name
    return str(beside) if beside.is_file() else name


def _rates(path: str, entries: Mapping[str, Any] | None, concepts: Mapping[str, Any]) -> Rates | None:
    if entries is None:
        return None
    unknown = [name for name in entries if name not in ("factors", "concepts", "seeds", "prompts_file")]
    factors = entries.get("factors", [])
    problems = [f"rates: unknown key {name!r}" for name in unknown]
    if not isinstance(factors, list) or not all(_is_number(f) and f > 0 for f in factors):
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
    unknown = [name for name in plan.metrics if name not in MORE_GROUPS]
    problems += [f"metrics: {name!r}: of {', '.join(MORE_GROUPS)}, with commas between" for name in unknown]
    if not plan.networks:
        problems.append("networks: one or more are needed")
    if plan.rates is not None and not {"subject", "text"} <= {*plan.metrics}:
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
