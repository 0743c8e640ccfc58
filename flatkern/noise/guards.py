"""What keeps noise that is written in a weight from getting out of its module."""

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn
from torch.utils._pytree import tree_leaves
from torch.utils.hooks import RemovableHandle


class Guard:
    """Hooks on a module whose parameter has noise written in it: none of it gets out.

    `state_dict` gives the clean bits. Copying, pickling and loading are refused, because what they
    would see or overwrite is the noisy weight.
    """

    # What torch asks of a state_dict hook that returns nothing.
    _from_public_api = True

    def __init__(self, state: Any, module: nn.Module, parameter: str) -> None:
        """Guard `parameter` of `module`, a weight's `State`; nothing is put on it yet."""
        self._state = state
        self._parameter = parameter
        self._attributes = module.__dict__
        self._saving, self._loading = module._state_dict_hooks, module._load_state_dict_pre_hooks
        self._handles = RemovableHandle(self._saving), RemovableHandle(self._loading)

    def put(self, survives_casts: bool) -> None:
        """Guard from here on. Under handles made once, which costs less than registering."""
        saving, loading = self._handles
        self._saving[saving.id] = self
        self._loading[loading.id] = self._refuse_load
        if not survives_casts:
            self._attributes["_apply"] = self._refuse_cast

    def remove(self) -> None:
        """Leave the module as it was; harmless where it is."""
        self._attributes.pop("_apply", None)
        for handle in self._handles:
            handle.remove()

    def __call__(
        self, module: nn.Module, state_dict: dict[str, Any], prefix: str, metadata: Any
    ) -> None:
        """Clean bits in the state_dict."""
        key = prefix + self._parameter
        if self._state.perturbed and key in state_dict:
            state_dict[key] = self._state.clean_weight()

    def _refuse_load(self, state_dict: Any, prefix: str, *rest: Any) -> None:
        self._require_clean("load_state_dict", f"{prefix}{self._parameter}")

    def _refuse_cast(self, *args: Any, **options: Any) -> None:
        """In place of the module's `_apply`, where the clean bits follow from the noisy ones."""
        hint = 'restore="snapshot" allows it; '
        self._require_clean("casting or moving a module", self._state.target.name, hint)

    def __reduce_ex__(self, protocol: Any) -> Any:
        self._require_clean("copying or pickling", self._state.target.name)
        return super().__reduce_ex__(protocol)

    def _require_clean(self, action: str, name: str, hint: str = "") -> None:
        if self._state.perturbed:
            raise RuntimeError(
                f"WeightNoise: {action} while in-place noise is written in {name}; "
                f"{hint}close the window or use paused() (state_dict() is clean at any time)"
            )


def late_backward_guard(name: str, key: Tensor) -> Callable[[nn.Module, Any, Any], None]:
    """A forward hook that lets no backward through the outputs once the window is closed.

    FSDP gathers weights behind autograd's back, so their version counters tell it nothing.

    Args:
        name: of the weight.
        key: the noise key of the window, which its close writes.
    """
    version = key._version

    def refuse_late(grad: Tensor) -> None:
        if key._version != version:
            raise RuntimeError(
                f"WeightNoise: backward through {name} after its window was closed; "
                "the weight that it needs is no longer noisy"
            )

    def watch(module: nn.Module, args: Any, output: Any) -> None:
        for tensor in tree_leaves(output):
            if isinstance(tensor, Tensor) and tensor.requires_grad:
                tensor.register_hook(refuse_late)

    return watch
