"""The one exception a person is meant to read."""


class UserError(Exception):
    """What is wrong, where, and what to do: printed as one line, exit code 2, no traceback.

    Raise it wherever the cause is input, configuration or the machine. Anything else that escapes a stage is a bug of
    ours and keeps its traceback.
    """
