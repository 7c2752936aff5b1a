"""The README.md of a shared adapter: a hub model card, Markdown under a block of YAML.

Prompts, tokens and names come from people: in YAML they are written by the YAML library, in Markdown escaped, in code
as quoted literals on one line.
"""

import json
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import quote

import yaml

from sd_atoms.report.markdown import cell, code, escaped, fenced, number_text, table
from sd_atoms.sources import is_hub_id

TAGS = ("text-to-image", "stable-diffusion", "dreambooth")
ATOMS = "filter atoms"
LORAS = ("lora", "locon", "lora-conv")
PAPER = "[Large Convolutional Model Tuning via Filter Subspace](https://arxiv.org/abs/2403.00269)"
COLUMNS = 4  # pictures side by side

SCORES = {
    "image": "picture and training pictures, mean cosine",
    "text": "picture and prompt, mean cosine",
    "match": "share of pictures whose best prompt of all is their own",
    "diversity": "diversity of the pictures, mean 1 − cosine",
}
RATES = {
    "learning_rate": "atoms",
    "beta_learning_rate": "β",
    "token_learning_rate": "new word",
    "text_learning_rate": "text encoder",
}


class CardImage(NamedTuple):
    """A picture of the card: its path relative to the card, and its prompt."""

    path: str
    prompt: str


class AdapterFile(NamedTuple):
    """The one file that holds the adapter, beside the card."""

    name: str
    size_bytes: int


def model_card(
    config: Mapping[str, Any],
    about: Mapping[str, Any],
    metrics: Mapping[str, Any],
    pictures: Sequence[CardImage],
    file: AdapterFile,
    *,
    grids: Sequence[str] = (),
    drawn: int = 0,
    repo_id: str | None = None,
) -> str:
    """The card of a run. Settings that are missing are left out, so older runs have cards too.

    Args:
        config: the run's settings, local paths reduced to their last part.
        about: the header of the adapter: sampling, training, versions.
        metrics: the run's scores and counts; may be empty.
        pictures: what is shown, with the adapter.
        file: the adapter as one file.
        grids: relative paths of the contact sheets, one per concept.
        drawn: how many such pictures the run has, of which `pictures` are some.
        repo_id: where it is shared, "owner/name"; None = the reader has the folder.
    """
    config = {**config, "method": about.get("method") or config.get("method") or "atoms"}
    sections = [
        front_matter(config, pictures),
        f"# {escaped(Path(file.name).stem)}: {escaped(_method(config))} for {escaped(_base(config))}",
        _what_it_is(config, metrics, file),
        "## The word\n\n" + _words(config),
        "## Pictures\n\n" + _pictures(pictures, grids, drawn, about) if pictures or grids else "",
        "## Scores\n\n" + _scores(config, metrics) if metrics.get("clip") else "",
        "## How it was trained\n\n" + _training(config, about, metrics),
        "## How to load it\n\n" + _loading(config, about, file, repo_id),
        "## Limits\n\n" + _limits(metrics),
    ]
    return "\n\n".join(section for section in sections if section) + "\n"


def front_matter(config: Mapping[str, Any], pictures: Sequence[CardImage]) -> str:
    """The YAML block that the hub reads."""
    prompts = [concept["instance_prompt"] for concept in _concepts(config) if concept.get("instance_prompt")]
    data = {
        "base_model": _base(config) if is_hub_id(_base(config)) else None,
        "library_name": "diffusers",
        "tags": [*TAGS, "lora" if _method(config) in LORAS else _method(config).replace(" ", "-")],
        "instance_prompt": prompts[0] if prompts else None,
        "widget": [{"text": prompt, "output": {"url": path}} for path, prompt in pictures],
    }
    data = {key: value for key, value in data.items() if value}
    return f"---\n{yaml.safe_dump(data, sort_keys=False, allow_unicode=True, width=10**6)}---"


def _what_it_is(config: Mapping[str, Any], metrics: Mapping[str, Any], file: AdapterFile) -> str:
    training = metrics.get("training", {})
    counts = [
        f"{training[key]:,} {what}"
        for key, what in (
            ("trained_numbers", f"numbers of {_method(config)}"),
            ("trained_token_numbers", "of the new word's embedding"),
            ("trained_text_numbers", "in the text encoder"),
        )
        if training.get(key)
    ]
    trained = f": {_listed(counts)} were trained, everything else stays as it is" if counts else ""
    words = [token for concept in _concepts(config) for token in _tokens(concept)]
    what = f"the word {_listed([code(word) for word in words])}" if words else "one concept"
    base = code(_base(config))
    paper = f" ({PAPER})" if _method(config) == ATOMS else ""
    method = f"*{_method(config)}* alone{paper}"
    if training.get("trained_text_numbers"):
        method = f"*{_method(config)}*{paper} and an adapter of its text encoder"
    size = f"{file.size_bytes / 1e3:.1f} KB" if file.size_bytes < 1e6 else f"{file.size_bytes / 1e6:.1f} MB"
    return (
        f"It teaches the Stable Diffusion base {base} {what} by {method}{trained}. "
        f"The file {code(file.name)} of {size} is the whole adapter."
    )


def _words(config: Mapping[str, Any]) -> str:
    rows = []
    for concept in _concepts(config):
        prompt = escaped(concept.get("instance_prompt") or "")
        starts = (concept.get("initializer_token") or "").split()
        tokens = _tokens(concept)
        starts = starts * len(tokens) if len(starts) == 1 else starts
        for token, start in zip(tokens, starts or [""] * len(tokens), strict=False):
            rows.append([cell(code(token)), f"what the training pictures show: “{prompt}”", escaped(start)])
    if rows:
        return table(["in a prompt", "it stands for", "it started from the word"], rows)
    prompts = _listed([f"“{escaped(concept.get('instance_prompt') or '')}”" for concept in _concepts(config)])
    return f"There is no new word; the concept is called as in training: {prompts}."


def _pictures(pictures: Sequence[CardImage], grids: Sequence[str], drawn: int, about: Mapping[str, Any]) -> str:
    parts = []
    if pictures:
        sampling = about.get("sampling", {})
        forms = {"scheduler": "sampler {}", "num_inference_steps": "{} steps", "guidance_scale": "guidance {:g}"}
        how = [form.format(sampling[key]) for key, form in forms.items() if sampling.get(key) is not None]
        some = (
            f": {len(pictures)} of the run's {drawn} template pictures, evenly spread" if drawn > len(pictures) else ""
        )
        made = f" ({', '.join(how)})" if how else ""
        parts.append(escaped(f"With the adapter, not picked by eye{some}{made}."))
        parts.append(_picture_table(pictures))
    if grids:
        parts.append("All of the run, beside the training pictures and what the base draws:")
        parts += [f"![Contact sheet]({quote(grid)})" for grid in grids]
    return "\n\n".join(parts)


def _picture_table(pictures: Sequence[CardImage]) -> str:
    """Rows of pictures with their prompts below; Markdown wants a header, so the first pictures are it."""
    lines = []
    columns = min(COLUMNS, len(pictures))
    for start in range(0, len(pictures), columns):
        row = list(pictures[start : start + columns])
        blank = [""] * (columns - len(row))
        lines.append([f"![{escaped(prompt)}]({quote(path)})" for path, prompt in row] + blank)
        lines.append([escaped(prompt) for _, prompt in row] + blank)
    return table(lines[0], lines[1:], centred=True)


def _scores(config: Mapping[str, Any], metrics: Mapping[str, Any]) -> str:
    rows, worse = [], []
    blocks = {"": metrics["clip"]} | {f"{name}: ": own for name, own in metrics.get("clip_by_concept", {}).items()}
    for where, block in blocks.items():
        adapted, base = block.get("adapted", {}), block.get("base", {})
        for key in dict.fromkeys([key for key in (*SCORES, *adapted, *base) if key in adapted or key in base]):
            label = escaped(where + SCORES.get(key, key))
            values = adapted.get(key), base.get(key)
            difference = None if None in values else values[0] - values[1]
            rows.append([label, *map(_number, values), _number(difference, "+.3f")])
            if difference is not None and difference < 0:
                worse.append(label.partition(",")[0])
    judge = config.get("clip_model_name_or_path")
    text = [
        f"By {f'the CLIP model {code(judge)}' if judge else 'a CLIP model'}, adapter and base on the same seeds and "
        "prompts, the base with the plain word in place of the new one; higher is closer to the pictures, closer to "
        "the prompts, more diverse.",
        table(["", "adapter", "base", "difference"], rows, right=[False, True, True, True]),
    ]
    if worse:
        text.append(f"Below the base: {'; '.join(worse)}.")
    return "\n\n".join(text)


def _training(config: Mapping[str, Any], about: Mapping[str, Any], metrics: Mapping[str, Any]) -> str:
    header = about.get("training", {})
    steps = metrics.get("training", {}).get("steps") or header.get("steps") or config.get("max_train_steps")
    per_step = header.get("pictures_per_step")
    versions = about.get("versions", {})
    revision = config.get("revision")
    rows = {
        "Base": code(_base(config)) + (f", revision {code(revision)}" if revision else ""),
        "Training pictures": header.get("pictures"),
        "Prompt": "; ".join(escaped(concept.get("instance_prompt") or "") for concept in _concepts(config)),
        "Resolution": f"{config['resolution']} px" if config.get("resolution") else None,
        "Steps": f"{steps:,}" + (f", {per_step} pictures each" if per_step else "") if steps else None,
        "What is trained": escaped(_adapted(config)),
        "Learning rates": _rates(config, header),
        "Precision of the base": {"no": "float32"}.get(config.get("mixed_precision"), config.get("mixed_precision")),
        "Prior preservation": None if config.get("prior") in (None, "none") else escaped(config["prior"]),
        "Seed": header.get("seed", config.get("seed")),
        "Versions": escaped(", ".join(f"{name} {number}" for name, number in versions.items())),
    }
    return table(["", ""], [[key, cell(str(value))] for key, value in rows.items() if value not in (None, "")])


def _adapted(config: Mapping[str, Any]) -> str:
    m, m1, kc = (config.get(key) or 0 for key in ("m", "m1", "kc"))
    parts = []
    if _method(config) != ATOMS:
        m = kc = 0
        sizes = {key: config[key] for key in ("rank", "alpha", "factor", "block_size") if config.get(key) is not None}
        parts = [" ".join([_method(config), *(f"{key}={value:g}" for key, value in sizes.items())])]
    if m:
        parts.append(f"m = {m} atoms per layer" + (f" out of m1 = {m1} per input channel" if m1 else ""))
    if kc:
        parts.append(f"block atoms over {kc}×{kc} channels on {config.get('block_layers', 'pointwise')} layers")
    if config.get("target"):
        parts = [f"{_listed(parts)} on {config['target']}"]
    if config.get("train_token_embedding"):
        parts.append("the new word's embedding")
    if config.get("train_text_encoder"):
        parts.append(f"{config.get('text_adapter', 'an adapter')} in the text encoder")
    return "; ".join(parts)


def _rates(config: Mapping[str, Any], header: Mapping[str, Any]) -> str:
    used = {
        "learning_rate": True,
        "beta_learning_rate": config.get("m1") and config.get("train_beta", True),
        "token_learning_rate": config.get("train_token_embedding"),
        "text_learning_rate": config.get("train_text_encoder"),
    }
    values = {key: header.get(key, config.get(key)) for key in RATES if used[key]}
    whose = RATES if _method(config) == ATOMS else RATES | {"learning_rate": _method(config)}
    rates = [f"{value:g} ({whose[key]})" for key, value in values.items() if value is not None]
    schedule = [config["lr_scheduler"]] if rates and config.get("lr_scheduler") else []
    return escaped(", ".join(rates + schedule))


def _loading(config: Mapping[str, Any], about: Mapping[str, Any], file: AdapterFile, repo_id: str | None) -> str:
    base, source = _base(config), repo_id or file.name
    concept = _concepts(config)[0]
    word = concept.get("placeholder_token") or concept.get("initializer_token") or ""
    prompt = f"The {word} at night" if word else concept.get("instance_prompt") or ""
    sampling = about.get("sampling", {})
    options = "".join(
        f", {key}={sampling[key]:g}"
        for key in ("num_inference_steps", "guidance_scale")
        if sampling.get(key) is not None
    )
    revision = f", revision={_literal(config['revision'])}" if config.get("revision") else ""
    load = "load_atoms" if _method(config) == ATOMS else "load_adapter"
    if base == "pocket":
        opening = [f"from sd_atoms import {load}", "from sd_atoms.pipeline import open_base"]
        pipe = 'pipe = open_base("pocket")  # comes with the package'
    else:
        opening = ["from diffusers import StableDiffusionPipeline", f"from sd_atoms import {load}"]
        note = "" if is_hub_id(base) else "  # your folder of this base"
        pipe = f"pipe = StableDiffusionPipeline.from_pretrained({_literal(base)}{revision}){note}"
    lines = [
        *opening,
        "",
        pipe,
        f"{load}(pipe, {_literal(source)})" + ("" if repo_id else "  # or the folder that this card is in"),
        f'pipe({_literal(prompt)}{options}).images[0].save("picture.png")',
    ]
    command = [
        "sd-atoms generate",
        f"--adapter {_quoted(source)}",
        f"--pretrained_model_name_or_path {_quoted(base)}",
        *([f"--revision {_quoted(config['revision'])}"] if config.get("revision") else []),
        "--prompts prompts.txt",
        *([f"--token {_quoted(word)}"] if word else []),
        "--seeds 0-3 --out pictures_of_it",
    ]
    return (
        "With the `sd_atoms` package:\n\n"
        + fenced("python", "\n".join(lines))
        + "\n\n`pipe.set_adapters`, `disable_lora`, `fuse_lora` and the like then work on it as on a LoRA."
        "\n\nOr, with templates such as `a watercolor painting of the {}` in `prompts.txt`, one per line:\n\n"
        + fenced("sh", " \\\n  ".join(command))
    )


def _limits(metrics: Mapping[str, Any]) -> str:
    judged = "the scores are of one run by one CLIP model" if metrics.get("clip") else "nothing was scored"
    return (
        f"It knows its subject from a few pictures, and {judged}: expect it to follow prompts less closely than its "
        "base does, to drift where the prompt is far from the training pictures, and to fit no base of another "
        "architecture."
    )


def _concepts(config: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """The entries of `concepts`, or the one that the settings themselves describe."""
    return list(config.get("concepts") or [config])


def _tokens(concept: Mapping[str, Any]) -> list[str]:
    return (concept.get("placeholder_token") or "").split()


def _method(config: Mapping[str, Any]) -> str:
    """What people call the method; runs of old have no such setting."""
    name = config.get("method", "atoms")
    return ATOMS if name == "atoms" else name


def _base(config: Mapping[str, Any]) -> str:
    return str(config.get("pretrained_model_name_or_path") or "its base")


def _number(value: float | None, form: str = ".3f") -> str:
    return number_text(value, form).replace("-", "−")


def _listed(items: Sequence[str]) -> str:
    """a, b and c"""
    return " and ".join([*([", ".join(items[:-1])] if items[:-1] else []), *items[-1:]])


def _literal(text: str) -> str:
    """A Python string on one line."""
    return json.dumps(text, ensure_ascii=False)


def _quoted(text: str) -> str:
    return shlex.quote(" ".join(text.split()))
