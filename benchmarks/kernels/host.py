"""The host's time for a call of each op, and where it goes; needs no GPU.

    python -m benchmarks.kernels.host
    python -m benchmarks.kernels.host --chip A100

Calls the ops on CPU tensors as if these were on a GPU, with kernels compiled for `--chip`, and a
driver that does nothing where it would launch: what the CUDA or HIP runtime takes is not in it. Of
a call's least time in many rounds, in a loop of equal calls:

- dispatch: the public function and PyTorch's dispatcher;
- checks: finding the plan of the arguments' kind, by which they have been checked;
- launch: of compiled code, up to the driver;
- the rest: making the output, and views.

Beside it what a call takes whose plan is to be made, with all checks and Triton's search for the
compiled code.
"""

from __future__ import annotations

import argparse
import itertools
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from types import SimpleNamespace
from typing import Any, NamedTuple
from unittest.mock import patch

import torch
import triton

from ras_kernels import _checks, _library, _plans, _triton

from ..commands import as_command
from ..tables import grid
from . import variants
from .chips import CHIPS, Chip
from .compiled import Driver
from .jobs import JOBS, LUMINA, SD3, prepare

CALLS, ROUNDS = 50, 100
MODELS = SD3(128, 0.5), LUMINA(128, 0.5)  # small, which to the host is all the same

Plan = Callable[..., _plans.Run]


class IdleDriver(Driver):
    """A chip's driver, as far as Triton's launches go; what they launch, `launched` is told."""

    def __init__(self, chip: Chip, launched: Callable[..., None] = _plans.nothing) -> None:
        super().__init__(chip)
        self.launcher_cls = lambda source, metadata: launched
        self.utils = SimpleNamespace(
            get_device_properties=lambda device: {"max_shared_mem": chip.shared},
            load_binary=lambda *_: ("module", "function", 0, 0, 1024),
        )

    def get_current_device(self) -> IdleDriver:
        return self  # so that no kernel is one that another such driver has loaded


@contextmanager
def as_if_on(
    driver: Driver, implement: Callable[[Plan], _plans.Run] = _plans.remembered
) -> Iterator[None]:
    """Have the ops do on CPU tensors what they do on those of a chip, or what is made of it."""
    library = torch.library.Library("ras_kernels", "IMPL")
    with ExitStack() as stack:
        stack.callback(library._destroy)
        for target, name, value in (
            (triton.runtime.driver, "_active", driver),
            (_triton, "architecture", lambda device: driver.chip.architecture),
            (_triton, "multiprocessors", lambda device: 132),
            (_library, "supports", lambda device, dtype: True),
            (_checks, "check_range", _plans.nothing),  # a GPU's indices are not read
            (torch.cuda, "current_device", lambda: None),  # the index of the device "cpu"
        ):
            stack.enter_context(patch.object(target, name, value))
        for op, plan in _library.PLANS.items():
            library.impl(op, _library.on_its_device(implement(plan)), "CPU")
        yield


class Spent(NamedTuple):
    """Microseconds of a call: of one that makes its plan, of later ones, and of their parts."""

    first: float
    later: float
    dispatch: float
    checks: float
    launch: float

    @property
    def rest(self) -> float:
        return self.later - self.dispatch - self.checks - self.launch


def spent(run: Callable[[], object], driver: IdleDriver) -> Spent:
    """What a call of an op, `run`, takes the host."""
    results = []

    def noting(plan: Plan) -> _plans.Run:
        def run_and_note(*args: Any) -> Any:
            results.append(plan(*args)(*args))
            return results[-1]

        return run_and_note

    def returning(*_: Any) -> Any:
        return results[0]

    with as_if_on(driver, noting):
        run()
    with as_if_on(driver, lambda plan: lambda *args: plan(*args)(*args)):
        first = least(run)
    with as_if_on(driver):
        later = least(run)
    with as_if_on(driver, lambda plan: returning):
        dispatch = least(run)
    with as_if_on(driver, lambda plan: _plans.remembered(lambda *_: returning)):
        found = least(run)
    with as_if_on(driver), ExitStack() as stack:
        for module in variants.MODULES:
            stack.enter_context(patch.object(module, "launch", lambda *_, **__: _plans.nothing))
        idle = least(run)
    return Spent(first, later, dispatch, found - dispatch, later - idle)


def least(run: Callable[[], object]) -> float:
    """Microseconds of a call in the fastest of the rounds, which had the processor to itself."""
    times = []
    for _ in range(ROUNDS + 1):  # the first one warms up
        start = time.perf_counter()
        for _ in range(CALLS):
            run()
        times.append(time.perf_counter() - start)
    return 1e6 * min(times[1:]) / CALLS


def main(argv: Sequence[str] | None = None) -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(prog="benchmarks.kernels.host", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--chip", choices=CHIPS, default="H100")
    options = parser.parse_args(argv)
    torch.set_num_threads(1)
    driver, rows = IdleDriver(CHIPS[options.chip]), []
    with torch.no_grad():
        for model, op in itertools.product(MODELS, JOBS):
            found = spent(prepare(op, model, "cpu").ours.run, driver)
            times = found.later, found.dispatch, found.checks, found.launch, found.rest, found.first
            rows.append([op, model.model, *(f"{value:.1f}" for value in times)])
    titles = "op | model | a call, µs | dispatch | checks | launch | rest | a call of a new kind"
    print(grid(titles, rows))


if __name__ == "__main__":
    as_command(main)
