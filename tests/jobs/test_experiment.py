"""The file of an experiment: which runs it means, and everything that can be wrong with it."""

from pathlib import Path

import pytest
import yaml

from sd_atoms.errors import UserError
from sd_atoms.jobs.experiment import read_plan
from sd_atoms.jobs.plan import chosen_rate

IA3 = str(Path(__file__).parents[2] / "configs" / "compare" / "peft" / "ia3.json")
ENTRIES = {
    "output_dir": "out",
    "settings": {"pretrained_model_name_or_path": "pocket", "max_train_steps": 7},
    "concepts": {"castle": {"config": "pocket/castle"}, "canal": {"config": "pocket/canal", "max_train_steps": 9}},
    "methods": {"atoms": None, "atoms (9, 4)": {"method": "atoms", "m1": 4}, "lora": {"rank": 8}},
    "seeds": "0-1",
    "networks": ["pocket:clip"],
}


def plan_of(tmp_path, flags=(), **changes):
    entries = {name: value for name, value in {**ENTRIES, **changes}.items() if value != "left out"}
    (tmp_path / "e.yaml").write_text(yaml.safe_dump(entries, sort_keys=False))
    return read_plan(str(tmp_path / "e.yaml"), dict(flags))


@pytest.mark.parametrize("name", ["pocket", "pocket_budgets", "pocket_masks", "pocket_quick", "sd14_castle"])
def test_the_packaged_experiments_mean_runs(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # by short name, from anywhere
    assert {run.stage for run in read_plan(f"compare/{name}", {}).runs} >= {"pretrained", "scored"}


def test_every_method_is_trained_on_every_concept_with_every_seed(tmp_path):
    plan = plan_of(tmp_path)
    assert [run.name for run in plan.runs][:2] == ["castle/pretrained", "canal/pretrained"]
    scored = [run for run in plan.runs if run.stage == "scored"]
    assert [run.name for run in scored if run.concept == "castle"] == [
        f"castle/{method}/seed-{seed}" for method in ("atoms", "atoms_9_4", "lora") for seed in (0, 1)
    ]
    assert len(scored) == 12
    config = plan.config(plan.named("castle/atoms_9_4/seed-1"))
    assert (config.method.method, config.method.m1, config.loop.seed) == ("atoms", 4, 1)
    assert config.output.output_dir == "out/runs/castle/atoms_9_4/seed-1"
    assert config.images.prompts_file is None  # the experiment draws
    assert plan.against == "lora"


def test_a_concepts_own_settings_win_over_those_of_all_and_these_over_its_file(tmp_path):
    plan = plan_of(tmp_path)
    steps = [plan.config(plan.named(f"{name}/lora/seed-0")).loop.max_train_steps for name in ("castle", "canal")]
    assert steps == [7, 9]
    assert plan.config(plan.named("castle/lora/seed-0")).data.instance_data_dir == "pocket:castle"
    assert plan.config(plan.named("castle/lora/seed-0")).method.rank == 8


def test_rates_are_tried_on_other_seeds_and_prompts_and_the_best_is_taken(tmp_path):
    plan = plan_of(
        tmp_path,
        rates={"factors": [0.5, 1], "seeds": [100, 101]},
        methods={"atoms": None, "lora": {"learning_rate": 1e-3}},
    )
    tried = [run for run in plan.runs if run.stage == "rate"]
    assert [run.name for run in tried] == [
        f"rates/castle/atoms/{rate}/seed-{seed}" for rate in ("0.005", "0.01") for seed in (100, 101)
    ]
    assert not set(plan.tuning) & set(plan.prompts)
    run = plan.named("canal/atoms/seed-0")
    assert (run.needs, run.rate_runs) == (("canal/pretrained",), tuple(other.name for other in tried))
    assert plan.named("canal/lora/seed-0").rate_runs == ()
    scores = dict(zip((other.name for other in tried), (0.5, 0.1, 0.2, 0.3), strict=True))
    assert chosen_rate(plan, run, lambda other: scores[other.name]) == 0.005
    assert plan.config(run, 0.005).optimiser.learning_rate == 0.005
    scores["rates/castle/atoms/0.005/seed-101"] = None  # one that failed is not the mean of what is left
    assert chosen_rate(plan, run, lambda other: scores[other.name]) == 0.01
    with pytest.raises(UserError, match="has a score to choose by"):
        chosen_rate(plan, run, lambda other: None)
    assert chosen_rate(plan, plan.named("canal/lora/seed-0"), lambda other: None) is None


def test_a_method_brings_rates_of_its_own_to_try(tmp_path):
    (tmp_path / "ia3.json").write_text('{"peft_type": "IA3", "target_modules": ["to_k", "to_v"]}')
    ia3 = {"peft_config": "ia3.json", "learning_rate": ["1e-3", 0.02]}
    plan = plan_of(tmp_path, rates={"factors": [1, 2]}, methods={"lora": None, "ia3": ia3})
    tried = [run for run in plan.runs if run.stage == "rate" and run.method == "ia3"]
    assert [run.name for run in tried] == [f"rates/castle/ia3/{rate}/seed-100" for rate in ("0.001", "0.02")]
    run = plan.named("canal/ia3/seed-0")
    assert run.rate_runs == tuple(other.name for other in tried)
    assert chosen_rate(plan, run, lambda other: other.values["learning_rate"]) == 0.02
    assert plan.config(run, 0.02).optimiser.learning_rate == 0.02
    listed = plan_of(tmp_path, rates={"seeds": 7}, methods={"ia3": ia3})  # nothing is left for factors to multiply
    assert [run.name for run in listed.runs if run.stage == "rate"] == [
        "rates/castle/ia3/0.001/seed-7", "rates/castle/ia3/0.02/seed-7"
    ]  # fmt: skip


def test_a_flag_wins_over_the_file(tmp_path):
    plan = plan_of(tmp_path, {"seeds": "5", "output_dir": "there"})
    assert {run.seed for run in plan.runs if run.stage == "scored"} == {5}
    assert str(plan.folder) == "there"


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"concepts": "left out"}, "concepts is required"),
        ({"methods": {}}, "concepts and methods: one or more are needed"),
        ({"methods": ["lora"]}, "methods: `name: value` lines are needed"),
        ({"networks": "left out"}, "networks is required"),
        ({"colour": "red"}, "unknown key 'colour'"),
        ({"settings": {"output_dir": "x"}}, "settings: output_dir: the experiment decides it"),
        ({"methods": {"lora": {"seed": 3}}}, "methods.lora: seed: the experiment decides it"),
        ({"methods": {"lora": {"m1": 3}}}, "m1"),
        ({"methods": {"nonsense": None}}, "nonsense"),
        ({"methods": {"lora": {"rnak": 3}}}, "did you mean rank"),
        ({"methods": {"lora": None, "LoRA": {"method": "lora"}}}, "two runs would have this folder"),
        ({"methods": {"lora": {"max_train_steps": 3}}}, "methods.lora: max_train_steps: goes under settings"),
        ({"methods": {"Pretrained": None, "..": {"method": "lora"}}}, "'Pretrained'"),
        ({"methods": {"pretrained": {"method": "lora"}}}, "methods.pretrained: is what the base's own row is called"),
        ({"settings": {"learning_rate": 0.1}}, "learning_rate: each method has its own"),
        ({"networks": []}, "networks: one or more are needed"),
        ({"rates": {"factors": [1]}, "metrics": "subject"}, "metrics: rates are chosen by subject and text"),
        ({"fidelity": "openai/clip"}, "fidelity: 'openai/clip' is not among networks: pocket:clip"),
        ({"against": "dora"}, "against: 'dora' is not among methods: atoms, atoms"),
        ({"scales": "a"}, "scales: 'a': numbers with commas between are needed"),
        ({"scales": [99]}, "scales: 99 is out of range"),
        ({"shown_prompts": [99]}, "shown_prompts: 99: 0 to 19 is allowed"),
        (
            {"methods": {"lora": {"learning_rate": [0.1]}}},
            "lora: learning_rate: a number, or with rates a list",
        ),
        (
            {"rates": {"factors": [1]}, "methods": {"lora": {"learning_rate": ["a"]}}},
            "lora: learning_rate: a number, or",
        ),
        ({"rates": {"factors": [1]}, "methods": {"lora": {"rankk": 4}}}, "unknown key 'rankk' (did you mean rank"),
        ({"rates": {"factors": [1]}, "methods": {"ia4": None}}, "method='ia4': one of atoms, "),
        (
            {"rates": {"factors": [1]}, "methods": {"ia3": {"peft_config": IA3}}},
            "methods.ia3: has no usual rate to multiply; give its learning_rate, or a list of them to try",
        ),
        (
            {"rates": {"factors": [1]}, "concepts": {"castle": {"config": "pocket/castle", "instance_prompt": "a"}}},
            "castle/pretrained: instance_prompt: 'a' lacks the placeholder <castle>",
        ),
        ({"rates": {"factors": 3}}, "rates: factors: a list of numbers above 0 is needed, got 3"),
        ({"rates": {"seeds": 100}}, "methods.atoms: has no learning_rate; give one, a list of them to try, or"),
        ({"rates": {"factors": [1], "speed": 1}}, "rates: unknown key 'speed'"),
        ({"rates": {"factors": [1], "concepts": ["dog"]}}, "rates: concepts: of castle, canal"),
        ({"rates": {"factors": [1], "seeds": [1]}}, "rates: seeds: 1 are scored too"),
        ({"rates": {"factors": [1], "prompts_file": "few_shot"}}, "is scored too; take others"),
    ],
)
def test_what_is_wrong_is_one_line_that_names_it(tmp_path, changes, problem):
    with pytest.raises(UserError) as caught:
        plan_of(tmp_path, **changes)
    assert problem in str(caught.value)
    assert str(caught.value).startswith(str(tmp_path / "e.yaml"))
    assert "\n" not in str(caught.value)
