"""Which of PyTorch's attentions the dense side of a benchmark takes."""

import json

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from benchmarks.speed import attention, end_to_end

TINY = ["--layers=1", "--heads=4", "--head-dim=8", "--image-tokens=16", "--text-tokens=3"]
TINY += ["--steps=6", "--resets", "5", "--ratios", "0.5", "--pairs=1", "--device=cpu", "--json"]


def report(capsys, *more):
    end_to_end.main([*TINY, *more])
    return json.loads(capsys.readouterr().out)


def test_cudnns_is_timed_beside_what_pytorch_takes(monkeypatch, capsys):
    """As where there is cuDNN's; on a CPU the same is taken with that first."""
    order = []
    whole = end_to_end.run

    def noted(pipe, call, device):
        order.append(torch._C._get_sdp_priority_order()[0] == SDPBackend.CUDNN_ATTENTION.value)
        return whole(pipe, call, device)

    monkeypatch.setattr(end_to_end, "run", noted)
    monkeypatch.setattr(end_to_end, "has_cudnn", lambda device: True)
    found = report(capsys)
    assert order == 2 * [False, False, True]  # dense, with RAS, by cuDNN: warm-ups, then a round
    cpu = ["flash_for_cpu"]
    assert found["attentions"] == {"dense": cpu, attention.BY_CUDNN: cpu}
    row = found["rows"][-1]
    assert (row["setting"], row["steps_dense"], row["ceiling"]) == (attention.BY_CUDNN, 6, 1)


def test_compiled_code_is_not_timed_by_cudnns(monkeypatch, capsys):
    """It has the attention that it was made with."""
    monkeypatch.setattr(end_to_end, "has_cudnn", lambda device: True)
    found = report(capsys, "--compile=eager")
    assert found["attentions"] == {"dense": ["flash_for_cpu"]}
    assert [row["setting"] for row in found["rows"]] == ["0.5"]


def test_attention_of_no_fused_operator():
    query = torch.zeros(1, 1, 2, 8)
    with attention.Attentions() as found, sdpa_kernel(SDPBackend.MATH):
        scaled_dot_product_attention(query, query, query)
    assert found.names == ["math"]
