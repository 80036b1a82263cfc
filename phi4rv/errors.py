"""The one error that a user of the package is meant to read."""


class UserError(Exception):
    """Something the caller gave is wrong.

    The message is one line: it names the file, line or argument, and says what would be right. Command-line
    programs print it after ``error:`` and exit with 2; nothing else of the traceback is shown.
    """


class ContextLengthError(UserError):
    """A prompt has more tokens than the model's window holds."""
