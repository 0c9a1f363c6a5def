"""Everything that a GPU is needed for, part by part: tests, kernels, whole pipelines, the tables.

    python -m benchmarks.gpu
    python -m benchmarks.gpu --quick
    python -m benchmarks.gpu --tiny --out /tmp/rehearsal

What tells the most comes first: whether results are right, which tiles are best and the registers
they take, each op beside plain PyTorch, whole pipelines.

Each part is a process of its own with a limit on its time; what it leaves of that goes to the next.
One that fails does not keep the others from running: the exit status is 1 at the end. A part's JSON
and log lie in the folder `parts` of the GPU's folder in `--out`; one that has succeeded with the
same settings is not run again, so that an interrupted run goes on where it was. Pipelines are those
of `benchmarks.speed.end_to_end` with all layers, at 1024 x 1024 px with guidance, eager and with
compiled blocks, in fp16 and bf16. Then the plots and the tables of the documentation are made of
all that JSON, which `python -m benchmarks.gpu.table` does alone.

`--quick` ends within ten minutes: fewer rounds, of each model the dtype of the paper alone, and as
many kernels and tests as there is time for. `--tiny` rehearses that on a CPU, at toy sizes.
"""

from __future__ import annotations

import argparse
import json
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from xml.etree import ElementTree

from ..commands import as_command
from ..tables import RESULTS, ROOT, folder_name, grid
from .parts import Part, Row, parts
from .table import COUNTS, READMES, plots, update

COUNTED = (*COUNTS, "rounds", "tiles timed", "ways timed", "left out")
GRACE = 10  # seconds for an interrupted part to write down what it has
LOOK = 20  # seconds to see what the machine has
VERSIONS = "torch", "CUDA or ROCm", "triton", "diffusers", "driver"  # that results depend on


def main(argv: Sequence[str] | None = None) -> None:
    """Run all parts by the command line `argv` (default: the process's own)."""
    began = time.monotonic()
    options = parse(argv)
    machine = look(options)
    folder = options.out / folder_name(machine["device"])
    (folder / "parts").mkdir(parents=True, exist_ok=True)
    forget_others(folder / "parts", machine)
    write(folder / "parts" / "environment.json", machine)
    records, deadline = [], began + LOOK
    for part in parts(options, folder):
        deadline += part.seconds
        record = None if options.again else finished(part, folder)
        if record is None:
            print(f"{part.name}: {' '.join(part.command)}", flush=True)
            record = run(part, folder, deadline - time.monotonic())
            print(outcome(record), flush=True)
        records.append(record)
    plots(folder)
    for readme in options.readmes:
        update(readme, options.out)
    rows = ([record["part"], f"{record['seconds']:.0f}", outcome(record)] for record in records)
    print("\n" + grid("part | seconds | outcome", rows))
    sys.exit(1 if any(record["error"] for record in records) else 0)


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="benchmarks.gpu", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    add = parser.add_argument
    add("--quick", action="store_true", help="finish in ten minutes")
    add("--tiny", action="store_true", help="rehearse on the CPU, at toy sizes")
    add("--again", action="store_true", help="run parts that have succeeded, too")
    add("--out", type=Path, help="default: benchmarks/results; --tiny needs one of its own")
    add("--readmes", type=Path, nargs="+", help="whose tables to renew; with --tiny none")
    options = parser.parse_args(argv)
    if options.tiny and options.out is None:
        parser.error("--tiny needs --out: its figures say nothing, and belong among no results")
    if options.readmes is None:
        options.readmes = [] if options.tiny else READMES
    options.out = (options.out or RESULTS).resolve()
    return options


def look(options: argparse.Namespace) -> Row:
    """What the machine has; exits where that is no GPU, unless there need be none."""
    command = [sys.executable, "-m", "benchmarks.gpu.environment", "--json"]
    done = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, text=True, check=True)
    machine = json.loads(done.stdout)
    for name, value in machine.items():
        print(f"{name}: {value}")
    if not machine["gpu"] and not options.tiny:
        sys.exit(
            f"PyTorch {machine['torch']} sees no GPU here. Run this where there is one, with a "
            "PyTorch built for it, or rehearse on the CPU: "
            "python -m benchmarks.gpu --tiny --out /tmp/rehearsal"
        )
    flags = [f"--{name}" for name in ("quick", "tiny") if getattr(options, name)]
    return machine | {"tiny": options.tiny, "command": " ".join(["benchmarks.gpu", *flags])}


def forget_others(records: Path, machine: Row) -> None:
    """Remove what was found with other versions, which is not to stand beside new figures."""
    known = records / "environment.json"
    if known.exists():
        before = json.loads(known.read_text(encoding="utf-8"))
        if any(before.get(name) != machine.get(name) for name in VERSIONS):
            for record in records.glob("*.json"):
                record.unlink()


# --- a part ---------------------------------------------------------------------------------------


def run(part: Part, folder: Path, limit: float) -> Row:
    """Run a part and write down what became of it; errors are written down as well.

    Args:
        limit: Seconds, after which it is interrupted.
    """
    log, began = folder / "parts" / f"{part.name}.log", time.monotonic()
    before = part.made.read_bytes() if part.made.exists() else None
    part.made.unlink(missing_ok=True)
    command = [sys.executable, *part.command, part.target]
    with log.open("w", encoding="utf-8") as said:
        process = subprocess.Popen(
            command,
            cwd=ROOT,
            stdout=said,
            stderr=subprocess.STDOUT,
            preexec_fn=heed_interruptions,
        )
        late = not ended(process, limit)
    results, error = None, None
    try:
        results, error = part.read(part.made)
    except (OSError, ValueError, KeyError, ElementTree.ParseError) as unread:
        error = f"{part.made.name} tells nothing: {unread}"
    if results is None and before is not None:
        part.made.write_bytes(before)  # the figures of an earlier run are still good
    if late:
        error = f"interrupted after {limit:.0f} s"
    elif process.returncode and (results is None or error is None):
        error = reason(log.read_text(encoding="utf-8"), process.returncode)
    record: Row = {"part": part.name, "command": " ".join(part.command), "error": error}
    record |= {"seconds": round(time.monotonic() - began, 1), "results": results}
    write(folder / "parts" / f"{part.name}.json", record)
    return record


def heed_interruptions() -> None:
    """Shells have what they start in the background ignore them, and so its children."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def ended(process: subprocess.Popen[bytes], limit: float) -> bool:
    """Whether it ended by itself; whatever happens, it does not run on."""
    try:
        process.wait(max(limit, 0))
        return True
    except subprocess.TimeoutExpired:
        process.send_signal(signal.SIGINT)  # pytest writes down what it has
        try:
            process.wait(GRACE)
        except subprocess.TimeoutExpired:
            process.kill()
        return False
    except BaseException:
        process.kill()
        raise


def finished(part: Part, folder: Path) -> Row | None:
    """The record of an earlier run that did the same without an error."""
    path = folder / "parts" / f"{part.name}.json"
    if not path.exists():
        return None
    record = json.loads(path.read_text(encoding="utf-8"))
    same = record["command"] == " ".join(part.command) and record["error"] is None
    return record if same else None


def write(path: Path, record: Row) -> None:
    """All of it or nothing, should this be interrupted."""
    draft = path.with_suffix(".draft")
    draft.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    draft.replace(path)


def reason(log: str, status: int) -> str:
    """The error that ended a process, of what it said."""
    _, traceback, rest = log.rpartition("Traceback (most recent call last):")
    lines = [line for line in rest.splitlines() if line and not line[0].isspace()]
    if status < 0 or not lines:
        return f"exit status {status}"
    return lines[0 if traceback else -1]


def outcome(record: Row) -> str:
    results = record["results"] or {}
    told = f"failed: {record['error']}" if record["error"] else "done"
    return "; ".join([told, *(f"{results[name]} {name}" for name in COUNTED if name in results)])


if __name__ == "__main__":
    as_command(main)
