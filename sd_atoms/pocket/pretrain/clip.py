"""Stage "clip": contrastive training of a small CLIP on pictures and captions that are re-phrased every time."""

import random
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from accelerate import PartialState
from transformers import CLIPConfig, CLIPModel, CLIPTokenizer

from sd_atoms.pocket.pretrain.images import Pictures
from sd_atoms.pocket.pretrain.loop import TrainingRun, batch_per_process, mixed_precision
from sd_atoms.pocket.pretrain.stages import ClipSettings
from sd_atoms.pocket.world import LANDMARKS, PICTURE_PX, Scene, caption
from sd_atoms.pocket.world.companions import COMPANIONS
from sd_atoms.pocket.world.pen import COLOURS
from sd_atoms.pocket.world.scenes import SETTINGS, SPECIALS

PIXEL_MEAN = torch.tensor([0.48145466, 0.4578275, 0.40821073]).view(1, 3, 1, 1)  # CLIP's
PIXEL_STD = torch.tensor([0.26862954, 0.26130258, 0.27577711]).view(1, 3, 1, 1)
LARGEST_LOGIT_SCALE = 100  # as in CLIP

ATTRIBUTES = {
    "landmark": tuple(LANDMARKS),
    "setting": SETTINGS,
    "special": SPECIALS,
    "companion": (None, *COMPANIONS),
    "colour": tuple(COLOURS),
}


def run(work_dir: Path, settings: ClipSettings, state: PartialState) -> dict:
    """Trains and writes `work_dir`/clip, a CLIPModel folder."""
    tokenizer = CLIPTokenizer.from_pretrained(work_dir / "tokenizer")
    pictures, held_out = Pictures(work_dir, "train"), Pictures(work_dir, "held")
    labels = attribute_labels(pictures.scenes)
    torch.manual_seed(settings.seed)  # the same start in every process
    clip = build_clip(settings, tokenizer).to(state.device)
    heads = build_attribute_heads(settings).to(state.device)
    matrices = [parameter for parameter in clip.parameters() if parameter.ndim > 1]
    others = [parameter for parameter in clip.parameters() if parameter.ndim < 2]
    groups = [
        {"params": matrices, "weight_decay": settings.weight_decay},
        {"params": [*others, *heads.parameters()], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=settings.learning_rate, betas=settings.betas)
    training = TrainingRun(work_dir / "clip", settings, state, {"model": clip, "heads": heads}, optimizer)
    batch_size = batch_per_process(settings.batch_size, state)
    for step in training:
        rng, _ = training.random_numbers()
        phrasing = random.Random(int(rng.integers(1 << 62)))
        indices = rng.integers(0, len(pictures), batch_size)
        pixels = normalise_pixels(pictures.batch(indices))
        if rng.random() < 0.5:
            pixels = pixels.flip(-1)
        captions = [caption(pictures.scenes[index], phrasing) for index in indices]
        with mixed_precision(state.device):
            image_features = pooled_images(clip, pixels)
            text_features = pooled_texts(clip, tokenizer, captions)
            images = clip.visual_projection(image_features)
            texts = clip.text_projection(text_features)
            attribute_loss = name_attributes(heads["image"], image_features, labels[indices])
            named_by_text = name_attributes(heads["text"], text_features, labels[indices])
        attribute_loss = attribute_loss + settings.text_attribute_weight * named_by_text
        scale = clip.logit_scale.exp().clamp(max=LARGEST_LOGIT_SCALE)
        logits = scale * unit(images) @ unit(texts).T  # (n pictures, n captions)
        own = torch.arange(batch_size, device=logits.device)
        contrastive = (F.cross_entropy(logits, own) + F.cross_entropy(logits.T, own)) / 2
        training.update(
            contrastive + attribute_loss,
            contrastive=contrastive.item(),
            attributes=attribute_loss.item(),
            logit_scale=scale.item(),
        )
        if (step + 1) % settings.evaluate_every_steps == 0 and state.is_main_process:
            print(f"clip: step {step + 1} {evaluate(clip, tokenizer, held_out)}", flush=True)
    if not state.is_main_process:
        return {}
    clip.save_pretrained(work_dir / "clip")
    seconds = round(training.used_seconds)
    return {"steps": training.step, "seconds": seconds, **evaluate(clip, tokenizer, held_out)}


def build_clip(settings: ClipSettings, tokenizer: CLIPTokenizer) -> CLIPModel:
    tower = {
        "hidden_size": settings.width,
        "intermediate_size": 4 * settings.width,
        "num_hidden_layers": settings.layers,
        "num_attention_heads": settings.heads,
        "projection_dim": settings.width,
    }
    text = {
        **tower,
        "vocab_size": len(tokenizer),
        "max_position_embeddings": tokenizer.model_max_length,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    vision = {**tower, "image_size": PICTURE_PX, "patch_size": settings.patch_px}
    return CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=settings.width))


def build_attribute_heads(settings: ClipSettings) -> torch.nn.ModuleDict:
    """Linear maps that name a scene's attributes from either tower; they speed up the start and are thrown away."""
    outputs = sum(len(values) for values in ATTRIBUTES.values())
    return torch.nn.ModuleDict({tower: torch.nn.Linear(settings.width, outputs) for tower in ("image", "text")})


def attribute_labels(scenes: list[Scene]) -> torch.Tensor:
    """(n, attributes) int64: the position of each scene's attributes among their possible values."""
    return torch.tensor(
        [[values.index(getattr(scene, name)) for name, values in ATTRIBUTES.items()] for scene in scenes]
    )


def name_attributes(head: torch.nn.Linear, features: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Mean cross entropy over the attributes."""
    labels = labels.to(features.device)
    logits = head(features).split([len(values) for values in ATTRIBUTES.values()], dim=1)
    losses = [F.cross_entropy(part.float(), labels[:, index]) for index, part in enumerate(logits)]
    return sum(losses) / len(losses)


def normalise_pixels(pixels: torch.Tensor) -> torch.Tensor:
    """uint8 in [0, 255] -> float32 with CLIP's mean and deviation taken out."""
    return (pixels.float() / 255 - PIXEL_MEAN) / PIXEL_STD


def pooled_images(clip: CLIPModel, pixels: torch.Tensor) -> torch.Tensor:
    return clip.vision_model(pixel_values=pixels.to(clip.device)).pooler_output


def pooled_texts(clip: CLIPModel, tokenizer: CLIPTokenizer, texts: list[str]) -> torch.Tensor:
    return clip.text_model(**tokenizer(texts, padding=True, return_tensors="pt").to(clip.device)).pooler_output


def unit(vectors: torch.Tensor) -> torch.Tensor:
    return F.normalize(vectors.float(), dim=-1)


@torch.no_grad()
def evaluate(clip: CLIPModel, tokenizer: CLIPTokenizer, held_out: Pictures) -> dict[str, float]:
    """Retrieval among the captions of held-out pictures, and the landmark by its name alone.

    Captions leave attributes out, so that one may fit several pictures and 1 is out of reach.
    """
    clip.eval()
    count = len(held_out)
    group = min(100, count)
    phrasing = random.Random(5)
    images, texts = [], []
    for first in range(0, count - group + 1, group):
        indices = range(first, first + group)
        captions = [caption(held_out.scenes[index], phrasing) for index in indices]
        images.append(unit(clip.visual_projection(pooled_images(clip, normalise_pixels(held_out.batch(indices))))))
        texts.append(unit(clip.text_projection(pooled_texts(clip, tokenizer, captions))))
    names = [f"photo of a {landmark}" for landmark in LANDMARKS]
    named = unit(clip.text_projection(pooled_texts(clip, tokenizer, names)))
    clip.train()

    own = torch.arange(group, device=clip.device)
    similarities = [image @ text.T for image, text in zip(images, texts, strict=True)]  # (pictures, captions) each
    right_text = [(similarity.argmax(1) == own).float().mean().item() for similarity in similarities]
    right_image = [(similarity.argmax(0) == own).float().mean().item() for similarity in similarities]
    all_images, all_texts = torch.cat(images), torch.cat(texts)
    best = (all_images @ all_texts.T).topk(min(10, len(all_texts)), dim=1).indices
    in_best_ten = (best == torch.arange(len(best), device=clip.device)[:, None]).any(1).float().mean().item()
    truth = attribute_labels(held_out.scenes)[: len(all_images), 0]
    zero_shot = ((all_images @ named.T).argmax(1).cpu() == truth).float().mean().item()
    return {
        f"right_caption_of_{group}": round(float(np.mean(right_text)), 3),
        f"right_picture_of_{group}": round(float(np.mean(right_image)), 3),
        f"caption_in_best_10_of_{len(best)}": round(in_best_ten, 3),
        "zero_shot_landmark": round(zero_shot, 3),
    }
