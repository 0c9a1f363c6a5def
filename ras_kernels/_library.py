"""The ops' registration with PyTorch, so that `torch.compile` sees one node for each."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from . import _checks
from ._plans import Plans, Run, nothing, remembered
from ._triton import INTERPRETED, supports, triton

_LIBRARY = torch.library.Library("ras_kernels", "DEF")

PLANS: dict[str, Callable[..., Run]] = {}
"""Each op's plan by its kernel, with all checks, by name."""
KNOWN: dict[str, Plans] = {}
"""Those plans of each op that have been made, to be cleared where rules have changed."""


def register(
    schema: str,
    *,
    check: Callable[..., None],
    reference: Run,
    plan: Callable[..., Run | None],
    fake: Run = nothing,
    rows: Callable[..., int] = lambda tokens, *_: tokens.shape[1],
) -> Callable[..., Any]:
    """Define the op `torch.ops.ras_kernels.<name>`, and return a function that calls it.

    `define` and `impl` cost less per call than `torch.library.custom_op`. All functions take the
    op's arguments.

    Args:
        schema: Of the op, its name first; what it writes to is marked `(a!)`.
        check: Raises ValueError for wrong arguments; of tensors it goes by all but their values.
        reference: The PyTorch definition, for all devices without a kernel.
        plan: A function that launches the Triton kernel on arguments of the same kind (see
            `_plans`), or None if the kernel does not take such; it may not keep the tensors.
        fake: The shapes and dtypes of what the op returns, if anything.
        rows: How many rows there are for an `index` to name: those of the first argument.
    """
    name, reference = schema.partition("(")[0], without_autocast(reference)
    _LIBRARY.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
    op = getattr(torch.ops.ras_kernels, name).default
    names = [argument.name for argument in op._schema.arguments]

    at = names.index("index") if "index" in names else None

    def looking(run: Run) -> Run:
        """Look at an index's values first, if they are to be read."""
        if at is None:
            return run

        def looked(*args: Any) -> Any:
            index = args[at]
            if index is not None and (index.is_cpu or _checks.CHECKS_INDICES):
                _checks.check_range(index, rows(*args))
            return run(*args)

        return looked

    def checked(run: Run) -> Run:
        def after_checks(*args: Any) -> Any:
            check(*args)
            return run(*args)

        return after_checks

    def checked_plan(*args: Any) -> Run:
        check(*args)
        kinds = [(value.device, value.dtype) for value in args if isinstance(value, Tensor)]
        kinds += [(args[0].device, value) for value in args if isinstance(value, torch.dtype)]
        known = all(supports(*kind) for kind in kinds)
        return looking((plan(*args) if known else None) or reference)

    PLANS[name] = checked_plan
    planned = remembered(checked_plan, KNOWN.setdefault(name, {}))
    _LIBRARY.impl(name, checked(looking(reference)), "CompositeExplicitAutograd")
    if triton is not None:
        _LIBRARY.impl(name, on_its_device(planned), "CUDA")  # AMD's GPUs too
    if INTERPRETED:
        _LIBRARY.impl(name, planned, "CPU")
    torch.library.register_fake(f"ras_kernels::{name}", checked(fake), lib=_LIBRARY)

    def call(*args: Any) -> Any:
        if torch.compiler.is_compiling():
            check(*args)  # so that what raises is this, and no error of the compiler's about it
            return op(*args)
        try:
            return op(*args)
        except Exception as error:
            if type(error) is not ValueError:  # PyTorch's, of arguments that it does not take
                _checks.check_types(op._schema, args)
                check(*args)
            raise

    return call


def without_autocast(run: Run) -> Run:
    """As kernels, definitions compute in the dtypes that they are given."""

    def run_without(*args: Any) -> Any:
        kind = args[0].device.type
        if not torch.is_autocast_enabled(kind):
            return run(*args)
        with torch.autocast(kind, enabled=False):
            return run(*args)

    return run_without


def on_its_device(run: Run) -> Run:
    """Triton launches on the current device, which need not be that of the tensors."""

    def run_there(*args: Any) -> Any:
        device = args[0].device
        if device.index == torch.cuda.current_device():
            return run(*args)
        with torch.cuda.device(device):
            return run(*args)

    return run_there
