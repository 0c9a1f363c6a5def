"""Serve many requests, unlike each other, with one pipeline, and see that each is what it is alone.

    python -m benchmarks.serving --requests 1000

The bundled model is loaded and enabled once. Requests differ in size, steps, guidance, settings and
mask, and come from several threads in a random order, under a lock. One in twenty is broken off in
mid-run by its callback, as when a client is gone. The latents of all others are compared with those
of a copy of the model that is enabled for that request alone. Memory is that of the process and
that of all tensors there are, those to compare with included, once every kind of request has been
served, and at tenths of all.
"""

from __future__ import annotations

import argparse
import copy
import gc
import json
import random
import threading
import warnings
from collections.abc import Iterator
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

import ras
from ras.cli.generate import BUNDLED_CALL
from ras.cli.loading import load

from .commands import COUNT, STEP, as_command
from .tables import grid

SIDES = (64, 96, 128)
STEPS = (4, 6, 9)
GUIDANCE = (1.0, 4.0)
SPEEDUP = 2.0  # where the settings do not say another
SETTINGS: tuple[dict[str, Any], ...] = (
    {},
    {"speedup": 1.5},
    {"sample_ratio": 0.5},
    {"sample_ratio": 0.5, "kv_correction": False},
    {"mask": (0.25, 0.5)},
    {"speedup": 1.0},
)
PROMPTS = (
    "a red ring on a blue background",
    "two green stars",
    "a striped yellow square, top left",
)
BROKEN_OFF = 20  # one in so many


class Gone(BaseException):
    """The client is gone."""


class Request(NamedTuple):
    width: int
    height: int
    steps: int
    guidance: float
    settings: dict[str, Any]
    seed: int


def requests(count: int, seed: int) -> list[Request]:
    """So many kinds of request, drawn from all that there are."""
    kinds = [*product(SIDES, SIDES, STEPS, GUIDANCE, range(len(SETTINGS)))]
    drawn = random.Random(seed).sample(kinds, min(count, len(kinds)))
    return [Request(*kind[:-1], SETTINGS[kind[-1]], i) for i, kind in enumerate(drawn)]


def serve(pipe: Any, request: Request, *, gone: bool = False) -> torch.Tensor:
    """The latents of a request. Raises Gone in its midst if the client is `gone`."""

    def each_step(pipe: Any, step: int, t: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        if gone and step == request.steps // 2:
            raise Gone
        return tensors

    settings = dict(request.settings)
    if "mask" in settings:
        settings["mask"] = mask = np.zeros((request.height, request.width), np.float32)
        top, left = (int(share * side) for share, side in zip(request.settings["mask"], mask.shape))
        mask[top : top + 32, left : left + 32] = 1
    with ras.settings(pipe, **settings):
        return pipe(
            PROMPTS[request.seed % len(PROMPTS)],
            width=request.width,
            height=request.height,
            num_inference_steps=request.steps,
            generator=torch.Generator().manual_seed(request.seed),
            output_type="latent",
            callback_on_step_end=each_step,
            **{**BUNDLED_CALL, "guidance_scale": request.guidance},
        ).images


def alone(pipe: Any, request: Request) -> torch.Tensor:
    """The latents of a request that a copy of a pipeline is enabled for."""
    pipe = copy.deepcopy(pipe)
    with ras.enabled(pipe, speedup=SPEEDUP):
        return serve(pipe, request)


def memory() -> dict[str, float]:
    """Megabytes of the process, and of all tensors."""
    gc.collect()
    kinds = torch.Tensor, torch.nn.Parameter  # others, of compilers, have no memory
    found = (each for each in gc.get_objects() if type(each) in kinds)
    storages = {each.untyped_storage().data_ptr(): each.untyped_storage() for each in found}
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return {
        "process": pages * 4096 / 1e6,
        "tensors": sum(storage.nbytes() for storage in storages.values()) / 1e6,
    }


def measure(count: int, kinds: int, threads: int, seed: int) -> dict[str, Any]:
    """Serve so many requests, and tell what came of them."""
    options = argparse.Namespace(model=None, device=torch.device("cpu"), dtype=None)
    # Weights in a file's memory are multiplied otherwise, in the last bit, than those of a copy.
    pipe = copy.deepcopy(load(options, ras.bundled_model()))
    pipe.set_progress_bar_config(disable=True)
    known = requests(kinds, seed)
    expected = [alone(pipe, request) for request in known]
    ras.enable(pipe, speedup=SPEEDUP)
    drawn = random.Random(seed)
    first = drawn.sample(range(len(known)), len(known))  # every kind once
    order = [*first, *drawn.choices(range(len(known)), k=max(count - len(first), 0))][:count]
    waiting: Iterator[tuple[int, int]] = iter(enumerate(order, 1))
    marks = {len(first)} | {count * tenth // 10 for tenth in range(1, 11)}
    told: dict[str, Any] = {"requests": count, "kinds": len(known), "threads": threads}
    told |= {"equal": 0, "unlike": 0, "broken_off": 0, "memory": {}}
    lock = threading.Lock()

    @torch.no_grad()
    def work() -> None:
        while True:
            with lock:
                number, kind = next(waiting, (0, 0))
                if not number:
                    return
                try:
                    latents = serve(pipe, known[kind], gone=number % BROKEN_OFF == 0)
                    told["equal" if torch.equal(latents, expected[kind]) else "unlike"] += 1
                    del latents
                except Gone:
                    told["broken_off"] += 1
                if number in marks:
                    told["memory"][number] = memory()

    workers = [threading.Thread(target=work, daemon=True) for _ in range(threads)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    if told["equal"] + told["unlike"] + told["broken_off"] != count:
        raise ValueError("a request has failed")
    return told


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = partial(parser.add_argument, metavar="N")
    add("--requests", type=COUNT, default=1000, help="default: %(default)s")
    add("--kinds", type=COUNT, default=40, help="of request; default: %(default)s")
    add("--threads", type=COUNT, default=4, help="default: %(default)s")
    add("--seed", type=STEP, default=0, help="of what comes when; default: %(default)s")
    parser.add_argument("--json", action="store_true", help="print the figures as JSON")
    options = parser.parse_args(argv)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ras.RASWarning)  # of few steps
        told = measure(options.requests, options.kinds, options.threads, options.seed)
    if options.json:
        print(json.dumps(told, indent=2))
        return
    print(
        f"{told['requests']} requests of {told['kinds']} kinds from {told['threads']} threads: "
        f"{told['equal']} equal to what they are alone, {told['unlike']} not, "
        f"{told['broken_off']} broken off\n"
    )
    rows = [
        [str(number), f"{held['process']:.1f}", f"{held['tensors']:.2f}"]
        for number, held in sorted(told["memory"].items())
    ]
    print(grid("requests served | process, MB | tensors, MB", rows))


if __name__ == "__main__":
    as_command(main)
