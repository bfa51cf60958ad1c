"""The exception for wrong input, notices about automatic choices, and an exit status."""

import functools
import sys


class InputError(ValueError):
    """Wrong input. The message is one line that names the problem, its place and the remedy.

    The command line prints it and exits with status 2. Python callers can catch it as a ``ValueError``.
    """


SPEAKING = True
"""Whether this process prints notices; of several processes, only rank 0 does."""


@functools.cache
def notice(line: str) -> None:
    """Prints a line about an automatic choice on stderr, once; of several processes, only rank 0 prints."""
    if SPEAKING:
        print(line, file=sys.stderr, flush=True)


INTERRUPTED = 75
"""Exit status (EX_TEMPFAIL) of a run that was stopped or lost a process; the same command resumes it."""
