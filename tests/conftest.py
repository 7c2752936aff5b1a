"""Every test runs offline and on the CPU; the expensive objects are made once."""

import copy
import os
from collections import Counter
from pathlib import Path

import pytest

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TRANSFORMERS_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"

# one core for each of several test processes: multi-threaded ones side by side would wait for each other
_worker = os.environ.get("PYTEST_XDIST_WORKER")
if _worker and hasattr(os, "sched_setaffinity"):
    _cores = sorted(os.sched_getaffinity(0))
    os.sched_setaffinity(0, {_cores[int(_worker.removeprefix("gw")) % len(_cores)]})

import torch  # noqa: E402 (it counts the cores when it is imported)

# a minute for all of them: the maths, files, settings and the registry, without a training
QUICK = (
    "atoms/", "data/", "evaluation/", "report/", "training/test_parts.py", "pocket/test_pocket_world.py",
    "pocket/test_pocket_files.py", "methods/test_registry.py", "methods/test_counts.py", "test_settings.py",
    "test_machine.py", "test_docs.py", "test_files.py",
    "test_progress.py",
)  # fmt: skip

# begun first, so that no process is left with one of them at the end
LONGEST = ("training/test_training.py", "commands/test_command_line.py", "methods/test_runs.py", "tuner/test_tuner.py")


def pytest_collection_modifyitems(items):
    here = Path(__file__).parent
    items.sort(key=lambda item: item.path.relative_to(here).as_posix() not in LONGEST)
    for item in items:
        if item.path.relative_to(here).as_posix().startswith(QUICK) and "slow" not in item.keywords:
            item.add_marker(pytest.mark.quick)


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
    latents, states = torch.randn(2, 8, 16, 16, generator=generator), torch.randn(2, 77, 128, generator=generator)
    return latents, torch.tensor([10, 700]), states


@pytest.fixture(autouse=True)
def forget_accelerate():
    """Accelerate keeps its state for the process; every test gets a new one."""
    yield
    from accelerate.state import AcceleratorState, GradientState, PartialState

    for state in (AcceleratorState, GradientState, PartialState):
        state._reset_state()


def pytest_terminal_summary(terminalreporter):
    """How many malformed inputs of each kind were tried, and how they ended."""
    reports = [r for found in terminalreporter.stats.values() for r in found if getattr(r, "when", "") == "call"]
    told = [value for report in reports for name, value in getattr(report, "user_properties", ()) if name == "fuzzed"]
    for kind, count in sorted(Counter(told).items()):
        terminalreporter.write_line(f"malformed {kind}: {count}")
