"""Fixtures of all tests."""

import pytest
import torch

pytest.register_assert_rewrite("operands")  # its asserts say what they compared, as tests' do


@pytest.fixture
def no_gradients():
    with torch.no_grad():
        yield
