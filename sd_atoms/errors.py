"""What the user is told: errors to mend and warnings to weigh."""


class UserError(Exception):
    """Bad input: one line that names the file or field, the value got and what is allowed.

    The command line prints the message without a traceback and exits with code 2.
    """


class AtomsWarning(UserWarning):
    """Something the user should know although the job goes on; the command line shows these and no library's."""
