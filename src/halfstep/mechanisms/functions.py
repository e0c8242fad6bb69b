"""Fast functions: on a processor, equals of torch's own that take less time, put in their place inside a block.

    dropout                         torch draws a number for an element, one after another; here 16 bits of a hash serve
    cross_entropy                   torch makes an fp32 copy of 16-bit logits and reads it three times; here they are read once
                                    each way
    scaled_dot_product_attention    torch leaves its fast way where there is dropout, and is slow for short sequences; here it
                                    is two batched products and a pass between them, where that was timed to be faster
    gelu                            torch computes an error function for every bf16 number; here all there are have been computed
    conv2d, conv_transpose2d        torch computes output and gradients without making patches of the images; here each is one
                                    product of patches, where that was timed to be faster

Each has torch's signature and hands over to torch's own where it does not apply; the modules of numerics say where. What they
compute is the same up to rounding, except that dropout draws other numbers from the same seed. `Plan.functions` decides
whether they are used.

A mode of `mechanisms.operators` further in looks functions up first; it is given the same ones (`OperatorMode`'s `equals`).

A backward pass runs in the block too (`Conversion.stand_by`): activation checkpointing runs functions again there, and those
must draw what they drew before.
"""

import warnings
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any, get_args

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

from halfstep.errors import PrecisionWarning
from halfstep.insides import BACKWARD, INSIDES
from halfstep.numerics import dropouts, gelus, losses, routed_convolutions, scaled_attention, traced
from halfstep.numerics.kernels import PLAIN, Kernels, hide_frame

Function = Callable[..., Any]


@dataclass(frozen=True)
class Fast:
    """What takes a function's place, what does in compiled code, and the kernels without which that is no gain.

    kernels: None where it is made of torch's own functions.
    """

    eager: Function
    traced: Function
    kernels: Kernels | None

    @property
    def is_usable(self) -> bool:
        return self.kernels is None or self.kernels.library.functions is not None

    @property
    def way(self) -> str:
        """What computes: "native", or "torch: ..."."""
        return "torch, in the way that is faster for each shape" if self.kernels is None else self.kernels.way


FAST: Mapping[Function, Fast] = {
    F.dropout: Fast(dropouts.dropout, traced.dropout, dropouts.KERNELS),
    F.cross_entropy: Fast(losses.cross_entropy, traced.cross_entropy, losses.KERNELS),
    F.scaled_dot_product_attention: Fast(
        scaled_attention.scaled_dot_product_attention,
        traced.scaled_dot_product_attention,
        scaled_attention.KERNELS,
    ),
    F.gelu: Fast(gelus.gelu, traced.gelu, gelus.KERNELS),
    F.conv2d: Fast(routed_convolutions.conv2d, routed_convolutions.conv2d, None),
    F.conv_transpose2d: Fast(routed_convolutions.conv_transpose2d, routed_convolutions.conv_transpose2d, None),
}
"""torch function -> what takes its place."""


TRACED: Mapping[Function, Function] = {
    F.embedding: traced.embedding,
    F.embedding_bag: traced.embedding_bag,
}
"""torch function -> what takes its place in compiled code alone, because the compiler fails with it."""


@dataclass(frozen=True)
class Noted:
    """A function that notes that it was called, under the one of torch's whose place it takes."""

    theirs: Function
    ours: Function
    called: dict[Function, None]  # in the order of their first calls

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        self.called[self.theirs] = None
        return self.ours(*args, **kwargs)


class FunctionMode(TorchFunctionMode):
    """A `with` block in which functions of torch's are replaced, also within those that torch makes of them.

    replacements: torch function -> function with the same signature; left out: all of FAST whose kernels run here.

    `called` has those of FAST that were called so far, in eager code.

    Subclasses of Tensor keep torch's own. In compiled code, if it is called inside the block, those of FAST are written
    into its graph (`numerics.traced`), and no others are replaced.

    Examples:
        >>> with FunctionMode({torch.tanh: lambda x: x + 1}):
        ...     torch.tanh(torch.zeros(1)).item()
        1.0
    """

    def __init__(self, replacements: Mapping[Function, Function] | None = None) -> None:
        super().__init__()
        self.traced = dict(TRACED)
        self.called: dict[Function, None] = {}
        if replacements is None:
            usable = {theirs: fast for theirs, fast in FAST.items() if fast.is_usable}
            replacements = {theirs: Noted(theirs, fast.eager, self.called) for theirs, fast in usable.items()}
            self.traced |= {theirs: fast.traced for theirs, fast in usable.items()}
        self.replacements = dict(replacements)

    @hide_frame
    def __torch_function__(
        self, func: Function, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        is_traced = torch.compiler.is_compiling()
        ours = (self.traced if is_traced else self.replacements).get(func)
        if (
            is_traced and func is Tensor.unflatten
        ):  # which the compiler neither traces under a mode nor finds in a dictionary
            return torch.unflatten(*args, **kwargs)
        if ours is None and func in FAST and not is_traced:  # whose kernels do not run here
            self.called[func] = None
        if ours is None and (is_traced or func not in _MADE_OF_OTHERS):
            return func(*args, **kwargs)
        if any(kind not in PLAIN for kind in types):
            return func(*args, **kwargs)
        if ours is not None:
            return ours(*args, **kwargs)
        with self:
            return INSIDES[func](*args, **kwargs)


_MADE_OF_OTHERS = frozenset((F.multi_head_attention_forward, *BACKWARD))


def describe_functions(called: Iterable[Function] = FAST) -> tuple[str, ...]:
    """What runs on this machine in place of these functions: "native", or "torch: ..." and the reason; each answer once.

    Examples:
        >>> describe_functions([F.dropout])[0].partition(":")[0]
        'dropout'
    """
    ways: dict[str, list[str]] = {}
    for theirs in called:
        ways.setdefault(FAST[theirs].way, []).append(theirs.__name__)
    return tuple(f"{', '.join(names)}: {way}" for way, names in ways.items())


def get_routes() -> list[dict[str, Any]]:
    """What has been timed so far, as plain values: a run that goes on bit for bit takes the same ways again.

    Examples:
        >>> put_back_routes(get_routes())
    """
    return [asdict(shape) | {"route": route} for routed in _ROUTED for shape, route in routed.ROUTES.items()]


def put_back_routes(saved: Iterable[Mapping[str, Any]]) -> None:
    """Take over what `get_routes` gave; shapes that are not in it stay as they are.

    Warns of what another version has saved in other words: to train on is worth more than to repeat its roundings.
    """
    kinds = {frozenset(field.name for field in fields(routed.Shape)): routed for routed in _ROUTED}
    unknown = 0
    for values in saved:
        shape = {key: value for key, value in values.items() if key != "route"}
        routed = kinds.get(frozenset(shape))
        if routed and values.get("route") in get_args(routed.Route):
            routed.ROUTES[routed.Shape(**shape)] = values["route"]
        else:
            unknown += 1
    if unknown:
        warnings.warn(
            f"{unknown} of the ways of attention and convolutions in the saved state are described in other words than here, as "
            "another version of halfstep does it; they are timed again: load the state with that version to go on bit for bit",
            PrecisionWarning,
            stacklevel=3,
        )


_ROUTED: tuple[Any, ...] = (scaled_attention, routed_convolutions)
"""Modules with a Shape, a Route, and ROUTES from the one to the other."""
