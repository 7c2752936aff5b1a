"""Every test runs offline and on the CPU; the expensive objects are made once."""

import os

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TRANSFORMERS_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"

import copy

import pytest
import torch


@pytest.fixture(scope="session")
def pocket():
    """The pocket pipeline as packaged; tests that change it take `pipe`."""
    from sd_atoms.pipeline import open_base

    return open_base("pocket")


@pytest.fixture
def pipe(pocket):
    """A pocket pipeline of the test's own."""
    own = copy.copy(pocket)
    for name in ("unet", "vae", "text_encoder", "tokenizer", "scheduler"):
        own.register_modules(**{name: copy.deepcopy(getattr(pocket, name))})
    return own


@pytest.fixture
def unet_inputs():
    """A fixed batch for the pocket UNet: noisy latents, timesteps, text states."""
    generator = torch.Generator().manual_seed(0)
    latents, states = torch.randn(2, 4, 16, 16, generator=generator), torch.randn(2, 77, 128, generator=generator)
    return latents, torch.tensor([10, 700]), states


@pytest.fixture(autouse=True)
def forget_accelerate():
    """Accelerate keeps its state for the process; every test gets a new one."""
    yield
    from accelerate.state import AcceleratorState, GradientState, PartialState

    for state in (AcceleratorState, GradientState, PartialState):
        state._reset_state()
