"""What may have changed in a model since its weights were looked at."""

from torch import nn

from flatkern import _backend
from flatkern.nn import shards
from flatkern.noise.scopes import why_no_elements
from flatkern.noise.targets import Target
from flatkern.noise.whole import require_whole
from flatkern.ops import _check


class Seen:
    """The places of the weights in scope, to be compared whenever a window opens."""

    def __init__(self, model: nn.Module, targets: list[Target], scope: str) -> None:
        """Note where the weights are; in scope "trainable" also what is trained."""
        self._model = model
        self._owners = [target.owners for target in targets]
        self._ties = [owners for owners in self._owners if len(owners) > 1]
        parents: dict[int, list[tuple[nn.Module, str]]] = {}
        flags = []
        for module in model.modules():
            for name, child in module._modules.items():
                if child is not None:
                    parents.setdefault(id(child), []).append((module, name))
            if scope == "trainable":
                parts = module._parameters.items()
                flags += [(module, name, p.requires_grad) for name, p in parts if p is not None]
        self._flags = flags
        # Every link between a module above a weight and its parent, once.
        links: dict[tuple[int, str], tuple[nn.Module, str, nn.Module]] = {}
        todo = [module for owners in self._owners for module, _ in owners]
        while todo:
            module = todo.pop()
            for parent, name in parents.get(id(module), ()):
                if (id(parent), name) not in links:
                    links[id(parent), name] = parent, name, module
                    todo.append(parent)
        self._links = list(links.values())

    def still(self, weights_too: bool) -> bool:
        """Whether modules, ties and what is trained are what they were, and `weights_too`."""
        for parent, name, child in self._links:
            if parent._modules.get(name) is not child:
                return False
        for owners in self._owners if weights_too else self._ties:
            weights = [module._parameters.get(name) for module, name in owners]
            if weights[0] is None or any(weight is not weights[0] for weight in weights):
                return False
        for module, name, flag in self._flags:
            weight = module._parameters.get(name)
            if weight is None or weight.requires_grad != flag:
                return False
        return True


class Places:
    """Where the weights lie, to be compared whenever a window opens: what was checked still holds.

    Of weights that are no plain parameters, such as shards, nothing is known beforehand.
    """

    def __init__(self, targets: list[Target]) -> None:
        """Nothing is noted yet."""
        owners = [target.owners[0] for target in targets]
        self._parameters = [(module._parameters, name) for module, name in owners]
        self._noted: list | None = None

    def note(self) -> None:
        """The weights were checked as they are now."""
        self._noted = self._look()

    def still(self) -> bool:
        """Whether no weight was replaced, moved or cast since, and the backend is the same."""
        return self._noted is not None and self._noted == self._look()

    def _look(self) -> list | None:
        weights = [parameters.get(name) for parameters, name in self._parameters]
        if any(type(weight) is not nn.Parameter for weight in weights):
            return None
        addresses = [weight.data_ptr() for weight in weights]
        return [_backend.named(), *map(id, weights), *addresses, *(w.dtype for w in weights)]


def check_weights(op: str, targets: list[Target]) -> None:
    """One error, by name, if a weight is no longer one that noise can be made for."""
    for target in targets:
        weight = getattr(*target.owners[0])
        require_whole(op, target.name, weight)
        for site in target.layers if target.merged else ():
            for part, adapter in site.adapters().items():
                require_whole(op, f"{part} of {target.name}", adapter)
        reason = why_no_elements(weight) if target.quantized is None else None
        if reason is not None:
            raise RuntimeError(
                f"{op}: {target.name} became {reason} after this object was made, which takes "
                "no noise; make a new WeightNoise (with PEFT: detach, then attach again)"
            )


def check_shards(op: str, targets: list[Target], ranks: str) -> None:
    """Refuse, before anything is sent or written, what would not be the unsharded noise."""
    for target in targets:
        weight = target.weight
        if not shards.is_sharded(weight):
            continue
        shards.check(op, target.name, weight)
        if ranks == "independent":
            accepted = f"'same' where weights are sharded, as {target.name} is"
            _check.refuse(op, "ranks", accepted, ranks)
        if target.fisher is not None:
            accepted = f"one that needs no Fisher where weights are sharded, as {target.name}"
            _check.refuse(op, "strategy", accepted, "fisher")
        if target.rows.columns:
            accepted = f"one without a scale for each output where {target.name} is sharded"
            _check.refuse(op, "strategy", accepted, target.strategy)
        if target.rows.stacked and not shards.are_even(weight):
            raise ValueError(
                f"{op}: {target.name} must be a stack that ranks share evenly where it is sharded, "
                f"got {weight.placements} of {list(weight.shape)} on a mesh of "
                f"{list(weight.device_mesh.shape)}"
            )
        for layer in target.layers:
            if not layer.takes_shards:
                kind = type(getattr(layer, "layer", layer)).__name__.removeprefix("FSDP")
                raise TypeError(
                    f"{op}: {target.name} must be of a layer that shows its noise in shards, such "
                    f"as a LoRALinear, where it is sharded, got {kind}"
                )
