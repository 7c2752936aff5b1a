"""Numbers that every method trains on Stable Diffusion v1-4's UNet, which needs no weights for that."""

import time

import pytest

from sd_atoms.errors import UserError
from sd_atoms.methods import all_methods, find_budget, get_method
from sd_atoms.pipeline.architectures import build_unet, unet_config

PINNED = [
    ("atoms", {}, None, 4_212),
    ("atoms", {"m": 6}, None, 2_808),
    ("atoms", {"m1": 4}, None, 2_021_472),
    ("atoms", {"m1": 4, "train_beta": False}, None, 16_848),
    ("atoms", {"m": 0, "kc": 4, "block_layers": "all"}, None, 1_078_272),
    ("lora", {}, None, 797_184),
    ("lora", {"rank": 1}, None, 199_296),
    ("locon", {}, None, 2_188_960),
    ("lora-conv", {}, None, 3_663_648),
    ("loha", {}, None, 4_377_920),
    ("lokr", {}, None, 111_880),
    ("lokr", {"factor": 8}, None, 276_912),
    ("loha", {}, "attn", 1_594_368),
    ("oft", {}, None, 1_541_568),
    ("lycoris-locon", {}, None, 2_188_960),
    ("lycoris-loha", {}, None, 4_377_920),
    ("lycoris-lokr", {}, None, 111_880),
    ("lycoris-lokr", {"factor": 8}, None, 276_912),
    ("difffit", {}, None, 581_124),
    ("bitfit", {}, None, 343_684),
    ("norm", {}, None, 200_320),
    ("full", {}, None, 859_520_964),
    ("token", {}, None, 0),
]
BUDGETS = [
    ("atoms", 60_000, {"m": 0, "kc": 2, "m_c": 8, "block_layers": "all"}, 59_904),
    ("lora", 1_000_000, {"rank": 5}, 996_480),
    ("lokr", 100_000, {"rank": 3}, 93_308),
    ("oft", 1_000_000, {"block_size": 16}, 745_920),
    ("bitfit", 400_000, {}, 343_684),
]
REFUSED_BUDGETS = [
    ("lora", 4_000, "method lora comes no nearer than 199296 (rank=1)"),
    ("full", 1_000_000, "method full comes no nearer than 859520964 (its only size)"),
    ("token", 1_000, "method token comes no nearer than 0 (its only size)"),
    ("lokr", 10**8, "method lokr comes no nearer than"),
]


@pytest.fixture(scope="module")
def sd():
    return build_unet(unet_config("sd-v1-4"), "meta")


@pytest.mark.parametrize(("name", "settings", "target", "count"), PINNED)
def test_counts_on_sd_v1_4(name, settings, target, count, sd):
    method = get_method(name)
    assert method.count(sd, method.make_config(sd, settings, target)) == count


def test_every_method_is_pinned():
    assert {name for name, *_ in PINNED} == set(all_methods())


def test_counting_is_quick(sd):
    start = time.process_time()
    method = get_method("full")
    method.count(sd, method.make_config(sd))
    assert time.process_time() - start < 3


@pytest.mark.parametrize(("name", "budget", "settings", "count"), BUDGETS)
def test_a_budget_leads_to_the_nearest_size(name, budget, settings, count, sd):
    method = get_method(name)
    found = find_budget(method, sd, budget)
    assert found == (settings, count)
    assert method.count(sd, method.make_config(sd, found.settings)) == count


@pytest.mark.parametrize(("name", "budget", "message"), REFUSED_BUDGETS)
def test_budgets_that_no_size_comes_near_are_refused(name, budget, message, sd):
    with pytest.raises(UserError) as error:
        find_budget(get_method(name), sd, budget)
    assert message in str(error.value)


def test_a_budget_leaves_other_settings_and_the_target_alone(sd):
    found = find_budget(get_method("lokr"), sd, 300_000, {"factor": 8, "alpha": 2}, "conv3x3")
    assert found.settings == {"rank": 4, "factor": 8, "alpha": 2}
    assert found.count == 276_912
    with pytest.raises(UserError, match="rank: is what budget=300000 chooses"):
        find_budget(get_method("lora"), sd, 300_000, {"rank": 8})


@pytest.mark.parametrize("budget", [0, -5, 1.5, True, "4k"])
def test_a_budget_is_a_number_of_numbers(budget, sd):
    with pytest.raises(UserError, match=r"budget=.*: an integer from 1 on is allowed"):
        find_budget(get_method("lora"), sd, budget)
