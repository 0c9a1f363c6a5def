"""What an op's first call with arguments of a kind works out, for its later calls to go by.

Checks, tiles and the choice of compiled code follow from the kind of the arguments: shapes,
strides, dtypes, devices, whether the data lies at a multiple of 16 bytes, and what is no tensor.
They take the host longer than many kernels take a GPU, and in a denoiser's steps come up again and
again. So an op's plan is made once for each kind, by a function of the arguments that returns a
function of the arguments, whose work is to allocate and to launch.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor

from ._triton import triton

MOST = 1024  # kinds that are remembered of an op; then it starts over

Run = Callable[..., Any]
Plans = dict[tuple[Any, ...], Run]

if triton is not None:  # where hooks are kept has moved in Triton 3.4
    _HOOKS = triton.knobs.runtime if hasattr(triton, "knobs") else triton.compiler.CompiledKernel


def nothing(*_: object) -> None:
    """Do nothing: there is nothing to compute, or to return."""


def remembered(plan: Callable[..., Run], known: Plans | None = None) -> Run:
    """A function that runs the plan of its arguments' kind, which is made when it first comes up.

    What raises is not remembered: a plan starts with the checks.

    Args:
        plan: Makes one.
        known: Where they are kept, for others to clear.
    """
    plans: Plans = {} if known is None else known

    def run(*args: Any) -> Any:
        kind = tuple(
            [
                (a.shape, a.stride(), a.dtype, a.device, a.data_ptr() & 15)
                if isinstance(a, Tensor)
                else a
                for a in args
            ]
        )
        found = plans.get(kind)
        if found is None:
            found = plan(*args)
            if len(plans) >= MOST:
                plans.clear()
            plans[kind] = found
        return found(*args)

    return run


def launch(
    kernel: Any, grid: Sequence[int], tensors: Sequence[Tensor], *numbers: float, **constants: Any
) -> Callable[..., None]:
    """Compile a kernel for such tensors, and return what launches it on others of their kind.

    That goes past what Triton does at each launch to find the code for the arguments. New tensors
    are as much aligned as those given here, since allocators align by more than 16 bytes.

    Args:
        kernel: Takes tensors, then numbers, then constants.
        grid: Up to three numbers of programs; nothing is launched if one is 0.
        tensors: Examples, as whose dtypes the kernel takes the data of others.
        numbers: That are the same in each launch.
        constants: By name, Triton's own options among them.
    """
    if not math.prod(grid):
        return nothing
    compiled = kernel.warmup(*tensors, *numbers, grid=grid, **constants)
    if compiled is None:  # as in the interpreter
        dtypes = [tensor.dtype for tensor in tensors]

        def interpret(*tensors: Tensor) -> None:
            typed = (tensor.view(dtype) for tensor, dtype in zip(tensors, dtypes))
            kernel[grid](*typed, *numbers, **constants)

        return interpret
    values = *numbers, *(constants[name] for name in kernel.arg_names if name in constants)
    # Triton 3.2 leaves the constants out, which later versions take and ignore.
    values = values[: len(compiled.src.signature) - len(tensors)]
    programs = (*grid, 1, 1)[:3]
    announced, run = compiled[programs], compiled.run  # the first loads the code
    function, metadata = compiled.function, compiled.packed_metadata

    def start(*tensors: Tensor) -> None:
        if _watched():
            announced(*tensors, *values)
        else:
            stream = triton.runtime.driver.active.get_current_stream(tensors[0].device.index)
            run(*programs, stream, function, metadata, None, None, None, *tensors, *values)

    return start


def _watched() -> bool:
    """Whether a profiler is to be told of launches, which takes Triton longer than launching."""
    hooks = _HOOKS.launch_enter_hook, _HOOKS.launch_exit_hook
    return any([getattr(hook, "calls", hook) for hook in hooks])  # a chain of them, since 3.5
