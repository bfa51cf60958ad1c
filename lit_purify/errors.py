"""The one exception that a user's input can cause."""


class InputError(ValueError):
    """Something the user gave cannot be used: the message is one line that names the thing and the remedy.

    The command line prints it and ends with exit status 2; a library caller sees a plain ``ValueError``.
    """
