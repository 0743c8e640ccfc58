import pytest


@pytest.fixture
def own_accelerate():
    """accelerate keeps one state for the process: not the one that another test's GPU is in."""
    state = pytest.importorskip("accelerate.state", reason="accelerate is not installed")
    state.AcceleratorState._reset_state(reset_partial_state=True)
