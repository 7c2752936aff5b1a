"""Malformed inputs of all kinds, two hundred from each seed: each ends in one line and exit code 2, or is handled.

A case is rerun by its seed and number: pytest tests/commands/test_fuzz.py -m "slow or not slow" -k "seed_3_case_17".
"""

import copy
import io
import json
import random
import re
import shutil
import signal
import struct
import tarfile
from pathlib import Path
from types import SimpleNamespace

import datasets
import pytest
import torch
import yaml
from helpers import CASTLE
from PIL import Image
from spoiling import damaged, spoilt_json, spoilt_metadata, spoilt_tensors
from tiny import write_tiny_base

from sd_atoms.cli import main, train_main
from sd_atoms.files import leftovers
from sd_atoms.pipeline import open_base

SEEDS, CASES = 12, 200
LIMIT_S, WAIT_S = 60, 600  # of computing, and of waiting on a machine with other work
USUAL = 22  # cases of seed 0 that are run every time
QUICK = dict(
    **CASTLE,
    resolution=64,
    train_batch_size=1,
    max_train_steps=1,
    lr_warmup_steps=0,
    num_instance_images=1,
    num_inference_steps=1,
    report_to="none",
)
TRAINED = dict(resolution=None, train_token_embedding=True, ema_decay=0.9, validation_loss_steps=1, keep="best")


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """A folder with the tiny base."""
    return write_tiny_base(tmp_path_factory.mktemp("base") / "tiny")


@pytest.fixture(scope="module", autouse=True)
def quick_base(tiny):
    """Opening the pocket base is a copy of the tiny one that is open."""
    base = open_base(str(tiny))

    def opened(name, **settings):
        if name != "pocket":
            return open_base(name, **settings)
        own = copy.copy(base)
        for part in ("unet", "vae", "text_encoder", "tokenizer", "scheduler"):
            own.register_modules(**{part: copy.deepcopy(getattr(base, part))})
        return own

    with pytest.MonkeyPatch.context() as patch:
        for module in ("training.base", "commands.drawing", "pipeline.inspection"):
            patch.setattr(f"sd_atoms.{module}.open_base", opened)
        yield


@pytest.fixture(scope="module")
def trained(tmp_path_factory, quick_base):
    """A finished run of one step with everything in its checkpoint."""
    folder = tmp_path_factory.mktemp("fuzz")
    config = folder / "c.yaml"
    config.write_text(yaml.safe_dump({**QUICK, **TRAINED, "output_dir": str(folder / "run")}))
    assert train_main(["--config", str(config)]) == 0
    return folder / "run"


@pytest.fixture(scope="module")
def made(tmp_path_factory, tiny, trained):
    """What the cases are made from: a run, a base, and a data set of two pictures as `save_to_disk` writes it."""
    table, rng = tmp_path_factory.mktemp("table") / "table", random.Random(0)
    rows = {
        "image": [{"bytes": encoded(noise(rng), "PNG"), "path": None} for _ in range(2)],
        "text": ["a {}", "the {}"],
    }
    datasets.Dataset.from_dict(rows).cast_column("image", datasets.Image()).save_to_disk(table)
    return SimpleNamespace(run=trained, base=tiny, table=table)


# --- what is wrong ---------------------------------------------------------------------------------------------------


NASTY = (
    None, True, -1, 0, 1.5, 10**18, -(10**18), 10**400, 1e308, float("nan"), float("inf"), float("-inf"), "", " ",
    "\n", "a\nb", "\0", "\ud800", "\x1b[31m", "x" * 5000, "../" * 40, "~nobody/x", "/dev/null", "{}", "%s%n",
    "<castle>",
    "1e400", "0x10", "nan", "none", [], [1], [[[]]], {}, {"a": 1}, {1: {2: 3}}, b"\xff\xfe", "castle castle castle",
)  # fmt: skip
# nothing is wrong with long work, so these never get a number
AMOUNTS = {
    "max_train_steps", "num_train_epochs", "train_batch_size", "gradient_accumulation_steps", "num_class_images",
    "num_instance_images", "num_validation_images", "num_inference_steps",
}  # fmt: skip
KEYS = (
    "adam_beta1", "adam_beta2", "adam_epsilon", "adam_weight_decay", "aspect_ratio_buckets", "block_layers",
    "base_config",
    "cache_dir", "caption_dropout", "captions", "center_crop", "checkpointing_steps", "checkpoints_total_limit",
    "class_data_dir", "class_prompt", "class_prompts_file", "clip_model_name_or_path", "concepts", "dataset_name",
    "ema_decay", "form", "gradient_checkpointing", "guidance_scale", "holdout_images", "huber_c",
    "image_interpolation_mode", "initializer_token", "instance_data_dir", "instance_prompt", "instance_prompts_file",
    "kc", "keep", "l1", "learning_rate", "loss_type", "lr_num_cycles", "lr_power", "lr_scheduler", "lr_warmup_steps",
    "m", "m1", "m_c", "max_grad_norm", "max_train_samples", "method", "mixed_precision", "noise_offset",
    "on_bad_image", "optimizer", "overwrite", "placeholder_token", "prediction_type", "pretrained_model_name_or_path",
    "prior", "prior_loss_weight", "prompts_file", "random_flip", "report_to", "rescale_betas_zero_snr", "resolution",
    "resume_from_checkpoint", "revision", "scheduler", "seed", "snr_gamma", "solver", "target", "text_kc",
    "text_rank", "token_learning_rate", "train_beta", "train_text_encoder", "train_token_embedding",
    "validation_loss_steps", "validation_prompt", "validation_steps", "variant", "with_prior_preservation",
    "output_dir", "unknown_key",
    *sorted(AMOUNTS),
)  # fmt: skip


def yaml_text(value):
    """YAML of anything: JSON is YAML, and has words for what safe_dump refuses."""
    if isinstance(value, bytes):
        return "!!binary //4="
    text = json.dumps(value)
    return {"NaN": ".nan", "Infinity": ".inf", "-Infinity": "-.inf"}.get(text, text)


def settings_yaml(rng, folder, settings):
    """Wrong types and values under right keys."""
    lines = {key: yaml_text(value) for key, value in settings.items()}
    for key in rng.sample(KEYS, rng.choice([1, 1, 1, 2, 4])):
        lines[key] = yaml_text(
            rng.choice([v for v in NASTY if key not in AMOUNTS or not isinstance(v, (int, float)) or v <= 0])
        )
    return "".join(f"{key}: {text}\n" for key, text in lines.items())


SYNTAX = {
    "tabs": lambda text: text.replace(": ", ":\t", 3).replace("\n", "\n\t", 2),
    "no colon": lambda text: text.replace(":", "", 1),
    "duplicate": lambda text: text + "m: 3\nm: [3]\n",
    "alias bomb": lambda text: (
        text
        + "a0: &a0 [x, x, x, x, x, x, x, x, x]\n"
        + "".join(f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]\n" for n in range(1, 10))
        + "m: *a9\nconcepts: *a9\ninstance_data_dir: *a9\n"
    ),
    "endless": lambda text: text + "m: &a [*a]\nconcepts: &b [*b]\nform: &c {a: *c}\n",
    "no anchor": lambda text: text + "m: *nowhere\n",
    "deep": lambda text: text + "m: " + "[" * 3000 + "\n",
    "deep maps": lambda text: text + "m: " + "{a: " * 3000 + "\n",
    "two documents": lambda text: text + "---\n" + text,
    "list": lambda text: "".join(f"- {line}\n" for line in text.splitlines()),
    "scalar": lambda text: "just a word",
    "empty": lambda text: "",
    "comment": lambda text: "# nothing\n",
    "utf-16": lambda text: text.encode("utf-16"),
    "latin-1": lambda text: (text + "revision: é\n").encode("latin-1"),
    "byte-order mark": lambda text: b"\xef\xbb\xbf" + text.encode(),
    "nul": lambda text: text + "revision: a\0b\n",
    "no date": lambda text: text + "revision: 2024-13-45\n",
    "no hex": lambda text: text + "m: 0x_\n",
    "huge hex": lambda text: text + f"m: 0x{'f' * 5000}\n0x{'e' * 5000}: 1\n",
    "huge number": lambda text: text + f"m: {'9' * 5000}\n",
    "python": lambda text: text + "m: !!python/object/apply:os.abort []\n",
    "set": lambda text: text + "m: !!set {a, b}\nconcepts: !!omap [a: 1]\n",
    "float": lambda text: text + "m: !!float x\n",
    "no binary": lambda text: text + "revision: !!binary '%%%'\n",
    "merge": lambda text: text + "<<: 5\n",
    "keys": lambda text: text + "1: 2\nnull: 3\n2024-01-01: 4\n[a, b]: 5\n? {a: 1}\n: 6\ntrue: 7\n",
    "cut": lambda text: text[: len(text) // 2] + '"',
    "indented": lambda text: text.replace("\n", "\n  ", 1),
}
CONCEPTS = (
    "castle", 5, [], [5], [[]], [None], {}, {"instance_data_dir": "pocket:castle"}, [{}], [{"repeats": 0}],
    [{"repeats": 10**15}], [{"foo": 1}], [{"instance_prompt": None}], [{"instance_prompt": ["a"]}], [{5: 6}],
    [{"instance_data_dir": "pocket:castle", "instance_prompt": "a <c>", "placeholder_token": "<c>"}],
    [{"instance_data_dir": "pocket:castle", "instance_prompt": "a castle"}, {"instance_prompt": "x"}],
    [{"instance_data_dir": "pocket:nothing", "instance_prompt": "a castle"}],
    [{"instance_data_dir": "pocket:castle", "instance_prompt": "a castle"}] * 2,
    [{"instance_data_dir": "pocket:castle", "instance_prompt": "a <c>", "placeholder_token": "<c> <c>",
      "initializer_token": "castle"}],
    [{"instance_data_dir": "pocket:castle", "instance_prompt": "a \0", "class_prompt": "\ud800"}],
)  # fmt: skip


def config_case(rng, folder, made, kinds=("settings", "syntax", "bytes")):
    """(words) of a training with a malformed YAML file."""
    settings = {**QUICK, "output_dir": str(folder / "run")}
    kind = rng.choice(kinds)
    if kind == "settings":
        text = settings_yaml(rng, folder, settings)
    elif kind == "syntax":
        text = SYNTAX[rng.choice(sorted(SYNTAX))](yaml.safe_dump(settings))
    elif kind == "bytes":
        text = damaged(rng, yaml.safe_dump(settings).encode(), 5000)
        if re.search(
            rb"(steps|images|size): *[^1\n]|(steps|images|size): *1\S", text
        ):  # long work, or the default of it
            text += b"\nm: 99\n"
    else:
        lone = {key: value for key, value in settings.items() if not re.match("instance|placeholder|initializer", key)}
        text = "".join(f"{k}: {yaml_text(v)}\n" for k, v in {**lone, "concepts": rng.choice(CONCEPTS)}.items())
    path = folder / "inputs" / "c.yaml"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return ["--config", str(path)]


def concepts_case(rng, folder, made):
    """(words) of a training with a malformed list of concepts."""
    return config_case(rng, folder, made, kinds=("concepts",))


def noise(rng, width=40, height=32, mode="RGB"):
    return Image.frombytes("RGB", (width, height), rng.randbytes(3 * width * height)).convert(mode)


def encoded(image, kind, **options):
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def png_of_size(width, height):
    """A valid beginning of a PNG that says it is that large."""
    import zlib

    header = b"IHDR" + struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    data = b"IDAT" + zlib.compress(b"\0" * 1000)
    chunks = b"".join(
        struct.pack(">I", len(chunk) - 4) + chunk + struct.pack(">I", zlib.crc32(chunk))
        for chunk in (header, data, b"IEND")
    )
    return b"\x89PNG\r\n\x1a\n" + chunks


def tiff_tag(rng, tag, value):
    """A TIFF whose header says something else than its pixels."""
    content = bytearray(encoded(noise(rng), "TIFF"))
    place = content.rfind(struct.pack("<H", tag))
    content[place + 8 : place + 12] = struct.pack("<I", value)
    return bytes(content)


IMAGES = {
    "damaged.png": lambda rng: damaged(rng, encoded(noise(rng), "PNG")),
    "damaged.jpg": lambda rng: damaged(rng, encoded(noise(rng), "JPEG")),
    "damaged.webp": lambda rng: damaged(rng, encoded(noise(rng), "WEBP")),
    "damaged.gif": lambda rng: damaged(rng, encoded(noise(rng), "GIF")),
    "damaged.bmp": lambda rng: damaged(rng, encoded(noise(rng), "BMP")),
    "damaged.tiff": lambda rng: damaged(rng, encoded(noise(rng), "TIFF")),
    "cut.jpg": lambda rng: encoded(noise(rng), "JPEG")[: rng.randrange(600)],
    "random.png": lambda rng: rng.randbytes(rng.randrange(1, 3000)),
    "empty.jpg": lambda rng: b"",
    "zeros.webp": lambda rng: bytes(5000),
    "jpeg.png": lambda rng: encoded(noise(rng), "JPEG"),
    "pdf.jpg": lambda rng: b"%PDF-1.4\n" + rng.randbytes(500),
    "svg.png": lambda rng: b"<svg xmlns='http://www.w3.org/2000/svg'/>",
    "eps.png": lambda rng: encoded(noise(rng), "EPS"),
    "huge.png": lambda rng: png_of_size(2**31 - 1, 2**31 - 1),
    "wide.png": lambda rng: png_of_size(100_000_000, 16),
    "flat.png": lambda rng: png_of_size(0, 0),
    "large.png": lambda rng: png_of_size(5000, 4000),
    "huge.tiff": lambda rng: tiff_tag(rng, 256, 2**32 - 1),
    "strips.tiff": lambda rng: tiff_tag(rng, 273, 2**31),
    "line.png": lambda rng: encoded(noise(rng, 1, 500), "PNG"),
    "strip.png": lambda rng: encoded(noise(rng, 3000, 17), "PNG"),
    "palette.png": lambda rng: encoded(noise(rng).quantize(7), "PNG", transparency=3),
    "palette.gif": lambda rng: encoded(noise(rng).quantize(3), "GIF"),
    "alpha.png": lambda rng: encoded(noise(rng, mode="RGBA"), "PNG"),
    "grey.png": lambda rng: encoded(noise(rng, mode="LA"), "PNG"),
    "bits.png": lambda rng: encoded(noise(rng, mode="1"), "PNG"),
    "deep.png": lambda rng: encoded(noise(rng, mode="L").convert("I").convert("I;16"), "PNG"),
    "float.tiff": lambda rng: encoded(noise(rng, mode="F"), "TIFF"),
    "nan.tiff": lambda rng: encoded(Image.new("F", (32, 32), float("nan")), "TIFF"),
    "cmyk.jpg": lambda rng: encoded(noise(rng, mode="CMYK"), "JPEG"),
    "exif.jpg": lambda rng: encoded(noise(rng), "JPEG", exif=b"Exif\0\0MM\0*" + rng.randbytes(200)),
    "exif.png": lambda rng: encoded(noise(rng), "PNG", exif=b"II*\0\x08\0\0\0\xff\xff" + rng.randbytes(60)),
    "profile.jpg": lambda rng: encoded(noise(rng), "JPEG", icc_profile=rng.randbytes(300)),
}


def image_case(rng, folder, made):
    """(words) of a training with bad pictures, alone or among good ones."""
    photos = folder / "inputs" / "photos"
    photos.mkdir()
    for name in rng.sample(sorted(IMAGES), rng.choice([1, 1, 2])):
        (photos / name).write_bytes(IMAGES[name](rng))
    if rng.random() < 0.3:
        noise(rng).save(photos / "good.png")
    settings = {**QUICK, "instance_data_dir": str(photos), "output_dir": str(folder / "run")}
    settings |= {"on_bad_image": rng.choice(["error", "error", "skip"])}
    return train_words(settings)


def train_words(settings):
    return [f"--{key}={value}" for key, value in settings.items() if value is not None]


CAPTIONS = (
    b"", b" \n\t", b"\xff\xfe<castle>", b"photo of a <castle>", b"{}", b"{} and {}", b"{a} {0} {", b"}{ {}",
    b"\0 <castle>",
    b"<castle>\r\n\r\nmore", "<castle> \u202e\u0000\u200b😀".encode(), b"<castle> " * 3000, b"no placeholder",
    b"<castle>".decode().encode("utf-16"), b"\xef\xbb\xbf<castle>", b"<|endoftext|><castle><|startoftext|>",
)  # fmt: skip
ENTRIES = (
    "", "{", "[]", "5", "null", '"a.png"', "{}", '{"file_name": 5}', '{"file_name": "a.png"}', "[" * 100_000, "NaN",
    '{"file_name": "a.png", "text": null}', '{"file_name": "a.png", "text": ""}', "{'file_name': 'a.png'}", "\x00",
    '{"file_name": "a.png", "text": ["x"]}', '{"file_name": "a.png", "text": "<castle>"}', "\ufeff{}",
    '{"file_name": "../a.png", "text": "<castle>"}', '{"file_name": "a.png", "text": "<castle> \\ud800"}',
    '{"file_name": "a.png", "text": "\\u0000 <castle>"}', '{"file_name": "a\\u0000.png", "text": "x"}',
    '{"file_name": "none.png", "text": "x"}', '{"file_name": "a.png", "text": "{}", "caption": "{}"}',
    '{"file_name": "b.png", "text": "{}"}', '{"file_name": "a.png", "text": ' + "9" * 5000 + "}",
    '{"file_name": "/a.png", "prompt": "{}"}',
)  # fmt: skip


def caption_case(rng, folder, made):
    """(words) of a training with bad captions."""
    photos = folder / "inputs" / "photos"
    photos.mkdir()
    for name in ("a.png", "b.png"):
        noise(rng).save(photos / name)
    if rng.random() < 0.5:
        for name in rng.choice([("a.txt",), ("a.txt", "b.txt"), ("a.txt", "b.txt")]):
            (photos / name).write_bytes(rng.choice(CAPTIONS))
    else:
        lines = rng.choices(ENTRIES, k=rng.choice([1, 2, 3]))
        if rng.random() < 0.3:
            lines += ['{"file_name": "a.png", "text": "{}"}', '{"file_name": "b.png", "text": "{}"}']
        content = "\n".join(lines).encode()
        (photos / "metadata.jsonl").write_bytes(content if rng.random() < 0.7 else damaged(rng, content))
    settings = {**QUICK, "instance_data_dir": str(photos), "output_dir": str(folder / "run")}
    words = [*train_words(settings), "--captions"]
    return words if rng.random() < 0.7 else [*words, "--train_token_embedding"]


TEMPLATES = (
    b"", b"\n\n# only a comment\n", b"no braces", b"{} {}", b"{", b"}{", b"{0}", b"{name}", b"\xff{}", b"{}\0",
    b"{}" * 500,
    "\ufeff{}".encode(), "{} ".encode("utf-16"), b"{}\r\nphoto of {}\rx", b"photo of a {} " + b"very " * 3000,
    b"{}" + b"\x1b[0m",
    "{} 😀 \u202e".encode(), b"a {}\nb {}\nc\n", b"{{}}", b"%s {}", b"{}\x85x", b"$ {} $ \\frac{",
)  # fmt: skip
SEED_WORDS = (
    "", " ", ",", "-", "0-", "-1", "3-1", "0-99999999999", "1,1", "0-3,2", "1.5", "1e3", "nan", "٣", "½", "0x1",
    str(2**63 - 1), str(2**63), "9" * 400, "0--3", "0 - 0", "0;1", "0,", "\n0", "0\0", "\ud800",
)  # fmt: skip


def prompt_case(rng, folder, made):
    """(words) of drawing with bad templates or seeds."""
    bad = rng.random() < 0.6
    path = folder / "inputs" / "t.txt"
    path.write_bytes(rng.choice(TEMPLATES) if bad else b"a {}\n")
    words = ["--adapter", str(made.run / "castle.safetensors"), "--prompts", str(path), "--out", str(folder / "run")]
    return ["generate", *words, "--num_inference_steps=1", f"--seeds={'0' if bad else rng.choice(SEED_WORDS)}"]


def adapter_case(rng, folder, made):
    """(words) of drawing with a bad adapter, or of inspecting it."""
    inputs = folder / "inputs"
    path = whole = shutil.copy(made.run / "castle.safetensors", inputs)
    if rng.random() < 0.45:
        path = shutil.copytree(made.run / "adapter", inputs / "adapter")
        whole = path / rng.choice(["adapter_model.safetensors", "learned_embeds.safetensors", "adapter_config.json"])
        other = rng.choice(["", "", "", "missing", "folder", "pickle"])
        if other:
            whole.unlink()
            if other == "folder":
                whole.mkdir()
            if other == "pickle":
                torch.save({}, whole.with_suffix(".bin"))
            whole = None
    whole = whole and Path(whole)
    if whole and whole.suffix == ".json":
        config = json.loads(whole.read_text())
        words = rng.choice(
            [json.dumps(spoilt_json(rng, config))] * 5
            + ["", "{", "[]", "5", "[" * 100_000, "\0", whole.read_text()[:-9]]
        )
        whole.write_text(words, encoding="utf-8", errors="surrogatepass")
    elif whole:
        content = whole.read_bytes()
        kind = rng.choice(["header", "header", "tensors", "tensors", "cut", "body", "bytes"])
        if kind == "header":
            content = spoilt_metadata(rng, whole, "sd_atoms")
        elif kind == "tensors":
            content = spoilt_tensors(rng, whole)
        elif kind == "cut":
            content = content[: rng.randrange(len(content))]
        elif kind == "body":
            start = 8 + int.from_bytes(content[:8], "little")
            content = content[:start] + damaged(rng, content[start:], len(content))[: len(content) - start]
        else:
            content = damaged(rng, content, 8 + int.from_bytes(content[:8], "little"))
        whole.write_bytes(content)
    if rng.random() < 0.4:
        return ["inspect", str(path), "--json", str(folder / "run")]
    (inputs / "t.txt").write_text("a {}\n")
    words = ["--prompts", str(inputs / "t.txt"), "--out", str(folder / "run"), "--seeds=0", "--compare-base"]
    return ["generate", "--adapter", str(path), *words]


def checkpoint_case(rng, folder, made):
    """(words) of going on from a bad checkpoint."""
    run = shutil.copytree(made.run, folder / "inputs" / "run")
    path = run / "checkpoints" / "checkpoint-1.safetensors"
    settings = {**QUICK, **TRAINED, "output_dir": str(run), "max_train_steps": 2}
    kind = rng.choice(["header"] * 3 + ["tensors"] * 3 + ["cut", "bytes", "words", "config", "log", "folder"])
    choice = "latest"
    if kind == "header":
        path.write_bytes(spoilt_metadata(rng, path, rng.choice(["best", "groups", "scaler", "step"])))
    elif kind == "tensors":
        path.write_bytes(spoilt_tensors(rng, path))
    elif kind == "cut":
        path.write_bytes(path.read_bytes()[: rng.randrange(path.stat().st_size)])
    elif kind == "bytes":
        path.write_bytes(damaged(rng, path.read_bytes(), 2000))
    elif kind == "words":
        choice = rng.choice(["", "x", "1", "checkpoint-2", "../checkpoint-1", "/dev/null", "x" * 300, ".", str(run)])
    elif kind == "config":
        content = (run / "config.yaml").read_bytes()
        (run / "config.yaml").write_bytes(rng.choice([b"", b"\xff", b"5", b"a: [", damaged(rng, content, 3000)]))
    elif kind == "log":
        content = (run / "log.jsonl").read_bytes()
        (run / "log.jsonl").write_bytes(rng.choice([b"", b"\xff\n", b"5\n", b"{}\n", damaged(rng, content)]))
    else:
        path.unlink()
        path.mkdir()
    words = train_words({key: value for key, value in settings.items() if value is not True})
    return [*words, "--train_token_embedding", f"--resume_from_checkpoint={choice}"]


def shard_case(rng, folder, made):
    """(words) of a training from a bad tar file."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode=rng.choice(["w", "w", "w", "w:gz"])) as tar:
        for name in [*rng.sample(sorted(IMAGES), rng.choice([0, 1, 2])), "good.png", "good.txt"]:
            content = (
                IMAGES[name](rng) if name in IMAGES else b"a {}" if name == "good.txt" else encoded(noise(rng), "PNG")
            )
            info = tarfile.TarInfo(rng.choice([name, f"a/{name}", f"../{name}", name.upper(), name * 20]))
            info.size = len(content)
            info.type = rng.choice([tarfile.REGTYPE] * 8 + [tarfile.SYMTYPE, tarfile.DIRTYPE])
            tar.addfile(info, io.BytesIO(content))
    content = buffer.getvalue()
    path = folder / "inputs" / "a.tar"
    path.write_bytes(damaged(rng, content, 1000) if rng.random() < 0.6 else content)
    settings = {**QUICK, "instance_data_dir": str(path), "output_dir": str(folder / "run")}
    return [
        *train_words(settings),
        *rng.choice([[], ["--captions"]]),
        f"--on_bad_image={rng.choice(['error', 'skip'])}",
    ]


def table_case(rng, folder, made):
    """(words) of a training from a bad data set."""
    table = Path(shutil.copytree(made.table, folder / "inputs" / "table"))
    path = rng.choice(sorted(table.iterdir()))
    kind = rng.choice(["bytes", "bytes", "json", "gone", "column", "split", "rows"])
    words = {"dataset_name": str(table), "dataset_split": "train"}
    if kind == "json" and path.suffix == ".json":
        value = spoilt_json(rng, json.loads(path.read_text()))
        path.write_text(json.dumps(value), encoding="utf-8", errors="surrogatepass")
    elif kind == "gone":
        path.unlink()
    elif kind == "column":
        words[rng.choice(["image_column", "caption_column"])] = rng.choice(
            ["image", "text", "none", "", "\ud800", "a.b"]
        )
    elif kind == "split":
        words["dataset_split"] = rng.choice(["test", "", "train[:1]", "../train", "train+train"])
    elif kind == "rows":
        shutil.rmtree(table)
        texts = ["a {}", rng.choice(["", "{} {}", "\0", "x" * 5000])]
        images = [{"bytes": IMAGES[rng.choice(sorted(IMAGES))](rng), "path": None} for _ in texts]
        rows = {"image": images, "text": texts}
        datasets.Dataset.from_dict(rows).cast_column("image", datasets.Image(decode=False)).save_to_disk(table)
        words["caption_column"] = "text"
    else:
        path.write_bytes(damaged(rng, path.read_bytes(), path.stat().st_size))
    settings = {**QUICK, "instance_data_dir": None, **words, "output_dir": str(folder / "run")}
    return train_words(settings)


def base_case(rng, folder, made):
    """(words) of a training on a bad base."""
    base = Path(shutil.copytree(made.base, folder / "inputs" / "base"))
    path = rng.choice(sorted(path for path in base.rglob("*") if path.is_file()))
    kind = rng.choice(["bytes", "inside", "inside", "inside", "gone", "folder", "cut"])
    if kind == "inside" and path.suffix == ".json":
        value = spoilt_json(rng, json.loads(path.read_text()))
        path.write_text(json.dumps(value), encoding="utf-8", errors="surrogatepass")
    elif kind == "inside" and path.suffix == ".safetensors":
        path.write_bytes(rng.choice([spoilt_tensors, spoilt_metadata])(rng, path))
    elif kind in ("gone", "folder"):
        path.unlink()
        if kind == "folder":
            path.mkdir()
    elif kind == "cut":
        path.write_bytes(path.read_bytes()[: rng.randrange(path.stat().st_size)])
    else:
        path.write_bytes(damaged(rng, path.read_bytes(), 5000))
    return train_words({**QUICK, "pretrained_model_name_or_path": str(base), "output_dir": str(folder / "run")})


def share_case(rng, folder, made):
    """(words) of sharing a bad run."""
    run = Path(shutil.copytree(made.run, folder / "inputs" / "run"))
    path = rng.choice(sorted(path for path in run.rglob("*") if path.is_file()))
    kind = rng.choice(["bytes", "inside", "gone", "folder"])
    if kind == "inside" and path.suffix == ".json":
        value = spoilt_json(rng, json.loads(path.read_text()))
        path.write_text(json.dumps(value), encoding="utf-8", errors="surrogatepass")
    elif kind in ("gone", "folder"):
        path.unlink()
        if kind == "folder":
            path.mkdir()
    else:
        path.write_bytes(damaged(rng, path.read_bytes(), 3000))
    return ["share", str(rng.choice([run, run, run / "checkpoints"]))]


# --- the cases -------------------------------------------------------------------------------------------------------

FAMILIES = {
    "pictures": image_case,
    "configs": config_case,
    "captions": caption_case,
    "prompts": prompt_case,
    "adapters": adapter_case,
    "checkpoints": checkpoint_case,
    "base folders": base_case,
    "concept lists": concepts_case,
    "tables": table_case,
    "shards": shard_case,
    "runs to share": share_case,
}


def contents(folder):
    return {path: path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def too_long(number, frame):
    raise TimeoutError(f"computed for more than {LIMIT_S} s, or waited for {WAIT_S} s")


def is_usual(seed, number):
    return seed == 0 and number < USUAL


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("seed", "number"),
    [
        pytest.param(
            seed, number, id=f"seed_{seed}_case_{number}", marks=() if is_usual(seed, number) else pytest.mark.slow
        )
        for seed in range(SEEDS)
        for number in range(CASES)
    ],
)
def test_malformed_input_ends_in_one_line_or_is_handled(seed, number, tmp_path, capsys, made, record_property):
    rng, kind = random.Random(f"{seed}/{number}"), list(FAMILIES)[number % len(FAMILIES)]
    family = FAMILIES[kind]
    (tmp_path / "inputs").mkdir()
    words = family(rng, tmp_path, made)
    command = main if words[0] in ("generate", "inspect", "share") else train_main
    in_place = kind in ("checkpoints", "runs to share")  # what is written to is among the inputs
    run = tmp_path / "inputs" / "run" if in_place else tmp_path / "run"
    before, of_run = contents(tmp_path / "inputs"), contents(made.run)
    capsys.readouterr()
    clocks = ((signal.ITIMER_PROF, signal.SIGPROF, LIMIT_S), (signal.ITIMER_REAL, signal.SIGALRM, WAIT_S))
    for clock, number_of_signal, seconds in clocks:
        signal.signal(number_of_signal, too_long)
        signal.setitimer(clock, seconds)
    try:
        code = command(words)
    finally:
        for clock, *_ in clocks:
            signal.setitimer(clock, 0)
    _, message = capsys.readouterr()
    record_property("fuzzed", f"{kind}: exit {code}")
    print(words, code, message)  # for whoever looks at a failed case
    assert code in (0, 2)
    said = [line for line in message.splitlines() if not line.startswith(("warning: ", "Training: "))]
    if code == 2:
        assert said[0].startswith("error: ")
        assert all(line.startswith("  ") for line in said[1:])
        assert len(said) == 1 or len(said) > 2, "one problem is one line, several have a heading"
        assert len(message) < 10_000 + 200 * message.count("\n")
        after = contents(tmp_path)
        if kind == "base folders":  # what opens may still fail while it trains; what the run wrote till then stays
            after = {path: content for path, content in after.items() if run not in path.parents}
        assert after == before, "something was written, changed or removed"
    else:
        assert said == []
        assert run.exists()
        kept = {path: content for path, content in before.items() if run not in path.parents}
        assert kept.items() <= contents(tmp_path).items(), "an input was changed or removed"
    assert contents(made.run) == of_run
    assert leftovers(tmp_path) == []
