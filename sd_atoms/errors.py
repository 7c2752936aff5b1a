"""What the user is told: errors to mend and warnings to weigh."""

from collections.abc import Sequence

MOST_TOLD = 20  # lines of a list


class UserError(Exception):
    """Bad input: one line that names the file or field, the value got and what is allowed.

    The command line prints the message without a traceback and exits with code 2.
    """


class AtomsWarning(UserWarning):
    """Something the user should know although the job goes on; the command line shows these and no library's."""


def shortlist(names: Sequence[str], most: int = 4) -> str:
    """The first `most` names, and how many more there are."""
    more = f" and {len(names) - most:,} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more


def plural(number: int, noun: str) -> str:
    """A number and its noun, in the plural unless there is one."""
    return f"{number:,} {noun}{'s' * (number != 1)}"


def first_lines(lines: Sequence[str]) -> list[str]:
    """The first lines of a list, and one on how many more there are."""
    more = len(lines) - MOST_TOLD
    return [*lines[:MOST_TOLD], f"… and {more:,} more"] if more > 0 else [*lines]


def refuse(problems: Sequence[str], heading: str) -> None:
    """Raises all problems as one error, of many the first ones; none is silence.

    Args:
        problems: one line each.
        heading: the line above several.

    Raises:
        UserError: one line for one problem; the heading and an indented line each for several, `first_lines` of them.
    """
    if len(problems) == 1:
        raise UserError(problems[0])
    if problems:
        raise UserError("\n  ".join([heading, *first_lines(problems)]))
