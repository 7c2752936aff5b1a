"""What the training loops share: progress, learning rate, averaged gradients, log and checkpoints."""

import json
import math
import time
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

import numpy as np
import torch
from accelerate import PartialState
from accelerate.utils import broadcast, reduce
from diffusers.models.attention_processor import AttnProcessor
from tqdm import tqdm

from sd_atoms.pocket.pretrain.checkpoint import load_checkpoint, save_checkpoint
from sd_atoms.pocket.pretrain.stages import TrainingSettings

CHECKPOINT_NAME = "checkpoint.safetensors"


class TrainingRun:
    """One training stage in progress; iterating over it yields the step numbers, from the stored step to the end.

        for step in run:
            loss = ...
            run.update(loss, l1=...)

    A checkpoint is written every `settings.checkpoint_every_seconds` and at the end, by the main process alone.

    Args:
        folder: gets checkpoint.safetensors and log.jsonl.
        modules: everything that a checkpoint must hold; the gradients of "model" are clipped.
        optimizer: over what is trained.
        first_step: the number of steps that the modules have behind them at the start.
    """

    def __init__(
        self,
        folder: Path,
        settings: TrainingSettings,
        state: PartialState,
        modules: Mapping[str, torch.nn.Module],
        optimizer: torch.optim.Optimizer,
        first_step: int = 0,
    ):
        self.folder = folder
        self.settings = settings
        self.state = state
        self.modules = modules
        self.optimizer = optimizer
        self.step = first_step
        self.used_seconds = 0.0  # training time over all resumes
        self.progress = 0.0  # in [0, 1]
        self._measured: list[dict[str, float]] = []
        folder.mkdir(parents=True, exist_ok=True)
        if (folder / CHECKPOINT_NAME).exists():
            scalars = load_checkpoint(folder / CHECKPOINT_NAME, modules, optimizer)
            self.step, self.used_seconds = scalars["step"], scalars["used_seconds"]
            state.print(f"{folder.name}: goes on at step {self.step}")

    def __iter__(self) -> Iterator[int]:
        last_tick = last_save = time.monotonic()
        with self._progress_bar() as bar:
            while True:
                now = time.monotonic()
                self.used_seconds = self._agreed(self.used_seconds + now - last_tick)
                last_tick = now
                self.progress = self._progress()
                done = self.step if self.settings.max_steps is not None else int(self.used_seconds)
                bar.update(min(done, bar.total) - bar.n)
                if self.progress >= 1:
                    break
                rate = learning_rate(self.progress, self.settings)
                for group in self.optimizer.param_groups:
                    group["lr"] = rate
                yield self.step
                self.step += 1
                if self.step % self.settings.log_every_steps == 0:
                    self._log(rate, bar)
                if time.monotonic() - last_save >= self.settings.checkpoint_every_seconds:
                    self.save()
                    last_save = time.monotonic()
        self.save()

    def update(self, loss: torch.Tensor, **measured: float) -> None:
        """One optimiser step on a loss; `measured` goes to the log, averaged between its lines."""
        self.optimizer.zero_grad()
        loss.backward()
        average_gradients(parameter for group in self.optimizer.param_groups for parameter in group["params"])
        torch.nn.utils.clip_grad_norm_(self.modules["model"].parameters(), self.settings.largest_gradient_norm)
        self.optimizer.step()
        self._measured.append({"loss": float(loss.detach()), **measured})

    def random_numbers(self) -> tuple[np.random.Generator, torch.Generator]:
        """Generators for this step and process alone, so that a resumed run draws what an unbroken one would."""
        generator = np.random.default_rng((self.settings.seed, self.step, self.state.process_index))
        return generator, torch.Generator().manual_seed(int(generator.integers(1 << 62)))

    def save(self) -> None:
        if self.state.is_main_process:
            scalars = {"step": self.step, "used_seconds": self.used_seconds}
            save_checkpoint(self.folder / CHECKPOINT_NAME, self.modules, self.optimizer, scalars)

    def _progress(self) -> float:
        if self.settings.max_steps is not None:
            return self.step / self.settings.max_steps
        return self.used_seconds / self.settings.budget_seconds

    def _agreed(self, seconds: float) -> float:
        """The main process's seconds, so that all processes stop at the same step."""
        if self.state.num_processes == 1 or self.settings.max_steps is not None:
            return seconds
        return broadcast(torch.tensor([seconds], dtype=torch.float64, device=self.state.device)).item()

    def _progress_bar(self) -> tqdm:
        disable = None if self.state.is_main_process else True
        if self.settings.max_steps is not None:
            return tqdm(desc=self.folder.name, total=self.settings.max_steps, unit="step", disable=disable)
        return tqdm(desc=self.folder.name, total=int(self.settings.budget_seconds), unit="s", disable=disable)

    def _log(self, rate: float, bar: tqdm) -> None:
        means = {key: float(np.mean([values[key] for values in self._measured])) for key in self._measured[0]}
        self._measured.clear()
        bar.set_postfix(step=self.step, loss=f"{means['loss']:.4f}")
        line = {"step": self.step, "progress": round(self.progress, 4), "learning_rate": rate, **means}
        if self.state.is_main_process:
            with open(self.folder / "log.jsonl", "a", encoding="utf-8") as file:
                file.write(json.dumps(line) + "\n")


def learning_rate(progress: float, settings: TrainingSettings) -> float:
    """A linear rise over the warm-up, the peak, and a cosine down to (almost) nothing over the decay's share."""
    risen = min(1, progress / settings.warm_up_share)
    fallen = max(0, 1 - (1 - progress) / settings.decay_share)  # [0, 1]
    return settings.learning_rate * risen * (0.5 + 0.5 * math.cos(math.pi * fallen)) + 1e-7


def average_gradients(parameters: Iterable[torch.nn.Parameter]) -> None:
    """Replaces each gradient by its mean over the processes, in one message."""
    if PartialState().num_processes == 1:
        return
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    means = reduce(torch.cat([gradient.reshape(-1) for gradient in gradients]), "mean")
    for gradient, mean in zip(gradients, means.split([gradient.numel() for gradient in gradients]), strict=True):
        gradient.copy_(mean.view_as(gradient))


def batch_per_process(batch_size: int, state: PartialState) -> int:
    """This process's share of a batch, at least 1."""
    return max(1, batch_size // state.num_processes)


def mixed_precision(device: torch.device) -> torch.autocast:
    """Matrix products in bfloat16, weights and losses in float32.

    Without effect on processors that lack the instructions: there bfloat16 is many times slower than float32.
    """
    pays = device.type != "cpu" or torch.backends.cpu.get_cpu_capability() == "AVX512"
    return torch.autocast(device.type, dtype=torch.bfloat16, enabled=pays)


def attend_plainly(model: torch.nn.Module, device: torch.device) -> None:
    """Attention by two matrix products, where training under `mixed_precision` on a CPU is faster so.

    At the sizes of the pocket base the backward pass of scaled_dot_product_attention takes 65 % of a step in bfloat16
    on such processors. Changes neither parameters nor, within rounding, results.
    """
    if device.type == "cpu":
        model.set_attn_processor(AttnProcessor())
