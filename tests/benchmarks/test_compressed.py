"""The command that tells what caches of 8 bits lose."""

import json

from benchmarks.quality import compressed


def test_a_table_and_a_file(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(compressed, "SETTINGS", {"half": dict(sample_ratio=0.5)})
    file = tmp_path / "figures.json"
    compressed.main(["--count=1", "--steps=6", f"--json={file}"])
    rows = json.loads(file.read_text())
    assert [row["caches"] for row in rows] == ["float32", "int8", "float8_e4m3fn"]
    own, *codes = rows
    assert own["nearness"] == "" and all(2 * row["bytes"] < own["bytes"] for row in codes)
    near = [float(row["nearness"]) for row in codes]
    assert 120 > near[0] > near[1] > own["psnr"] > 0
    assert capsys.readouterr().out.count("| half | ") == 3
