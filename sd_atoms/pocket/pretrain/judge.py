"""Stage "judge": a network that tells whether two pictures show one landmark, whatever surrounds it.

It knows no captions, unlike the CLIP of the pocket base, and so takes no part in what that one rewards.
"""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from accelerate import PartialState
from transformers import CLIPModel, ResNetConfig, ResNetModel

from sd_atoms.pocket.pretrain.clip import normalise_pixels, pooled_images, unit
from sd_atoms.pocket.pretrain.loop import TrainingRun, batch_per_process, mixed_precision
from sd_atoms.pocket.pretrain.stages import JudgeSettings
from sd_atoms.pocket.pretrain.views import class_members, landmark_views, load_views, prepare_views, take_views
from sd_atoms.pocket.world import LANDMARKS, PICTURE_PX

ANY_CLASS = "any"
Encoder = Callable[[torch.Tensor], torch.Tensor]  # (n, 3, 128, 128) uint8 -> (n, d)


def run(work_dir: Path, settings: JudgeSettings, state: PartialState) -> dict:
    """Renders the views, trains and writes `work_dir`/judge, a ResNetModel folder."""
    prepare_views(work_dir, settings, state)
    shards, members = load_views(work_dir, settings), class_members(settings)
    torch.manual_seed(settings.seed)  # the same start in every process
    judge = build_judge(settings).to(state.device)
    optimizer = torch.optim.AdamW(
        judge.parameters(), lr=settings.learning_rate, betas=settings.betas, weight_decay=settings.weight_decay
    )
    training = TrainingRun(work_dir / "judge", settings, state, {"model": judge}, optimizer)
    batch_size = batch_per_process(settings.batch_size, state)
    for _ in training:
        rng, noise = training.random_numbers()
        views = take_views(shards, draw_landmarks(members, batch_size, rng), settings.views_per_landmark, rng)
        pixels = soften(views.flatten(0, 1), settings, rng, noise)
        with mixed_precision(state.device):
            features = pooled(judge, pixels).unflatten(0, views.shape[:2])  # (landmarks, views, d)
        loss = contrastive_loss(features, settings.temperature)
        training.update(loss, right_view=right_view_rate(features[:, 0].detach(), features[:, 1].detach()))
    if not state.is_main_process:
        return {}
    judge.eval().save_pretrained(work_dir / "judge")
    clip = CLIPModel.from_pretrained(work_dir / "clip").eval().to(state.device)

    def clip_features(pixels: torch.Tensor) -> torch.Tensor:
        return clip.visual_projection(pooled_images(clip, normalise_pixels(pixels)))

    held_out = held_out_views(settings)
    return {
        "steps": training.step,
        "seconds": round(training.used_seconds),
        "epochs": round(training.step * settings.batch_size / settings.landmark_count, 2),
        "judge": evaluate(lambda pixels: pooled(judge, normalise_pixels(pixels)), held_out),
        "clip": evaluate(clip_features, held_out),
    }


def build_judge(settings: JudgeSettings) -> ResNetModel:
    """A small ResNet. Its batch norms matter: a ConvNeXt, without any, gives every picture the same features from the
    first steps on, at temperatures of 0.1 to 1.
    """
    widths, depths = list(settings.widths), list(settings.depths)
    return ResNetModel(ResNetConfig(embedding_size=widths[0], hidden_sizes=widths, depths=depths, layer_type="basic"))


def pooled(judge: ResNetModel, pixels: torch.Tensor) -> torch.Tensor:
    """(n, d) features of normalised pixels: the mean over the picture, which are never negative."""
    return judge(pixel_values=pixels.to(judge.device)).pooler_output.flatten(1)


def draw_landmarks(members: list[np.ndarray], count: int, rng: np.random.Generator) -> np.ndarray:
    """Numbers of `count` different landmarks, or of fewer where there are no more: half of one class and half of
    another, so that half of the negatives are of the same class. Classes come up by how many landmarks they have.
    """
    sizes = np.array([len(numbers) for numbers in members])
    chosen = rng.choice(len(members), 2, replace=False, p=sizes / sizes.sum())
    return np.concatenate([rng.permutation(members[index])[: max(1, count // 2)] for index in chosen])


def soften(
    pixels: torch.Tensor, settings: JudgeSettings, rng: np.random.Generator, noise: torch.Generator
) -> torch.Tensor:
    """uint8 -> normalised as CLIP's; half of the pictures shrunk and enlarged again, noise on all.

    Pictures of a diffusion model are softer than those of the renderer.
    """
    pixels = pixels.float()
    soft = rng.permutation(len(pixels))[: len(pixels) // 2]
    side = int(rng.integers(settings.smallest_soft_px, PICTURE_PX))
    small = F.interpolate(pixels[soft], size=side, mode="bilinear", antialias=True)
    pixels[soft] = F.interpolate(small, size=PICTURE_PX, mode="bilinear")
    return normalise_pixels(pixels + 255 * settings.noise_deviation * torch.randn(pixels.shape, generator=noise))


def contrastive_loss(features: torch.Tensor, temperature: float) -> torch.Tensor:
    """Supervised contrastive loss (arXiv 2004.11362, its L_out): each view finds the other views of its landmark among
    all views but itself.

    Args:
        features: (landmarks, views, d).
        temperature: divides the cosines.
    """
    landmarks, views, _ = features.shape
    vectors = unit(features.flatten(0, 1))
    itself = torch.eye(len(vectors), dtype=torch.bool, device=vectors.device)
    logits = (vectors @ vectors.T / temperature).masked_fill(itself, -torch.inf)  # (n, n)
    own = torch.arange(landmarks, device=vectors.device).repeat_interleave(views)
    positive = (own[:, None] == own) & ~itself
    return -logits.log_softmax(1)[positive].mean()


def right_view_rate(first: torch.Tensor, second: torch.Tensor) -> float:
    """Share of 2n views that are nearest by cosine to their own landmark among the n other views, in both directions.

    Args:
        first: (n, d), one view of each landmark.
        second: (n, d), another view of each.
    """
    similarities = unit(first) @ unit(second).T
    own = torch.arange(len(first), device=first.device)
    right = [(similarities.argmax(side) == own).float().mean() for side in (0, 1)]
    return float(sum(right) / 2)


def held_out_views(settings: JudgeSettings) -> list[tuple[str, torch.Tensor]]:
    """Groups of landmarks that training never shows: ANY_CLASS or their class, (n, 2, 3, 128, 128) uint8."""
    groups, seed = [], settings.first_held_out_seed
    sizes = {ANY_CLASS: settings.held_out_landmarks, **dict.fromkeys(LANDMARKS, settings.held_out_of_class)}
    for kind, size in sizes.items():
        for _ in range(settings.held_out_groups):
            name = None if kind == ANY_CLASS else kind
            views = np.stack([landmark_views(one, 2, name) for one in range(seed, seed + size)])
            groups.append((kind, torch.from_numpy(views).permute(0, 1, 4, 2, 3)))
            seed += size
    return groups


@torch.no_grad()
def evaluate(encode: Encoder, groups: list[tuple[str, torch.Tensor]]) -> dict[str, float | dict[str, float]]:
    """How often the other view of a landmark is found in its group: of any class, of its own, and class by class.

    The mean over the classes weighs them alike; some hold landmarks that hardly differ, so that 1 is out of reach.
    """
    rates, sizes = {}, {}
    for kind, views in groups:
        rates.setdefault(kind, []).append(right_view_rate(encode(views[:, 0]), encode(views[:, 1])))
        sizes[kind] = len(views)
    means = {kind: float(np.mean(found)) for kind, found in rates.items()}
    of_any, size = means.pop(ANY_CLASS), max(sizes[name] for name in means)
    return {
        f"right_view_of_{sizes[ANY_CLASS]}": round(of_any, 3),
        f"right_view_of_{size}_of_one_class": round(float(np.mean(list(means.values()))), 3),
        "by_class": {name: round(rate, 3) for name, rate in means.items()},
    }
