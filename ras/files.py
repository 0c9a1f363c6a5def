"""Small files of what was measured: read with care, and written whole or not at all."""

from __future__ import annotations

import errno
import json
import math
import os
import platform
import re
import secrets
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from os import PathLike
from pathlib import Path
from typing import Any, NoReturn

from .checks import shown

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

LARGEST = 10_000_000  # bytes


def read_json(path: str | PathLike[str]) -> Any:
    """What is in a JSON file.

    Raises:
        ValueError: It is no JSON, no text, too deep, or larger than 10 MB.
        OSError: It cannot be read.
    """
    with open(path, "rb") as file:
        content = file.read(LARGEST + 1)
    if len(content) > LARGEST:
        raise ValueError(f"it is larger than {LARGEST:,} bytes")
    try:
        return json.loads(content, parse_constant=_no_number, parse_float=_finite)
    except UnicodeDecodeError:
        raise ValueError("it is no text") from None
    except RecursionError:
        raise ValueError("it is too deep") from None
    except ValueError as error:
        raise ValueError(f"it is not JSON ({error})") from None


def _finite(text: str) -> float:
    return float(text) if math.isfinite(float(text)) else _no_number(text)


def _no_number(text: str) -> NoReturn:
    raise ValueError(f"{text} is no number there")


def writable(file: Any, suffixes: Sequence[str]) -> Path:
    """The path of a file that can be written, and ends in one of the suffixes.

    Raises:
        TypeError: It is no file's name.
        ValueError: It ends otherwise.
        OSError: It cannot be written.
    """
    try:
        path = Path(file)
    except TypeError:
        raise TypeError(f"file must be a file's name, got {shown(file)}") from None
    if path.suffix.lower() not in suffixes:
        raise ValueError(f"file {shown(str(path))} does not end in one of {', '.join(suffixes)}")
    if not path.parent.is_dir():
        raise FileNotFoundError(f"there is no folder {str(path.parent)!r}")
    if path.is_dir() or not os.access(path if path.exists() else path.parent, os.W_OK):
        raise PermissionError(f"{str(path)!r} cannot be written")
    return path


@contextmanager
def written_whole(path: str | PathLike[str]) -> Iterator[Path]:
    """A file to write in a `with` block, which is `path` when the block ends, and gone if it fails.

    Raises OSError if it cannot be written. Its name ends as that of `path`. It is on the disk
    before it is `path`, so that that is whole after a loss of power, too.
    """
    path = Path(os.path.realpath(path))  # a link stays one
    if path.is_dir():
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
    if not path.parent.is_dir():
        raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), str(path))
    if path.exists() and not path.is_file():
        yield path  # a device is not to be replaced
        return
    part = path.with_name(f".{_process()}-{secrets.token_hex(8)}.part{path.suffix}")
    try:
        yield part
        with open(part, "r+b") as file:
            os.fsync(file.fileno())
        if path.exists():
            shutil.copymode(path, part)
        part.replace(path)
    except BaseException:
        part.unlink(missing_ok=True)
        raise


def _process() -> str:
    """This machine's name and this process's number."""
    return f"{re.sub(r'[^A-Za-z0-9.-]', '_', platform.node())[:100]}-{os.getpid()}"


def remove_parts(folder: Path) -> None:
    """Remove what processes of this machine that are gone have left of files in a folder."""
    machine = _process().rpartition("-")[0]
    for part in folder.glob(".*.part*"):
        found = re.fullmatch(rf"\.{re.escape(machine)}-(\d+)-[0-9a-f]{{16}}\.part.*", part.name)
        if found and not _is_there(int(found[1])):
            part.unlink(missing_ok=True)


def _is_there(process: int) -> bool:
    if os.name != "posix":  # signal 0 is another one elsewhere
        return True
    try:
        os.kill(process, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:  # it is somebody else's
        pass
    return True


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """A `with` block that one process is in at a time; `path` is an empty file, which stays.

    Whoever is killed in it leaves it. Where the system has no such locks there is none.
    """
    with open(path, "ab") as file:
        if fcntl is not None:
            with suppress(OSError):  # some file systems of clusters have none
                fcntl.flock(file, fcntl.LOCK_EX)
        yield


def write_text(path: str | PathLike[str], text: str) -> None:
    """Write a file that nobody ever sees half of. Raises OSError if it cannot be written."""
    with written_whole(path) as part:
        part.write_text(text, encoding="utf-8")
