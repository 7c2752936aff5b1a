"""Settings as frozen dataclasses: one table of defaults that makes the flags, reads the YAML and checks both.

Later sources win: default, then what `accelerate launch` says in the environment, then the YAML file of --config, then
the command line. Every mistake of all sources is reported at once. Settings may be composed of sections, one for each
part of the program that uses them; flags and YAML keys are those of all sections, side by side.
"""

import argparse
import dataclasses
import os
import types
import typing
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

import yaml

from sd_atoms.errors import UserError
from sd_atoms.sources import packaged_file
from sd_atoms.values import coerce, near, shown

# what kohya's scripts and others of diffusers call our settings
ELSEWHERE = {
    "network_dim": "rank", "network_alpha": "alpha", "optimizer_type": "optimizer", "unet_lr": "learning_rate",
    "text_encoder_lr": "text_learning_rate", "lr_text_encoder": "text_learning_rate", "min_snr_gamma": "snr_gamma",
    "v_parameterization": "prediction_type", "zero_terminal_snr": "rescale_betas_zero_snr",
    "enable_bucket": "aspect_ratio_buckets", "flip_aug": "random_flip", "masked_loss": "masks",
    "cache_latents": "cache_dir", "cache_latents_to_disk": "cache_dir", "save_every_n_steps": "checkpointing_steps",
    "max_train_epochs": "num_train_epochs", "network_module": "method",
}  # fmt: skip


def setting(
    default: Any,
    group: str,
    help: str,
    *,
    choices: Sequence[str] | None = None,
    low: float | None = None,
    high: float | None = None,
    required: bool = False,
    unless: Sequence[str] = (),
    item: type | None = None,
    many: bool = False,
    positional: bool = False,
    aliases: Sequence[str] | Mapping[str, Any] = (),
    environment: str | None = None,
    file: bool = False,
    needs: Sequence[str] = (),
) -> Any:
    """A dataclass field that is also a flag.

    Args:
        default: its value where nobody says otherwise.
        group: heading under which --help lists it.
        help: one line; a None default is explained in it.
        choices: all allowed values.
        low, high: smallest and largest allowed number.
        required: None is no answer, unless one of the fields named in `unless` is set.
        item: the field is a tuple of these settings; a YAML list of mappings gives it, no flag does.
        many: the field is a tuple of text; its flag may come several times, a YAML file gives one text or a list.
        positional: the command line gives it without its name.
        aliases: other names of the flag and YAML key; a mapping gives the value that such a switch stands for.
        environment: variable by which `accelerate launch` sets the same.
        file: names a file; in a YAML file it counts from there, where such a file is there. The word none is no file.
        needs: what it does nothing without: another setting, as "dataset_name", or some values of it, as
            "loss_type=huber|smooth_l1".
    """
    metadata = dict(group=group, help=help, choices=choices, low=low, high=high, required=required, unless=unless)
    metadata |= dict(item=item, many=many, positional=positional, environment=environment, file=file, needs=needs)
    metadata |= dict(aliases=dict(aliases) if isinstance(aliases, Mapping) else dict.fromkeys(aliases))
    return dataclasses.field(default=default, metadata=metadata)


def unmet_needs(settings: Any, as_if_left_out: Mapping[str, Any] | None = None) -> list[str]:
    """One line for each setting that would do nothing, because what it needs is not there.

    0, False and None ask for nothing and so need nothing.

    Args:
        settings: all of them.
        as_if_left_out: name -> value that counts as if nobody had set it, beside the default.
    """
    found, values, same = [], flat(settings), as_if_left_out or {}
    for name, (_, field) in fields_of(type(settings)).items():
        value = values[name]
        if not value or value in (field.default, same.get(name)):
            continue
        shown_name = f"{name}={value}" if field.metadata["choices"] else name
        for need in field.metadata["needs"]:
            other, _, allowed = need.partition("=")
            if not (str(values[other]) in allowed.split("|") if allowed else values[other]):
                found.append(f"{shown_name} needs {need.replace('|', ' or ')}")
    return found


def section(settings: type) -> Any:
    """A dataclass field that holds some of the settings, for the part of the program that uses these."""
    return dataclasses.field(default_factory=settings, metadata={"section": settings})


def flat(settings: Any) -> dict[str, Any]:
    """Name -> value of all settings, those of its sections among them."""
    values = {}
    for field in dataclasses.fields(settings):
        value = getattr(settings, field.name)
        values |= flat(value) if "section" in field.metadata else {field.name: value}
    return values


def replaced(settings: Any, **changes: Any) -> Any:
    """The same settings with other values, in whatever section they are.

    Raises:
        TypeError: there is no such setting.
    """
    own = {}
    for field in dataclasses.fields(settings):
        if "section" in field.metadata:
            names = fields_of(field.metadata["section"]).keys() & changes.keys()
            if names:
                part = {name: changes.pop(name) for name in names}
                own[field.name] = replaced(getattr(settings, field.name), **part)
    return dataclasses.replace(settings, **own, **changes)


def fields_of(settings: type) -> dict[str, tuple[type, dataclasses.Field]]:
    """Name -> (the section that has it, the field) of all settings, in order."""
    found = {}
    for field in dataclasses.fields(settings):
        part = field.metadata.get("section")
        found |= {field.name: (settings, field)} if part is None else fields_of(part)
    return found


def build(settings: type, values: Mapping[str, Any]) -> Any:
    """Settings of those values; what is left out has its default.

    Raises:
        TypeError: there is no such setting.
    """
    own, rest = {}, dict(values)
    for field in dataclasses.fields(settings):
        if "section" in field.metadata:
            part = field.metadata["section"]
            own[field.name] = build(part, {name: rest.pop(name) for name in fields_of(part) if name in rest})
    return settings(**own, **rest)


class Parser(argparse.ArgumentParser):
    """Reports a mistake as UserError, so that every command ends alike."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter, **kwargs)

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message} (see {self.prog} --help)")


def add_flags(parser: argparse.ArgumentParser, settings: type) -> None:
    """One flag per field, under the field's group; absent flags stay out of the parsed result."""
    groups = {}
    for name, (owner, field) in fields_of(settings).items():
        meta, kind = field.metadata, _kind(owner, name)
        if meta["item"]:
            continue
        note = "" if field.default in (None, ()) else f" (default: {field.default})"
        note = " (required)" if meta["required"] else note
        options = dict(help=(meta["help"] + note).replace("%", "%%"), default=argparse.SUPPRESS)
        if meta["positional"]:
            parser.add_argument(name, nargs=None if meta["required"] else "?", metavar=name.upper(), **options)
            continue
        group = groups.setdefault(meta["group"], parser.add_argument_group(meta["group"]))
        same = [f"--{name}", *(f"--{alias}" for alias, value in meta["aliases"].items() if value is None)]
        if kind is bool:
            group.add_argument(*same, dest=name, action=argparse.BooleanOptionalAction, **options)
        elif meta["many"]:
            group.add_argument(*same, dest=name, metavar="STR", action="append", **options)
        else:
            metavar = "{" + ",".join(meta["choices"]) + "}" if meta["choices"] else kind.__name__.upper()
            group.add_argument(*same, dest=name, metavar=metavar, **options)
        for alias, value in meta["aliases"].items():
            if value is not None:
                options["help"] = f"the same as --{name} {value}"
                group.add_argument(f"--{alias}", action=argparse.BooleanOptionalAction, **options)


def resolve(
    settings: type, flags: Mapping[str, Any], config_path: str | None = None, unknown: Sequence[str] = ()
) -> Any:
    """Builds the settings from defaults, the launcher's environment, a YAML file and flags.

    Args:
        settings: the dataclass.
        flags: field name -> text or bool, as parsed.
        config_path: a YAML file of field names and values, or the short name of a packaged one, or None.
        unknown: command-line words that no flag took.

    Raises:
        UserError: everything that is wrong, in one line.
    """
    fields = fields_of(settings)
    problems = [f"unknown flag {word}{_meant(word.lstrip('-'), fields)}" for word in unknown if word.startswith("--")]
    problems += [f"unexpected word {word!r}" for word in unknown[:1] if not word.startswith("--")]
    values = launcher_settings(settings)
    for origin, entries in ((config_path, read_config(config_path) if config_path else {}), (None, flags)):
        for name, value in _by_own_names(fields, entries).items():
            try:
                values[name] = coerced(settings, name, value)
            except ValueError as error:
                where = "" if name not in fields else f"--{name}: " if origin is None else f"{name}: "
                problems.append(f"{where}{error}")
                continue
            if origin is not None:
                values[name] = _from_there(Path(origin).parent, fields[name][1], values[name])
    reported = {problem.split(":")[0].lstrip("-") for problem in problems}
    for name, (_, field) in fields.items():
        excused = any(values.get(other) not in (None, ()) for other in field.metadata["unless"])
        if field.metadata["required"] and values.get(name) in (None, ()) and name not in reported and not excused:
            same = "".join(f" (--{alias})" for alias, value in field.metadata["aliases"].items() if value is None)
            problems.append(f"{name}{same} is required: {field.metadata['help']}")
    if problems:
        of_words = all(problem.startswith(("--", "unknown flag", "unexpected word")) for problem in problems)
        source = f"{config_path}: " if config_path and not of_words else ""
        count = f"{len(problems)} problems: " if len(problems) > 1 else ""
        raise UserError(source + count + "; ".join(problems))
    return build(settings, values)


def _meant(word: str, fields: Mapping[str, Any]) -> str:
    """Which setting somebody had in mind, for a message; empty where none is known."""
    word = word.partition("=")[0]
    return f" (here: {ELSEWHERE[word]})" if ELSEWHERE.get(word) in fields else near(word, fields)


def _from_there(folder: Path, field: dataclasses.Field, value: Any) -> Any:
    """A value of a YAML file in that folder: files count from there, where they are there."""
    if field.metadata["item"] and value:
        own = dataclasses.fields(field.metadata["item"])
        return tuple(
            dataclasses.replace(entry, **{f.name: _from_there(folder, f, getattr(entry, f.name)) for f in own})
            for entry in value
        )
    is_there = field.metadata["file"] and isinstance(value, str) and (folder / value).is_file()
    return str(folder / value) if is_there else value


def launcher_settings(settings: type) -> dict[str, Any]:
    """What `accelerate launch` says of these settings in the environment; what it says to no purpose is left out."""
    found = {}
    for name, (_, field) in fields_of(settings).items():
        text = os.environ.get(field.metadata["environment"] or "")
        if text:
            try:
                found[name] = coerced(settings, name, text)
            except ValueError as error:
                raise UserError(f"{field.metadata['environment']}: {error}") from error
    return found


def launcher_notes(settings: Any) -> list[str]:
    """One line on each setting about which the launcher says something else than the default: what holds."""
    notes, values = [], flat(settings)
    for name, said in launcher_settings(type(settings)).items():
        if said != fields_of(type(settings))[name][1].default:
            other = "" if values[name] == said else f", as set here; accelerate launch says {said}"
            notes.append(f"{name}: {values[name]}{other or ', as accelerate launch says'}")
    return notes


def _by_own_names(fields: Mapping[str, Any], entries: Mapping[str, Any]) -> dict[str, Any]:
    """The same entries without aliases; a setting's own name wins over a switch that stands for one of its values."""
    known = {alias: (name, value) for name, (_, f) in fields.items() for alias, value in f.metadata["aliases"].items()}
    own = {name: value for name, value in entries.items() if name not in known}
    for alias, given in entries.items():
        if alias in known:
            name, stands_for = known[alias]
            if stands_for is None:
                own.setdefault(name, given)
            elif given is True:
                own.setdefault(name, stands_for)
            elif given is not False:
                own[alias] = given  # is reported as no such key: neither true nor false
    return own


def read_config(path: str | Path) -> dict[str, Any]:
    """The mapping in the file of --config."""
    return read_yaml(config_file(path))


def config_file(path: str | Path) -> Path:
    """The file of --config: a path, or the short name of a packaged one such as pocket/castle."""
    packaged = None if Path(path).exists() else packaged_file(str(path), "configs", ".yaml")
    return packaged or Path(path)


def read_settings(settings: type, path: str | Path) -> dict[str, Any]:
    """What a YAML file of these settings says, under their own names; nothing is checked.

    Raises:
        UserError: as `read_yaml`.
    """
    return _by_own_names(fields_of(settings), read_yaml(path))


def read_yaml(path: str | Path) -> dict[str, Any]:
    """The mapping in a YAML file.

    Raises:
        UserError: no such file, not YAML, or not a mapping.
    """
    try:
        entries = yaml.safe_load(Path(path).read_text(encoding="utf-8-sig"))
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot be read ({getattr(error, 'strerror', None) or error})") from error
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = f" at line {mark.line + 1}" if mark else ""
        reason = " ".join(str(getattr(error, "problem", error)).split())
        raise UserError(f"{path}: not valid YAML{line} ({reason})") from error
    except (ValueError, RecursionError) as error:  # a date such as 2024-13-45, lists in lists in lists …
        raise UserError(f"{path}: not valid YAML ({error})") from error
    if entries is None:
        return {}
    if not isinstance(entries, dict):
        raise UserError(f"{path}: must hold `name: value` lines, got a {type(entries).__name__}")
    return entries


def to_yaml(values: Any) -> str:
    """The settings as YAML in the order of their fields."""
    return yaml.safe_dump(plain_values(values), sort_keys=False, allow_unicode=True, width=119)


def plain_values(values: Any) -> dict[str, Any]:
    """Name -> value of all settings, as a YAML file has them."""
    return {
        name: [dataclasses.asdict(entry) for entry in value] if isinstance(value, tuple) else value
        for name, value in flat(values).items()
    }


def coerced(settings: type, name: Any, value: Any) -> Any:
    """A value as the setting of that name has it.

    Raises:
        ValueError: there is no such setting, or the value is not allowed.
    """
    fields = fields_of(settings)
    if name not in fields:
        raise ValueError(f"unknown key {shown(name)}{_meant(str(name), fields)}")
    owner, field = fields[name]
    item = field.metadata["item"]
    if field.metadata["many"]:
        return tuple(coerce(field, str, entry) for entry in (value if isinstance(value, (list, tuple)) else [value]))
    if item is None or value is None:
        return coerce(field, _kind(owner, name), value)
    return _items(item, value)


def _items(item: type, entries: Any) -> tuple:
    """A list of mappings as settings, all mistakes in one ValueError."""
    if not isinstance(entries, (list, tuple)) or not all(isinstance(entry, dict) for entry in entries):
        raise ValueError(f"{shown(entries)} is not a list of `name: value` mappings")
    made, problems = [], []
    for number, entry in enumerate(entries):
        values = {}
        for name, value in entry.items():
            try:
                values[name] = coerced(item, name, value)
            except ValueError as error:
                problems.append(f"[{number}] {'' if name not in fields_of(item) else f'{name}: '}{error}")
        made.append(values)
    if problems:
        raise ValueError("; ".join(problems))
    return tuple(item(**values) for values in made)


def _kind(owner: type, name: str) -> type:
    """The plain type of a field: str of `str | None`."""
    hint = typing.get_type_hints(owner)[name]
    if isinstance(hint, types.UnionType):
        return next(part for part in typing.get_args(hint) if part is not type(None))
    return hint
