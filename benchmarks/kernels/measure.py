"""The time that each way to do each job takes on a device."""

from __future__ import annotations

import gc
import time
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from ras_kernels import _triton

from ..gpu.goals import OURS, Row
from ..speed.timing import Timer, device_name
from .jobs import DTYPE, JOBS, Shape, Way, prepare

COPIED, TINY_COPIED = 1 << 30, 1 << 20  # bytes, of the copy that gives the ceiling
SIDE, TINY_SIDE = 8192, 128  # of the matrices that give the ceiling


def measure(timer: Timer, shapes: Sequence[Shape], tiny: bool, seconds: float) -> dict[str, Any]:
    """Time all jobs; a row for each way of each."""
    began = time.perf_counter()
    results: dict[str, Any] = {
        "device": device_name(str(timer.device)),
        "tiny": tiny,
        "torch": torch.__version__,
        "cuda": torch.version.cuda or torch.version.hip,
        "triton": _triton.triton.__version__ if _triton.triton else None,
        "dtype": str(DTYPE).removeprefix("torch."),
        "l2_bytes": timer.l2,
        "copy_gb_s": timer.copy_ceiling(TINY_COPIED if tiny else COPIED),
        "matmul_tflop_s": timer.matmul_ceiling(TINY_SIDE if tiny else SIDE, DTYPE),
        "left_out": 0,
        "rows": [],
    }
    jobs = [(op, shape) for shape in shapes for op in JOBS]
    gc.freeze()  # what there is by now is none of the jobs' garbage, and takes long to look through
    for op, shape in tqdm(jobs, unit="job", disable=tiny):
        if time.perf_counter() - began > seconds:
            results["left_out"] += 1
            continue
        results["rows"] += time_job(timer, op, shape)
        gc.collect()  # of jobs, whose functions refer to them
    gc.unfreeze()
    return results


def time_job(timer: Timer, op: str, shape: Shape) -> list[Row]:
    """A row for each way to do a job; one that fails says how, and the others go on."""
    try:
        job = prepare(op, shape, str(timer.device))
    except torch.OutOfMemoryError as error:
        return [{"op": op, "shape": shape.label, "way": OURS, "error": said(error)}]
    before = [tensor.clone() for tensor in job.written]

    def restore() -> None:
        for tensor, start in zip(job.written, before):
            tensor.copy_(start)

    rows: list[Row] = []
    expected: list[Tensor] = []
    for name, way in {OURS: job.ours, **job.plain}.items():
        row: Row = {"op": op, "shape": shape.label, "way": name}
        row |= {"bytes": job.bytes, "flops": job.flops}
        rows.append(row)
        try:
            with way.within():
                restore()
                found = outcome(way)
                expected = expected or found
                apart = 0.0 if way.part else difference(found, expected)
                if apart > job.tolerance:
                    row["error"] = f"differs by {apart:.2g} of the norm"
                    continue
                restore()
                count = timer.warm_up(way.run)
                row["events_us"] = timer.events(way.run, count)
                row["host_us"] = timer.host(way.run, count)
                row["graph_us"] = timer.graph(way.run)
        except Exception as error:  # such as a backend that does not take the shape
            row["error"] = said(error)
    return rows


def outcome(way: Way) -> list[Tensor]:
    """What a way returns, kept from what the next one writes."""
    found = way.run()
    return [tensor.clone() for tensor in ([found] if isinstance(found, Tensor) else found)]


def difference(found: Sequence[Tensor], expected: Sequence[Tensor]) -> float:
    """The greatest distance of two tensors, relative to the norm of the expected one."""
    return max(
        ((a.float() - b.float()).norm() / b.float().norm()).item() for a, b in zip(found, expected)
    )


def said(error: Exception) -> str:
    return f"{type(error).__name__}: {error}".partition("\n")[0][:120]
