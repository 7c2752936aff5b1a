"""The one kind of error that is the user's to mend."""


class UserError(Exception):
    """Bad input: one line that names the file or field, the value got and what is allowed.

    The command line prints the message without a traceback and exits with code 2.
    """
