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


def first_lines(lines: Sequence[str]) -> list[str]:
    """The first lines of a list, and one on how many more there are."""
    more = len(lines) - MOST_TOLD
    return [*lines[:MOST_TOLD], f"… and {more:,} more"] if more > 0 else [*lines]
