"""How many kernels a block launches in a step, counted on the CPU."""

import pytest
import torch
from torch import nn

import ras_kernels
from ras_kernels import _triton

if _triton.triton is None or _triton.INTERPRETED:
    pytest.skip("notes launches of Triton kernels, none interpreted", allow_module_level=True)

from benchmarks.kernels import launches
from benchmarks.kernels.launches import OWN


class Block(nn.Module):
    """A layer, and what the block does itself."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(4, 4)

    def forward(self, tokens):
        index = torch.arange(2)[None]  # one
        rows = ras_kernels.gather_tokens(tokens, index).transpose(1, 2)  # one, and a view
        ages = torch.zeros(2, 3, dtype=torch.int32)  # one
        order = dict(high_ratio=0.3, starvation_scale=1.0)
        ras_kernels.select_regions(tokens[:, :, 0], ages, 2, **order)  # three, and a copy
        ras_kernels.norm_rotary(rows.view(2, 4, 1, 2).transpose(2, 3))  # one, and a copy before it
        self.layer(tokens[:0])  # none
        return self.layer(tokens.new_empty(2, 3, 4))  # one


def test_what_counts_as_a_launch():
    block = Block()
    counted = launches.Launches({"blocks": block})
    with torch.no_grad(), counted.counting():
        for _ in range(2):  # the last call counts
            block(torch.ones(2, 3, 4))
    assert counted.counts == {"blocks": {OWN: 1 + 1 + 1 + 4 + 2, "layer": 1}}


def test_launches_of_a_block():
    """Of SD3's; dense are those that diffusers makes, and a copy by the CPU's attention."""
    totals = {
        setting: launches.count("sd3", config)["transformer_blocks"].total()
        for setting, config in launches.SETTINGS.items()
    }
    assert totals == {"dense": 51, "paper": 38, "default": 39}
