"""All that is around a pipeline, before and after."""

import torch

import ras


class Snapshot:
    """Every attribute, hook, processor and class member around a pipeline, by identity."""

    def __init__(self, pipe):
        self.kept = []  # keeps what it saw alive, so that no identity is used twice
        self.seen = {"pipe": self.members(vars(pipe))}
        objects = {"transformer": pipe.transformer, "scheduler": pipe.scheduler}
        for name, thing in objects.items():
            self.seen[f"type of {name}"] = self.members(vars(type(thing)))
        self.seen["type of pipe"] = self.members(vars(type(pipe)))
        self.seen["scheduler"] = self.members(vars(pipe.scheduler))
        for name, module in pipe.transformer.named_modules():
            self.seen[f"module {name}"] = (type(module), self.members(vars(module)))
        state = pipe.transformer.state_dict()
        self.seen["state"] = list(state)
        self.weights = {name: weight.clone() for name, weight in state.items()}

    def members(self, attributes):
        """Names and identities; of dictionaries (hooks, parameters, modules) what is in them."""
        found = {}
        for name, value in attributes.items():
            self.kept.append(value)
            if isinstance(value, dict):
                self.kept.extend(value.values())
                value = {key: id(inner) for key, inner in value.items()}
            elif isinstance(value, (int, float, str, tuple, bool, type(None))):
                pass
            else:
                value = id(value)
            found[name] = value
        return found

    def same_as(self, other, ignoring=()):
        for name in self.seen.keys() | other.seen.keys():
            if name not in ignoring:
                assert self.seen.get(name) == other.seen.get(name), name
        assert self.weights.keys() == other.weights.keys()
        for name, weight in self.weights.items():
            assert torch.equal(weight, other.weights[name]), name


def check_undone(before, pipe, ran=True):
    """As it was; a run leaves its own marks on the scheduler and the pipeline."""
    assert not ras.is_enabled(pipe)
    before.same_as(Snapshot(pipe), ignoring=("scheduler", "pipe") if ran else ())
