"""What runs tell of themselves."""

import logging

import pytest
from support import pipelines
from support.pipelines import sd3_inputs
from support.runs import run
from support.zoo import ENTRIES

import ras
from ras.log import follow_environment, logger

pytestmark = pytest.mark.usefixtures("no_gradients")
PLAN = (1, 1, 0.25, 0, 1)


def test_each_step_in_a_line(caplog):
    pipe = ras.enable(pipelines.sd3(), plan=PLAN)
    with caplog.at_level(logging.DEBUG, "ras"):
        run(pipe, sd3_inputs(pipe), 5)
    sigmas = pipe.scheduler.sigmas.tolist()
    done = "all tokens", "all tokens", "16 of 64 tokens", "nothing", "all tokens"
    steps = [each.getMessage() for each in caplog.records if each.levelno == logging.DEBUG]
    assert steps == [f"step {i} of 5 at {sigmas[i]:.3f}: {each}" for i, each in enumerate(done)]
    (plan,) = [each.getMessage() for each in caplog.records if each.levelno == logging.INFO]
    assert plan == f"run 1: ##+.#, speed-up {ras.stats(pipe).plan.speedup(64, 12):.2f}"


def test_references_and_text_are_told_of(caplog):
    pipe, call = ENTRIES["flux-kontext"].build()
    ras.enable(pipe, plan=(1, 1, 0.25, 1), reuse_text=True)
    with caplog.at_level(logging.DEBUG, "ras"):
        call(4)
    tokens = ras.stats(pipe).region_counts[0].numel()
    told = caplog.messages[3]
    assert told.endswith("references, no text") and f": {tokens // 4} of {tokens} tokens, " in told


def test_silence_by_default(capfd):
    pipe = ras.enable(pipelines.sd3(), plan=PLAN)
    run(pipe, sd3_inputs(pipe), 5)
    assert capfd.readouterr() == ("", "")


def test_the_environment(monkeypatch, capfd):
    before = logger.handlers[:], logger.level
    try:
        for level, said in (("", ""), ("info", ""), ("DEBUG", "ras: step 0\n")):
            monkeypatch.setenv("RAS_LOG", level)
            follow_environment()
            logger.debug("step %d", 0)
            assert capfd.readouterr().err == said
            logger.handlers[:] = before[0]
            logger.setLevel(before[1])
        monkeypatch.setenv("RAS_LOG", "loud")
        with pytest.raises(ValueError, match="RAS_LOG must be one of debug, info"):
            follow_environment()
    finally:
        logger.handlers[:] = before[0]
        logger.setLevel(before[1])
