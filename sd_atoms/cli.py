"""The command line: words in, objects out. What a command needs is imported inside it.

A command is a module of `sd_atoms.commands`: its docstring describes it, `Settings` are its flags, `run` does it.
"""

import ast
import codecs
import errno
import importlib
import importlib.util
import os
import re
import shlex
import signal
import sys
import unicodedata
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path

from sd_atoms.errors import AtomsWarning, UserError
from sd_atoms.settings import Parser, add_flags, resolve
from sd_atoms.values import near

PLAIN_WORDS = "d beta alpha kappa pi epsilon gamma omega lambda sum sqrt (x) -> <- ... x - - - <= >= ~ * \" \" ' '"
PLAIN = dict(zip("ΔβακπεγωλΣ√⊗→←…×–—−≤≥≈·“”‘’", PLAIN_WORDS.split(), strict=True))
COMMANDS = (
    "train",
    "doctor",
    "generate",
    "again",
    "evaluate",
    "drift",
    "compare",
    "sweep",
    "sheet",
    "pick",
    "inspect",
    "share",
    "export",
    "import",
    "extract",
    "vtab",
    "classify",
    "bench",
    "pretrain-pocket",
)
VERBS = {
    "vtab": ("table", "make-demo", "run"),
    "classify": ("train", "evaluate", "predict", "cam", "merge", "compare"),
    "bench": ("step", "serve", "decompose", "sparse", "forms", "data", "pocket"),
}  # a module each
CONFIGURED = ("train", "doctor", "generate", "drift", "classify train")  # take a YAML file of settings


def main(words: Sequence[str] | None = None) -> int:
    """`sd-atoms`: returns the exit code; 2 for bad input, with one line on stderr."""
    return _run(lambda: _dispatch(list(sys.argv[1:] if words is None else words)))


def train_main(words: Sequence[str] | None = None) -> int:
    """`train_dreambooth_atoms.py`: the same as `sd-atoms train`."""
    return _run(lambda: _start("train", list(sys.argv[1:] if words is None else words), "train_dreambooth_atoms.py"))


def _dispatch(words: list[str]) -> None:
    program = "sd-atoms"
    about = "Personalise Stable Diffusion by training only filter atoms."
    command = _choose(words, program, COMMANDS, "sd_atoms.commands", about)
    _start(command, words[1:], f"{program} {command}")


def _choose(words: list[str], program: str, choices: Sequence[str], package: str, description: str) -> str:
    """The first word, if it is one of the choices, modules of a package; else help, or an error that names them."""
    if not words or words[0] not in choices:
        if words and not words[0].startswith("-"):
            raise UserError(f"no command {words[0]!r}{near(words[0], choices)}; see {program} --help")
        parser = Parser(prog=program, description=description)
        commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
        for choice in choices:
            commands.add_parser(choice, help=_summary(f"{package}.{choice.replace('-', '_')}"))
        parser.parse_args(words[:1])
    return words[0]


def _summary(module: str) -> str:
    """What the docstring of a module begins with; nothing of it is imported, which would take seconds for all."""
    source = Path(importlib.util.find_spec(module).origin).read_text(encoding="utf-8")
    return " ".join(ast.get_docstring(ast.parse(source)).partition("\n\n")[0].split()).replace("%", "%%")


def _start(command: str, words: list[str], program: str) -> None:
    module = importlib.import_module(f"sd_atoms.commands.{command.replace('-', '_')}")
    from sd_atoms.training.interrupt import Interrupted

    words, settings = [_underscored(word) for word in words], getattr(module, "Settings", None)
    if command in VERBS:
        verb = _choose(words, program, VERBS[command], module.__name__, module.__doc__)
        module = importlib.import_module(f"{module.__name__}.{verb.replace('-', '_')}")
        words, program, settings = words[1:], f"{program} {verb}", getattr(module, "Settings", None)
        command = f"{command} {verb}"
    parser = Parser(prog=program, description=module.__doc__)
    try:
        if settings is None:  # a command that reads its words itself
            module.add_arguments(parser)
            module.run(parser.parse_args(words))
        else:
            module.run(_settings(parser, settings, words, command in CONFIGURED))
    except Interrupted as stop:
        again = shlex.join([*program.split(), *(word for word in words if word != "--overwrite")])
        if command == "classify train" and not any(word.startswith("--resume_from") for word in words):
            again += " --resume_from_checkpoint latest"
        if command == "train":
            start = program if program.startswith("sd-atoms") else f"accelerate launch {program}"
            own = shlex.join(["--config", f"{stop.run}/config.yaml"])
            again = f"{start} {own} --resume_from_checkpoint latest"
        _say(f"\nStopped after step {stop.step}; the checkpoint is saved in {stop.run}. To go on:\n  {again}")
        raise SystemExit(128 + stop.signal_number) from None


def _settings(parser: Parser, settings: type, words: list[str], configured: bool):
    """Flags, and the YAML file of --config, as settings."""
    if configured:
        # a list of all flags would hide the groups below it
        parser.usage = "%(prog)s [--config FILE] [--FLAG VALUE …]"
        parser.add_argument(
            "--config", metavar="FILE", help="YAML file of settings; flags of the command line win over it"
        )
    add_flags(parser, settings)
    known, unknown = parser.parse_known_args(words)
    flags = vars(known)
    return resolve(settings, flags, flags.pop("config", None), unknown)


def _underscored(word: str) -> str:
    """--compare-base and --compare_base are the same flag; argparse writes the opposite of --x as --no-x."""
    if not word.startswith("--"):
        return word
    name, equals, value = word.partition("=")
    name = "--" + name[2:].replace("-", "_")
    return name.replace("--no_", "--no-", 1) + equals + value


def _run(job: Callable[[], None]) -> int:
    from sd_atoms.training.interrupt import follow_launcher

    follow_launcher()
    codecs.register_error("plain", _plainly)
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="plain")
    warnings.showwarning = _show_warning
    import diffusers
    import transformers

    for library in (transformers, diffusers):
        library.utils.logging.set_verbosity_error()  # their notices are for those who call them
    try:
        job()
        sys.stdout.flush()  # while a broken pipe can still be told
    except UserError as error:
        _say("error: " + re.sub(r"[\r\n]+(?!  )", " ", str(error)))  # a name may hold line breaks; lists are indented
        return 2
    except BrokenPipeError:  # `sd-atoms … | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # nothing is left to be flushed at the end
        return 128 + signal.SIGPIPE
    except OSError as error:
        if error.errno == errno.ENAMETOOLONG:  # every look at such a path fails, whoever takes it
            _say(f"error: {str(error.filename)[:100]!r}…: {error.strerror}")
        elif error.errno in (errno.ENOSPC, errno.EDQUOT):  # while a line was added to a log; see `files` for the rest
            _say("error: no space left on the disk for a log; every checkpoint and adapter written before is whole")
        else:
            raise
        return 2
    except UnicodeEncodeError as error:  # the name of a file, under a locale such as C
        if error.encoding != sys.getfilesystemencoding():
            raise
        _say(f"error: {error.object!r}: the locale ({error.encoding}) can name no such file; set PYTHONUTF8=1")
        return 2
    except KeyboardInterrupt:
        return 130
    return 0


def _plainly(error: UnicodeError) -> tuple[str, int]:
    """Stands in for letters that a console, a log or LC_ALL=C has no sign for."""
    if not isinstance(error, UnicodeEncodeError):
        raise error
    plain = []
    for letter in error.object[error.start : error.end]:
        bare = unicodedata.normalize("NFKD", letter).encode("ascii", "ignore").decode()
        plain.append(PLAIN.get(letter) or bare or "?")
    return "".join(plain), error.end


def _say(text: str) -> None:
    if int(os.environ.get("RANK", 0)) == 0:
        print(text, file=sys.stderr)


def _show_warning(message, category, filename, lineno, file=None, line=None) -> None:
    if issubclass(category, AtomsWarning):
        _say(f"warning: {message}")
