"""Fixtures of all tests."""

import os

import pytest
import torch

pytest.register_assert_rewrite("support.operands")  # its asserts say what they compared

if "PYTEST_XDIST_WORKER" in os.environ:  # as many processes as cores, none of which needs more
    torch.set_num_threads(1)


@pytest.fixture
def no_gradients():
    with torch.no_grad():
        yield
