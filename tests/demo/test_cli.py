import importlib.util
import json
import subprocess
import sys

import pytest
import torch
from torch.utils.benchmark import Timer

import flatkern
from flatkern import cli, microbench


def test_doctor_says_what_is_usable(capsys: pytest.CaptureFixture[str]) -> None:
    status = cli.main(["doctor"])
    assert status == int(flatkern.available_backends() == ["reference"])
    out = capsys.readouterr().out
    for backend in ("cuda", "cpu", "triton", "reference"):
        assert backend in out


USABLE = dict.fromkeys(("cuda", "cpu", "triton", "reference"), "usable")


@pytest.mark.parametrize(
    ("backend", "auto", "unusable", "words"),
    [
        ("auto", {"cpu": "cpu"}, {"cuda": "no device"}, []),
        ("auto", {"cpu": "reference"}, {"cpu": "not built"}, ["C++ compiler"]),
        ("auto", {"cpu": "cpu", "cuda": "triton"}, {"cuda": "no nvcc"}, ["no nvcc"]),
        ("auto", {"cpu": "cpu", "cuda": "reference"}, {"cuda": "sm_75"}, ["nothing fast"]),
        ("triton", {"cpu": "cpu"}, {"triton": "no device"}, ["FLATKERN_BACKEND=triton"]),
    ],
)
def test_doctor_has_advice_for_what_is_missing(backend, auto, unusable, words, monkeypatch, capsys):
    info = {"backend": backend, "auto": auto, "backends": USABLE | unusable, "extension": {}}
    monkeypatch.setattr(flatkern, "build_info", lambda: dict(info))
    assert cli.main(["doctor", "--json"]) == int(bool(words))
    advice = json.loads(capsys.readouterr().out)["advice"]
    assert len(advice) == len(words)
    assert all(word in line for word, line in zip(words, advice, strict=True))
    assert cli.main(["doctor"]) == int(bool(words))
    assert ("nothing to do" in capsys.readouterr().out) == (not words)


def test_bench_times_every_op_and_moves_no_generator(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    # How often torch repeats a measurement is not what this is about, and takes it ten seconds.
    monkeypatch.setattr(Timer, "adaptive_autorange", lambda timer, **_: timer.timeit(2))
    before = torch.get_rng_state()
    small = ["bench", "--rows", "48", "--cols", "64", "--rank", "2", "--tokens", "4"]
    small += ["--seconds", "0.001"]
    assert cli.main([*small, "--json"]) == 0
    record = json.loads(capsys.readouterr().out)
    assert torch.equal(before, torch.get_rng_state())
    assert record["rows"][0]["op"] == "row_norm"
    assert all(row["flatkern"] > 0 and (row["copy"] or row["lora"]) for row in record["rows"])
    # The scale, and what the kernel has in flight: nothing of the weight's 48 x 64.
    assert record["rows"][0]["peak_bytes"] < 2 * 48 * 64


def test_bench_measures_nothing_that_is_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(flatkern.ops, "row_norm", lambda weight, *_: weight.float().norm(dim=1))
    with pytest.raises(RuntimeError, match="wrong results"):
        microbench.measure(48, 64, 2, 4)


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        cli.main(["--version"])
    assert caught.value.code == 0
    assert capsys.readouterr().out.strip() == flatkern.__version__


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "required: COMMAND"),
        (["fly"], "invalid choice: 'fly'"),
        (["demo", "--seeds", "0"], "must be a whole number of at least 1, got '0'"),
        (["demo", "--seeds", "two"], "got 'two'"),
        (["demo", "--device", "meta"], "must be cpu, cuda or cuda:N, got 'meta'"),
        (["demo", "--device", "nonsense"], "got 'nonsense'"),
        (["demo", "--full", "--choose"], "not allowed with"),
        (["demo", "--sigma", "1"], "unrecognized arguments: --sigma 1"),
    ],
)
def test_wrong_arguments_get_one_clean_message(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as caught:
        cli.main(arguments)
    assert caught.value.code == 2
    assert message in capsys.readouterr().err


def test_seeds_do_not_go_with_choosing(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["demo", "--choose", "--seeds", "2"]) == 2
    assert "--seeds does not go with --choose" in capsys.readouterr().err


def test_methods_are_checked(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert cli.main(["demo", "--choose", "--methods", "SAM"]) == 2
    assert "--methods does not go with --choose" in capsys.readouterr().err
    monkeypatch.setattr(cli, "_missing_for_demo", lambda: None)
    assert cli.main(["demo", "--methods", "SAM,Adam"]) == 2
    assert "got Adam" in capsys.readouterr().err


def test_missing_extras_are_named_with_what_to_install(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    find_spec = importlib.util.find_spec
    hidden = ("tqdm", "tabulate", cli.DEMO_MODEL)
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name in hidden else find_spec(name)
    )
    assert cli.main(["demo"]) == 2
    err = capsys.readouterr().err
    assert "tabulate, tqdm" in err
    assert 'pip install "flatkern[demo]"' in err
    assert "--require-hashes -r " in err


OTHERS = (
    "transformers",
    "peft",
    "accelerate",
    "torchao",
    "bitsandbytes",
    "lightning",
    "matplotlib",
)
WITHOUT_OTHERS = f"""
import sys, torch, flatkern, flatkern.cli
from flatkern.nn import replace_linear, save_adapter
model = torch.nn.Sequential(torch.nn.Linear(4, 4))
replace_linear(model, ["0"])
with flatkern.WeightNoise(model).window():
    model(torch.ones(1, 4)).sum().backward()
flatkern.cli.main(["doctor"])
try:
    flatkern.cli.main(["demo", "--help"])
except SystemExit:
    pass
print([module for module in {OTHERS} if module in sys.modules])
"""


def test_other_packages_are_not_imported_before_they_are_used() -> None:
    """By layers and a window, the doctor and help."""
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT_OTHERS],
        capture_output=True,
        text=True,
        check=True,
        timeout=120,
    )
    assert done.stdout.splitlines()[-1] == "[]"
    # Nothing to read but what was asked for; a backend that is slow here says so.
    assert "_pytree" not in done.stderr
    assert "Deprecat" not in done.stderr


def test_help_is_readable(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        cli.main(["demo", "--help"])
    text = capsys.readouterr().out
    assert "30 % flipped" in " ".join(text.split())
    assert "%%" not in text


def test_doctor_says_what_auto_runs(capsys: pytest.CaptureFixture[str]) -> None:
    cli.main(["doctor"])
    chosen = flatkern.build_info()["auto"]["cpu"]
    assert f"on cpu tensors  runs {chosen}" in capsys.readouterr().out
