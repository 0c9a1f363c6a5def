"""A test of a family's record, which needs nothing else to go by.

After a dense call, one of the same inputs that computes all tokens in shuffled order, or any half
of them, over the keys and values kept, has to give the same output. It does not if a record leaves
out a place where tokens enter or a layer of attention, names one whose keys are of other tokens, or
has the order of the text wrong.
"""

from __future__ import annotations

import copy
from typing import Any, cast

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from .api import is_enabled
from .branch import Branch, Call, form_of
from .denoisers import families_of
from .family import Family
from .mount import Mount
from .origin import Origin
from .plan import Reuse

TOLERANCE = {torch.float32: 1e-4, torch.float64: 1e-4, torch.bfloat16: 0.05, torch.float16: 0.01}


def check(pipe: Any, *, family: Family | None = None, **call: Any) -> float:
    """Try on a pipeline's own call whether its partial steps compute what they should.

    The pipeline runs as it is. Each call of its transformers is made three times more: densely,
    for all tokens in an order that is shuffled for each sample, and for half of these.

    Args:
        pipe: A pipeline that is not enabled, with partial steps (`ras models`).
        family: The record to try, instead of ours.
        **call: What the pipeline is called with; two steps (`num_inference_steps=2`) will do.

    Returns:
        The largest relative error of a call's output (Frobenius norm).

    Raises:
        AssertionError: The error is beyond rounding, or attention was not where it was looked for.
        ValueError: The pipeline is enabled, or has no partial steps.
        TypeError: `family` is no record.
    """
    if is_enabled(pipe):
        raise ValueError("the pipeline is enabled; call ras.disable on it first")
    families = families_of(pipe, family)
    for transformer, record in families:
        if not record.regions:
            raise ValueError(f"{type(transformer).__name__} has no partial steps")
    probes = [_Probe(*each, pipe.scheduler) for each in families]
    for probe in probes:
        probe.listen()
    try:
        with torch.no_grad():
            pipe(**call)
    finally:
        for probe in probes:
            probe.handle.remove()
    errors = [error for probe in probes for error in probe.errors]
    if not errors:
        raise AssertionError("the pipeline has not called its transformer")
    dtype = getattr(families[0][0], "dtype", torch.float32)
    if not max(errors) <= TOLERANCE.get(dtype, 0.05):
        raise AssertionError(
            f"partial steps of the inputs of a dense one differ from that: relative error "
            f"{max(errors):.2g}; the record of {families[0][1].model} is wrong for this call"
        )
    return max(errors)


class _Probe:
    """A transformer whose calls are made again; it takes the place of a session."""

    def __init__(self, transformer: Any, family: Family, scheduler: Any) -> None:
        self.transformer, self.family = transformer, family
        self.errors: list[float] = []
        self.handle: Any = None
        self._mount: Mount | None = None
        self._branch, self._share = Branch(), 0
        self.origin = Origin(None, scheduler)

    def listen(self) -> None:
        self.handle = self.transformer.register_forward_hook(self._again, with_kwargs=True)

    def _again(self, module: Any, args: Any, kwargs: Any, output: Any) -> None:
        if self._mount is not None:
            return  # one of ours
        self._mount = mount = Mount(module, self.family)
        name = mount.obstacle()
        if name is not None:
            self._mount = None
            raise AssertionError(f"the attention processor {name} cannot be stood in for")
        mount.add(cast(Any, self))
        try:
            self._branch = Branch()
            outputs = []
            for self._share in (0, 1, 2):
                given = copy.deepcopy((args, kwargs))
                outputs.append(module(*given[0], **given[1]))
        finally:
            mount.remove(cast(Any, self))
            self._mount = None
        dense, *partial = outputs
        self.errors += [_error(dense, output), *(_error(each, dense) for each in partial)]

    # --- what a mount asks of its session

    has_ended = False

    def expects_calls(self) -> bool:
        return True

    def is_here(self) -> bool:
        return True

    def begin_call(self, mount: Mount, inputs: dict[str, Any]) -> Call:
        """Compute all tokens, then all in another order, then the first half of another one."""
        family, branch = self.family, self._branch
        obstacle = mount.obstacle_of_ranks() or family.obstacle(mount.transformer, inputs)
        layout = family.layout(mount.transformer, inputs)
        latents = family.latents_of(inputs)
        if obstacle is not None or not layout.grid or latents is None:
            raise AssertionError(obstacle or f"there is no layout of {form_of(inputs)}")
        batch, first = len(latents), latents[0]
        if self._share:
            count = -(-layout.tokens // self._share)
            orders = [torch.randperm(layout.tokens)[:count] for _ in range(batch)]
            branch.rows = mount.agreed(torch.stack(orders).to(first.device, torch.int32))
        else:
            mount.make_room(branch, batch, layout, first.dtype, first.device, reuse=Reuse.HELD)
        branch.tokens.expect(branch.rows, 1.0, 0.0)
        walk = mount.walk(branch, layout, shared=batch == 1)
        return Call(branch, 1.0, 0.0, Reuse.HELD, walk)

    def attention_missed(self, *, again: bool) -> None:
        raise AssertionError(
            f"the attention of some layers in {list(self.family.attention)} was not seen: their "
            "keys are of other tokens than the record says"
        )

    def call_failed(self) -> None:
        """The error that has made it fail is on its way."""

    def end_of_call(self) -> None:
        """The pipeline has returned."""


def _error(found: Any, expected: Any) -> float:
    """The relative error of an output's tensors, of the rows that both have."""
    pairs = zip(pytree.tree_leaves(found), pytree.tree_leaves(expected))
    return max(_relative(a, b) for a, b in pairs if isinstance(a, Tensor))


def _relative(found: Tensor, expected: Tensor) -> float:
    if found.ndim == 3 and found.shape != expected.shape:  # references stay behind
        expected = expected[:, : found.shape[1]]
    difference, size = (found - expected).float().norm(), expected.float().norm()
    return (difference / size).item() if size else difference.item()
