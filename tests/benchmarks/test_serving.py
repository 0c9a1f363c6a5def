"""Many requests of one pipeline, at a tiny size."""

import json

from benchmarks import serving


def test_serving(monkeypatch, capsys):
    """Requests of the first kind are taken for unlike what they are alone, all others are equal."""
    for name, value in dict(SIDES=(64, 96), STEPS=(3, 4), BROKEN_OFF=4).items():
        monkeypatch.setattr(serving, name, value)
    alone, serve, served = serving.alone, serving.serve, []

    def noted(pipe, request, *, gone=False):
        served.append((request.seed, gone))
        return serve(pipe, request, gone=gone)

    def other(pipe, request):
        found = alone(pipe, request) + (request.seed == 0)
        served.clear()
        return found

    monkeypatch.setattr(serving, "serve", noted)
    monkeypatch.setattr(serving, "alone", other)
    serving.main(["--requests=10", "--kinds=3", "--threads=2", "--json"])
    told = json.loads(capsys.readouterr().out)
    assert len(served) == 10 and told["broken_off"] == sum(gone for _, gone in served) == 2
    assert told["unlike"] == served.count((0, False)) > 0
    assert told["equal"] == 8 - told["unlike"] > 1
    memory = told["memory"]
    assert [*memory] == [str(number) for number in range(1, 11)]
    tensors = [memory[number]["tensors"] for number in memory]
    assert 0 < tensors[-1] < 1.01 * tensors[2]  # what other tests have left may go meanwhile
    assert memory["10"]["process"] > tensors[-1]
    told["memory"] = {10: memory["10"]}
    monkeypatch.setattr(serving, "measure", lambda *_: told)
    serving.main([])
    said = capsys.readouterr().out
    assert said.startswith(f"10 requests of 3 kinds from 2 threads: {told['equal']} equal to what")
    assert "| requests served | process, MB | tensors, MB |" in said and "\n| 10 | " in said
