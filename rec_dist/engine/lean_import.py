"""Imports DeepSpeed without what it imports in vain."""

import sys


def import_deepspeed() -> None:
    """DeepSpeed's autotuner imports mlflow if it is installed, and does without it otherwise. That takes 2 CPU seconds.

    We never tune, so mlflow is kept from being found meanwhile. `import mlflow` works as usual afterwards.
    """
    if "deepspeed" in sys.modules or "mlflow" in sys.modules:
        return
    sys.modules["mlflow"] = None  # type: ignore[assignment] # Python's own way to say that a module cannot be imported
    try:
        import deepspeed  # noqa: F401
    finally:
        del sys.modules["mlflow"]
