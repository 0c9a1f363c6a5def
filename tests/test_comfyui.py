"""The nodes for ComfyUI, in graphs as its API has them, by its documented interface of a node."""

import importlib.util
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from support import pipelines

import ras

STEPS = 12
PACK = Path(__file__).parents[1] / "integrations/comfyui/__init__.py"


@pytest.fixture
def nodes(monkeypatch):
    """The pack, as ComfyUI imports it; it loads a small pipeline, whatever the name."""
    spec = importlib.util.spec_from_file_location("custom_nodes.ras", PACK)
    found = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(found)
    parts = pipelines.text_encoders()
    pipe = pipelines.sd3(vae=pipelines.autoencoder(), parts=parts)
    monkeypatch.setattr(found, "load", lambda *_: pipe)
    return found


def evaluate(nodes, graph, values):
    """What each node of a graph returns; an input `[node, n]` is that node's n-th output."""
    found, types = {}, {}
    for name, node in graph.items():
        kind = nodes.NODE_CLASS_MAPPINGS[node["class_type"]]
        asked = kind.INPUT_TYPES()
        given = {}
        assert asked["required"].keys() <= node["inputs"].keys()
        for key, value in node["inputs"].items():
            wanted, *config = {**asked["required"], **asked.get("optional", {})}[key]
            if isinstance(value, list):
                other, at = value
                assert types[other][at] == wanted
                value = found[other][at]
            elif isinstance(wanted, list):
                assert value in wanted
            elif config and "min" in config[0]:
                assert config[0]["min"] <= value <= config[0]["max"]
            given[key] = values.get(value, value) if isinstance(value, str) else value
        found[name] = getattr(kind(), kind.FUNCTION)(**given)
        types[name] = kind.RETURN_TYPES
        assert len(found[name]) == len(kind.RETURN_TYPES) == len(kind.RETURN_NAMES)
    return found


def sample(pipeline):
    call = dict(prompt="a red ring", steps=STEPS, seed=3, guidance_scale=4.0, width=0, height=0)
    return dict(class_type="RASSample", inputs=dict(pipeline=[pipeline, 0], **call))


def applied(**more):
    return dict(class_type="RASApply", inputs=dict(pipeline=["loaded", 0], speedup=2.0, **more))


GRAPH = {
    "loaded": dict(class_type="RASLoadPipeline", inputs=dict(model="", dtype="auto")),
    "faster": applied(),
    "masked": applied(mask="MASK"),
    "by faster": sample("faster"),
    "by masked": sample("masked"),
    "dense": sample("loaded"),
}


def test_a_graph(nodes):
    """One loaded pipeline, dense and with RAS, is what it is by hand; a mask makes regions."""
    mask = torch.zeros(1, 64, 64)
    mask[:, :24, :24] = 1
    found = evaluate(nodes, GRAPH, {"MASK": mask})
    pipe = found["loaded"][0].pipe
    assert not ras.is_enabled(pipe)
    call = dict(guidance_scale=4.0, max_sequence_length=0, num_inference_steps=STEPS)

    def by_hand(**settings):
        with ras.enabled(pipe, **settings):
            generator = torch.Generator().manual_seed(3)
            image = pipe("a red ring", generator=generator, **call).images[0]
            return np.asarray(image, np.float32) / 255, str(ras.stats(pipe))

    for name, settings in (("by faster", {}), ("by masked", dict(mask=mask))):
        image, regions, told = found[name]
        expected, stats = by_hand(speedup=2, **settings)
        assert image.dtype == torch.float32 and regions.shape == image.shape
        assert np.array_equal(image[0], expected) and told == stats
    veiled = [
        (found[name][0] != found[name][1]).any(-1).float().mean() for name in GRAPH if "by" in name
    ]
    assert veiled[0] == 0 and 0.3 < veiled[1] < 1
    assert np.array_equal(found["dense"][0][0], by_hand(speedup=1)[0])
    assert found["dense"][2] == "dense"


def test_what_is_left_out_is_the_pipelines_own(nodes, monkeypatch):
    """By the defaults of the node's inputs; and what a call does not take is refused by name."""
    (described,) = nodes.LoadPipeline().load("org/name", "auto")
    optional = nodes.Sample.INPUT_TYPES()["optional"]
    usual = {name: more[0]["default"] for name, (_, *more) in optional.items() if more}
    seen = []

    def call(self, prompt, num_inference_steps, generator, guidance_scale=7.0):
        seen.append(guidance_scale)
        return SimpleNamespace(images=[Image.new("RGB", (8, 8))])

    monkeypatch.setattr(type(described.pipe), "__call__", call)
    asked = dict(pipeline=described, prompt="a ring", steps=2, seed=0)
    for guidance in (usual["guidance_scale"], 0.0, 5.0):
        nodes.Sample().sample(**asked, **{**usual, "guidance_scale": guidance})
    assert seen == [7.0, 0.0, 5.0]
    for name, value in (("image", torch.ones(1, 8, 8, 3)), ("width", 64)):
        with pytest.raises(ValueError, match=f"takes no {name}"):
            nodes.Sample().sample(**asked, **{**usual, name: value})
    assert len(seen) == 3


def test_a_mask_of_nothing_is_none(nodes):
    """Images without a mask come with one of zeros."""
    found = evaluate(
        nodes, {k: GRAPH[k] for k in ("loaded", "masked")}, {"MASK": torch.zeros(1, 64, 64)}
    )
    assert found["masked"][0].mask is None
    assert found["masked"][0].config == ras.RASConfig(2.0)


def test_every_node_has_a_title(nodes):
    assert nodes.NODE_CLASS_MAPPINGS.keys() == nodes.NODE_DISPLAY_NAME_MAPPINGS.keys()
    for kind in nodes.NODE_CLASS_MAPPINGS.values():
        assert kind.CATEGORY and callable(getattr(kind, kind.FUNCTION))
