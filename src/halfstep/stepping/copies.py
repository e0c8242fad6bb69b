"""Copies of a prepared model are plain fp32 models: those of copy.deepcopy, and those that torch.save writes.

A plan is a thing of one model and its optimizer: units of another class, narrow weights whose truth lies beside them, hooks
that know the window. A copy has none of it: in place of narrow weights it has their full precision, its units get their
classes back, and the hooks that halfstep registered are left out. Hooks and classes of others go along.
"""

import copy
import operator
from collections import OrderedDict
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from typing import Any

from torch import Tensor, nn

from halfstep.mechanisms.layers import is_unit, undo_unit

HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_state_dict_hooks", "_state_dict_pre_hooks",
         "_load_state_dict_pre_hooks", "_load_state_dict_post_hooks")  # fmt: skip


def guard_copies(model: nn.Module, read_wide: Callable[[], Mapping[nn.Parameter, Tensor]]) -> ExitStack:
    """Let copies and pickles of a model be plain ones, until the stack that is returned is closed.

    read_wide: gives the full precision of every narrow parameter, in memory of its own.

    Examples:
        >>> layer = nn.Linear(1, 1)
        >>> guards = guard_copies(layer, dict)
        >>> copy.deepcopy(layer).__dict__.keys() == nn.Linear(1, 1).__dict__.keys()
        True
        >>> guards.close()
    """
    guards: dict[str, Any] = {}

    def copy_plainly(memo: dict[int, Any]) -> nn.Module:
        for parameter, value in read_wide().items():  # as if it had been copied already, whoever refers to it
            memo.setdefault(id(parameter), type(parameter)(value, parameter.requires_grad))
        for name in guards:
            del model.__dict__[name]
        try:
            twin = copy.deepcopy(model, memo)
        finally:
            model.__dict__.update(guards)
        _strip(twin)
        return twin

    def reduce(_protocol: int) -> Any:
        return operator.getitem, ((copy_plainly({}),), 0)  # what is read back is the copy itself

    guards.update(__deepcopy__=copy_plainly, __reduce_ex__=reduce)
    model.__dict__.update(guards)
    stack = ExitStack()
    for name in guards:
        stack.callback(model.__dict__.pop, name)
    return stack


def _strip(twin: nn.Module) -> None:
    """Take away what halfstep has put into a model that was copied."""
    for module in twin.modules():
        if is_unit(module):
            undo_unit(module)
        for name in HOOKS:
            hooks: OrderedDict[int, Any] = getattr(module, name)
            for key in [key for key, hook in hooks.items() if _is_ours(hook)]:
                del hooks[key]
                for options in (
                    "_forward_hooks_with_kwargs",
                    "_forward_hooks_always_called",
                    "_forward_pre_hooks_with_kwargs",
                ):
                    getattr(module, options).pop(key, None)


def _is_ours(hook: Any) -> bool:
    hook = getattr(hook, "hook", hook)  # torch wraps those of load_state_dict
    return str(getattr(hook, "__module__", "")).startswith("halfstep.")
