"""The exceptions that end a stage without a traceback."""


class UserError(Exception):
    """What is wrong, where, and what to do: printed as one line, exit code 2, no traceback.

    Raise it wherever the cause is input, configuration or the machine. Anything else that escapes a stage is a bug of
    ours and keeps its traceback.
    """


class Stopped(Exception):  # noqa: N818 - not an error
    """The stage was asked to stop (Ctrl-C, SIGTERM), saved its state and can go on later: one line, exit code 75."""
