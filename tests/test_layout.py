"""Holds the shape of the repository (CONTRIBUTING.md) by reading the sources."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "flatkern"
CSRC = ROOT / "csrc"
STEMS = ("noise", "row_norm", "perturb", "perturb_merged", "perturb_plane", "noisy_linear")

# A package may import from lower levels, and from itself. Siblings may import in one direction.
LEVELS = {
    "reference": 0,
    "triton": 0,
    "_C": 0,
    "ops": 1,
    "nn": 2,
    "noise": 2,
    "landscape": 3,
    "methods": 3,
    "integrations": 4,
    "baselines": 5,
    "microbench": 5,
    "landscape_command": 5,
    "cli": 6,
    "demo": 5,
    "study": 6,
    "__main__": 7,
    "__init__": 7,
}
IMPLEMENTATIONS = ("reference", "triton", "_C")
# Private modules at the top (_backend, _machine, _noise and others) carry no part of the
# meaning and may be used anywhere; of the rest they may know the extension that they load.
THIRD_PARTY = ("integrations", "demo", "study", "cli", "landscape_command")
ALLOWED_THIRD_PARTY = {
    "triton": {"triton"},
    "nn": {"safetensors"},
    # Imported when a picture or a bar is asked for.
    "landscape": {"matplotlib", "numpy", "plotly", "tqdm"},
}

SOURCES = sorted(PACKAGE.rglob("*.py"))
needs_csrc = pytest.mark.skipif(not CSRC.is_dir(), reason="an installed copy has no csrc")


def part_of(path):
    """The top-level part a source file belongs to: its folder, or its own name."""
    return path.relative_to(PACKAGE).with_suffix("").parts[0]


def imports(path):
    """Every module that a file imports, absolute, `from a import b` as a.b; lazy ones included."""
    package = ["flatkern", *path.relative_to(PACKAGE).with_suffix("").parts[:-1]]
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            module = ".".join([*base, *([node.module] if node.module else [])])
            yield from (f"{module}.{alias.name}" for alias in node.names)
        elif (
            isinstance(node, ast.Call)
            and getattr(node.func, "attr", getattr(node.func, "id", "")) == "import_module"
            and node.args
            and isinstance(node.args[0], ast.Constant)
        ):
            yield node.args[0].value


def edges():
    """(part, imported part, file) for each import of one part of the package by another."""
    for path in SOURCES:
        for module in imports(path):
            names = module.split(".")
            if names[0] == "flatkern" and len(names) > 1:
                target = names[1]
                exists = (PACKAGE / target).is_dir() or (PACKAGE / f"{target}.py").is_file()
                if (exists or target == "_C") and target != part_of(path):
                    yield part_of(path), target, path.relative_to(ROOT)


def is_utility(part):
    return part.startswith("_") and part not in LEVELS


def test_every_part_has_a_level():
    parts = {part_of(path) for path in SOURCES}
    assert {part for part in parts if not is_utility(part)} <= LEVELS.keys()


def test_imports_point_one_way():
    found = list(edges())
    assert ("ops", "reference") in {(part, target) for part, target, _ in found}
    wrong = []
    for part, target, path in found:
        if is_utility(target):
            continue
        allowed = target in IMPLEMENTATIONS if is_utility(part) else LEVELS[target] <= LEVELS[part]
        if not allowed:
            wrong.append(f"{path} imports flatkern.{target}")
    assert not wrong


def test_siblings_import_in_one_direction():
    pairs = {(part, target) for part, target, _ in edges()}
    assert not [pair for pair in pairs if pair[::-1] in pairs and not any(map(is_utility, pair))]


def test_implementations_do_not_import_one_another():
    wrong = [
        str(path)
        for part, target, path in edges()
        if part in IMPLEMENTATIONS and not is_utility(target)
    ]
    assert not wrong


def test_only_ops_choose_an_implementation():
    wrong = [
        f"{path} imports flatkern.{target}"
        for part, target, path in edges()
        if target in IMPLEMENTATIONS and part != "ops" and not is_utility(part)
    ]
    assert not wrong


def test_third_parties_stay_at_the_edge():
    wrong = []
    for path in SOURCES:
        part = part_of(path)
        if part in THIRD_PARTY:
            continue
        allowed = {"flatkern", "torch", *sys.stdlib_module_names}
        allowed |= ALLOWED_THIRD_PARTY.get(part, set())
        wrong += [
            f"{path.relative_to(ROOT)} imports {module}"
            for module in imports(path)
            if module.split(".")[0] not in allowed
        ]
    assert not wrong


def test_no_third_party_at_import_of_a_module_that_the_package_imports():
    # integrations and cli may use third parties; `import flatkern` must not need them.
    code = """
import random, sys
import torch
torch.manual_seed(3); random.seed(3)
states = torch.get_rng_state(), random.getstate()
before = set(sys.modules)
import flatkern
new = {name.split(".")[0] for name in set(sys.modules) - before}
own = {"flatkern", "torch", "torchgen", "functorch"}
of_torch = {"numpy", "sympy", "mpmath", "typing_extensions", "networkx", "filelock", "jinja2",
            "markupsafe", "fsspec", "triton", "isympy"}
foreign = new - own - of_torch - set(sys.stdlib_module_names) - {"_distutils_hack"}
assert not foreign, foreign
assert torch.equal(torch.get_rng_state(), states[0]) and random.getstate() == states[1]
assert not torch.cuda.is_initialized()
"""
    run = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert run.returncode == 0, run.stderr


@pytest.mark.parametrize("stem", STEMS)
@pytest.mark.parametrize(
    ("folder", "suffixes", "composes"),
    [
        (PACKAGE / "ops", (".py",), True),
        (PACKAGE / "reference", (".py",), False),
        (PACKAGE / "triton", (".py",), False),
        (CSRC / "cpu", (".cpp", ".h"), False),
        (CSRC / "cuda", (".cu", ".cuh"), False),
        (ROOT / "tests" / "ops", (".py",), True),
    ],
    ids=lambda value: value.name if isinstance(value, Path) else "",
)
def test_every_op_has_its_file(stem, folder, suffixes, composes):
    if folder in (PACKAGE / "triton", CSRC / "cpu", CSRC / "cuda") and not [
        file for suffix in suffixes for file in folder.glob(f"*{suffix}")
    ]:
        pytest.skip(f"{folder.name} has no kernels yet")
    if stem == "noisy_linear" and not composes:
        # Every backend composes it from its perturb and the vendor's product, in ops/.
        return
    if stem == "perturb_merged" and folder == CSRC / "cuda":
        # Two launches, in register.cpp.
        return
    prefix = "test_" if folder.parent.name == "tests" else ""
    assert any((folder / f"{prefix}{stem}{suffix}").is_file() for suffix in suffixes)


def includes(path):
    return [
        line.split("include", 1)[1].strip().strip('<>"')
        for line in path.read_text().splitlines()
        if line.lstrip().startswith("#") and "include" in line
    ]


def c_sources():
    return sorted(path for path in CSRC.rglob("*") if path.suffix in {".h", ".cpp", ".cu", ".cuh"})


# Registration, and the layer that calls torch's own products.
SEES_TORCH = {"register.cpp", "check.h", "noisy_linear.cpp", "noisy_linear.h", "noisy_products.h"}


@needs_csrc
def test_only_registration_and_the_layer_include_torch():
    assert c_sources()
    torch_headers = ("torch/", "ATen/", "c10/", "pybind11/", "Python.h")
    wrong = [
        f"{path.relative_to(ROOT)} includes {header}"
        for path in c_sources()
        for header in includes(path)
        if header.startswith(torch_headers)
        and path.name not in SEES_TORCH
        and not (path.name == "module.cpp" and header.startswith(("pybind11/", "torch/")))
    ]
    assert not wrong


@needs_csrc
def test_shared_headers_include_only_the_standard_library_and_each_other():
    shared = ("philox.h", "numeric.h", "args.h", "residual.h")
    for name in shared:
        assert [h for h in includes(CSRC / name) if "." in h and h not in shared] == []


@needs_csrc
def test_no_fast_math():
    # -ffast-math and its parts would move the bits of the noise from one build to another.
    texts = {path: path.read_text() for path in [*c_sources(), ROOT / "setup.py"]}
    forbidden = ("-ffast-math", "-Ofast", "use_fast_math", "-funsafe-math", "-fassociative-math")
    wrong = [
        f"{path}: {word}" for path, text in texts.items() for word in forbidden if word in text
    ]
    assert not wrong


def test_no_file_is_long():
    files = [*SOURCES, *(c_sources() if CSRC.is_dir() else [])]
    lengths = {path: len(path.read_text().splitlines()) for path in files}
    assert not {str(path): lines for path, lines in lengths.items() if lines > 400}


def stores(tree, own):
    """Attributes that are assigned: those of `self` if `own`, else those of anything else."""
    nodes = [node for node in ast.walk(tree) if isinstance(node, ast.Attribute)]
    for node in nodes:
        is_self = isinstance(node.value, ast.Name) and node.value.id == "self"
        if isinstance(node.ctx, ast.Store) and is_self == own:
            yield node.attr


def test_only_its_own_file_writes_the_state_of_a_weight():
    state = PACKAGE / "noise" / "state.py"
    classes = [n for n in ast.parse(state.read_text()).body if isinstance(n, ast.ClassDef)]
    fields = set(stores(next(c for c in classes if c.name == "State"), own=True))
    assert {"row_scale", "key", "noisy", "perturbed", "called"} < fields
    found = [
        (path.relative_to(ROOT), name)
        for path in SOURCES
        for name in stores(ast.parse(path.read_text()), own=False)
        if path != state and name in fields
    ]
    assert not found
