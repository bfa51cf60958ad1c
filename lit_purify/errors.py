"""The one exception that a user's input can cause, lines about choices made for the user, and an exit status."""

import functools
import sys


class InputError(ValueError):
    """Something the user gave cannot be used: the message is one line that names the thing and the remedy.

    The command line prints it and ends with exit status 2; a library caller sees a plain ``ValueError``.
    """


SPEAKING = True
"""Whether this process says what was chosen for the user; of several processes the first one does."""


@functools.cache
def notice(line: str) -> None:
    """Says once, on stderr, what was chosen for the user; of several processes the first one says it."""
    if SPEAKING:
        print(line, file=sys.stderr, flush=True)


INTERRUPTED = 75
"""Exit status (EX_TEMPFAIL) of a run that was stopped, or lost a process: the same command goes on."""
