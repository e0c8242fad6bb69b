"""The insides of torch's functions that are written in Python and made of other functions.

Such a function asks first whether a torch function mode wants it, and while a mode looks after a call the mode is off. So a
mode that wants to see what the function is made of cannot run it: it would see the function again. Its inside is a copy
that does not ask.
"""

from collections.abc import Callable, Iterator, Mapping
from types import FunctionType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

Function = Callable[..., Any]

BACKWARD = (Tensor.backward, torch.autograd.backward, torch.autograd.grad)
_ASKING = ("has_torch_function", "has_torch_function_unary", "has_torch_function_variadic")


def _open_functions(*functions: Function) -> Iterator[tuple[Function, Function]]:
    worlds: dict[str, dict[str, Any]] = {}  # module -> its globals, in which nobody asks
    for function in functions:
        if isinstance(function, FunctionType) and any(word in _ASKING for word in function.__code__.co_names):
            world = worlds.setdefault(function.__module__, function.__globals__ | dict.fromkeys(_ASKING, _say_no))
            inside = FunctionType(
                function.__code__, world, function.__name__, function.__defaults__, function.__closure__
            )
            inside.__kwdefaults__ = function.__kwdefaults__
            yield function, inside


def _say_no(*_: Any) -> bool:
    return False


INSIDES: Mapping[Function, Function] = dict(
    _open_functions(*vars(F).values(), *vars(torch.functional).values(), *BACKWARD)
)
"""Function -> its inside. Methods of Tensor are left out: they ask, and go on to a method of the same name."""
