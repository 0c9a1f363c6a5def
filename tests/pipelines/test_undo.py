"""What `ras` leaves behind: nothing. And what a ratio of 1 changes: nothing."""

import copy
import gc

import pytest
import torch
from diffusers import FlowMatchHeunDiscreteScheduler
from support import pipelines
from support.pipelines import normal, sd3_inputs
from support.runs import CONFIG, LORA_LAYERS, Stop, load_lora, lora, run, stop_at
from support.snapshot import Snapshot, check_undone

import ras


@pytest.fixture(autouse=True)
def no_gradients():
    with torch.no_grad():
        yield


def with_inputs(pipe):
    return pipe, sd3_inputs(pipe, 2)


def controlnet():
    pipe = pipelines.sd3_controlnet()
    return pipe, sd3_inputs(pipe, control_image=normal(1, 3, 128, 128).sigmoid())


def lumina():
    pipe = pipelines.lumina()
    return pipe, pipelines.lumina_inputs(pipe, 2)


SD35 = dict(qk_norm="rms_norm", dual_attention_layers=(0, 1))
FAMILIES = {  # a small pipeline of each kind and the arguments of a call of it
    "sd3": lambda: with_inputs(pipelines.sd3()),
    "sd3.5": lambda: with_inputs(pipelines.sd3(**SD35)),
    "heun": lambda: with_inputs(pipelines.sd3(scheduler=FlowMatchHeunDiscreteScheduler())),
    "controlnet": controlnet,
    "lumina": lumina,
}


def ran_plain(pipe, inputs):
    """The result of a plain run, after which the scheduler's attributes are those of any run."""
    return run(pipe, inputs), set(vars(pipe.scheduler)), set(vars(pipe))


# --- a ratio of one, and after disable ------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_ratio_one_is_dense_to_the_bit(family):
    pipe, inputs = FAMILIES[family]()
    expected = run(pipe, inputs)
    with ras.enabled(pipe, CONFIG, sample_ratio=1.0):
        assert torch.equal(run(pipe, inputs), expected)
        assert ras.stats(pipe).steps_sparse == 0
    assert torch.equal(run(pipe, inputs), expected)


@pytest.mark.parametrize("family", FAMILIES)
def test_enable_and_disable_without_a_run(family):
    pipe, _ = FAMILIES[family]()
    before = Snapshot(pipe)
    ras.enable(pipe, CONFIG)
    assert ras.is_enabled(pipe)
    ras.disable(pipe)
    check_undone(before, pipe, ran=False)


@pytest.mark.parametrize("family", FAMILIES)
def test_after_a_run_all_is_as_before(family):
    pipe, inputs = FAMILIES[family]()
    expected, scheduler_names, pipe_names = ran_plain(pipe, inputs)
    before = Snapshot(pipe)
    ras.enable(pipe, CONFIG)
    assert not torch.equal(run(pipe, inputs), expected)
    assert ras.stats(pipe).steps_sparse == 5
    ras.disable(pipe)
    check_undone(before, pipe)
    assert set(vars(pipe.scheduler)) == scheduler_names and set(vars(pipe)) == pipe_names
    assert torch.equal(run(pipe, inputs), expected)


def test_the_state_dict_is_untouched_while_enabled():
    pipe, inputs = with_inputs(pipelines.sd3())
    before = {name: weight.clone() for name, weight in pipe.transformer.state_dict().items()}
    with ras.enabled(pipe, CONFIG):
        run(pipe, inputs)
        during = pipe.transformer.state_dict()
    assert list(before) == list(during)
    assert all(torch.equal(before[name], during[name]) for name in before)


@pytest.mark.parametrize("at", [0, 3, 5])
def test_disable_after_an_exception(at):
    pipe, inputs = with_inputs(pipelines.sd3())
    expected = run(pipe, inputs)
    before = Snapshot(pipe)
    with pytest.raises(Stop), ras.enabled(pipe, CONFIG):
        run(pipe, inputs, callback_on_step_end=stop_at(at))
    check_undone(before, pipe)
    assert torch.equal(run(pipe, inputs), expected)


def test_disable_in_the_middle_of_a_run():
    """From then on the run is plain: no caches, no hooks, the step counter of nobody."""
    pipe, inputs = with_inputs(pipelines.sd3())
    before = Snapshot(pipe)

    def off(pipe, step, t, tensors):
        if step == 3:
            ras.disable(pipe)
        return tensors

    ras.enable(pipe, CONFIG)
    result = run(pipe, inputs, callback_on_step_end=off)
    assert result.isfinite().all()
    check_undone(before, pipe)


def test_enabled_twice_and_disabled_once():
    pipe, inputs = with_inputs(pipelines.sd3())
    expected = run(pipe, inputs)
    before = Snapshot(pipe)
    ras.enable(pipe, CONFIG)
    run(pipe, inputs)
    ras.enable(pipe, CONFIG, sample_ratio=0.25)
    run(pipe, inputs)
    ras.disable(pipe)
    check_undone(before, pipe)
    ras.disable(pipe)  # nothing to do, and no error
    check_undone(before, pipe)
    assert torch.equal(run(pipe, inputs), expected)


def test_nested_contexts_and_a_model_already_enabled():
    pipe, inputs = with_inputs(pipelines.sd3())
    before = Snapshot(pipe)
    with ras.enabled(pipe, CONFIG) as model:
        assert model is pipe and ras.is_enabled(pipe)
        run(pipe, inputs)
    check_undone(before, pipe)


def live_tensors():
    """The bytes of all tensors in the process, in order; not of those that compilers trace."""
    gc.collect()
    kinds = (torch.Tensor, torch.nn.Parameter)
    found = [thing for thing in gc.get_objects() if type(thing) in kinds]
    return sorted(tensor.nbytes for tensor in found)


def test_nothing_is_kept_alive():
    """After `disable` there are no more tensors in the process than before `enable`."""
    pipe, inputs = with_inputs(pipelines.sd3())
    run(pipe, inputs)
    before = len(live_tensors())
    ras.enable(pipe, CONFIG)
    run(pipe, inputs)
    with pytest.raises(Stop):
        run(pipe, inputs, callback_on_step_end=stop_at(3))
    ras.disable(pipe)
    assert len(live_tensors()) <= before


@pytest.mark.parametrize("interrupted", [False, True])
def test_caches_are_freed_when_a_call_returns(interrupted):
    """Complete or interrupted, no run leaves a tensor behind that is as large as a layer's keys."""
    pipe, inputs = with_inputs(pipelines.sd3())

    def interrupt(pipe, step, t, tensors):
        pipe._interrupt = interrupted and step == 3
        return tensors

    run(pipe, inputs)
    keys = 2 * 2 * 64 * 64 * 4  # bytes: batch with guidance, tokens, channels, float32

    def large():
        return [size for size in live_tensors() if size >= keys]

    before = large()
    ras.enable(pipe, CONFIG)
    run(pipe, inputs, callback_on_step_end=interrupt)
    assert large() == before
    assert ras.stats(pipe).cache_bytes >= 3 * 2 * keys


def test_bare_transformer_is_undone():
    pipe, inputs = with_inputs(pipelines.sd3())
    before = Snapshot(pipe)
    ras.enable(pipe.transformer, CONFIG, scheduler=pipe.scheduler)
    run(pipe, inputs)
    assert ras.stats(pipe.transformer).steps_sparse == 5
    ras.disable(pipe.transformer)
    assert not ras.is_enabled(pipe.transformer)
    check_undone(before, pipe)


def test_lora_loaded_after_enable():
    """Loading wraps layers that carry hooks; neither unloading nor disabling leaves any behind."""
    pipe, inputs = with_inputs(pipelines.sd3())
    plain, _ = with_inputs(pipelines.sd3())
    expected = run(pipe, inputs)
    before = Snapshot(pipe)
    state, _ = lora(pipe.transformer, 1000)
    load_lora(plain, state)

    ras.enable(pipe, CONFIG)
    load_lora(pipe, state)
    run(pipe, inputs)
    ras.disable(pipe)
    assert torch.equal(run(pipe, inputs), run(plain, inputs))
    for name in LORA_LAYERS:
        for module in pipe.transformer.get_submodule(name).modules():
            assert not module._forward_hooks and not module._forward_pre_hooks, name
    pipe.unload_lora_weights()
    assert torch.equal(run(pipe, inputs), expected)
    after = Snapshot(pipe)
    ignored = {"scheduler", "pipe", "module "}  # peft leaves its configuration on the transformer
    before.same_as(after, ignoring=ignored)
    hooks = [name for name in vars(pipe.transformer) if name.endswith("_hooks")]
    assert not any(getattr(pipe.transformer, name) for name in hooks)


def test_lora_loaded_before_and_unloaded_while_enabled():
    pipe, inputs = with_inputs(pipelines.sd3())
    expected = run(pipe, inputs)
    load_lora(pipe, lora(pipe.transformer, 1000)[0])
    ras.enable(pipe, CONFIG)
    run(pipe, inputs)
    pipe.unload_lora_weights()
    ras.disable(pipe)
    assert torch.equal(run(pipe, inputs), expected)
    for module in pipe.transformer.modules():
        assert not module._forward_hooks and not module._forward_pre_hooks


def test_projections_fused_after_enable():
    """Fused before or after: the same dense result, and the user's own processors stay."""
    pipe, inputs = with_inputs(pipelines.sd3())
    plain, _ = with_inputs(pipelines.sd3())
    plain.transformer.fuse_qkv_projections()
    expected = run(plain, inputs)
    ras.enable(pipe, CONFIG)
    pipe.transformer.fuse_qkv_projections()
    ras.disable(pipe)
    assert torch.equal(run(pipe, inputs), expected)
    kinds = [type(p) for p in pipe.transformer.attn_processors.values()]
    assert kinds == [type(p) for p in plain.transformer.attn_processors.values()]
    for module in pipe.transformer.modules():
        assert not module._forward_hooks and not module._forward_pre_hooks


def test_the_users_hooks_stay():
    """Hooks and wraps made before and after `enable`, taken off in any order."""
    pipe, inputs = with_inputs(pipelines.sd3())
    calls = []
    transformer = pipe.transformer
    first = transformer.proj_out.register_forward_hook(lambda *_: calls.append("first"))
    ras.enable(pipe, CONFIG)
    second = transformer.proj_out.register_forward_hook(lambda *_: calls.append("second"))
    run(pipe, inputs)
    assert calls.count("first") == calls.count("second") == 8
    first.remove()
    ras.disable(pipe)
    calls.clear()
    run(pipe, inputs)
    assert calls == ["second"] * 8
    second.remove()
    assert not transformer.proj_out._forward_hooks


def test_scheduler_taken_out_while_enabled_is_free():
    """Taken out of the pipeline before `disable`, it is stepped as if `ras` did not exist."""
    pipe, inputs = with_inputs(pipelines.sd3())
    first = pipe.scheduler
    ras.enable(pipe, CONFIG)
    run(pipe, inputs)
    pipe.scheduler = pipelines.euler()
    run(pipe, inputs)
    assert ras.stats(pipe).steps_sparse == 5
    ras.disable(pipe)
    assert "step" not in vars(first) and "step" not in vars(pipe.scheduler)


@pytest.mark.parametrize("order", [(0, 1), (1, 0)])
def test_two_pipelines_with_one_scheduler(order):
    """Two transformers, one scheduler: disabled in either order, it is left as it was."""
    one, inputs = with_inputs(pipelines.sd3())
    pipes = one, pipelines.sd3(scheduler=one.scheduler, seed=4)
    for pipe in pipes:
        ras.enable(pipe, CONFIG)
    for pipe in pipes:
        run(pipe, inputs)
        assert ras.stats(pipe).steps_sparse == 5
    twin, step = copy.deepcopy(one.scheduler), one.scheduler.step_index
    twin.set_timesteps(8)
    twin.step(normal(1, 4), twin.timesteps[0], normal(1, 4))
    assert (twin.step_index, one.scheduler.step_index) == (1, step)
    first, last = (pipes[i] for i in order)
    ras.disable(first)
    run(last, inputs)
    assert ras.stats(last).steps_sparse == 5
    ras.disable(last)
    assert "step" not in vars(one.scheduler)


# --- copies of the scheduler ----------------------------------------------------------------------


def test_copy_of_the_scheduler_is_independent():
    """Stepping a copy in the middle of a run changes nothing in the run, nor the run the copy."""
    pipe, inputs = with_inputs(pipelines.sd3())
    ras.enable(pipe, CONFIG)
    expected = run(pipe, inputs)
    stats = ras.stats(pipe)
    lone = pipelines.euler()
    lone.set_timesteps(8)
    noise, sample = normal(2, 16, 16, 16, seed=1), normal(2, 16, 16, 16, seed=2)
    alone = lone.step(noise, lone.timesteps[0], sample, return_dict=False)[0]

    def step_a_copy(pipe, step, t, tensors):
        twin = copy.deepcopy(pipe.scheduler)
        assert twin.step_index == pipe.scheduler.step_index
        twin.set_timesteps(8)
        given = twin.step(noise, twin.timesteps[0], sample, return_dict=False)[0]
        assert torch.equal(given, alone)
        return tensors

    assert torch.equal(run(pipe, inputs, callback_on_step_end=step_a_copy), expected)
    assert ras.stats(pipe).steps_sparse == stats.steps_sparse == 5
    twin = copy.deepcopy(pipe.scheduler)
    ras.disable(pipe)
    twin.set_timesteps(8)
    assert torch.equal(twin.step(noise, twin.timesteps[0], sample, return_dict=False)[0], alone)


def test_copy_of_the_scheduler_does_not_hold_the_model():
    """No copy of the weights hangs on a copy of an enabled pipeline's scheduler."""
    pipe, inputs = with_inputs(pipelines.sd3())
    ras.enable(pipe, CONFIG)
    run(pipe, inputs)
    twin = copy.deepcopy(pipe.scheduler)
    reached, queue = set(), [twin]
    while queue:
        thing = queue.pop()
        if id(thing) in reached:
            continue
        reached.add(id(thing))
        assert not isinstance(thing, torch.nn.Module), "a model hangs on the copy"
        if isinstance(thing, dict):
            queue += thing.values()
        elif isinstance(thing, (list, tuple)):
            queue += thing
        elif hasattr(thing, "__self__") and not isinstance(thing.__self__, type(copy)):
            queue += [thing.__self__, *getattr(thing.__func__, "__dict__", {}).values()]
        elif hasattr(thing, "__dict__") and not isinstance(thing, (type, torch.Tensor)):
            queue += vars(thing).values()


def test_new_pipeline_with_an_enabled_ones_scheduler_config():
    """What users do: another scheduler from the config of the enabled pipeline's."""
    pipe, inputs = with_inputs(pipelines.sd3())
    expected = run(pipe, inputs)
    ras.enable(pipe, CONFIG)
    run(pipe, inputs)
    other = pipelines.sd3(scheduler=type(pipe.scheduler).from_config(pipe.scheduler.config))
    assert torch.equal(run(other, inputs), expected)
