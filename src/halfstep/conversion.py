"""A plan applied to a model: the reversible handle that says what was done, what was not, and why.

    resolve the plan over the model's modules         dead rules are errors
    convolutions -> memory format                     weights once, what comes in on entry
    every module's own parameters -> storage format   through MasterWeights, parameter objects stay the same
    modules whose format differs from the one around them, and units of `cast = "unit"` -> Unit
    modules whose products are scaled, or emulated -> ProductUnit, inside which torch's functions are replaced
    the rest of the model runs under one autocast     `cast = "op"`: Conversion.autocast(); backward: Conversion.stand_by()

Operations are cast by torch.autocast or by OperatorMode, as `operators.choose_twin` has it for the format and the device.

`state_dict()` of a converted model has the same keys and holds the fp32 truth; `load_state_dict()` takes fp32. Undoing
gives back the same parameter objects in fp32 and the same classes.
"""

import warnings
from collections.abc import Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import replace
from types import TracebackType
from typing import Any, Self

import torch
from torch import Tensor, nn

from halfstep.control.monitor import Audit
from halfstep.errors import ModelError, PlanError, PrecisionWarning, UnsupportedError
from halfstep.feasibility import (
    keep_ingredients_wide,
    name_around,
    replaces_products,
    require_possible,
    require_scalable,
)
from halfstep.mechanisms.activations import Keeper
from halfstep.mechanisms.functions import FAST, Function, FunctionMode, describe_functions
from halfstep.mechanisms.layers import (
    DTYPES,
    Block,
    Gate,
    NormUnit,
    ProductUnit,
    ScaledUnit,
    Unit,
    find_kind,
    is_unit,
    make_unit,
    undo_unit,
)
from halfstep.mechanisms.master_weights import MasterWeights
from halfstep.mechanisms.memory_formats import CONVOLUTIONS, find_memory_format, lay_out, return_contiguous
from halfstep.mechanisms.operators import OperatorMode, Twin, cast_operations, choose_twin
from halfstep.mechanisms.replacements import (
    read_products,
    replace_functions,
)
from halfstep.numerics.products import Histories, ProductState, QuantizedWeights
from halfstep.plan import Plan, Resolution, Settings
from halfstep.records import LayerRecord, PlanRecord

UNITS = ("linear", "conv", "attention", "recurrent", "norm")  # what `cast = "unit"` casts around


class Conversion:
    """What a plan did to a model. Made by `convert`; undone by `undo()` or at the end of a `with` block.

    Examples:
        >>> with convert(nn.Linear(2, 2), Plan.preset("bf16-true")) as conversion:
        ...     print(conversion.describe()[0].storage, conversion.model.weight.dtype)
        bf16 torch.bfloat16
    """

    def __init__(self, model: nn.Module, plan: Plan, resolution: Resolution, device_type: str) -> None:
        self.model, self.plan, self.device_type = model, plan, device_type
        self.table: Mapping[str, Settings] = resolution.table
        self.masters = MasterWeights()
        self.masters.expect_sparse(
            p for m in model.modules() if getattr(m, "sparse", False) is True for p in m.parameters(recurse=False)
        )
        self.products: dict[str, ProductState] = {}  # module path -> what its products keep from call to call
        self.quantized = QuantizedWeights()
        saved = {path: settings.saved.replace("fp32", "") for path, settings in self.table.items()}
        self.keeper = Keeper(model, saved) if any(saved.values()) else None
        self._undo = ExitStack()
        self._around = name_around(self.table[""]) if self.table[""].cast == "op" else "fp32"
        self.twins: dict[str, Twin] = {}  # 16-bit format -> who casts operations to it in this model, and why
        self._functions = FunctionMode() if plan.functions == "fast" and device_type == "cpu" else None
        self._modes: dict[str, OperatorMode] = {}  # of the formats for which torch.autocast will not do
        if self._around != "fp32":
            self._find_mode(self._around)
        self.storage = self._agree_on_storage()

    def list_autocast_weights(self) -> set[nn.Parameter]:
        """Weights of linear and convolution layers that run in 16 bits only inside of `autocast()`."""
        relying = {
            path
            for path, s in self.table.items()
            if s.cast == "op" and s.compute == self._around != "fp32" and s.storage == "fp32"
        }
        return {
            parameter
            for path, module in self.model.named_modules()
            if path in relying and find_kind(module) in ("linear", "conv")
            for parameter in module.parameters(recurse=False)
        }

    @contextmanager
    def autocast(self) -> Iterator[None]:
        """What a forward pass and the loss run under: torch's autocast where the plan casts every operation, and what keeps
        activations for the backward pass in fewer bits where it says so."""
        with ExitStack() as stack:
            stack.enter_context(self._replace_functions())
            stack.enter_context(self._cast_operations())
            if self.keeper is not None and torch.is_grad_enabled():
                stack.enter_context(self.keeper.keep())
            yield

    def _cast_operations(self) -> AbstractContextManager[Any]:
        if self._around == "fp32":
            return nullcontext()
        mode = self._modes.get(self._around)
        return cast_operations(self._around, self.device_type) if mode is None else mode.opened()

    @contextmanager
    def stand_by(self) -> Iterator[None]:
        """What a backward pass runs under, so that activation checkpointing computes again what the forward pass computed."""
        with self._replace_functions(), ExitStack() as stack:
            for mode in self._modes.values():
                stack.enter_context(mode.stand_by())
            yield

    def _replace_functions(self) -> AbstractContextManager[Any]:
        return self._functions or nullcontext()

    def _list_equals(self) -> Mapping[Any, Any]:
        """Fast functions, for modes that look functions up before the block of those around them does."""
        return self._functions.replacements if self._functions else {}

    def _find_mode(self, compute: str) -> OperatorMode | None:
        """The mode that casts operations to a 16-bit format; None where torch.autocast does."""
        if compute not in self.twins:
            self.twins[compute] = choose_twin(compute, self.device_type)
            if self.twins[compute].name == "OperatorMode":
                self._modes[compute] = OperatorMode(compute, self.device_type, equals=self._list_equals())
        return self._modes.get(compute)

    def audit(self) -> Audit:
        """A `with` block that sees what really runs: formats of all products, and every cast.

        Examples:
            >>> with convert(nn.Sequential(nn.Linear(2, 2)), Plan.preset("bf16-mixed")) as conversion:
            ...     with conversion.audit() as audit, conversion.autocast():
            ...         _ = conversion.model(torch.ones(1, 2))
            >>> audit.computed["0"]
            Counter({'bf16': 1})
        """
        return Audit(self.model, {path: self.table[path].compute for path in self.products})

    def describe(self) -> tuple[LayerRecord, ...]:
        """One record for every module that has parameters of its own or that a plan has a word for."""
        records = []
        for path, module in self.model.named_modules():
            own, kind = sum(p.numel() for p in module.parameters(recurse=False)), find_kind(module)
            if own or kind:
                s, is_replaced = self.table[path], path in self.products
                records.append(
                    LayerRecord(path=path, kind=kind, compute=s.compute, storage=s.storage, master=s.master,
                                parameters=own, why=s.why, grad=s.grad, saved="" if is_replaced else s.saved,
                                memory_format=s.memory_format if isinstance(module, CONVOLUTIONS) else "",
                                **({"grad_input": s.grad_input, "grad_weight": s.grad_weight,
                                    "scaling": s.scaling.replace("tensor", "")} if is_replaced else {}))
                )  # fmt: skip
        return tuple(records)

    def make_record(self, *, step: int = 0, why: str = "", seconds: float = 0.0) -> PlanRecord:
        """What the plan has done to the model, for the record. step, why, seconds: when, why and in what time it was chosen."""
        return PlanRecord(step=step, plan=str(self.plan), layers=self.describe(), why=why, seconds=seconds,
                          functions=self.describe_functions(), operations=self.describe_operations())  # fmt: skip

    def describe_operations(self) -> tuple[str, ...]:
        """For each 16-bit format that operations are cast to: who casts them, and why.

        Examples:
            >>> convert(nn.Linear(2, 2), Plan.preset("bf16-mixed")).describe_operations()
            ("bf16 by torch.autocast: in bf16 torch's list for cpu departs from the table in no range",)
        """
        return tuple(f"{format} by {twin.name}: {twin.why}" for format, twin in self.twins.items())

    @property
    def called_functions(self) -> tuple[Function, ...]:
        """Functions with a fast equal that were called so far, where the plan asks for those."""
        return tuple(self._functions.called) if self._functions else ()

    def recall_functions(self, names: Iterable[str]) -> None:
        """Take over which functions were called before a run was interrupted, by name."""
        if self._functions is not None:
            known = {function.__name__: function for function in FAST}
            self._functions.called |= {known[name]: None for name in names if name in known}

    def describe_functions(self) -> tuple[str, ...]:
        """What is done about functions that have a fast equal and were called so far, where the plan asks for those."""
        if self.plan.functions != "fast":
            return ()
        if self._functions is None:
            return (f"torch's own: the fast ones are for a processor, and the model is on {self.device_type}",)
        left = "tensors in fp16: left to torch, the kernels take fp32 and bf16"
        said = describe_functions(self.called_functions)
        return (*said, *([left] if said and any(s.compute == "fp16" for s in self.table.values()) else []))

    def share_quantized_weights(self) -> None:
        """From now on products share `quantized`, which the caller clears whenever weights have changed."""
        for state in self.products.values():
            state.weights = self.quantized

    @property
    def histories(self) -> Histories:
        """Those of the modules with delayed scaling, which a run that goes on bit for bit has to save."""
        return Histories({path: s for path, s in self.products.items() if self.table[path].scaling == "delayed"})

    def undo(self) -> None:
        """Give the model back as it was, with the weights it has now, in fp32. A second call does nothing."""
        self._undo.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.undo()

    def read_wide(self) -> dict[nn.Parameter, Tensor]:
        """The full precision of every parameter that is stored in 16 bits."""
        return {p: self.masters.read(p) for p in self.storage if p.dtype in (torch.bfloat16, torch.float16)}

    @contextmanager
    def shown_wide(self) -> Iterator[None]:
        """Inside the block the model has fp32 parameters in place of narrow ones, which stay as they are; for reading only."""
        wide = {p: nn.Parameter(value, requires_grad=p.requires_grad) for p, value in self.read_wide().items()}
        places = [
            (module._parameters, name, parameter)
            for module in self.model.modules()
            for name, parameter in module._parameters.items()
            if parameter in wide
        ]
        try:
            for parameters, name, parameter in places:
                parameters[name] = wide[parameter]
            yield
        finally:
            for parameters, name, parameter in places:
                parameters[name] = parameter

    @contextmanager
    def widened(self) -> Iterator[None]:
        """Every parameter itself in fp32 inside the block, from its truth where it has one; for reading only.

        torch drops the hooks that others have on the gradients of narrow parameters (see `numerics.openings`).
        """
        narrow = {p: p.data for p in self.storage if p.dtype in (torch.bfloat16, torch.float16)}
        try:
            for parameter in narrow:
                parameter.data = self.masters.read(parameter)
            yield
        finally:
            for parameter, live in narrow.items():
                parameter.data = live

    def apply(self) -> None:
        """Do to the model what the plan says; an error on the way leaves the model as it was.

        Raises ModelError for a model of which a part is converted already.
        """
        converted = [path or "the model" for path, module in self.model.named_modules() if is_unit(module)]
        if converted:
            raise ModelError(
                f"'{converted[0]}' is converted already; undo that first (restore() of its stepper, undo() of its conversion)"
            )
        try:
            for path, module in self.model.named_modules():
                self._convert_unit(path, module)
            self._lay_out()
            for parameter, settings in self.storage.items():
                if settings.storage != "fp32":
                    self.masters.narrow(parameter, DTYPES[settings.storage], settings.master)
                    self._undo.callback(self.masters.widen, parameter)
            for module in self.model.modules():
                self._keep_state_in_fp32(module)
            self._warn_of_nothing_narrow()
        except BaseException:
            self.undo()
            raise

    def _lay_out(self) -> None:
        """Memory formats that the plan states. The caller of a contiguous model gets what it has always got."""
        differs = False
        for path, module in self.model.named_modules():
            stated = self.table[path].memory_format
            if stated and isinstance(module, CONVOLUTIONS):
                differs |= stated == "channels_last" and find_memory_format(module) != "channels_last"
                self._undo.callback(lay_out(module, stated))
        if differs:
            self._undo.callback(return_contiguous(self.model))

    def _warn_of_nothing_narrow(self) -> None:
        named = {rule.compute for rule in self.plan.rules if rule.compute and rule.compute not in DTYPES}
        if named and not self.products:
            warnings.warn(
                f"no layer of this model is in {' or '.join(sorted(named))}: the plan's other rules, such as those for the first "
                "and the last layer, take them all",
                PrecisionWarning,
                stacklevel=3,
            )

    def _agree_on_storage(self) -> dict[nn.Parameter, Settings]:
        """Settings of every floating-point parameter. Raises PlanError when two modules share one and disagree."""
        agreed: dict[nn.Parameter, tuple[str, Settings]] = {}
        for path, module in self.model.named_modules():
            for name, parameter in module.named_parameters(recurse=False):
                if parameter.dtype in (torch.bfloat16, torch.float16):
                    raise ModelError(
                        f"'{path}.{name}' is {parameter.dtype} already; halfstep keeps the fp32 truth itself: pass the "
                        "model in fp32 (model.float()) and let the plan store it in 16 bits; if a plan has done so already, "
                        "undo that first (restore() of its stepper, undo() of its conversion)"
                    )
                if parameter.dtype != torch.float32:
                    continue
                here = self.table[path]
                first_path, first = agreed.setdefault(parameter, (path, here))
                if (first.storage, first.master) != (here.storage, here.master):
                    raise PlanError(
                        f"'{first_path}' and '{path}' share a parameter, but the plan stores it as {first.storage} "
                        f"(master {first.master}) and {here.storage} (master {here.master}); give both the same rule"
                    )
        return {parameter: settings for parameter, (_, settings) in agreed.items()}

    def _convert_unit(self, path: str, module: nn.Module) -> None:
        settings, around = self.table[path], self._find_surroundings(path)
        output = settings.output
        unit: type[Unit]
        if self._replaces_products(path, module):
            self._replace_products(path, module)
            return
        if find_kind(module) == "norm" and settings.storage != "fp32":
            unit, output = NormUnit, output or settings.compute
        elif self.plan.loss_scale == "layer" and settings.compute == "fp16":
            unit = ScaledUnit
        elif settings.cast == "unit":
            unit = Unit if find_kind(module) in UNITS else Gate
        elif path and settings.compute != around:
            # what runs around it in plain fp32 casts nothing by itself, so it must be handed fp32
            unit, output = Unit, output or ("fp32" if around == "fp32" else "")
        else:
            unit = Gate
        if unit is not Gate or output:
            make_unit(
                module, unit, self.device_type, settings.compute, output, self._choose_inside(unit, settings.compute)
            )
            self._undo.callback(undo_unit, module)
        if isinstance(module, nn.TransformerEncoderLayer) and any(s.compute != "fp32" for s in self.table.values()):
            # torch's inference shortcut reads the weights past their modules; a hook keeps it off
            self._undo.callback(module.register_forward_pre_hook(lambda *_: None).remove)

    def _choose_inside(self, unit: type[Unit], compute: str) -> Block | None:
        """What a unit's forward runs in; None for torch's autocast, and for units that open none or fp32's."""
        mode = self._find_mode(compute) if unit in (Unit, ScaledUnit) and compute != "fp32" else None
        return None if mode is None else mode.opened

    def _replaces_products(self, path: str, module: nn.Module) -> bool:
        """Whether a module's products are other than torch's own in its compute format."""
        return replaces_products(self.plan, module, self.table[path])

    def _replace_products(self, path: str, module: nn.Module) -> None:
        """Between the products a module keeps to the format around it; so do its results."""
        settings, around = self.table[path], self._find_surroundings(path)
        state = self.products[path] = ProductState(number=len(self.products))
        functions = replace_functions(read_products(settings), state)
        inside = OperatorMode(around, self.device_type, functions, self._list_equals()).opened
        make_unit(module, ProductUnit, self.device_type, around, settings.output, inside)
        self._undo.callback(undo_unit, module)

    def _find_surroundings(self, path: str) -> str:
        """The format of the autocast that a module is called under: that of the nearest module above it that casts."""
        while path:
            path = path.rpartition(".")[0]
            if path and self.table[path].cast == "op":
                return name_around(self.table[path])
        return self._around

    def _keep_state_in_fp32(self, module: nn.Module) -> None:
        """state_dict() reads the masters, load_state_dict() writes them; keys stay as they are.

        The hooks go by the module they are called with: a deep copy of the model has copies of them, and parameters of
        its own, which have no masters.
        """
        if not any(p.dtype in (torch.bfloat16, torch.float16) for p in module.parameters(recurse=False)):
            return
        masters = self.masters
        incoming: dict[nn.Parameter, Tensor] = {}

        def save(module: nn.Module, state: dict[str, Any], prefix: str, _metadata: Any) -> None:
            for name, parameter in module.named_parameters(recurse=False):
                if parameter.dtype in (torch.bfloat16, torch.float16):
                    state[prefix + name] = masters.read(parameter)

        def before_load(module: nn.Module, state: Mapping[str, Any], prefix: str, *_rest: Any) -> None:
            for name, parameter in module.named_parameters(recurse=False):
                value = state.get(prefix + name)
                if parameter in masters and value is not None and value.shape == parameter.shape:
                    incoming[parameter] = value

        def after_load(_module: nn.Module, _keys: Any) -> None:
            for parameter, value in incoming.items():
                masters.write(parameter, value)
            incoming.clear()

        self._undo.callback(module.register_state_dict_post_hook(save).remove)
        self._undo.callback(module.register_load_state_dict_pre_hook(before_load).remove)
        self._undo.callback(module.register_load_state_dict_post_hook(after_load).remove)


def convert(model: nn.Module, plan: Plan) -> Conversion:
    """Apply a plan to a model, in place.

    Examples:
        >>> layer = nn.Linear(2, 2)
        >>> weight = layer.weight
        >>> conversion = convert(layer, Plan.parse("compute=bf16 storage=bf16 master=split"))
        >>> layer.weight.dtype, layer.state_dict()["weight"].dtype
        (torch.bfloat16, torch.float32)
        >>> conversion.undo(); layer.weight is weight, layer.weight.dtype
        (True, torch.float32)

    Raises PlanError for a dead rule, a tied weight with two storages or a `saved_budget`, UnsupportedError for what cannot be
    honoured here, ModelError for a model whose weights are 16 bits wide already. A model that is refused is left as it was.
    """
    conversion = draft_conversion(model, plan)
    conversion.apply()
    return conversion


def draft_conversion(model: nn.Module, plan: Plan) -> Conversion:
    """What `convert` would do, checked and not yet done; raises what `convert` raises."""
    if plan.saved_budget:
        raise PlanError(
            f"saved_budget={plan.saved_budget} is met by measuring a batch, and convert() sees none; give the plan to prepare(), "
            "or state `saved` in its rules"
        )
    if plan.rest == "auto":
        raise PlanError(
            "rest=auto is chosen by timing a batch, and convert() sees none; give the plan to prepare(), or to "
            "choose_plan() first"
        )
    resolution = plan.resolve({path: find_kind(module) for path, module in model.named_modules()})
    resolution.require_alive()
    resolution = replace(resolution, table=keep_ingredients_wide(model, resolution.table))
    for path, module in model.named_modules():
        require_possible(path, module, resolution.table[path])
        if plan.loss_scale == "layer":
            require_scalable(path, module, resolution.table[path])
            if resolution.table[path].compute == "fp16" and replaces_products(plan, module, resolution.table[path]):
                raise UnsupportedError(
                    f"module '{path}': loss_scale=layer scales torch's own products, not emulated ones and those with formats "
                    "of their own; use loss_scale=dynamic"
                )
    device_type = next((p.device.type for p in model.parameters()), "cpu")
    return Conversion(model, plan, resolution, device_type)
