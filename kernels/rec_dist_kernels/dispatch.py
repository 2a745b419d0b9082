"""The one place that chooses an operation's implementation, so that "auto" means the same everywhere."""

from typing import Literal, TypeVar, get_args

Impl = Literal["auto", "reference", "triton"]
Op = TypeVar("Op")


def choose(op: str, impl: Impl, *, reference: Op, triton: Op | None = None) -> Op:
    """The implementation of `op` that `impl` asks for.

    auto: the reference, on every device, as no operation has a faster one in this version.
    reference: plain PyTorch.  triton: the fused kernel.

    Errors: ValueError if `impl` is unknown, or if it is "triton" and the operation has no Triton
    implementation: an explicit choice is never replaced by another one.
    """
    if impl not in get_args(Impl):
        raise ValueError(f"impl={impl!r} of {op} is unknown; use one of {', '.join(get_args(Impl))}")
    if impl == "triton":
        if triton is None:
            raise ValueError(f'{op} has no Triton implementation in this version; use impl="auto" or "reference"')
        return triton
    return reference
