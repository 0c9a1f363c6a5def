"""Samples, pipelines, threads and random generators keep out of each other's way."""

import random
import threading

import numpy
import pytest
import torch
from support import pipelines
from support.oracle import relative_error
from support.pipelines import Recorder, of_sample, sd3_inputs
from support.runs import CONFIG, run

import ras


@pytest.fixture(autouse=True)
def no_gradients():
    with torch.no_grad():
        yield


def build(family, seed=0, **config):
    pipe = getattr(pipelines, family)(seed=seed, **config)
    return pipe, getattr(pipelines, f"{family}_inputs")


@pytest.mark.parametrize("guidance", [1.0, 4.0])
@pytest.mark.parametrize("family", ["sd3", "lumina"])
def test_batch_of_three_is_three_batches_of_one(monkeypatch, family, guidance):
    pipe, inputs = build(family)
    inputs = inputs(pipe, 3)
    record = Recorder(monkeypatch, pipe)
    with ras.enabled(pipe, CONFIG):
        together = run(pipe, inputs, guidance=guidance)
        rows = record.rows
        for sample in range(3):
            record.clear()
            alone = run(pipe, of_sample(inputs, sample), guidance=guidance)
            for one, all_rows in zip(record.rows, rows, strict=True):
                assert torch.equal(one[0], all_rows[sample])
            assert relative_error(alone[0], together[sample]) < 1e-5


def in_threads(*jobs):
    """Run all jobs at once, each in a thread; their results in order."""
    results, start = [None] * len(jobs), threading.Barrier(len(jobs))

    def work(at):
        with torch.no_grad():
            start.wait(60)
            results[at] = jobs[at]()

    threads = [threading.Thread(target=work, args=(at,), daemon=True) for at in range(len(jobs))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)
    return results


def test_two_enabled_pipelines_in_two_threads():
    """Of two families, with two configurations, several runs each."""
    sd3, lumina = build("sd3"), build("lumina", seed=3)
    configs = [CONFIG, ras.RASConfig.paper(sample_ratio=0.25, error_reset_steps=(3,))]
    jobs = []
    for (pipe, inputs), config in zip((sd3, lumina), configs):
        ras.enable(pipe, config)
        inputs = inputs(pipe, 2)
        generator = torch.Generator()

        def job(pipe=pipe, inputs=inputs, generator=generator):
            call = dict(inputs, num_inference_steps=8, guidance_scale=4.0, generator=generator)
            return [pipe(**call).images for _ in range(3)]

        jobs.append(job)
    alone = [job() for job in jobs]
    together = in_threads(*jobs)
    for expected, results in zip(alone, together):
        for result in results:
            assert relative_error(result, expected[0]) < 1e-5
    assert ras.stats(sd3[0]).steps_sparse == 5 and ras.stats(lumina[0]).steps_sparse == 4


def test_two_pipelines_taking_turns():
    """Two runs at once in one thread: each step of the one is followed by a step of the other."""
    pipes = [build("sd3", seed)[0] for seed in (0, 5)]
    for pipe in pipes:
        ras.enable(pipe, CONFIG)
    inputs = [sd3_inputs(pipe, 2, seed=seed) for pipe, seed in zip(pipes, (10, 20))]
    alone = [run(pipe, x) for pipe, x in zip(pipes, inputs)]
    turn = threading.Semaphore(1), threading.Semaphore(0)

    def stepping(at):
        def hand_over(pipe, step, t, tensors):
            turn[1 - at].release()
            if step < 7:
                assert turn[at].acquire(timeout=60)
            return tensors

        def job():
            assert turn[at].acquire(timeout=60)
            call = dict(inputs[at], num_inference_steps=8, guidance_scale=4.0)
            return pipes[at](**call, callback_on_step_end=hand_over).images

        return job

    for expected, result in zip(alone, in_threads(stepping(0), stepping(1))):
        assert relative_error(result, expected) < 1e-5


def random_states(generator):
    return (
        torch.get_rng_state(),
        generator.get_state(),
        random.getstate(),
        numpy.random.get_state()[1].tolist(),
    )


@pytest.mark.parametrize("family", ["sd3", "lumina"])
def test_random_generators_are_left_alone(family):
    """After a run with `ras` each generator is where a plain run leaves it."""
    pipe, inputs = build(family)
    inputs = inputs(pipe, 2)
    latents = inputs.pop("latents")

    def states():
        torch.manual_seed(1)
        random.seed(1)
        numpy.random.seed(1)
        generator = torch.Generator().manual_seed(2)
        pipe(**inputs, num_inference_steps=8, generator=generator)
        return random_states(generator)

    plain = states()
    with ras.enabled(pipe, CONFIG):
        assert ras.is_enabled(pipe)
        sparse = states()
        assert ras.stats(pipe).steps_sparse == 5
    for before, after in zip(plain, sparse):
        equal = torch.equal(before, after) if torch.is_tensor(before) else before == after
        assert equal
    assert latents is not None


def test_disabling_one_pipeline_leaves_the_other():
    one, other = build("sd3")[0], build("sd3")[0]
    inputs = sd3_inputs(one)
    for pipe in (one, other):
        ras.enable(pipe, CONFIG)
    expected = run(one, inputs)
    ras.disable(other)
    assert ras.is_enabled(one) and not ras.is_enabled(other)
    assert torch.equal(run(one, inputs), expected)


def test_results_repeat_to_the_bit():
    pipe, inputs = build("sd3")
    inputs = inputs(pipe, 2)
    with ras.enabled(pipe, CONFIG):
        first = run(pipe, inputs)
        assert torch.equal(run(pipe, inputs), first)
