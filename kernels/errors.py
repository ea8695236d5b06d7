"""The one exception for what an op does not do."""


class UnsupportedError(NotImplementedError):
    """An op cannot run as it was asked to: not on this device, these arrays, or this derivative.

    The message is one line that says why. Command lines print it and exit with code 2.
    """
