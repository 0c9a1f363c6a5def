"""`benchmarks.gpu`, rehearsed on a CPU from start to end, and what it makes of failures."""

import json
import shutil
from pathlib import Path

import pytest
import torch

from benchmarks import environment, gpu, gpu_table
from benchmarks.families import FAMILIES

PARTS = {
    "sd3-float16-eager",
    "sd3-float16-compiled",
    "lumina-bfloat16-eager",
    "lumina-bfloat16-compiled",
    "kernels",
    "tests",
}
BEFORE, AFTER = "as before\n", "\nas it was\n"


def run(out, *more):
    """The exit status of a rehearsal in the folder `out`, whose README stands beside it."""
    readme = out.parent / "README.md"
    with pytest.raises(SystemExit) as ended:
        gpu.main(["--tiny", "--out", str(out), "--readme", str(readme), *more])
    return ended.value.code


@pytest.fixture(scope="module")
def rehearsal(tmp_path_factory):
    """The folder of results of a rehearsal."""
    out = tmp_path_factory.mktemp("rehearsal") / "results"
    empty = f"{BEFORE}{gpu_table.BEGIN}\n{gpu_table.END}{AFTER}"
    (out.parent / "README.md").write_text(empty, encoding="utf-8")
    assert run(out) == 0, [
        path.read_text(encoding="utf-8")[-3000:] for path in out.glob("*/parts/*.log")
    ]
    return out


@pytest.fixture
def out(rehearsal, tmp_path, monkeypatch):
    """A copy of it, to go on from, on a machine that is known."""
    (path,) = rehearsal.glob("*/parts/environment.json")
    machine = json.loads(path.read_text(encoding="utf-8"))
    monkeypatch.setattr(gpu, "look", lambda options: machine)
    shutil.copytree(rehearsal.parent, tmp_path, dirs_exist_ok=True)
    return tmp_path / "results"


def records(out):
    (folder,) = out.iterdir()
    return gpu_table.read(folder)


def test_rehearsal(rehearsal):
    (folder,) = rehearsal.iterdir()
    machine = json.loads((folder / "parts" / "environment.json").read_text(encoding="utf-8"))
    assert machine["torch"] == torch.__version__ and machine["tiny"]
    assert {path.stem for path in folder.glob("*.png")} >= set(FAMILIES)
    found = records(rehearsal)
    assert set(found) == PARTS == {path.stem for path in folder.glob("parts/*.log")}
    assert found["tests"]["results"]["passed"] > 0 and found["kernels"]["results"]["ways timed"] > 0
    for name in PARTS - {"tests", "kernels"}:
        settings = [row["setting"] for row in found[name]["results"]["rows"]]
        assert settings == ["0.5", "speedup=2"]
        compiled = found[name]["results"]["compile"]
        assert compiled == ("eager" if name.endswith("compiled") else None)


def test_the_table_of_a_rehearsal(rehearsal):
    text = (rehearsal.parent / "README.md").read_text(encoding="utf-8")
    assert text.startswith(BEFORE + gpu_table.BEGIN) and text.endswith(gpu_table.END + AFTER)
    assert gpu_table.block(rehearsal) in text and "the figures say nothing" in text
    lines = [line.split(" | ") for line in text.splitlines() if line.startswith("| SD3")]
    assert len(lines) == 2 * 5
    measured = {(line[1], line[2]) for line in lines if " to " in line[3] and " to " in line[4]}
    assert measured == {("fp16", "ratio 0.5"), ("fp16", "`ras.enable(pipe)`")}
    assert all(line[3] == "not measured" for line in lines if line[1] == "bf16")
    assert lines[1][5:] == ["1.57", "not measured", "1.62 |"]


def test_what_is_done_is_not_done_again(out, monkeypatch, capsys):
    before = records(out)
    asked = []
    monkeypatch.setattr(gpu, "run", lambda part, *_: asked.append(part.name) or before[part.name])
    assert run(out) == 0 and not asked and records(out) == before
    assert capsys.readouterr().out.count("| done") == len(PARTS)
    assert run(out, "--again") == 0 and set(asked) == PARTS
    asked.clear()
    assert run(out, "--quick") == 0 and set(asked) == {"kernels"}  # whose settings are others


def test_a_failure_costs_no_other_part(out, monkeypatch, capsys):
    """A part that fails, between one that is done and one that is not, and then does not."""
    whole = gpu.parts

    def one_broken(options, folder):
        parts = {part.name: part for part in whole(options, folder)}
        broken = parts["lumina-bfloat16-eager"]._replace(command=("-c", "1 | None # wrong"))
        made = folder / "parts" / "other.made"
        write = "import pathlib, sys; pathlib.Path(sys.argv[1]).write_text('{\"rounds\": 3}')"
        other = gpu.Part("other", ("-c", write), 9, str(made), made, gpu.read_pipeline)
        return [parts["sd3-float16-eager"], broken, other, parts["tests"]]

    monkeypatch.setattr(gpu, "parts", one_broken)
    assert run(out) == 1
    said = capsys.readouterr().out
    failed = "failed: TypeError: unsupported operand type(s)"
    assert said.count(failed) == 2  # at once, and in the summary
    found = records(out)
    assert found["other"]["results"] == {"rounds": 3} and found["other"]["error"] is None
    row = next(
        line
        for line in (out.parent / "README.md").read_text(encoding="utf-8").splitlines()
        if line.startswith("| Lumina-Next-T2I | bf16 | ratio 0.5 | ")
    )
    assert failed in row and row.count("|") == 9
    monkeypatch.setattr(gpu, "parts", whole)
    monkeypatch.setattr(gpu, "run", lambda part, *_: found[part.name] | {"error": None})
    assert run(out) == 0


def test_a_part_that_takes_too_long_is_interrupted(tmp_path):
    (tmp_path / "parts").mkdir()
    made = tmp_path / "made.xml"
    test = tmp_path / "test_slow.py"
    test.write_text("import time\ndef test_a(): pass\ndef test_b(): time.sleep(60)\n")
    command = ("-m", "pytest", "-q", "-p", "no:cacheprovider", str(test))
    part = gpu.Part("tests", command, 0, f"--junitxml={made}", made, gpu.read_tests)
    record = gpu.run(part, tmp_path, 4)
    assert record["error"] == "interrupted after 4 s" and record["seconds"] < 14
    assert record["results"]["passed"] == 1
    assert gpu.finished(part, tmp_path) is None


def test_failed_tests_and_ops_are_named(tmp_path):
    made = tmp_path / "made.xml"
    case = '<testcase classname="tests.test_x" name="test_{}">{}</testcase>'
    bodies = ["", '<failure message="no"/>', "<skipped/>", '<error message="no"/>']
    cases = "".join(case.format(i, body) for i, body in enumerate(bodies))
    made.write_text(f"<testsuites><testsuite>{cases}</testsuite></testsuites>", encoding="utf-8")
    counts, error = gpu.read_tests(made)
    assert (counts["passed"], counts["failed"], counts["skipped"]) == (1, 2, 1)
    assert error == "2 of 4 tests, tests.test_x.test_1 first"
    rows = [
        {"op": "gather_tokens", "shape": "SD3", "way": "indexing", "error": "slow"},
        {"op": "gather_tokens", "shape": "SD3", "way": "ras_kernels", "error": "differs"},
        {"op": "gather_tokens", "shape": "SD3", "way": "gather", "events_us": [1, 1, 1]},
    ]
    made.write_text(json.dumps({"rows": rows, "left_out": 0}), encoding="utf-8")
    assert gpu.read_kernels(made)[1] == "gather_tokens at SD3: differs"


def test_reasons():
    chained = "Traceback (most recent call last):\n  File\nKeyError: 1\n\nDuring it:\n\n"
    log = chained + "Traceback (most recent call last):\n  File\nValueError: no\nand more\n"
    assert gpu.reason(log, 1) == "ValueError: no"
    assert gpu.reason("one\ntwo\n", 2) == "two"
    assert gpu.reason("one\n", -9) == "exit status -9" == gpu.reason("", -9)


def test_the_plan(tmp_path):
    """All of it takes every dtype; --quick fits in nine minutes."""
    whole = [part.name for part in gpu.parts(gpu.parse([]), tmp_path)]
    assert len(whole) == len(set(whole)) == 2 * 2 * 2 + 2
    quick = gpu.parts(gpu.parse(["--quick"]), tmp_path)
    assert {part.name for part in quick} == PARTS
    assert gpu.LOOK + sum(part.seconds for part in quick) + gpu.GRACE < 540
    files = [Path(word).name for word in quick[-1].command if word.endswith(".py")]
    assert {"test_rows.py", "test_attention.py", "test_library.py"} <= set(files)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu(capsys):
    with pytest.raises(SystemExit, match="sees no GPU here"):
        gpu.main([])
    with pytest.raises(SystemExit):
        gpu.main(["--tiny"])
    assert "--tiny needs --out" in capsys.readouterr().err


def test_what_the_driver_tells(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    assert set(environment.told_by_driver().values()) == {None}
    tool = tmp_path / "nvidia-smi"
    tool.write_text("#!/bin/sh\necho '580.1, 345 MHz, 1980 MHz, 2619 MHz, 700.00 W, 31'\n")
    tool.chmod(0o755)
    told = environment.told_by_driver()
    assert told["driver"] == "580.1" and told["power limit, W"] == "700.00 W"


def test_the_table_in_the_readme_is_what_was_measured():
    """If not: python -m benchmarks.gpu_table."""
    text = gpu_table.README.read_text(encoding="utf-8")
    _, _, rest = text.partition(gpu_table.BEGIN + "\n\n")
    assert rest.partition("\n" + gpu_table.END)[0] == gpu_table.block(gpu_table.RESULTS)


def test_a_readme_without_a_place_for_the_table(tmp_path):
    (tmp_path / "README.md").write_text(gpu_table.END + gpu_table.BEGIN, encoding="utf-8")
    with pytest.raises(ValueError, match="no place for the table"):
        gpu_table.update(tmp_path / "README.md", tmp_path)
