"""Every method on several ranks; ddp_checks.py says what is held."""

import ddp_checks
import on_ranks
import pytest

from flatkern import methods

MODULES = ["ddp_checks"]


@pytest.fixture(scope="module")
def runner(tmp_path_factory):
    return on_ranks.Runner(tmp_path_factory.mktemp("ranks"), MODULES)


@pytest.mark.parametrize(("world", "name"), on_ranks.checks_of(MODULES))
def test_on_ranks(runner, world, name):
    runner.assert_passed(world, name)


def test_every_method_is_among_them():
    assert set(ddp_checks.KINDS) - {methods.Method} == {case.type for case in ddp_checks.EVERY}
