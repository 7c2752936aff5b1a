"""Words with weights in prompts, by compel."""

import sys

import numpy as np
import pytest
import torch
from helpers import tiny_base

from sd_atoms.errors import UserError
from sd_atoms.generation import Conditions, Request, generate
from sd_atoms.generation.weights import plain_texts, weighted_states
from sd_atoms.pipeline import add_placeholder_tokens, open_base
from sd_atoms.pipeline.sampling import Sampling

PLAIN = "a <castle> by a lake"


@pytest.fixture(scope="module")
def base():
    pytest.importorskip("compel")
    pipe = open_base(tiny_base())
    row = torch.randn(pipe.text_encoder.config.hidden_size, generator=torch.Generator().manual_seed(0))
    add_placeholder_tokens(pipe, {"<castle>": row})
    return pipe


def drawn(pipe, prompts, weights=True, negative=None, batch_size=1):
    requests, conditions = [Request(p, 0, "") for p in prompts], Conditions(negative, prompt_weights=weights)
    return [np.asarray(image) for _, image in generate(pipe, requests, Sampling(4.0, 2), None, batch_size, conditions)]


def test_without_weights_it_is_the_prompt_and_with_them_another(base):
    plain, negative = drawn(base, [PLAIN], weights=False)[0], drawn(base, [PLAIN], weights=False, negative="snow")[0]
    assert np.array_equal(drawn(base, [PLAIN])[0], plain)
    assert np.array_equal(drawn(base, [PLAIN], negative="snow")[0], negative)
    pictures = [plain, *drawn(base, ["a (<castle>)1.5 by a lake", "a <castle> by a lake--"])]
    pictures += drawn(base, [PLAIN], negative="(snow)1.5")
    assert len({picture.tobytes() for picture in [*pictures, negative]}) == 5


def test_a_weight_is_the_word_s_own_whoever_stands_beside(base):
    prompts = ["a (<castle>)1.5 by a lake", "a lake", PLAIN]
    alone = torch.cat([weighted_states(base, [prompt], None)["prompt_embeds"] for prompt in prompts])
    assert torch.equal(weighted_states(base, prompts, None)["prompt_embeds"], alone)
    # states of tokens before the word do not see it, and it is one token: a, <castle>
    difference = (alone[0] - alone[2]).abs().amax(dim=1)
    assert difference[2] > 0.01


def test_what_is_read_is_the_text_without_weights(base):
    texts = plain_texts(base, ["A (<castle>)1.3 by a lake++", "Georgia O'Keeffe style castle.", ""])
    assert texts == ["A <castle> by a lake", "Georgia O'Keeffe style castle.", ""]


@pytest.mark.parametrize("prompt", ['("a", "b").and()', '("a", "b").blend(1, 2)', "a castle.swap(dog) by a lake"])
def test_more_than_weights_is_refused(base, prompt):
    with pytest.raises(UserError, match=r"weights are read, not \.and\(\)"):
        plain_texts(base, [prompt])


def test_without_the_package_one_line_says_how_to_get_it(base, monkeypatch):
    monkeypatch.setitem(sys.modules, "compel", None)
    with pytest.raises(UserError, match=r'needs the package compel: pip install "sd-atoms\[weights\]"'):
        plain_texts(base, [PLAIN])
