"""A comparison made up of numbers and of pictures in one colour."""

from pathlib import Path

from PIL import Image

from sd_atoms.report.rows import Comparison

PROMPTS = ("photo of a {}.", 'The {} by a <lake> & "sea".', "A {} in snow.")
METHODS = ("pretrained", "atoms", "lora", "token")
SCALES = (0.0, 0.5, 1.0)


def figure(value: float, spread: float | None = 0.05) -> dict:
    """As `intervals.Figure.entries` has it."""
    ends = {"low": None, "high": None} if spread is None else {"low": value - spread, "high": value + spread}
    return {"value": value, "n": 6, **ends}


def made_up(folder: Path, concepts=("castle", "canal"), seeds=(0, 1), images_per_prompt=2) -> Comparison:
    """Four methods, of which "lora" is one tenth more alike than "atoms" on every picture of every seed."""
    runs = []
    for c, concept in enumerate(concepts):
        for m, method in enumerate(METHODS):
            for seed in seeds if m else (0,):
                name = f"{concept}/{method}/seed-{seed}" if m else f"{concept}/{method}"
                drawn = folder / name / "drawn"
                drawn.mkdir(parents=True)
                for number in range(len(PROMPTS)):
                    for drawing in range(images_per_prompt):
                        colour = (60 * m, 80 * number, 100 * drawing + 40 * seed + 10 * c)
                        Image.new("RGB", (64, 64), colour).save(drawn / f"{number:02d}-{drawing}.png")
                    if m in (1, 2):
                        for scale in (0.0, 0.5):
                            path = drawn / f"scale-{scale:g}-{number:02d}-0.png"
                            Image.new("RGB", (64, 64), (200, 80 * number, round(100 * scale))).save(path)
                image, text = [0.3, 0.4, 0.5, 0.35][m] + 0.02 * seed + 0.01 * c, [0.6, 0.55, 0.5, 0.58][m]
                images = [image + 0.01 * place for place in range(len(PROMPTS) * images_per_prompt)]
                clip = {
                    "figures": {
                        "image": figure(image),
                        "text": figure(text),
                        "diversity": figure(0.5 - 0.1 * m - 0.02 * c),
                    },
                    "by_image": {"image": images, "text": [text] * len(images)},
                }
                judge = {"figures": {"image": figure(image / 2, None)}, "by_image": {"image": images}}
                scores = {
                    "name": name, "concept": concept, "method": method, "seed": seed, "seconds": 9.0,
                    "learning_rate": 1e-3 if m else None, "networks": {"clip": clip, "judge": judge},
                }  # fmt: skip
                run = {"scores": scores, "folder": folder / name, "drawn": drawn}
                if m:
                    run |= {
                        "training": {
                            "method": method, "steps": 4, "seconds": 2.0 * m, "last_loss": 0.1,
                            "peak_memory_bytes": 10**9, "trained_numbers": 10**m, "trained_token_numbers": 1,
                            "trained_text_numbers": 0,
                        },
                        "environment": {
                            "started": "2026-01-01T00:00:00+00:00", "system": "Linux", "device": "cpu",
                            "versions": dict.fromkeys(("torch", "peft", "transformers", "diffusers"), "1"),
                        },
                        "settings": {
                            "pretrained_model_name_or_path": "pocket", "train_batch_size": 4,
                            "gradient_accumulation_steps": 1,
                        },
                        "peft_config": {"peft_type": method.upper()},
                        "adapter_bytes": 1000 * m,
                        "losses": [(step, 1.0 / step) for step in (1, 2, 3, 4)],
                        "steady_seconds": 3.0 * m,  # beside "seconds", which counts pauses
                    }  # fmt: skip
                runs.append(run)
    tried = [
        {"scores": {"method": "lora", "learning_rate": rate, "networks": {"clip": {"figures": {
            "image": figure(value), "text": figure(value)
        }}}}}
        for rate, value in ((1e-3, 0.4), (3e-3, 0.5), (1e-3, 0.5))
    ]  # fmt: skip
    return Comparison(
        base="pocket", methods=METHODS, concepts=concepts, prompts=PROMPTS, shown_prompts=(0, 1), scales=SCALES,
        scale_prompts=(0, 1, 2), images_per_prompt=images_per_prompt, fidelity="clip", text="clip", against="atoms",
        runs=runs, rate_runs=tried, failed={"castle/oft/seed-0": "error | with <signs>"},
    )  # fmt: skip
