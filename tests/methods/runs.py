"""Runs of every method on a tiny base, in this process: what the tests of the door share."""

from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
from accelerate.state import AcceleratorState, GradientState, PartialState
from PIL import Image
from torch import nn

from sd_atoms.cli import main, train_main
from sd_atoms.commands import train as command
from sd_atoms.generation import Request, generate
from sd_atoms.methods import all_methods
from sd_atoms.pipeline import open_base
from sd_atoms.pipeline.sampling import Sampling
from sd_atoms.training import batch, diffusion

METHODS = list(all_methods())
PUT_IN = [name for name in METHODS if name != "token"]
# steps that show: the usual rates of a few steps change no pixel
RATE, RATES = 0.02, {"full": 1e-3}
WORDS = {
    "initializer_token": "castle", "placeholder_token": "<castle>", "instance_prompt": "photo of a <castle>",
    "train_batch_size": 1, "lr_warmup_steps": 0, "num_instance_images": 1, "num_inference_steps": 2,
    "report_to": "none", "max_train_steps": 4, "checkpointing_steps": 2, "token_learning_rate": 0.1,
}  # fmt: skip
PROMPT, PLAIN_PROMPT = "photo of a <castle>", "photo of a castle"
TEACHER = {"prior": "teacher", "class_prompt": "a castle at night"}


def words(place, method, out, **settings):
    """The flags of a run; None leaves one out."""
    values = {
        **WORDS, "pretrained_model_name_or_path": place / "tiny", "instance_data_dir": place / "photos",
        "method": method, "learning_rate": RATES.get(method, RATE), "output_dir": out, **settings,
    }  # fmt: skip
    flags = ["--train_token_embedding"]
    for name, value in values.items():
        flags += [f"--{name}"] if value is True else [f"--{name}", str(value)] if value is not None else []
    return flags


def command_line(*given):
    """`sd-atoms` with these words, as a new process would start it; returns the exit code."""
    for state in (AcceleratorState, GradientState, PartialState):
        state._reset_state()
    return main([str(word) for word in given])


@dataclass
class Run:
    """A finished run, and what its process had in memory.

    pipe: at the end of the training. before: its parameters at the start. outcome: what the training returned.
    teacher: (noisy, timestep, prediction, target) of every sample whose target was the teacher's.
    """

    folder: Path
    pipe: Any = None
    before: dict[str, torch.Tensor] = field(default_factory=dict)
    outcome: Any = None
    teacher: list = field(default_factory=list)

    @property
    def file(self):
        return self.folder / "castle.safetensors"

    def picture(self, name="instance-00"):
        return pixels(self.folder / "images" / f"{name}.png")


def run(place, method, out, **settings):
    """Trains, which has to succeed, and keeps what was in memory."""
    made = Run(out)
    original_train, original_losses, original_loss = command.train_diffusion, batch.sample_losses, batch.losses

    def train(config, pipe, *others):
        made.pipe, made.before = pipe, {name: value.detach().clone() for name, value in parameters(pipe).items()}
        made.outcome = original_train(config, pipe, *others)
        return made.outcome

    def losses_of(samples, *others):
        def loss(prediction, target, *more):
            for index, sample in enumerate(samples):
                if sample.target is None:
                    noisy = sample.noisy.unsqueeze(0), torch.tensor([sample.timestep])
                    made.teacher.append((*noisy, prediction[[index]].detach(), target[[index]]))
            return original_loss(prediction, target, *more)

        with mock.patch.object(batch, "losses", loss):
            return original_losses(samples, *others)

    with ExitStack() as stack:
        stack.enter_context(torch.enable_grad())  # a test that looks at a run may have switched it off
        stack.enter_context(mock.patch.object(command, "train_diffusion", train))
        stack.enter_context(mock.patch.object(diffusion, "sample_losses", losses_of))
        for state in (AcceleratorState, GradientState, PartialState):
            state._reset_state()
        assert train_main(words(place, method, out, **settings)) == 0
    return made


def parameters(pipe) -> dict[str, nn.Parameter]:
    """Everything a pipeline is made of, by part and name."""
    parts = {name: getattr(pipe, name) for name in ("unet", "text_encoder", "vae")}
    return {f"{part}.{name}": value for part, module in parts.items() for name, value in module.named_parameters()}


def without_wrappers(named):
    """Parameters by the names that they have without adapters around them."""
    return {name.replace(".base_layer", ""): value for name, value in named.items()}


def same(one, other):
    """Whether two states are equal bit for bit."""
    return one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)


def opened(place, **settings):
    return open_base(str(place / "tiny"), **settings)


def pixels(path):
    with Image.open(path) as image:
        return np.asarray(image.convert("RGB"))


def drawn(pipe, prompt=PROMPT, seed=0):
    """The picture that a run draws of a prompt."""
    return np.asarray(next(iter(generate(pipe, [Request(prompt, seed, "")], Sampling(7.5, 2, "ddim", None))))[1])


@torch.no_grad()
def predicted(unet, dtype=torch.float32):
    """What a UNet says to fixed inputs, in float32."""
    generator = torch.Generator().manual_seed(0)
    noisy, states = torch.randn(1, 4, 4, 4, generator=generator), torch.randn(1, 5, 16, generator=generator)
    return unet(noisy.to(dtype), torch.tensor([500]), states.to(dtype)).sample.float()
