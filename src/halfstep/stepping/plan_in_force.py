"""The plan in force: what it has done to the model, how another one takes its place, and the wait for a batch.

Two things wait for one: "auto", which chooses a plan, and a plan with a `saved_budget`, which is in force already but for
the formats of saved activations.
"""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from halfstep.control.sensitivity import Choice, choose_plan, fit_saved, project
from halfstep.conversion import Conversion, convert, draft_conversion
from halfstep.distributed import is_inside_wrapper
from halfstep.errors import ModelError, PlanError, describe_unknown
from halfstep.machine.profiles import get_profile
from halfstep.machine.runtime import release_memory
from halfstep.plan import ALIASES, AUTO, PRESETS, Plan
from halfstep.rehearsals import REHEARSALS
from halfstep.stepping.optimizers import Optimizers
from halfstep.stepping.options import Options, require_plan


class PlanInForce:
    """Keeps a model and its optimizers under one plan; fp32 until one is adopted.

    Examples:
        >>> layer = nn.Linear(1, 1)
        >>> in_force = PlanInForce(layer, Optimizers((torch.optim.SGD(layer.parameters(), lr=0.1),)), Options())
        >>> in_force.adopt(Plan.parse("compute=bf16 storage=bf16 master=split"))
        >>> layer.weight.dtype
        torch.bfloat16
        >>> in_force.end(); layer.weight.dtype
        torch.float32
    """

    def __init__(self, model: nn.Module, optimizers: Optimizers, options: Options) -> None:
        self._model, self._optimizers, self._options = model, optimizers, options
        self._waiting: RemovableHandle | None = None  # "auto" or a budget that has not seen a batch yet
        self.budget = ""  # for saved activations, that waits for one
        self.conversion = convert(model, PRESETS["32-true"])
        optimizers.masters = self.conversion.masters

    @property
    def is_waiting(self) -> bool:
        """Whether "auto" has not chosen yet, or a budget is not met yet."""
        return self._waiting is not None

    def adopt(self, plan: Plan) -> None:
        """Put another plan in force, whose `saved_budget` is left to `wait_for_batch`.

        Raises what `convert` raises; the plan before stays in force then.
        """
        plan = replace(self._options.complete(plan), saved_budget="")
        before = self.conversion
        before.undo()
        try:
            drafted = draft_conversion(self._model, plan)
            require_plan(plan, drafted, self._options, self._optimizers.all)
            drafted.apply()
        except BaseException:
            self._follow(convert(self._model, before.plan), before)
            self._optimizers.masters = self.conversion.masters
            raise
        self.stop_waiting()
        self._follow(drafted, before)
        self._optimizers.follow(self.conversion.masters, narrow=plan.states == "8-bit")
        release_memory()  # what the plan before held

    def _follow(self, conversion: Conversion, before: Conversion) -> None:
        """Take another conversion's place, with what it knows beside the weights."""
        self.conversion = conversion
        conversion.masters.load_state_dict(before.masters.state_dict())
        conversion.histories.put_back(before.histories.copy())
        if self._options.accumulate > 1:
            conversion.share_quantized_weights()

    def end(self) -> None:
        """Give the model back in fp32, and the optimizers as plain ones."""
        self.stop_waiting()
        self.conversion.undo()
        self.conversion = convert(self._model, PRESETS["32-true"])
        self._optimizers.follow(self.conversion.masters)

    def require_possible(self, plan: Plan) -> None:
        """Raises what `adopt` would raise for the rules of a plan whose rest is still to be chosen."""
        plan = self._options.complete(replace(plan, rest="fp32"))
        with self.conversion.widened():
            require_plan(plan, draft_conversion(self._model, plan), self._options, self._optimizers.all)

    def wait_for_batch(self, take: Callable[[Choice], None], budget: str = "", given: Plan = AUTO) -> None:
        """Choose a plan when the first training batch arrives, just before the model sees it, and hand it to `take`.

        given: the plan whose rest is chosen.
        budget: choose nothing but formats for saved activations that fit into it.

        Of several processes all take the plan of the first.
        """

        def choose(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            if not module.training or not torch.is_grad_enabled():
                return
            if is_inside_wrapper():
                what = (
                    f"saved_budget={budget} puts its plan in force anew"
                    if budget
                    else "'auto' may change the format of weights"
                )
                raise ModelError(
                    f"{what}, for which DistributedDataParallel has its buffers already: run one training batch through "
                    "stepper.model before you wrap it, or give prepare() a plan"
                )
            self.stop_waiting()
            try:
                choice = self._fit_saved(budget, args, kwargs) if budget else self._choose(given, args, kwargs)
                plan = self._options.find_ranks().gather(str(choice.plan))[0]
                take(replace(choice, plan=Plan.parse(plan)))
            except BaseException:  # Ctrl-C too, after which a notebook goes on
                self.wait_for_batch(take, budget, given)
                raise

        self.stop_waiting()
        self._waiting, self.budget = (
            self._model.register_forward_pre_hook(choose, with_kwargs=True, prepend=True),
            budget,
        )

    def _choose(self, given: Plan, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Choice:
        profile = self._options.profile or get_profile(self.conversion.device_type)
        given = self._options.complete(given)  # so that trials save activations as training will
        return choose_plan(self._model, args, kwargs, profile=profile, given=given)

    def _fit_saved(self, budget: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Choice:
        """Measured under the plan that is in force; scales that follow a history are as before it."""
        conversion = self.conversion
        histories, keeper = conversion.histories.copy(), conversion.keeper

        def run() -> Tensor:
            with conversion.autocast():
                return project(self._model(*args, **kwargs))

        conversion.keeper = None  # its formats are among those that are measured
        try:
            with conversion.stand_by():
                return fit_saved(self._model, replace(conversion.plan, saved_budget=budget), run)
        finally:
            conversion.keeper = keeper
            conversion.histories.put_back(histories)

    def stop_waiting(self) -> None:
        if self._waiting is not None:
            self._waiting.remove()
        self._waiting, self.budget = None, ""

    def require_met_budget(self) -> None:
        """Raises ModelError where a step would be made without the formats that a budget asks for."""
        if self.budget:
            raise ModelError(
                f"saved_budget={self.budget} has not been met yet: formats are chosen when stepper.model(...) itself is called "
                "in training mode with gradients, and it was not; call it so, or state `saved` in the plan's rules"
            )


def read_plan(plan: Plan | str | Path) -> Plan:
    """A plan from whatever names one: a Plan, the name of a preset or of a rehearsal, a plan's text, or a plan file."""
    if isinstance(plan, Plan):
        return plan
    if isinstance(plan, Path):
        return Plan.load(plan)
    if not isinstance(plan, str):
        raise PlanError(
            f"a plan is a Plan, the name of a precision, a plan's text, or the path of a plan file; got {plan!r:.60}"
        )
    if plan.endswith((".toml", ".json", ".plan")):
        return Plan.load(Path(plan))
    if plan == "auto":
        return AUTO
    if plan in REHEARSALS:
        return REHEARSALS[plan].plan
    if "=" not in plan and plan not in (*PRESETS, *ALIASES):
        unknown = describe_unknown("precision", plan, ["auto", *PRESETS, *ALIASES, *REHEARSALS])
        raise PlanError(f"{unknown}, or a plan file, whose name ends in .toml, .json or .plan")
    return Plan.parse(plan)
