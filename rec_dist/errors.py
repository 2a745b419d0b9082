"""What the package raises when a run ends early and you can do something about it, and how it quotes an error of others.

The command line exits with 2, 1 or 75 then.
"""

# What to do when the model/ of a finished run is damaged: its last checkpoint is enough to write model/ again.
TRAIN_AGAIN = "remove finished.json of that run and train it again, which ends where it ended"


class UserError(ValueError):
    """A mistake of the user. The command line shows one line `error: ...` and exits with 2.

    The message names the key, file or row, the value, the limit and what to do.
    """


class StopRequested(Exception):  # noqa: N818 - a request, not an error
    """A signal or a stop file asked the run to stop. Run it again to go on from its newest checkpoint. Exit code 75."""


class WorkerFailedError(RuntimeError):
    """A worker failed, and no restart is left or would help. The message ends with the worker's traceback. Exit code 1."""


class UnreachableError(RuntimeError):
    """A store of data did not answer in the middle of a run. A restart may help. Exit code 1."""


class NotFiniteError(RuntimeError):
    """Too many losses or gradients in a row were not finite (train.max_bad_steps), or a score is no number. Exit code 1."""


class OutOfMemoryError(RuntimeError):
    """Memory ran out. The message says which keys to change. Exit code 1."""


class DiskError(RuntimeError):
    """The disk is full, read-only, broken, or not writable for this user. Exit code 1."""


def one_line(fault: BaseException, most: int = 300) -> str:
    """What an exception says, as one line of up to `most` characters; the name of its type if it says nothing."""
    text = " ".join(str(fault).split()) or type(fault).__name__
    return text if len(text) <= most else text[: most - 3] + "..."
