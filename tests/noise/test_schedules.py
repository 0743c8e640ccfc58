import math
import pickle

import pytest

import flatkern


def test_constant():
    assert [flatkern.constant()(step) for step in (0, 1, 10**6)] == [1.0, 1.0, 1.0]


def test_cosine_ramp():
    ramp = flatkern.cosine_ramp(8)
    assert ramp(0) == 0.0
    assert ramp(2) == pytest.approx(0.5 - math.sqrt(2) / 4)
    assert ramp(4) == pytest.approx(0.5)
    assert [ramp(step) for step in (8, 9, 10**6)] == [1.0, 1.0, 1.0]
    values = [ramp(step) for step in range(9)]
    assert values == sorted(values)


def test_linear_ramp():
    assert [flatkern.linear_ramp(4)(step) for step in (0, 1, 3, 4, 9)] == [0, 0.25, 0.75, 1, 1]


def test_lpf_ends_at_one_plus_alpha():
    ramp = flatkern.lpf(8, alpha=15)
    assert [ramp(step) for step in (0, 4, 8, 9)] == [1.0, 8.5, 16.0, 16.0]
    assert flatkern.lpf(8)(8) == 16.0


def test_schedules_can_be_pickled():
    assert pickle.loads(pickle.dumps(flatkern.lpf(4)))(1) == flatkern.lpf(4)(1)
    ramp = pickle.loads(pickle.dumps(flatkern.cosine_ramp(4)))
    assert ramp(1) == flatkern.cosine_ramp(4)(1)
    assert pickle.loads(pickle.dumps(flatkern.constant()))(3) == 1.0


@pytest.mark.parametrize(
    ("total", "error"), [(0, ValueError), (-1, ValueError), (2.0, TypeError), (True, TypeError)]
)
def test_total_steps_is_checked(total, error):
    for schedule in (flatkern.cosine_ramp, flatkern.linear_ramp, flatkern.lpf):
        with pytest.raises(error, match="total_steps"):
            schedule(total)


@pytest.mark.parametrize(
    ("alpha", "error"), [(-1.0, ValueError), (math.inf, ValueError), ("1", TypeError)]
)
def test_alpha_is_checked(alpha, error):
    with pytest.raises(error, match="alpha"):
        flatkern.lpf(4, alpha)
