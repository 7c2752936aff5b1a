"""Trains small fixed runs by one checkout of this project, and compares what two checkouts made, bit for bit.

    python tests/golden/make.py CHECKOUT OUT [--only CASE ...]
    python tests/golden/make.py --compare OUT OTHER_OUT

Nothing of the package is imported here: a run is a process of CHECKOUT's train_dreambooth_atoms.py and its flags.
"""

import argparse
import difflib
import hashlib
import json
import os
import shlex
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

from PIL import Image

ADAPTER, LOG, PICTURE, RUN, STOPPED = "adapter.safetensors", "log.jsonl", "picture.png", "run.json", "stopped"
INPUTS = "inputs.json"
LOGGED = ("step", "loss", "grad_norm", "learning_rate", "validation_loss")

# Relative paths, so that no file says where it was made
COMMON = (
    "--pretrained_model_name_or_path tiny --instance_data_dir photos --train_batch_size 1 --seed 3 --report_to none "
    "--num_instance_images 1 --num_inference_steps 3 --guidance_scale 3"
)
TOKEN = "--instance_prompt 'photo of a <castle>.' --placeholder_token '<castle>' --initializer_token castle"
ROW = f"{TOKEN} --train_token_embedding"
PLAIN = "--instance_prompt 'photo of a castle by a lake'"
SIX = "--max_train_steps 6"
# Some layers only, so that files stay small, at a rate that their pictures show
FEW = r"--target '(mid_block|up_blocks\.1)\..*\.conv[12]' --learning_rate 0.05"
# No layer with fewer blocks than taps, whose last atoms would be any that are orthonormal, others on each machine
MANY_BLOCKS = r"--target 'mid_block\.(resnets\.0\.conv1|.*\.(to_[qk]|proj_in))|up_blocks\.0.*conv_shortcut'"
# name -> flags of each command of the case, the second of two going on with the run of the first
CASES = {
    "atoms": [f"{ROW} {SIX}"],
    "overcomplete": [f"{PLAIN} {SIX} {FEW} --m 4 --m1 2 --beta_learning_rate 0.02 --adam_weight_decay 0.1"],
    "blocks": [f"{PLAIN} {SIX} {MANY_BLOCKS} --m 0 --kc 2 --block_layers all --learning_rate 0.03"],
    "sparse": [f"{PLAIN} {SIX} --m 5 --solver sparse --l1 0.002 --learning_rate 0.03"],
    "text-atoms": [
        f"{TOKEN} {SIX} {FEW} --train_text_encoder --text_kc 2 --text_learning_rate 0.01 --validation_loss_steps 2 "
        "--holdout_images 1 --keep best"
    ],
    "text-lora": [
        f"{ROW} {SIX} {FEW} --train_text_encoder --text_adapter lora --text_rank 2 --text_learning_rate 0.01"
    ],
    "teacher": [
        f"{ROW} {SIX} {FEW} --prior teacher --class_prompt 'photo of a castle' --prior_loss_weight 0.7 --snr_gamma 5 "
        "--ema_decay 0.9 --num_instance_images 2 --prompts_file prompts.txt --clip_model_name_or_path pocket:clip"
    ],
    "batches": [
        f"{ROW} {SIX} {FEW} --train_batch_size 2 --gradient_accumulation_steps 2 --captions --caption_dropout 0.3 "
        "--random_flip --aspect_ratio_buckets --max_grad_norm 0.05"
    ],
    "v-prediction": [
        f"{PLAIN} {SIX} {FEW} --prediction_type v_prediction --rescale_betas_zero_snr --loss_type huber --snr_gamma 2 "
        "--noise_offset 0.1 --center_crop --gradient_checkpointing --scheduler base"
    ],
    "bf16": [f"{ROW} {SIX} {FEW} --mixed_precision bf16"],
    "resume": [
        f"{ROW} {FEW} --lr_scheduler constant_with_warmup --max_train_steps 4",
        f"{ROW} {FEW} --lr_scheduler constant_with_warmup --max_train_steps 8 --resume_from_checkpoint latest",
    ],
}


def write_inputs(folder: Path) -> None:
    """What the cases read: the tiny base, the photos and prompts, named as the flags name them."""
    sys.path.insert(0, str(Path(__file__).parents[1]))
    from tiny import write_photos, write_tiny_base

    write_tiny_base(folder / "tiny")
    write_photos(folder / "photos")
    (folder / "prompts.txt").write_text("a {} in snow\na {} at night\na lake and a {}\n", encoding="utf-8")


def inputs_told(folder: Path) -> dict[str, str]:
    """What `write_inputs` wrote there, by digests of the numbers: where these differ, so will all else."""
    from transformers import CLIPTokenizer

    texts = [word for flags in CASES.values() for word in shlex.split(flags[0]) if " " in word]
    texts += [path.read_text(encoding="utf-8") for path in sorted(folder.glob("**/*.txt"))]
    parts = {path.parent.name: read_tensors(path)[2] for path in sorted(folder.glob("tiny/*/*.safetensors"))}
    for path in sorted(folder.glob("photos/*.png")):
        with Image.open(path) as image:
            parts[f"photo {path.stem}"] = image.tobytes()
    parts["token ids"] = json.dumps(
        CLIPTokenizer.from_pretrained(folder / "tiny" / "tokenizer")(texts).input_ids
    ).encode()
    return {name: hashlib.sha256(content).hexdigest()[:16] for name, content in parts.items()}


def commands(case: str) -> list[list[str]]:
    """The flags of a case's commands, to be run in the folder that `write_inputs` filled."""
    return [shlex.split(f"{COMMON} {flags} --output_dir {case}") for flags in CASES[case]]


def collect(run: Path, out: Path) -> None:
    """What is kept of a finished run."""
    out.mkdir(parents=True, exist_ok=True)
    (adapter,) = run.glob("*.safetensors")
    shutil.copyfile(adapter, out / ADAPTER)
    shutil.copyfile(run / "images" / "instance-00.png", out / PICTURE)
    (out / LOG).write_text("".join(json.dumps(entry) + "\n" for entry in read_log(run / LOG)), encoding="utf-8")
    metrics = json.loads((run / "metrics.json").read_text(encoding="utf-8"))
    del metrics["training"]["seconds"]
    files = sorted(path.relative_to(run).as_posix() for path in run.rglob("*") if path.is_file())
    told = {
        "files": files,
        "metrics": metrics,
        "config": (run / "config.yaml").read_text(encoding="utf-8").splitlines(),
    }
    (out / RUN).write_text(json.dumps(told, indent=0) + "\n", encoding="utf-8")


def read_log(path: Path) -> list[dict]:
    """The entries of a log without what differs between two runs of the same settings."""
    entries = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    return [{key: entry[key] for key in LOGGED if key in entry} for entry in entries]


def make(checkout: Path, out: Path, cases: list[str]) -> None:
    """Runs the cases by a checkout, on one core."""
    package = checkout / "sd_atoms"
    environment = dict(
        os.environ, PYTHONPATH=str(checkout), OMP_NUM_THREADS="1", HF_HUB_OFFLINE="1", ACCELERATE_USE_CPU="true"
    )
    if hasattr(os, "sched_setaffinity"):  # a run takes all cores that it may use, and their number moves last bits
        os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})
    look = "import importlib.util as u; print(u.find_spec('sd_atoms').origin)"
    found = subprocess.run([sys.executable, "-c", look], env=environment, cwd="/", capture_output=True, text=True)
    if Path(found.stdout.strip()).parent != package:
        sys.exit(f"{package} is not what is imported, but {found.stdout.strip()}")
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        write_inputs(folder)
        out.mkdir(parents=True, exist_ok=True)
        (out / INPUTS).write_text(json.dumps(inputs_told(folder), indent=0) + "\n", encoding="utf-8")
        for case in cases:
            for number, flags in enumerate(commands(case)):
                if number:
                    keep_stopped(folder / case, out / case / STOPPED)
                command = [sys.executable, str(checkout / "train_dreambooth_atoms.py"), *flags]
                done = subprocess.run(command, env=environment, cwd=folder, capture_output=True, text=True)
                if done.returncode:
                    sys.exit(f"{case}: {done.stdout}\n{done.stderr}")
            collect(folder / case, out / case)
            print(case, flush=True)


def keep_stopped(run: Path, out: Path) -> None:
    """What it takes to go on with a run later, but for its seconds, which no two runs share."""
    (out / "checkpoints").mkdir(parents=True)
    for path in (*run.glob("checkpoints/*"), run / "config.yaml"):
        shutil.copyfile(path, out / path.relative_to(run))
    entries = [json.loads(line) | {"seconds": 0.0} for line in (run / LOG).read_text(encoding="utf-8").splitlines()]
    (out / LOG).write_text("".join(json.dumps(entry) + "\n" for entry in entries), encoding="utf-8")


def compare(one: Path, other: Path) -> list[str]:
    """The first difference of each file that differs; none if the two folders hold the same, bit for bit."""
    found = []
    if (one / INPUTS).read_bytes() != (other / INPUTS).read_bytes():
        found.append(f"{INPUTS}: {lines_difference(one / INPUTS, other / INPUTS)}")
    for case in sorted({path.name for folder in (one, other) for path in folder.iterdir() if path.is_dir()}):
        found += [f"{case}: {difference}" for difference in differences(one / case, other / case)]
    return found


def differences(one: Path, other: Path) -> Iterator[str]:
    """What differs between two folders of one case."""
    names = [{path.relative_to(folder) for path in folder.rglob("*") if path.is_file()} for folder in (one, other)]
    for name in sorted(names[0] ^ names[1]):
        yield f"only {one if name in names[0] else other} has {name}"
    for name in sorted(names[0] & names[1]):
        if (one / name).read_bytes() == (other / name).read_bytes():
            continue
        of_kind = {".safetensors": tensors_difference, ".png": picture_difference}
        difference = of_kind.get(name.suffix, lines_difference)(one / name, other / name)
        if difference:
            yield f"{name}: {difference}"


def read_tensors(path: Path) -> tuple[dict[str, str], dict[str, dict], bytes]:
    """Header entries, types, shapes and places of the tensors, and their bytes, of a safetensors file."""
    content = path.read_bytes()
    start = 8 + int.from_bytes(content[:8], "little")
    tensors = json.loads(content[8:start])
    return tensors.pop("__metadata__", {}), tensors, content[start:]


def tensors_difference(one: Path, other: Path) -> str | None:
    """How two safetensors files differ; the order of the header's entries, which is drawn anew each time, is none."""
    (header, tensors, content), (other_header, other_tensors, other_content) = map(read_tensors, (one, other))
    for name in sorted(tensors.keys() | other_tensors.keys()):
        if tensors.get(name) != other_tensors.get(name):
            return f"{name} is {tensors.get(name)} and {other_tensors.get(name)}"
        start, end = tensors[name]["data_offsets"]
        if content[start:end] != other_content[start:end]:
            return f"the numbers of {name} differ"
    for key in sorted(header.keys() | other_header.keys()):
        if header.get(key) != other_header.get(key):
            entries, other_entries = (json.loads(own.get(key, "null")) for own in (header, other_header))
            if isinstance(entries, dict) and isinstance(other_entries, dict):
                for name in [*entries, *other_entries]:
                    if entries.get(name) != other_entries.get(name):
                        return f"{key} in the header differs in {name}"
            return f"{key} in the header differs"
    return "the bytes differ" if content != other_content else None


def picture_difference(one: Path, other: Path) -> str:
    """How two PNG files differ."""
    with Image.open(one) as a, Image.open(other) as b:
        if (a.size, a.mode) != (b.size, b.mode):
            return f"{a.mode} {a.size} and {b.mode} {b.size}"
        apart = [abs(x - y) for x, y in zip(a.tobytes(), b.tobytes(), strict=True)]
        if any(apart):
            return f"{sum(map(bool, apart))} of {len(apart)} numbers differ, by {max(apart)} grey levels at most"
        for key in [*a.text, *b.text]:
            if a.text.get(key) != b.text.get(key):
                return f"its note {key} is {a.text.get(key)!r} and {b.text.get(key)!r}"
    return "the bytes differ, the pixels do not"


def lines_difference(one: Path, other: Path) -> str:
    """The lines that two texts differ in, up to three of them."""
    texts = [path.read_text(encoding="utf-8").splitlines() for path in (one, other)]
    found = [line for line in difflib.unified_diff(*texts, n=0, lineterm="") if line[:2] not in ("--", "++", "@@")]
    return "; ".join(found[:3]) + (f" and {len(found) - 3} more" if len(found) > 3 else "") or "the bytes differ"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folders", nargs=2, type=Path, metavar="FOLDER")
    parser.add_argument("--compare", action="store_true", help="the two folders are what two checkouts made")
    parser.add_argument("--only", nargs="+", choices=CASES, help="these cases; otherwise all")
    words = parser.parse_args()
    one, other = (folder.resolve() for folder in words.folders)
    if not words.compare:
        make(one, other, words.only or list(CASES))
        return
    found = compare(one, other)
    print("\n".join(found) or f"{len([p for p in one.iterdir() if p.is_dir()])} cases are equal bit for bit")
    sys.exit(bool(found))


if __name__ == "__main__":
    main()
