"""The one exception for input that cannot be used."""


class InputError(ValueError):
    """Something the caller gave cannot be used.

    The message is one line for the person who gave it: what was wrong, and what is accepted.
    Command lines print it and exit with code 2; anything else is a defect and shows a traceback.
    """
