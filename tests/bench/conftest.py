"""Benchmarks by their command lines, on a tiny UNet."""

import pytest
import torch
from tiny_unet import TINY

from sd_atoms.bench import decompose, forms, serve, step
from sd_atoms.cli import main


@pytest.fixture
def bench(monkeypatch, capsys):
    """Runs a bench command line on a tiny UNet and returns what it printed."""
    for module in (step, serve, decompose, forms):
        monkeypatch.setattr(module, "unet_config", lambda arch: TINY)

    def run(*words):
        assert main(["bench", *words, "--threads", "1"]) == 0
        return capsys.readouterr().out

    threads = torch.get_num_threads()
    yield run
    torch.set_num_threads(threads)
