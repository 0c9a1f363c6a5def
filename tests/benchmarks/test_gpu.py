"""`benchmarks.gpu`, rehearsed on a CPU from start to end, and what it makes of failures."""

import json
import shutil
from pathlib import Path

import pytest
import torch

from benchmarks.gpu import __main__ as gpu
from benchmarks.gpu import environment, goals, parts, table
from benchmarks.kernels import jobs
from benchmarks.speed.families import PUBLISHED

PARTS = {
    "sd3-float16-eager",
    "sd3-float16-compiled",
    "lumina-bfloat16-eager",
    "lumina-bfloat16-compiled",
    "kernels",
    "tests",
    "tiles",
}
MARK = table.mark("gpu table")
BEFORE, AFTER = "as before\n", "\nas it was\n"


def run(out, *more):
    """The exit status of a rehearsal in the folder `out`, whose README stands beside it."""
    readme = out.parent / "README.md"
    with pytest.raises(SystemExit) as ended:
        gpu.main(["--tiny", "--out", str(out), "--readmes", str(readme), *more])
    return ended.value.code


@pytest.fixture(scope="module")
def rehearsal(tmp_path_factory):
    """The folder of results of a rehearsal."""
    out = tmp_path_factory.mktemp("rehearsal") / "results"
    empty = f"{BEFORE}{MARK}\n{MARK}{AFTER}"
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
    return table.read(folder)


def test_rehearsal(rehearsal):
    (folder,) = rehearsal.iterdir()
    machine = json.loads((folder / "parts" / "environment.json").read_text(encoding="utf-8"))
    assert machine["torch"] == torch.__version__ and machine["tiny"]
    assert {path.stem for path in folder.glob("*.png")} >= set(PUBLISHED)
    found = records(rehearsal)
    assert set(found) == PARTS == {path.stem for path in folder.glob("parts/*.log")}
    assert found["tests"]["results"]["passed"] > 0 and found["kernels"]["results"]["ways timed"] > 0
    assert found["tiles"]["results"]["tiles timed"] > 20
    for name in PARTS - {"tests", "tiles", "kernels"}:
        settings = [row["setting"] for row in found[name]["results"]["rows"]]
        assert settings == ["0.5", "speedup=2"]
        compiled = found[name]["results"]["compile"]
        assert compiled == ("eager" if name.endswith("compiled") else None)


def test_the_table_of_a_rehearsal(rehearsal):
    text = (rehearsal.parent / "README.md").read_text(encoding="utf-8")
    assert text.startswith(BEFORE + MARK) and text.endswith(MARK + AFTER)
    assert table.block(rehearsal) in text and "the figures say nothing" in text
    lines = [line.split(" | ") for line in text.splitlines() if line.startswith("| SD3")]
    assert len(lines) == 2 * 6
    measured = {(line[1], line[2]) for line in lines if " to " in line[3] and " to " in line[4]}
    assert measured == {("fp16", "ratio 0.5"), ("fp16", "`ras.enable(pipe)`")}
    assert all(line[3] == "not measured" for line in lines if line[1] == "bf16")
    assert lines[5][2:5] == ["dense by cuDNN, else by flash_for_cpu", "not measured", ""]
    assert lines[1][5:] == ["1.57", "not measured", "1.62 |"]


def test_what_is_done_is_not_done_again(out, monkeypatch, capsys):
    before = records(out)
    asked = []
    monkeypatch.setattr(gpu, "run", lambda part, *_: asked.append(part.name) or before[part.name])
    assert run(out) == 0 and not asked and records(out) == before
    assert capsys.readouterr().out.count("| done") == len(PARTS)
    assert run(out, "--again") == 0 and set(asked) == PARTS
    asked.clear()
    assert run(out, "--quick") == 0 and set(asked) == {
        "tiles",
        "kernels",
    }  # whose settings are others


def test_a_failure_costs_no_other_part(out, monkeypatch, capsys):
    """A part that fails, between one that is done and one that is not, and then does not."""
    whole = gpu.parts

    def one_broken(options, folder):
        known = {part.name: part for part in whole(options, folder)}
        broken = known["lumina-bfloat16-eager"]._replace(command=("-c", "1 | None # wrong"))
        made = folder / "parts" / "other.made"
        write = "import pathlib, sys; pathlib.Path(sys.argv[1]).write_text('{\"rounds\": 3}')"
        other = parts.Part("other", ("-c", write), 9, str(made), made, parts.read_pipeline)
        return [known["sd3-float16-eager"], broken, other, known["tests"]]

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
    part = parts.Part("tests", command, 0, f"--junitxml={made}", made, parts.read_tests)
    record = gpu.run(part, tmp_path, 8)
    assert record["error"] == "interrupted after 8 s" and record["seconds"] < 8 + gpu.GRACE
    assert record["results"]["passed"] == 1
    assert gpu.finished(part, tmp_path) is None


def test_results_of_other_versions_are_forgotten(tmp_path):
    for name in ("environment", "kernels"):
        gpu.write(tmp_path / f"{name}.json", {"torch": "2.11", "driver": "1", "free disk": 3})
    gpu.forget_others(tmp_path, {"torch": "2.11", "driver": "1", "free disk": 2})
    assert (tmp_path / "kernels.json").exists()
    gpu.forget_others(tmp_path, {"torch": "2.12", "driver": "1", "free disk": 2})
    assert not (tmp_path / "kernels.json").exists()


def test_failed_tests_and_ops_are_named(tmp_path):
    made = tmp_path / "made.xml"
    case = '<testcase classname="tests.test_x" name="test_{}">{}</testcase>'
    bodies = ["", '<failure message="no"/>', "<skipped/>", '<error message="no"/>']
    cases = "".join(case.format(i, body) for i, body in enumerate(bodies))
    made.write_text(f"<testsuites><testsuite>{cases}</testsuite></testsuites>", encoding="utf-8")
    counts, error = parts.read_tests(made)
    assert (counts["passed"], counts["failed"], counts["skipped"]) == (1, 2, 1)
    assert error == "2 of 4 tests, tests.test_x.test_1 first"
    rows = [
        {"op": "gather_tokens", "shape": "SD3", "way": "indexing", "error": "slow"},
        {"op": "gather_tokens", "shape": "SD3", "way": "ras_kernels", "error": "differs"},
        {"op": "gather_tokens", "shape": "SD3", "way": "gather", "events_us": [1, 1, 1]},
    ]
    made.write_text(json.dumps({"rows": rows, "left_out": 0}), encoding="utf-8")
    assert parts.read_kernels(made)[1] == "gather_tokens at SD3: differs"


def test_reasons():
    chained = "Traceback (most recent call last):\n  File\nKeyError: 1\n\nDuring it:\n\n"
    log = chained + "Traceback (most recent call last):\n  File\nValueError: no\nand more\n"
    assert gpu.reason(log, 1) == "ValueError: no"
    assert gpu.reason("one\ntwo\n", 2) == "two"
    assert gpu.reason("one\n", -9) == "exit status -9" == gpu.reason("", -9)


def test_the_plan(tmp_path):
    """All of it takes every dtype; --quick fits in ten minutes."""
    whole = [part.name for part in gpu.parts(gpu.parse([]), tmp_path)]
    assert len(whole) == len(set(whole)) == 2 * 2 * 2 + 3
    quick = gpu.parts(gpu.parse(["--quick"]), tmp_path)
    assert {part.name for part in quick} == PARTS
    assert [part.name for part in quick[:3]] == ["tests", "tiles", "kernels"]
    assert gpu.LOOK + sum(part.seconds for part in quick) + gpu.GRACE < 600
    files = [Path(word).name for word in quick[0].command if word.endswith(".py")]
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


@pytest.mark.parametrize("readme", table.READMES, ids=lambda readme: readme.parent.name)
def test_the_tables_in_the_readmes_are_what_was_measured(readme, tmp_path):
    """If not: python -m benchmarks.gpu.table."""
    copy = tmp_path / "README.md"
    copy.write_text(text := readme.read_text(encoding="utf-8"), encoding="utf-8")
    table.update(copy, table.RESULTS)
    assert copy.read_text(encoding="utf-8") == text


def test_where_nothing_is_measured_a_sentence_says_so(tmp_path):
    """No table, and the command that makes one."""
    for name, make in table.TABLES.items():
        said = make(tmp_path)
        assert "python -m benchmarks.gpu" in said and "not been run on a GPU yet" in said, name
        assert "|" not in said, name


def test_a_readme_without_a_place_for_a_table(tmp_path):
    (tmp_path / "README.md").write_text("nothing", encoding="utf-8")
    with pytest.raises(ValueError, match="no place for a table"):
        table.update(tmp_path / "README.md", tmp_path)


def test_goals(tmp_path):
    """Of each the least and the most that was found, from rows of ways that were timed."""
    times = {
        ("gather_tokens", "0.5", "ras_kernels"): 20,
        ("gather_tokens", "0.5", "copy_ of as many rows"): 19,
        ("gather_tokens", "0.5", "gather"): 5,
        ("scatter_tokens_", "0.5", "ras_kernels"): 25,
        ("scatter_tokens_", "0.5", "copy_ of as many rows"): 20,
        ("sparse_attention", "0.5", "ras_kernels"): 10,
        ("sparse_attention", "0.5", "SDPA, flash"): 5,
        ("sparse_attention", "0.5", "cat, SDPA, flash"): 15,
        ("sparse_attention", "0.5", "cat, SDPA, math"): 90,
        ("sparse_attention", "0.25", "ras_kernels"): 10,
        ("sparse_attention", "0.25", "cat, SDPA, flash"): 9,
        ("select_lowest", "0.5", "topk, sort"): 9,
    }
    rows = [
        {"op": op, "shape": f"SD3-medium, 1024², {ratio}", "way": way}
        | {"graph_us": [time, 0, 0], "events_us": [time, 0, 0]}
        for (op, ratio, way), time in times.items()
    ]
    rows.append({"op": "select_lowest", "shape": "SD3-medium, 1024², 0.5", "way": "ras_kernels"})
    (tmp_path / "one").mkdir()
    results = {"device": "A GPU", "rows": rows}
    (tmp_path / "one" / "kernels.json").write_text(json.dumps(results), encoding="utf-8")
    heading, _, copies, linear, attention, grouped, selection = goals.table(tmp_path).splitlines()
    assert heading.endswith("| at least | A GPU |")
    assert copies.endswith("| 0.95 | 0.80 to 0.95 |")
    assert attention.endswith("| 1 | 0.90 to 1.50 |")
    for line in (linear, grouped, selection):
        assert line.endswith("| not measured |")


def test_goals_are_of_jobs_that_there_are():
    """Each goal's figures come out of a run of all jobs."""
    shapes = [shape.label for shape in jobs.SHAPES]
    rows = [
        {"op": op, "shape": shape.label, "way": way, "events_us": [1, 1, 1]}
        for shape in jobs.SHAPES
        for op in jobs.JOBS
        for way in (goals.OURS, *jobs.prepare(op, shape, "meta").plain)
    ]
    assert all(
        any(label.startswith(model) for label in shapes) for model in (goals.SD3, goals.LUMINA)
    )
    for goal in goals.GOALS:
        assert {*goal.figures({"rows": rows})} == {1.0}, goal.text
