"""How long work takes on a device, each run of it with a cold L2 cache, and the device's ceilings.

On a CPU, for trials of the programs that use this, there is no flush and no graph.
"""

from __future__ import annotations

import math
import platform
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch

import ras_kernels

WARM_UPS = 3
MOST_RUNS, FEWEST_RUNS = 200, 5
GRAPH_RUNS, REPLAYS = 10, 9
HOST_RUNS, HOST_ROUNDS = 20, 5
AMD_FLUSH = 512 << 20  # bytes: MI300X has 256 MB of cache beyond its L2

Run = Callable[[], object]


class Times(NamedTuple):
    """Microseconds: the median and the quartiles."""

    median: float
    low: float
    high: float


class Timer:
    """Times work on one device.

    Args:
        device: A GPU, or `cpu`.
        seconds: To spend on each measurement, about.
    """

    def __init__(self, device: str, seconds: float) -> None:
        self.device, self.seconds = torch.device(device), seconds
        self.gpu = self.device.type == "cuda"
        self.l2 = torch.cuda.get_device_properties(device).L2_cache_size if self.gpu else 0
        # Twice the cache, so that nothing of what was there stays.
        size = AMD_FLUSH if torch.version.hip else 2 * self.l2
        self._buffer = torch.empty(size if self.gpu else 0, dtype=torch.int8, device=device)

    def flush(self) -> None:
        self._buffer.zero_()

    def warm_up(self, run: Run) -> int:
        """Run a few times, which compiles, and return how many runs a measurement may take."""
        for _ in range(WARM_UPS):
            run()
        self.wait()
        start = time.perf_counter()
        self.flush()
        run()
        self.wait()
        count = self.seconds / (time.perf_counter() - start)
        return int(min(max(count, FEWEST_RUNS), MOST_RUNS))

    def wait(self) -> None:
        if self.gpu:
            torch.cuda.synchronize(self.device)

    def events(self, run: Run, count: int) -> Times:
        """Between events before and after each run: what the host is late with counts, too."""
        if not self.gpu:
            return self._wall(run, count)
        pairs = [_pair() for _ in range(count)]
        for start, end in pairs:
            self.flush()
            start.record()
            run()
            end.record()
        return _elapsed(pairs)

    def graph(self, run: Run) -> Times | None:
        """In a CUDA graph, which the host is never late with; None on a CPU.

        A graph of flushes and runs is timed, and one of the flushes alone, whose median goes off.
        """
        if not self.gpu:
            return None
        both, alone = self._replayed([self.flush, run]), self._replayed([self.flush])
        return Times(*((value - alone.median) / GRAPH_RUNS for value in both))

    def host(self, run: Run, count: int) -> float:
        """Microseconds that the host spends on a call, the device being asked to wait for none."""
        count = min(count, HOST_RUNS)  # below what a launch queue holds
        spent = []
        for _ in range(HOST_ROUNDS):
            self.wait()
            start = time.perf_counter()
            for _ in range(count):
                run()
            spent.append(1e6 * (time.perf_counter() - start) / count)
        self.wait()
        return statistics.median(spent)

    def copy_ceiling(self, size: int) -> float:
        """GB/s, read and written, of PyTorch's copy of so many bytes."""
        source = torch.empty(size, dtype=torch.int8, device=self.device)
        target = torch.empty_like(source)
        return 2 * size / self._least(lambda: target.copy_(source)) / 1e3

    def matmul_ceiling(self, side: int, dtype: torch.dtype) -> float:
        """TFLOP/s of PyTorch's product of two square matrices."""
        a, b = (torch.randn(side, side, dtype=dtype, device=self.device) for _ in range(2))
        return 2 * side**3 / self._least(lambda: a @ b) / 1e6

    def _least(self, run: Run) -> float:
        """The low quartile: a ceiling is what the device can do, not what it does on average."""
        return self.events(run, self.warm_up(run)).low

    def _replayed(self, works: Sequence[Run]) -> Times:
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            for _ in range(GRAPH_RUNS):
                for work in works:
                    work()
        graph.replay()
        pairs = [_pair() for _ in range(REPLAYS)]
        for start, end in pairs:
            start.record()
            graph.replay()
            end.record()
        return _elapsed(pairs)

    def _wall(self, run: Run, count: int) -> Times:
        times = []
        for _ in range(count):
            start = time.perf_counter()
            run()
            times.append(1e6 * (time.perf_counter() - start))
        return spread(times)


def _pair() -> tuple[torch.cuda.Event, torch.cuda.Event]:
    return torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)


def _elapsed(pairs: Sequence[tuple[torch.cuda.Event, torch.cuda.Event]]) -> Times:
    torch.cuda.synchronize()
    return spread([1e3 * start.elapsed_time(end) for start, end in pairs])


def spread(times: Sequence[float]) -> Times:
    low, median, high = statistics.quantiles(times, n=4, method="inclusive")
    return Times(median, low, high)


def median_interval(values: Sequence[float]) -> tuple[float, float]:
    """The tightest pair of order statistics that holds the median with 95 % confidence.

    With n values the pair of ranks (i, n - 1 - i) misses it with probability
    `2 * P(X <= i)` for X binomial of n trials at one half.
    """
    ordered, n = sorted(values), len(values)
    chances = [math.comb(n, i) / 2**n for i in range(n)]
    rank = max((i for i in range(n // 2) if 2 * sum(chances[: i + 1]) <= 0.05), default=0)
    return ordered[rank], ordered[n - 1 - rank]


def machine(device: str) -> dict[str, Any]:
    """What a time on a device depends on most."""
    return {
        "device": device_name(device),
        "kernels": ras_kernels.backend(device),
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
    }


def device_name(device: str) -> str:
    if torch.device(device).type == "cuda":
        return torch.cuda.get_device_name(device)
    return platform.processor() or platform.machine()
