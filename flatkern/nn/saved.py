"""Modules that are trained whole beside the adapters, and saved with them: heads, mostly."""

import contextlib
from collections.abc import Iterable, Iterator

from torch import Tensor, nn

from flatkern.nn.linear import LoRALinear
from flatkern.nn.names import hint, named_modules, named_parameters
from flatkern.nn.parameters import LoRAParameter
from flatkern.ops import _check

# In the `__dict__` of a module that is saved whatever is trainable by then.
_MARK = "_flatkern_saved"
# What a model for a task is called, in which all but the base model is new; and what its output
# layer is called elsewhere. As `peft.utils.constants.SEQ_CLS_HEAD_NAMES` and PEFT's task classes.
_TASKS = ("Classification", "QuestionAnswering", "MultipleChoice")
_HEADS = ("classifier", "score", "qa_outputs")
# In front of every name in a file, as PEFT wraps a model; and what wrappers of a module call it.
PREFIX = "base_model.model."
_WRAPPER_PARTS = ("_orig_mod", "module", "_checkpoint_wrapped_module", "_fsdp_wrapped_module")


def output_layers(model: nn.Module) -> tuple[list[nn.Module], list[nn.Module]]:
    """The declared output embeddings, which are pretrained, and the heads, which are new."""
    embeddings, heads = [], []
    for _, module in named_modules(model):
        if hasattr(module, "get_output_embeddings"):
            output = module.get_output_embeddings()
            if output is None:
                heads += _heads(module)
            else:
                embeddings.append(output)
        elif callable(getattr(module, "get_classifier", None)):  # timm's
            found = module.get_classifier()
            heads += found if isinstance(found, tuple | list) else [found]
    return embeddings, [head for head in heads if _has_parameters(head)]


def _heads(model: nn.Module) -> list[nn.Module]:
    base = getattr(model, "base_model", model)
    is_for_task = any(task in type(model).__name__ for task in _TASKS)
    if is_for_task and any(child is base for child in model.children()):
        return [child for child in model.children() if child is not base]
    return [getattr(model, name, None) for name in _HEADS]


def _has_parameters(module: nn.Module | None) -> bool:
    return isinstance(module, nn.Module) and next(module.parameters(), None) is not None


def matching(op: str, argument: str, modules: dict[str, nn.Module], names: Iterable[str]) -> list:
    """Full names of the modules that are named exactly or by a dotted suffix, as in PEFT."""
    _check.kinds(op, (list, tuple, set, frozenset), **{argument: names})
    for name in names:
        _check.kinds(op, str, **{argument: name})
        if not any(matches(full, name) for full in modules if full):
            raise ValueError(
                f"{op}: {argument} must be names of modules of the model, got {name!r}, "
                f"not found; {hint(name, filter(None, modules))}"
            )
    return [full for full in modules if full and any(matches(full, name) for name in names)]


def matches(full: str, name: str) -> bool:
    """Whether a full name is this one or ends with it."""
    return full == name or full.endswith(f".{name}")


def keep(modules: Iterable[nn.Module]) -> None:
    """Train these modules, and save them with the adapters."""
    modules = list(modules)
    mark(modules)
    for module in modules:
        for weight in module.parameters():
            if weight.is_floating_point() or weight.is_complex():
                weight.requires_grad_(True)


def mark(modules: Iterable[nn.Module]) -> None:
    """Save these modules with the adapters, trainable or not."""
    for module in modules:
        setattr(module, _MARK, True)


def find_saved(
    op: str, model: nn.Module, asked: Iterable[str] | None
) -> tuple[dict[str, nn.Module], list[str]]:
    """The modules to save by full name, and what is trained but saved nowhere, by name.

    Args:
        op: for errors.
        model: with `LoRALinear` layers.
        asked: names; None: what `keep` was called for, and every module with parameters of its own
            that are trained.

    Raises:
        TypeError, ValueError: not names of modules without adapters.
    """
    modules = dict(named_modules(model, remove_duplicate=False))
    adapters = {
        id(weight)
        for module in modules.values()
        if isinstance(module, LoRALinear | LoRAParameter)
        for weight in module.adapters().values()
    }
    if asked is not None:
        names = matching(op, "modules_to_save", modules, asked)
        for name in names:
            if _is_adapted(modules[name]):
                raise ValueError(
                    f"{op}: modules_to_save must be modules without LoRALinear layers, got {name}"
                )
    else:
        names = [
            name
            for name, module in modules.items()
            if name
            and not _is_adapted(module)
            and (_MARK in module.__dict__ or _trains(module, adapters))
        ]
    saved: dict[str, nn.Module] = {}
    for name in names:
        if not any(name.startswith(f"{parent}.") for parent in saved):
            saved[name] = modules[name]
    held = adapters | {id(weight) for module in saved.values() for weight in module.parameters()}
    lost = [
        name
        for name, weight in named_parameters(model)
        if weight.requires_grad and id(weight) not in held
    ]
    return saved, lost


def _is_adapted(module: nn.Module) -> bool:
    return any(isinstance(part, LoRALinear | LoRAParameter) for part in module.modules())


def _trains(module: nn.Module, adapters: set[int]) -> bool:
    own = module.parameters(recurse=False)
    return any(weight.requires_grad and id(weight) not in adapters for weight in own)


def state_of(module: nn.Module) -> dict[str, Tensor]:
    """Its `state_dict` with the names of the unwrapped module; clean in any window."""
    return {
        f"{name}.{key}" if name else key: value
        for name, part in named_modules(module)
        for key, value in part.state_dict().items()
        if key in part._parameters or key in part._buffers
    }


def load_state(module: nn.Module, state: dict[str, Tensor]) -> None:
    """Write what `state_of` gave; RuntimeError where noise is written in a parameter."""
    for name, part in named_modules(module):
        prefix = f"{name}." if name else ""
        own = {
            key: state[prefix + key]
            for key in (*part._parameters, *part._buffers)
            if prefix + key in state
        }
        if own:
            part.load_state_dict(own, strict=False)


def read_saved(
    op: str, model: nn.Module, names: Iterable[str], tensors: dict[str, Tensor]
) -> dict[str, dict[str, Tensor]]:
    """The tensors of each of the model's modules that a file names, checked.

    Args:
        op: for errors.
        model: that they will be loaded into.
        names: as PEFT's `modules_to_save`; those that the model does not have are left out.
        tensors: by full name in the model.

    Raises:
        ValueError: a tensor that is of none of the modules or does not fit, or one is missing.
    """
    modules = dict(named_modules(model, remove_duplicate=False))
    read: dict[str, dict[str, Tensor]] = {}
    left = dict(tensors)
    for full, module in modules.items():
        if not full or not any(full.endswith(name) for name in names):
            continue
        prefix = f"{full}."
        found = [key for key in left if key.startswith(prefix)]
        given = {key.removeprefix(prefix): left.pop(key) for key in found}
        if not given:
            continue
        expected = state_of(module)
        for key in sorted(given.keys() ^ expected.keys()):
            where = "the file" if key in expected else "the model"
            raise ValueError(
                f"{op}: {prefix}{key} must be in the file and in the model, got none in {where}"
            )
        for key, value in expected.items():
            if value.shape != given[key].shape:
                _check.refuse(op, prefix + key, str(list(value.shape)), given[key])
            if value.is_floating_point() != given[key].is_floating_point():
                _check.refuse(op, prefix + key, _check.describe(value), given[key])
        read[full] = given
    for name in left:
        raise ValueError(
            f"{op}: the file must hold adapters and modules of modules_to_save alone, got {name}"
        )
    return read


@contextlib.contextmanager
def written(modules: dict[str, nn.Module], saved: dict[str, dict[str, Tensor]]) -> Iterator[None]:
    """The saved modules' tensors are in the model; after an exception what was there before."""
    before = {name: {k: v.clone() for k, v in state_of(modules[name]).items()} for name in saved}
    try:
        for name, state in saved.items():
            load_state(modules[name], state)
        yield
    except BaseException:
        for name, state in before.items():
            load_state(modules[name], state)
        raise


def unwrapped(
    op: str, tensors: dict[str, Tensor], modules: dict[str, nn.Module]
) -> dict[str, Tensor]:
    """The file's tensors; names of wrappers, which older versions wrote, are left out.

    Only where the model has no module of the whole name. ValueError if two become one.
    """
    read: dict[str, Tensor] = {}
    for key, value in tensors.items():
        path: list[str] = []
        for part in key.removeprefix(PREFIX).split("."):
            if part not in _WRAPPER_PARTS or ".".join([*path, part]) in modules:
                path.append(part)
        new = PREFIX + ".".join(path) if key.startswith(PREFIX) else key
        if new in read:
            raise ValueError(f"{op}: the file must hold {new} once, got {key} as well")
        read[new] = value
    return read
