"""What may be asked of a stepper beside model, optimizers and plan, and what cannot be had."""

import warnings
from collections.abc import Iterable
from dataclasses import dataclass, replace
from numbers import Real
from typing import TypeVar

from torch import Tensor, nn
from torch.optim import LBFGS, Optimizer
from torch.optim.lr_scheduler import LRScheduler, ReduceLROnPlateau
from torch.optim.swa_utils import AveragedModel

from halfstep.control.controller import Policy
from halfstep.conversion import Conversion
from halfstep.distributed import Ranks, find_ranks, is_sharded, is_wrapped
from halfstep.errors import FormatError, ModelError, PlanError, UnheldWarning, UnsupportedError, describe_unknown
from halfstep.mechanisms.activations import SAVED_FORMATS
from halfstep.mechanisms.master_weights import PARAMETERWISE
from halfstep.numerics.formats import find_format
from halfstep.plan import Plan, Rule
from halfstep.records import HardwareProfile, describe_some
from halfstep.stepping.optimizers import list_parameters, list_unheld
from halfstep.window import SIXTEEN_BITS, Noting

T = TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class Options:
    """`prepare` says what each of them means."""

    accumulate: int = 1
    clip: float | None = None
    schedulers: tuple[LRScheduler, ...] = ()
    averages: tuple[AveragedModel, ...] = ()
    release: bool = False
    profile: HardwareProfile | None = None
    recovery: Policy | None = None  # None: what the plan says
    states: str | None = None  # of the optimizers; None: what the plan says
    saved: Rule | None = None  # for activations of which no rule of the plan says anything
    ranks: Ranks | None = None  # None: all that there are

    def complete(self, plan: Plan) -> Plan:
        """The plan with what these options say of it.

        Examples:
            >>> [rule.saved for rule in Options(saved=Rule(saved="int8")).complete(Plan.parse("compute=bf16")).rules]
            [None, 'int8']
        """
        if self.saved is not None and plan.saved_budget:
            raise PlanError(
                f"saved={self.saved.saved!r} and the plan's saved_budget={plan.saved_budget!r} both say how to save activations; "
                "give one of them: a format for all, or a budget that chooses formats"
            )
        last = () if self.saved is None or self.saved in plan.rules else (self.saved,)
        return replace(
            plan,
            recovery=self.recovery or plan.recovery,
            states=self.states or plan.states,
            rules=(*plan.rules, *last),
        )

    def find_ranks(self) -> Ranks:
        """The processes that take their steps together, as things stand now."""
        return self.ranks or find_ranks()


def read_saved(format: str) -> Rule:
    """The rule for a format of saved activations. Raises FormatError or PlanError where there is none of that name.

    Examples:
        >>> read_saved("int8").saved
        'int8'
    """
    allowed = [*filter(None, SAVED_FORMATS), "fp32"]
    try:
        rule = Rule(saved=format)
    except FormatError:
        raise FormatError(describe_unknown("saved format", format, allowed)) from None
    if rule.saved not in allowed:
        raise PlanError(describe_unknown("saved format", format, allowed))
    return rule


def read_states(states: str) -> str:
    """How optimizer states are kept, as a plan says it. Raises PlanError where there is no such way.

    Examples:
        >>> read_states("8-bit")
        '8-bit'
    """
    return Plan(states=states).states


def require_trainable(model: nn.Module, optimizers: tuple[Optimizer, ...], given: object) -> None:
    """Raises ModelError unless the optimizers move some of the model's parameters, each by one of them."""
    if not isinstance(model, nn.Module) or not all(isinstance(o, Optimizer) for o in optimizers) or not optimizers:
        raise ModelError(
            f"prepare takes a module and an optimizer, or several; got {type(model).__name__} and {type(given).__name__}"
        )
    _require_plain(model)
    trainable = {p for p in model.parameters() if p.requires_grad}
    if not trainable:
        raise ModelError(f"{type(model).__name__} has no trainable parameters; set requires_grad on some of them")
    held = [p for o in optimizers for p in list_parameters(o)]
    if not trainable & set(held):
        raise ModelError(
            f"the optimizer holds none of the {len(trainable)} trainable parameters of {type(model).__name__}; "
            "make it from model.parameters()"
        )
    if len(set(held)) < len(held):
        raise ModelError("two optimizers hold the same parameter; give every parameter to one of them")


def warn_of_unheld(model: nn.Module, optimizers: Iterable[Optimizer]) -> None:
    """Warns of parameters that look as if they were trained, and that no optimizer moves."""
    names = list_unheld(model, optimizers)
    if names:
        warnings.warn(
            f"no optimizer given to prepare() holds {describe_some(names)}, which require gradients: this stepper does not "
            "train them. Give them to an optimizer, or call requires_grad_(False) on them if they are to stay as they are",
            UnheldWarning,
            stacklevel=3,
        )


def _require_plain(model: nn.Module) -> None:
    if is_wrapped(model):
        raise ModelError(
            f"{type(model).__name__} has taken its buffers for fp32 gradients; give prepare the model itself, then wrap it: "
            "stepper = prepare(model, ...), model = DistributedDataParallel(stepper.model)"
        )
    if is_sharded(model):
        raise UnsupportedError(
            "the model's parameters are sharded over ranks, which no plan here knows; give prepare a whole model, and wrap "
            "stepper.model in DistributedDataParallel"
        )
    hooks = ((path, hook) for path, m in model.named_modules() for hook in m._forward_pre_hooks.values())
    prepared = [path for path, hook in hooks if isinstance(hook, Noting) and hook.window]
    if prepared:
        what = f"'{prepared[0]}', a part of the model," if prepared[0] else "the model"
        raise ModelError(f"{what} is prepared already; go on with its stepper, or call restore() on that first")


def require_possible(options: Options, model: nn.Module, optimizers: tuple[Optimizer, ...]) -> None:
    """Raises ModelError for options that do not go together, or not with this model and these optimizers."""
    accumulate, clip = options.accumulate, options.clip
    is_limit = clip is None or (isinstance(clip, Real) and clip > 0)
    if not isinstance(accumulate, int) or accumulate < 1 or not is_limit:
        raise ModelError(
            f"accumulate must be at least 1 and clip above 0; got accumulate={accumulate!r}, clip={clip!r}"
        )
    if not isinstance(options.profile, HardwareProfile | None):
        raise ModelError(f"profile takes a HardwareProfile, as probe_hardware() gives it; got {options.profile!r:.60}")
    wholesale = any(type(optimizer) not in PARAMETERWISE for optimizer in optimizers)
    if options.release and (accumulate > 1 or clip is not None or wholesale):
        raise ModelError(
            "release=True needs accumulate=1, no clip, and optimizers that treat parameters one by one "
            f"({', '.join(sorted(kind.__name__ for kind in PARAMETERWISE))})"
        )
    if options.release:
        require_alone(options.find_ranks())
    if any(isinstance(optimizer, LBFGS) for optimizer in optimizers):
        require_whole(options, optimizers)
    _require_schedulers(options.schedulers, optimizers)
    _require_averages(options.averages, model)


def require_alone(ranks: Ranks) -> None:
    """Raises UnsupportedError where gradients have to be averaged before they may be applied."""
    if ranks.size > 1:
        raise UnsupportedError(
            f"release=True updates a parameter before its gradient is averaged over the {ranks.size} ranks; leave release "
            "out, or give prepare(..., ranks=halfstep.distributed.Alone()) if every rank trains a model of its own"
        )


def require_stand_ins(optimizers: Iterable[Optimizer], *, closure: bool) -> None:
    """Raises UnsupportedError where narrow weights would lose the hooks of the wrapper that averages their gradients."""
    names = [type(o).__name__ for o in optimizers if closure or type(o) not in PARAMETERWISE]
    if names:
        raise UnsupportedError(
            f"{names[0]}{' with a closure' * closure} widens 16-bit weights where they are, and DistributedDataParallel loses "
            "its hooks on them; use a precision that stores weights in fp32, as bf16-mixed, or average gradients by hooks of "
            "your own"
        )


def require_whole(options: Options, optimizers: tuple[Optimizer, ...]) -> None:
    """Raises ModelError where a step that evaluates its loss again and again cannot be made."""
    if options.accumulate > 1 or len(optimizers) > 1:
        raise ModelError(
            "a closure, which LBFGS needs, takes one optimizer and accumulate=1: it evaluates the whole loss again and "
            f"again; got {len(optimizers)} and accumulate={options.accumulate}"
        )


def _require_schedulers(schedulers: Iterable[LRScheduler], optimizers: tuple[Optimizer, ...]) -> None:
    for scheduler in schedulers:
        name, own = type(scheduler).__name__, getattr(scheduler, "optimizer", None)
        if isinstance(scheduler, ReduceLROnPlateau):
            raise ModelError(f"{name} needs a metric; leave it out and step it yourself after each evaluation")
        if own is not None and not any(own is optimizer for optimizer in optimizers):
            raise ModelError(
                f"{name} schedules {type(own).__name__} with lr={own.param_groups[0].get('lr')}, which is none of the "
                "optimizers given to prepare(); make it from one of those"
            )


def _require_averages(averages: Iterable[AveragedModel], model: nn.Module) -> None:
    shapes = {name: parameter.shape for name, parameter in model.named_parameters()}
    for average in averages:
        if any(p.dtype in SIXTEEN_BITS for p in average.parameters()):
            raise ModelError(
                "an AveragedModel has 16-bit weights: it was made from a converted model; make it before prepare()"
            )
        theirs = {name: parameter.shape for name, parameter in average.module.named_parameters()}
        if theirs != shapes:
            odd = next(name for name in [*shapes, *theirs] if theirs.get(name) != shapes.get(name))
            raise ModelError(
                f"an AveragedModel is of another model: '{odd}' has shape {_spell(theirs.get(odd))} there and "
                f"{_spell(shapes.get(odd))} here; make it from the model that is given to prepare()"
            )


def _spell(shape: Iterable[int] | None) -> str:
    return "none" if shape is None else str(tuple(shape))


def require_plan(plan: Plan, drafted: Conversion, options: Options, optimizers: Iterable[Optimizer]) -> None:
    """Raises UnsupportedError for a plan under which these optimizers cannot be stepped as asked."""
    if options.release and plan.loss_scale == "dynamic":
        raise UnsupportedError("release=True updates weights before an overflow is known; use another loss_scale")
    fp16 = find_format("fp16")  # fp16(1e-8) is 0: an optimizer that keeps fp16 states with it divides 0 by 0
    narrow = {p for p, s in drafted.storage.items() if s.storage == "fp16" and s.master == "none"}
    for optimizer, group in ((o, group) for o in optimizers for group in o.param_groups):
        eps = group.get("eps")
        if isinstance(eps, Real) and eps < fp16.smallest_subnormal and narrow.intersection(group["params"]):
            raise UnsupportedError(
                f"{type(optimizer).__name__} has eps={eps:g}, which is 0 in fp16, and the plan keeps no fp32 "
                f"master; give eps >= {fp16.smallest_subnormal:.2g} (1e-4 is usual), or master=fp32 in the plan"
            )


def require_several(given: object, kind: type[T], name: str, *, does: str) -> tuple[T, ...]:
    """One, or the members of an iterable of several; none of None. Others than of that kind will do if they have a method of
    the name `does`. Raises ModelError for what has none.

    Examples:
        >>> require_several(None, AveragedModel, "averages", does="update_parameters")
        ()
    """
    is_one = not isinstance(given, Iterable) or isinstance(given, nn.Module | Tensor | type)
    taken = take_several((given,) if is_one and given is not None else given, kind)
    for each in taken:
        if isinstance(each, type | Optimizer) or not hasattr(each, does):
            raise ModelError(f"{name} takes one {kind.__name__} or several; got {type(each).__name__}")
    return taken


def take_several(given: object, kind: type[T]) -> tuple[T, ...]:
    """One, or the members of an iterable of several, as a tuple; nothing of a model, a tensor or a class."""
    if isinstance(given, kind):
        return (given,)
    if not isinstance(given, Iterable) or isinstance(given, nn.Module | Tensor | type):
        return ()
    return tuple(given)
