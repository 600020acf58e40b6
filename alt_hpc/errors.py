"""The one exception that a user is meant to read: a sentence naming what is wrong and where."""


class InputError(Exception):
    """Wrong input. The message is one sentence that names file, line and field where known.

    The command line prints it to stderr and exits with status 2; nothing has been queued.
    """
