"""CUDA without a GPU: tensors that hold real values on the CPU and say that they are on cuda:0.

Inside `pretending()`, a tensor's storage is marked when a call would have put it on the GPU. From then on tensors on it answer
`.device` with cuda:0, an operation on tensors of two devices raises, Triton's kernels run in the interpreter and take GPU
tensors only, and everything that would make the host wait for the GPU is written down with the line that asked for it. Values
are real, so code that branches on them goes where it would go on a GPU. What it cannot tell: speed, memory, streams, and
whether a kernel compiles.

Two modes of torch do the work. `_Function` sees calls as Python makes them, with the device that was asked for, and gives torch
the CPU instead. `_Operations` sees what torch makes of them, backward passes included.

A mode holds in the thread that enters it; a test runs the loader in its own.
"""

import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves

ROOT = Path(__file__).parents[2]
OURS = (f"{ROOT}/rec_dist/", f"{ROOT}/kernels/")
GPU, CPU = torch.device("cuda", 0), torch.device("cpu")

# Operations whose result has a size, or is a number, that only the GPU knows.
_WAITING = {
    "_local_scalar_dense",
    "bincount",
    "equal",
    "histc",
    "masked_select",
    "nonzero",
    "unique_consecutive",
    "unique_dim",
    "_unique",
    "_unique2",
}
_INDEXED = {"index", "index_put", "index_put_", "_index_put_impl_", "_unsafe_index"}
# Functions of Python that take a device. Those of the second set copy values from the host.
_FACTORIES = {
    *(
        "arange",
        "empty",
        "empty_like",
        "empty_strided",
        "eye",
        "full",
        "full_like",
        "linspace",
        "new_empty",
        "new_full",
        "new_ones",
    ),
    *(
        "new_zeros",
        "ones",
        "ones_like",
        "rand",
        "rand_like",
        "randint",
        "randn",
        "randn_like",
        "randperm",
        "scalar_tensor",
        "zeros",
    ),
    "zeros_like",
}
_COPYING = {"as_tensor", "new_tensor", "tensor"}
_MAKING = _FACTORIES | _COPYING
# Python of torch that only passes a call on.
_PASSING = (
    "torch/functional.py",
    "torch/nn/functional.py",
    "torch/_tensor.py",
    "torch/overrides.py",
    "torch/utils/_contextlib.py",
    "torch/_jit_internal.py",
    "torch/_compile.py",
    "torch/_dynamo/eval_frame.py",
)


class MixedDevicesError(RuntimeError):
    """An operation on tensors of the CPU and of the GPU."""


@dataclass(frozen=True)
class Wait:
    """The host waits for the GPU. place: file:function of who asked; line: file:line; caller: our own line behind a library's."""

    what: str
    place: str
    line: str
    caller: str
    ours: bool

    def __str__(self) -> str:
        return f"{self.what} at {self.line}" + ("" if self.ours else f", called from {self.caller}")


@dataclass
class Pretence:
    """What happened since the last take(). to_gpu: copies from pinned memory that nobody waits for."""

    waits: list[Wait] = field(default_factory=list)
    to_gpu: int = 0
    kernels: list[str] = field(default_factory=list)
    _gpu: dict[int, StorageWeakRef] = field(default_factory=dict)  # a weak reference also keeps the number from being used again
    _pinned: dict[int, StorageWeakRef] = field(default_factory=dict)

    def take(self) -> "Pretence":
        """Return what happened since the last call, and begin again."""
        taken = Pretence(self.waits, self.to_gpu, self.kernels)
        self.waits, self.to_gpu, self.kernels = [], 0, []
        return taken

    @property
    def own_waits(self) -> dict[str, int]:
        """place -> how many waits our own files asked for."""
        return _counted(wait for wait in self.waits if wait.ours)

    @property
    def other_waits(self) -> dict[str, int]:
        """place -> how many waits other packages, or a test, asked for."""
        return _counted(wait for wait in self.waits if not wait.ours)

    def on_gpu(self, tensor: Tensor) -> bool:
        """Whether the tensor is on the pretended GPU."""
        return _storage(tensor)._cdata in self._gpu

    def is_pinned(self, tensor: Tensor) -> bool:
        """Whether the tensor is in pinned memory of the host."""
        return tensor.untyped_storage()._cdata in self._pinned

    def put(self, tensor: Tensor, on_gpu: bool) -> Tensor:
        """Say where the tensor's storage is."""
        storage = _storage(tensor)
        if on_gpu:
            self._gpu[storage._cdata] = StorageWeakRef(storage)
        else:
            self._gpu.pop(storage._cdata, None)
        return tensor

    def pin(self, tensor: Tensor) -> Tensor:
        """Say that the tensor's storage is pinned."""
        storage = tensor.untyped_storage()
        self._pinned[storage._cdata] = StorageWeakRef(storage)
        return tensor

    def wait(self, what: str) -> None:
        """Write down a wait of the host."""
        self.waits.append(_asked(what))

    def transfer(self, source: Tensor, to_gpu: bool, non_blocking: bool) -> None:
        """Write down a copy between host and GPU."""
        if to_gpu and non_blocking and self.is_pinned(source):
            self.to_gpu += 1
            return
        ways = {True: "copy to the GPU", False: "copy to the host"}
        how = " from pageable memory" if to_gpu and not self.is_pinned(source) else ""
        self.wait(f"{ways[to_gpu]}{how}")


def _storage(tensor: Tensor) -> torch.UntypedStorage:
    while torch._C._functorch.is_functorch_wrapped_tensor(tensor):  # inside torch.vmap
        tensor = torch._C._functorch.get_unwrapped(tensor)
    return tensor.untyped_storage()


def _counted(waits: Iterator[Wait]) -> dict[str, int]:
    counts: dict[str, int] = {}
    for wait in waits:
        counts[wait.place] = counts.get(wait.place, 0) + 1
    return counts


def _asked(what: str) -> Wait:
    """Who asked for a wait: the innermost frame that is not this file or a part of torch that passes calls on."""
    asked, caller = None, None
    frame: Any = sys._getframe(1)
    while frame is not None and caller is None:
        file, name = frame.f_code.co_filename, frame.f_code.co_name
        if file != __file__ and not file.endswith(_PASSING):
            here = (_short(file), name, frame.f_lineno)
            asked = asked or here
            caller = here if file.startswith(OURS) else None
        frame = frame.f_back
    assert asked is not None
    ours = asked is caller
    shown = "nothing of ours" if caller is None else f"{caller[0]}:{caller[2]}"
    return Wait(what, f"{asked[0]}:{asked[1]}", f"{asked[0]}:{asked[2]}", shown, ours)


def _short(file: str) -> str:
    return file.split("site-packages/")[-1].removeprefix(f"{ROOT}/")


class _Operations(TorchDispatchMode):
    """Checks the devices of every operation, marks what it makes, and notes those that wait."""

    def __init__(self, pretence: Pretence) -> None:
        super().__init__()
        self.pretence = pretence
        self.in_factory = False  # `_Function` marks what is made

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        with torch._C.DisableTorchFunction():
            return self._operate(func, args, kwargs or {})

    def _operate(self, func: Any, args: Any, kwargs: Any) -> Any:
        name = func._schema.name.split("::")[1]
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        on_gpu = [self.pretence.on_gpu(tensor) for tensor in tensors]
        if any(on_gpu):
            self._check(func, name, args, kwargs, tensors, on_gpu)
        result = func(*args, **kwargs)
        # In a backward pass autograd itself makes zeros for gradients that are missing, on the device of what they belong to.
        made_by_autograd = not tensors and not self.in_factory and torch._C._current_graph_task_id() != -1
        if made_by_autograd or (any(on_gpu) and name not in ("copy_", "_local_scalar_dense")):
            for leaf in tree_leaves(result):
                if isinstance(leaf, Tensor) and not any(leaf is tensor for tensor in tensors):
                    self.pretence.put(leaf, True)
        return result

    def _check(self, func: Any, name: str, args: Any, kwargs: Any, tensors: list[Tensor], on_gpu: list[bool]) -> None:
        if name == "copy_":
            if on_gpu[0] != on_gpu[1]:
                non_blocking = bool(kwargs.get("non_blocking", len(args) > 2 and args[2]))
                self.pretence.transfer(tensors[1], on_gpu[0], non_blocking)
            return
        host = [tuple(tensor.shape) for tensor, gpu in zip(tensors, on_gpu, strict=True) if not gpu and tensor.dim() > 0]
        if name in _INDEXED and on_gpu[0]:
            indices = [leaf for leaf in tree_leaves(args[1]) if isinstance(leaf, Tensor)]
            if not all(self.pretence.on_gpu(index) for index in indices):
                self.pretence.wait("copy of an index to the GPU")
            if any(index.dtype in (torch.bool, torch.uint8) for index in indices):
                self.pretence.wait(f"{name} with a mask")
            return
        if host:  # a tensor without dimensions is a number, which goes with the call
            raise MixedDevicesError(f"{func} got tensors of the GPU, and of the CPU of shapes {host}, at {_asked(name).line}")
        if name in _WAITING or (name == "repeat_interleave" and kwargs.get("output_size") is None):
            self.pretence.wait(name)


class _Function(TorchFunctionMode):
    """Answers what a tensor says of its device, and makes and moves tensors as if there were a GPU."""

    def __init__(self, pretence: Pretence, operations: _Operations) -> None:
        super().__init__()
        self.pretence, self.operations = pretence, operations

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        name = getattr(func, "__name__", "")
        first = args[0] if args and isinstance(args[0], Tensor) else None
        if name == "__get__" and first is not None:
            return self._attribute(func, first, args, kwargs)
        if first is not None and name in ("to", "cpu", "cuda"):
            return self._to(name, first, args[1:], kwargs)
        if first is not None and name == "is_pinned":
            return self.pretence.is_pinned(first)
        if first is not None and name == "pin_memory":
            return self.pretence.pin(first.clone())
        if first is not None and self.pretence.on_gpu(first):
            if name in ("numpy", "__array__"):
                raise TypeError(f"can't convert a tensor of cuda:0 to numpy, at {_asked(name).line}")
            if name == "get_device":
                return 0
            if name == "tolist":
                self.pretence.wait(name)
        if name in _MAKING:
            return self._make(func, name, args, kwargs)
        return func(*args, **kwargs)

    def _attribute(self, func: Any, tensor: Tensor, args: Any, kwargs: Any) -> Any:
        name = getattr(func.__self__, "__name__", "")
        if name == "device":
            return GPU if self.pretence.on_gpu(tensor) else CPU
        if name == "is_cuda":
            return self.pretence.on_gpu(tensor)
        if name == "is_cpu":
            return not self.pretence.on_gpu(tensor)
        return func(*args, **kwargs)

    def _make(self, func: Any, name: str, args: Any, kwargs: Any) -> Tensor:
        device, pinned = kwargs.get("device"), kwargs.pop("pin_memory", False)
        on_gpu = None if device is None else _is_gpu(device)
        if on_gpu:
            kwargs["device"] = CPU
        elif on_gpu is None and args and isinstance(args[0], Tensor):
            on_gpu = self.pretence.on_gpu(args[0])
        self.operations.in_factory = True
        try:
            made: Tensor = func(*args, **kwargs)
        finally:
            self.operations.in_factory = False
        if name in _COPYING and on_gpu and not (isinstance(args[0], Tensor) and self.pretence.on_gpu(args[0])):
            self.pretence.wait("values copied to the GPU")
            made = made.clone()
        if pinned:
            self.pretence.pin(made)
        return self.pretence.put(made, bool(on_gpu))

    def _to(self, name: str, tensor: Tensor, args: Any, kwargs: Any) -> Tensor:
        copy, here = kwargs.pop("copy", False), self.pretence.on_gpu(tensor)
        there, dtype, non_blocking = here, None, kwargs.get("non_blocking", False)
        if name != "to":
            there = name == "cuda"
        elif args and isinstance(args[0], Tensor):
            there, dtype = self.pretence.on_gpu(args[0]), args[0].dtype
        else:
            device, dtype, non_blocking, _ = torch._C._nn._parse_to(*args, **kwargs)
            there = here if device is None else _is_gpu(device)
        moved = tensor if dtype is None else tensor.to(dtype)
        if there == here:
            return moved.clone() if copy and moved is tensor else moved
        self.pretence.transfer(tensor, there, non_blocking)
        return self.pretence.put(moved.clone() if moved is tensor else moved, there)


def _is_gpu(device: Any) -> bool:
    return isinstance(device, int) or torch.device(device).type == "cuda"


@contextmanager
def outside() -> Iterator[None]:
    """Within `pretending`, what runs here knows nothing of it: the kernels' interpreter, and loading a model.

    transformers loads by way of meta tensors, and buffers that are in no file would be left without values.
    """
    with ExitStack() as stack:
        while torch.overrides._get_current_function_mode_stack():
            stack.enter_context(torch.overrides._pop_mode_temporarily())
        stack.enter_context(_disable_current_modes())
        yield


@contextmanager
def pretending() -> Iterator[Pretence]:
    """Inside, this thread has a GPU. Needs TRITON_INTERPRET=1, set before triton is imported."""
    from triton.runtime import interpreter

    pretence, run = Pretence(), interpreter.InterpretedFunction.run

    def checked(kernel: Any, *args: Any, grid: Any, warmup: bool, **options: Any) -> Any:
        host = [
            tuple(given.shape) for given in (*args, *options.values()) if isinstance(given, Tensor) and not pretence.on_gpu(given)
        ]
        if host:
            raise MixedDevicesError(f"kernel {kernel.fn.__name__} got tensors of the CPU of shapes {host}")
        pretence.kernels.append(kernel.fn.__name__)
        with outside():
            return run(kernel, *args, grid=grid, warmup=warmup, **options)

    operations = _Operations(pretence)
    function, run_backward = _Function(pretence, operations), torch.autograd._engine_run_backward

    def within_the_mode(*args: Any, **options: Any) -> Any:
        """backward() goes through the mode, which is off until that returns; the backward passes inside are Python, too."""
        with function:
            return run_backward(*args, **options)

    interpreter.InterpretedFunction.run, torch.autograd._engine_run_backward = checked, within_the_mode
    try:
        with function, operations:
            yield pretence
    finally:
        interpreter.InterpretedFunction.run, torch.autograd._engine_run_backward = run, run_backward
