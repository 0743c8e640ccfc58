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


def test_schedules_can_be_pickled():
    ramp = pickle.loads(pickle.dumps(flatkern.cosine_ramp(4)))
    assert ramp(1) == flatkern.cosine_ramp(4)(1)
    assert pickle.loads(pickle.dumps(flatkern.constant()))(3) == 1.0


@pytest.mark.parametrize(
    ("total", "error"), [(0, ValueError), (-1, ValueError), (2.0, TypeError), (True, TypeError)]
)
def test_total_steps_is_checked(total, error):
    with pytest.raises(error, match="total_steps"):
        flatkern.cosine_ramp(total)
