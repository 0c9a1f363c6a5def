"""The benchmarks' command lines: numbers that cannot be, errors and interrupts."""

import argparse
import importlib
import pkgutil
from pathlib import Path

import pytest

import benchmarks
from benchmarks.commands import as_command

NONSENSE = ["", "abc", "-1", "nan", "inf", "-inf", "1e999", "1" + "0" * 5000, "[1]", "0.5.1"]


class Parsed(Exception):
    """The command line has been taken."""


def commands():
    for module in pkgutil.walk_packages(benchmarks.__path__, "benchmarks."):
        source = Path(module.module_finder.path) / f"{module.name.rpartition('.')[2]}.py"
        if source.is_file() and "argparse.ArgumentParser(" in source.read_text():
            yield module.name


def parsers(name, monkeypatch):
    """Those that a command makes, as it is about to parse."""
    found = []

    def parse(parser, *_):
        found.append(parser)
        raise Parsed

    with monkeypatch.context() as patch, pytest.raises(Parsed):
        patch.setattr(argparse.ArgumentParser, "parse_args", parse)
        patch.setattr("sys.argv", [name])
        importlib.import_module(name).main()
    return found


@pytest.mark.parametrize("name", commands())
def test_numbers_that_cannot_be(name, monkeypatch, capsys):
    """Each is a message with the option's name, and status 2."""
    (parser,) = parsers(name, monkeypatch)
    for action in parser._actions:
        kinds = action.type, type(action.default)
        if {int, float} & {*kinds} or action.type not in (None, Path):
            assert action.type not in (int, float), action.option_strings
            for text in NONSENSE:
                with pytest.raises(SystemExit) as ended:
                    parser.parse_args([f"{action.option_strings[0]}={text}"])
                said = capsys.readouterr().err
                assert ended.value.code == 2 and action.option_strings[0] in said, text


def test_every_command_is_found():
    assert len(list(commands())) >= 10


@pytest.mark.parametrize(
    "error, status", [(ValueError("no"), 2), (OSError("no"), 2), (KeyboardInterrupt(), 130)]
)
def test_how_commands_end(error, status, capsys):
    def main():
        raise error

    with pytest.raises(SystemExit) as ended:
        as_command(main)
    said = capsys.readouterr().err
    assert ended.value.code == status and said.count("\n") == 1 and len(said) > 5
    as_command(lambda: None)
