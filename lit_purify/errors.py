"""The one exception that a user's input can cause, and the exit status of a run that can go on."""


class InputError(ValueError):
    """Something the user gave cannot be used: the message is one line that names the thing and the remedy.

    The command line prints it and ends with exit status 2; a library caller sees a plain ``ValueError``.
    """


INTERRUPTED = 75
"""Exit status (EX_TEMPFAIL) of a run that was stopped, or lost a process: the same command goes on."""
