"""The versions that everybody tests with: complete, and within the ranges that are promised."""

import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement

ROOT = Path(__file__).parents[1]
if not (ROOT / "constraints.txt").is_file():
    pytest.skip("an installed copy has no constraints", allow_module_level=True)


def needs():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"].values()
    lines = [*project["dependencies"], *(need for needs in extras for need in needs)]
    return [Requirement(line) for line in lines if not line.startswith("flatkern")]


def pinned():
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    return [Requirement(line) for line in lines]


def test_every_need_is_pinned_within_its_range():
    versions = {}
    for one in pinned():
        versions.setdefault(one.name, []).extend(pin.version for pin in one.specifier)
    for need in needs():
        # torch's wheel is the user's choice, and pins what it needs itself.
        if need.name == "torch":
            continue
        assert need.name in versions, f"{need.name}: run `make constraints`"
        for version in versions[need.name]:
            assert need.specifier.contains(version), f"{need} and {version}"


@pytest.mark.parametrize("one", pinned(), ids=lambda one: f"{one.name}-{one.marker}")
def test_a_pin_is_one_version(one):
    assert [pin.operator for pin in one.specifier] == ["=="]
