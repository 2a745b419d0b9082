"""The ways a run ends early that its user can do something about. The command line turns them into exit codes 2, 1 and 75."""

# The way out where a finished run's model/ is damaged: its last checkpoint is enough to write model/ again.
TRAIN_AGAIN = "remove finished.json of that run and train it again, which ends where it ended"


class UserError(ValueError):
    """The user's mistake: shown as one line `error: ...` without a traceback, exit code 2.

    The message names the key, file or row, the value, the limit and the way out.
    """


class StopRequested(Exception):  # noqa: N818 - a request, not an error
    """A signal or a stop file asked the run to stop, and its checkpoint is on disk: exit code 75."""


class WorkerFailedError(RuntimeError):
    """A worker failed, and no restart is left or would help: shown as `failed: ...` with its traceback, exit code 1."""


class UnreachableError(RuntimeError):
    """A store of data did not answer in the middle of a run: shown as one line `failed: ...`, exit code 1; a restart may help."""


class NotFiniteError(RuntimeError):
    """Too many losses or gradients in a row were not finite: shown as one line `failed: ...`, exit code 1."""


class OutOfMemoryError(RuntimeError):
    """Memory ran out, and this is what to turn: shown as one line `failed: ...`, exit code 1."""


class DiskError(RuntimeError):
    """The disk is full, read-only, broken or closed to this user: shown as one line `failed: ...`, exit code 1."""
