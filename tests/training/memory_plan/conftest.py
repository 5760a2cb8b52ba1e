"""Forecasts by arithmetic, for the tests of what is made of them."""

import pytest

from tests.training.memory_plan.arithmetic import counted_forecasts


@pytest.fixture
def forecasts(monkeypatch):
    """The arguments of all forecasts that a test makes, which are by arithmetic."""
    return counted_forecasts(monkeypatch)
