"""The command line: words in, objects out. What a command needs is imported inside it."""

import errno
import os
import re
import shlex
import sys
import warnings
from collections.abc import Callable, Sequence

from sd_atoms.errors import AtomsWarning, UserError
from sd_atoms.settings import Parser, add_flags, resolve

TRAIN_DESCRIPTION = "Teaches Stable Diffusion a concept from a few pictures by training only filter atoms."


def main(words: Sequence[str] | None = None) -> int:
    """`sd-atoms`: returns the exit code; 2 for bad input, with one line on stderr."""
    return _run(lambda: _dispatch(list(sys.argv[1:] if words is None else words)))


def train_main(words: Sequence[str] | None = None) -> int:
    """`train_dreambooth_atoms.py`: the same as `sd-atoms train`."""
    return _run(lambda: _train(list(sys.argv[1:] if words is None else words), "train_dreambooth_atoms.py"))


def _dispatch(words: list[str]) -> None:
    parser = Parser(prog="sd-atoms", description="Personalise Stable Diffusion by training only filter atoms.")
    parser.add_argument("command", choices=COMMANDS, metavar="{" + ",".join(COMMANDS) + "}", help="what to do")
    if not words or words[0] not in COMMANDS:
        parser.parse_args(words[:1])  # --help, or an error that names the commands
    COMMANDS[words[0]](words[1:], f"sd-atoms {words[0]}")


def _train(words: list[str], program: str) -> None:
    from sd_atoms.training.config import TrainConfig

    config = _settings(TrainConfig, words, program, TRAIN_DESCRIPTION)
    from sd_atoms.recipes.personalise import personalise
    from sd_atoms.training.interrupt import Interrupted

    try:
        personalise(config)
    except Interrupted as stop:
        _say(
            f"\nStopped after step {stop.step}; the checkpoint is saved. To go on:\n"
            f"  accelerate launch train_dreambooth_atoms.py --config {config.output_dir}/config.yaml "
            "--resume_from_checkpoint latest"
        )
        raise SystemExit(128 + stop.signal_number) from None


def _doctor(words: list[str], program: str) -> None:
    from sd_atoms.training.config import TrainConfig

    config = _settings(TrainConfig, words, program, "Lists what is wrong or odd about a training run; starts none.")
    from sd_atoms.recipes.doctor import doctor

    doctor(config)


def _generate(words: list[str], program: str) -> None:
    from sd_atoms.recipes.draw import DrawConfig

    config = _settings(DrawConfig, words, program, "Draws pictures from prompt templates with an adapter.")
    from sd_atoms.recipes.draw import draw

    draw(config)


def _drift(words: list[str], program: str) -> None:
    from sd_atoms.recipes.drift import DriftConfig

    config = _settings(DriftConfig, words, program, "Measures how far an adapter moves pictures of other things.")
    from sd_atoms.recipes.drift import report_drift

    report_drift(config)


def _sweep(words: list[str], program: str) -> None:
    from sd_atoms.recipes import sweep_command
    from sd_atoms.training.interrupt import Interrupted

    words = [_underscored(word) for word in words]
    try:
        _delegate(sweep_command, words, program, "Trains a run per point of a grid of settings, and makes one table.")
    except Interrupted as stop:
        again = shlex.join(word for word in words if word != "--overwrite")
        _say(f"\nStopped after step {stop.step}; {stop.checkpoint} is saved. To go on:\n  {program} {again}")
        raise SystemExit(128 + stop.signal_number) from None


def _inspect(words: list[str], program: str) -> None:
    from sd_atoms.recipes import inspect_command

    _delegate(
        inspect_command, words, program, "Says what an adapter changes, layer by layer, or what a UNet has to adapt."
    )


def _share(words: list[str], program: str) -> None:
    from sd_atoms.recipes import share_command

    _delegate(share_command, words, program, "Makes a finished run a folder to give away, and uploads it if asked to.")


def _bench(words: list[str], program: str) -> None:
    from sd_atoms.bench import command

    _delegate(command, words, program, "Measures speed and memory on this machine.")


def _pretrain_pocket(words: list[str], program: str) -> None:
    from sd_atoms.pocket.pretrain import command

    _delegate(
        command, words, program, "Makes the pocket base again, from its procedural world to the finished folders."
    )


COMMANDS: dict[str, Callable[[list[str], str], None]] = {
    "train": _train,
    "doctor": _doctor,
    "generate": _generate,
    "drift": _drift,
    "sweep": _sweep,
    "inspect": _inspect,
    "share": _share,
    "bench": _bench,
    "pretrain-pocket": _pretrain_pocket,
}


def _settings(settings: type, words: list[str], program: str, description: str):
    """Flags and the YAML file of --config as settings."""
    # a list of all flags would hide the groups below it
    parser = Parser(prog=program, usage="%(prog)s [--config FILE] [--FLAG VALUE …]", description=description)
    parser.add_argument(
        "--config", metavar="FILE", help="YAML file of settings; flags of the command line win over it"
    )
    add_flags(parser, settings)
    known, unknown = parser.parse_known_args([_underscored(word) for word in words])
    flags = vars(known)
    path = flags.pop("config")
    return resolve(settings, flags, path, unknown)


def _underscored(word: str) -> str:
    """--compare-base and --compare_base are the same flag; argparse writes the opposite of --x as --no-x."""
    if not word.startswith("--"):
        return word
    name, equals, value = word.partition("=")
    name = "--" + name[2:].replace("-", "_")
    return name.replace("--no_", "--no-", 1) + equals + value


def _delegate(command, words: list[str], program: str, description: str) -> None:
    parser = Parser(prog=program, description=description)
    command.add_arguments(parser)
    command.run(parser.parse_args(words))


def _run(job: Callable[[], None]) -> int:
    warnings.showwarning = _show_warning
    import diffusers
    import transformers

    for library in (transformers, diffusers):
        library.utils.logging.set_verbosity_error()  # their notices are for those who call them
    try:
        job()
    except UserError as error:
        _say("error: " + re.sub(r"[\r\n]+(?!  )", " ", str(error)))  # a name may hold line breaks; lists are indented
        return 2
    except OSError as error:
        if error.errno == errno.ENAMETOOLONG:  # every look at such a path fails, whoever takes it
            _say(f"error: {str(error.filename)[:100]!r}…: {error.strerror}")
        elif error.errno in (errno.ENOSPC, errno.EDQUOT):  # while a line was added to a log; see `files` for the rest
            _say("error: no space left on the disk for a log; every checkpoint and adapter written before is whole")
        else:
            raise
        return 2
    except KeyboardInterrupt:
        return 130
    return 0


def _say(text: str) -> None:
    if int(os.environ.get("RANK", 0)) == 0:
        print(text, file=sys.stderr)


def _show_warning(message, category, filename, lineno, file=None, line=None) -> None:
    if issubclass(category, AtomsWarning):
        _say(f"warning: {message}")
