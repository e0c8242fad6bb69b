"""Choose a plan for this model on this machine: measure, search, and try the result on the whole model.

    observe   one forward pass: which products the model makes, in which shapes
    time      each distinct shape in fp32 and in every 16-bit format that may be the fastest, convolutions in both memory
              formats; those that seem to gain nothing twice
    search    control/search: per layer, fp32 or the fastest format with its casts counted
    try       control/trials: the whole model on half the batch, with other memory formats, and against fp32

`measure_harm` asks the other question, what a format does to a layer: the gradient of the whole model, with one layer at a
time in its planned formats and all others in fp32, against the gradient in fp32.
"""

import itertools
import math
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor, nn

from halfstep.control.monitor import LayerShape, observe_shapes
from halfstep.control.search import NOISE, UNTIMED, LayerCost, SavedCost, choose_formats, choose_saved_formats
from halfstep.control.trials import choose_batch, find_devices, leave_no_trace, stay_wide, try_memory_formats, try_plan
from halfstep.conversion import convert, draft_conversion
from halfstep.errors import ModelError, PlanError
from halfstep.machine.hardware import EQUAL
from halfstep.machine.runtime import release_memory
from halfstep.machine.timing import DTYPES, Stopwatch, time_products
from halfstep.mechanisms.activations import Keeper
from halfstep.mechanisms.layers import find_kind
from halfstep.nests import list_tensors
from halfstep.numerics import rows
from halfstep.plan import AUTO, Plan, Rule, Settings
from halfstep.records import Capability, HardwareProfile, HarmRecord, SavedRecord

CANDIDATES = ("bf16", "fp16")
ORDERED = {"conv2d": {"contiguous": "conv2d", "channels_last": "conv2d, channels_last"}}  # by memory format
WIDE = ("fp32", "bf16")  # formats whose harm is not in question
ALIVE_ANYWAY = ("resident", "outside")  # saved tensors that no format of a module changes


@dataclass(frozen=True, kw_only=True)
class Choice:
    """A plan, the reason for it, and the time it took to find, in seconds."""

    plan: Plan
    why: str
    seconds: float


def measure_costs(shapes: Mapping[str, LayerShape], formats: Sequence[str], watch: Stopwatch) -> list[LayerCost]:
    """Time every distinct shape once, and give each layer its cost.

    A shape that no 16-bit format seems to speed up is timed once more, and the faster times count: whatever else the machine
    does just then would leave its layers in fp32 for the whole training.
    """
    timed: dict[tuple[str, tuple[int, ...], str], float] = {}
    per_number = {f: _time_cast(f, watch) for f in formats if f != "fp32"}

    def measure(layers: Iterable[LayerShape]) -> None:
        distinct = dict.fromkeys((name, layer.shape) for layer in layers for name in _list_orders(layer).values())
        for (operation, shape), format in itertools.product(distinct, formats):
            found = sum(m.milliseconds for m in time_products(operation, shape, format, watch))
            timed[operation, shape, format] = min(found, timed.get((operation, shape, format), math.inf))

    def weigh(layer: LayerShape) -> LayerCost:
        times = {
            format: {
                order: layer.calls * timed[name, layer.shape, format] for order, name in _list_orders(layer).items()
            }
            for format in formats
        }
        # forward converts the input, backward the gradient of the output; weights are stored in the format
        numbers = layer.calls * (layer.input_numbers + layer.output_numbers)
        casts = {format: numbers * ms for format, ms in per_number.items()}
        products = {format: min(found.values()) for format, found in times.items()}
        orders = times if layer.operation in ORDERED else {}
        return LayerCost(path=layer.path, shape=layer.shape, products=products, casts=casts, orders=orders)

    measure(shapes.values())
    measure([layer for layer in shapes.values() if not any(map(weigh(layer).gains, per_number))])
    return [weigh(layer) for layer in shapes.values()]


def _list_orders(layer: LayerShape) -> Mapping[str, str]:
    """Memory format -> what is timed for it."""
    return ORDERED.get(layer.operation, {"": layer.operation})


def measure_saved_costs(
    model: nn.Module, run: Callable[[], Tensor], *, formats: Sequence[str] = ("bf16", "int8", "int4"), seed: int = 0
) -> tuple[SavedCost, ...]:
    """Bytes and harm of each format for what each module saves; `choose_saved_formats` fits them into a budget.

    run: runs the model on a batch, under its autocast if it has one, and returns the loss.
    formats: the last one must be the coarsest.

    A module's harm is measured by one backward pass with that module alone in the coarsest format. To first order the error of
    a gradient is linear in that of the activations, so the harm of the others follows from their rounding noise, which one
    forward pass each measures. Liu et al. 2022, "GACT" (arXiv 2206.11357), section 4, where it follows from the bits.

    Examples:
        >>> model = nn.Sequential(nn.Linear(64, 256), nn.GELU(), nn.Linear(256, 1))
        >>> x = torch.randn(512, 64)
        >>> costs = measure_saved_costs(model, lambda: model(x).square().mean())
        >>> [(cost.path, cost.bytes["int4"], cost.harm["int8"] < cost.harm["int4"]) for cost in costs]
        [('1', 69632, True), ('2', 69632, True)]
    """
    modules, coarsest = [path for path, _ in model.named_modules()], formats[-1]
    parameters = [p for p in model.parameters() if p.requires_grad]

    def differentiate(table: Mapping[str, str]) -> list[Tensor]:
        with torch.random.fork_rng(devices=find_devices(model)), Keeper(model, table, seed=seed).keep():
            found = torch.autograd.grad(run(), parameters, allow_unused=True)
        return [g.to(torch.float32) for g in found if g is not None]

    with leave_no_trace(model):
        sizes, noises = {}, {}
        for format in formats:
            keeper = Keeper(model, {"": format}, seed=seed)
            with torch.random.fork_rng(devices=find_devices(model)), keeper.keep(measure=True):
                run()
            sizes[format], noises[format] = _add_up(keeper.records)
        exact = differentiate({})
        square = sum(float(g.square().sum()) for g in exact)
        costs = []
        for path in sizes[coarsest]:
            harm = 0.0
            if noises[coarsest].get(path):
                rounded = differentiate({other: coarsest if other == path else "" for other in modules})
                harm = sum(float((a - b).square().sum()) for a, b in zip(rounded, exact, strict=True)) / square
            per_noise = harm / noises[coarsest].get(path, 1.0)
            costs.append(
                SavedCost(
                    path=path,
                    bytes={"": sizes[coarsest][path][0]} | {f: sizes[f][path][1] for f in formats},
                    harm={"": 0.0} | {f: per_noise * noises[f].get(path, 0.0) for f in formats},
                )
            )
    return tuple(costs)


def _add_up(records: Sequence[SavedRecord]) -> tuple[dict[str, tuple[int, int]], dict[str, float]]:
    """Of each module: bytes as they are and as they are kept; the noise-to-signal ratio of what it rounds."""
    sizes: dict[str, tuple[int, int]] = {}
    for record in records:
        if record.why not in ALIVE_ANYWAY:
            before, kept = sizes.get(record.path, (0, 0))
            sizes[record.path] = before + record.bytes, kept + record.kept
    return sizes, {r.path: 10 ** (-r.sqnr / 10) for r in records if r.sqnr is not None}


def project(outputs: Any) -> Tensor:
    """One number whose gradient at every output is random: what a loss would send back that is not known yet.

    Raises ModelError where no output depends on a weight.
    """
    tensors = [t for t in list_tensors(outputs) if t.requires_grad]
    if not tensors:
        raise ModelError("the model returns no tensor that depends on its weights, so no gradient can be measured")
    return sum((t.to(torch.float32) * torch.randn_like(t, dtype=torch.float32)).mean() for t in tensors)  # type: ignore[return-value]


def fit_saved(model: nn.Module, plan: Plan, run: Callable[[], Tensor]) -> Choice:
    """The plan with formats for saved activations that fit into its `saved_budget`; what its rules say of `saved` stands.

    run: runs the model on a batch, under its autocast if it has one, and returns a loss.

    Costs of modules add up to the cost of all only where no two save the same tensor, which is packed once for each of their
    formats. So what is chosen is tried, and chosen again for less until it does fit.

    Examples:
        >>> model, x = nn.Sequential(nn.Linear(64, 256), nn.GELU(), nn.Linear(256, 1)), torch.randn(512, 64)
        >>> choice = fit_saved(model, Plan(saved_budget="300KiB"), lambda: model(x).square().mean())
        >>> [(rule.path, rule.saved) for rule in choice.plan.rules]
        [('1', 'int8'), ('2', 'int8')]

    Raises PlanError where the narrowest formats of all do not fit.
    """
    start, budget = time.perf_counter(), plan.saved_bytes
    table = plan.resolve({path: find_kind(module) for path, module in model.named_modules()}).table
    stated = {path: s.saved.replace("fp32", "") for path, s in table.items() if s.saved}
    costs = [_hold(cost, stated) for cost in measure_saved_costs(model, run)]
    limit, least = budget, sum(min(cost.bytes.values()) for cost in costs)
    while True:
        try:
            chosen = choose_saved_formats(costs, limit)
        except PlanError:
            raise PlanError(
                f"saved_budget={plan.saved_budget} cannot be met: on this batch saved activations take {least / 2**20:.4g} MiB "
                "in the narrowest formats that the plan allows; give more, or a smaller batch"
            ) from None
        kept = _measure_kept(model, run, chosen | stated)
        if kept <= budget:
            break
        limit, least = sum(cost.bytes[chosen[cost.path]] for cost in costs) - 1, kept
    rules = [_state_saved(cost, chosen[cost.path], table[cost.path].why) for cost in costs if chosen[cost.path]]
    before = sum(cost.bytes[""] for cost in costs)
    why = (
        f"saved_budget={plan.saved_budget}: saved activations take {before / 2**20:.4g} MiB on this batch, and "
        f"{(kept if rules else before) / 2**20:.4g} MiB with those of {len(rules)} modules in fewer bits"
    )
    plan = replace(plan, rules=(*rules, *plan.rules), saved_budget="")
    return Choice(plan=plan, why=why, seconds=time.perf_counter() - start)


def _hold(cost: SavedCost, stated: Mapping[str, str]) -> SavedCost:
    """The cost of a module whose format is stated already: there is nothing to choose."""
    if cost.path not in stated:
        return cost
    return SavedCost(path=cost.path, bytes={"": cost.bytes[stated[cost.path]]}, harm={"": 0.0})


def _measure_kept(model: nn.Module, run: Callable[[], Tensor], table: Mapping[str, str]) -> int:
    """Bytes that are kept for the backward pass in these formats; 0 where all of it is as it is."""
    keeper = Keeper(model, {path: table.get(path, "") for path, _ in model.named_modules()})
    with leave_no_trace(model), torch.random.fork_rng(devices=find_devices(model)), keeper.keep():
        run()
    return sum(kept for _, kept in _add_up(keeper.records)[0].values())


def _state_saved(cost: SavedCost, format: str, other: str) -> Rule:
    """The rule for what a module saves, with the reason after that of its other settings."""
    sizes = f"saved activations take {cost.bytes[''] / 2**20:.3g} MiB, {cost.bytes[format] / 2**20:.3g} in {format}"
    why = f"{sizes}, which changes the gradient by {cost.harm[format]:.2g} of its square"
    return Rule(path=cost.path, saved=format, why="; ".join(filter(None, [other, why])))


def _time_cast(format: str, watch: Stopwatch) -> float:
    """Milliseconds a number, at the size of a large activation."""
    count = 1 << 20
    x, y = torch.randn(count, device=watch.device), torch.empty(count, device=watch.device, dtype=DTYPES[format])
    return watch.time(lambda: y.copy_(x)) / count


def choose_plan(
    model: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any] | None = None, *, profile: HardwareProfile,
    given: Plan = AUTO,
) -> Choice:  # fmt: skip
    """The plan that "auto" means for this model, fed with this batch, on the machine of this profile.

    given: a plan whose rules stand before the chosen ones. Layers of which they state `compute` are not timed. Weights of which
        they state something are what such a plan makes of them by itself, fp32 where no rule says otherwise; so are
        weights in other modules that share them.

    Examples:
        >>> from halfstep.machine.hardware import probe_hardware
        >>> choice = choose_plan(nn.Linear(4, 4), (torch.ones(2, 4),), profile=probe_hardware(quick=True))
        >>> choice.plan.rules[-1].compute          # a layer this small never leaves fp32
        'fp32'
    """
    start, kwargs = time.perf_counter(), kwargs or {}
    fast, own = _list_candidates(profile), _state_weights(model, given)

    def complete(found: Plan) -> Plan:
        """What was found, behind what was given."""
        rules = (*own, *found.rules)
        fast_functions = given.functions == "fast" or profile.device == "cpu"
        return replace(
            given, rest="fp32", name=given.name or found.name, functions="fast" if fast_functions else "torch",
            loss_scale=found.loss_scale if given.loss_scale == "none" else given.loss_scale,
            rules=_drop_idle(model, rules, kept=given.rules),
        )  # fmt: skip

    if not fast:
        reasons = "; ".join(f"{c.format}: {c.why}" for c in profile.capabilities if c.format in CANDIDATES)
        why = f"no 16-bit format is faster than fp32 on this machine ({reasons})"
        plan = complete(Plan(rules=(Rule(compute="fp32", why=why),), name="auto"))
        return Choice(plan=plan, why=why, seconds=time.perf_counter() - start)
    with leave_no_trace(model):
        with observe_shapes(model) as shapes, torch.no_grad():
            model(*args, **kwargs)
        decided = _list_stated(model, given, "compute")
        left = {path: shape for path, shape in shapes.items() if path not in decided}
        costs = measure_costs(left, ("fp32", *fast), Stopwatch(profile.device, seconds=0.04))
        untimed = fast[0] if _has_untimed(model, shapes) else ""
        found = _keep_tables(model, _follow_ties(model, choose_formats(costs, untimed=untimed)))
        ordered_already = _list_stated(model, given, "memory_format")
        convolutions = [cost for cost in costs if cost.path not in ordered_already]
        wide = complete(Plan(rules=(Rule(compute="fp32"),)))
        half = choose_batch(model, args, kwargs, wide)
        plan, said = try_memory_formats(model, *half, complete(found), shapes, convolutions, profile.device)
        wins, why = try_plan(model, *half, wide, plan, Stopwatch(profile.device))
        if not wins:
            plan = complete(stay_wide(found, why))
            plan, said = try_memory_formats(model, *half, plan, shapes, convolutions, profile.device)
    why = "; ".join(filter(None, [why, said]))
    release_memory()
    return Choice(plan=plan, why=why, seconds=time.perf_counter() - start)


def _state_weights(model: nn.Module, given: Plan) -> tuple[Rule, ...]:
    """The rules of a plan, and those that keep fp32 weights where one of them says something of weights and not all: what is
    chosen behind them must not store in bf16 what they compute in fp32, nor what shares its weights with that."""
    about_weights = [rule for rule in given.rules if rule.compute or rule.storage or rule.master]
    kept = (
        Rule(path=rule.path, kind=rule.kind, position=rule.position, storage="fp32", master="none")
        for rule in about_weights
        if not (rule.storage and rule.master)
    )
    own = (*given.rules, *dict.fromkeys(kept))
    return (*own, *_state_shared_weights(model, Plan(rules=own)))


def _state_shared_weights(model: nn.Module, plan: Plan) -> list[Rule]:
    """Rules that store weights as modules do that share them and of which the plan says it."""
    stated, rules = _list_stated(model, plan, "storage"), {}
    table = dict(plan.resolve({path: find_kind(module) for path, module in model.named_modules()}).table)
    shared = _list_shared(model)
    for paths in shared * len(shared):  # as often, because sharing can form chains
        first = next((path for path in paths if path in stated), None)
        for path in paths:
            if first is not None and path not in stated:
                storage, master = table[first].storage, table[first].master
                rules[path] = Rule(path=path, storage=storage, master=master, why=f"shares a weight with {first}")
                table[path] = replace(table[path], storage=storage, master=master)
                stated.add(path)
    return list(rules.values())


def _list_shared(model: nn.Module) -> list[list[str]]:
    """Of every parameter that several modules share, their paths."""
    sharing: dict[nn.Parameter, list[str]] = {}
    for path, module in model.named_modules():
        for parameter in module.parameters(recurse=False):
            sharing.setdefault(parameter, []).append(path)
    return [paths for paths in sharing.values() if len(paths) > 1]


def _list_stated(model: nn.Module, plan: Plan, setting: str) -> set[str]:
    """Paths of the modules of which a plan's rules state a setting."""
    matching = plan.match({path: find_kind(module) for path, module in model.named_modules()})
    return {path for path, rules in matching.items() if any(getattr(rule, setting) for rule in rules)}


def _drop_idle(model: nn.Module, rules: tuple[Rule, ...], *, kept: tuple[Rule, ...]) -> tuple[Rule, ...]:
    """Rules without those that match nothing in this model, as one for embeddings where there are none.

    kept: rules that stay whatever they match.
    """
    matching = Plan(rules=rules).match({path: find_kind(module) for path, module in model.named_modules()})
    alive = {rule for matched in matching.values() for rule in matched}
    return tuple(rule for rule in rules if rule in alive or rule in kept)


def measure_harm(model: nn.Module, plan: Plan, run: Callable[[int], None]) -> tuple[HarmRecord, ...]:
    """What each layer's formats do to the gradient, one record for every layer that the plan computes in less than bf16.

    run: forward and backward on the batch of a number, leaving the gradients at the parameters. It is called with 0, again
        and again, and once with 1, each time from the same random state.

    Costs a step in fp32 for every such layer and two more; leaves weights, gradients, buffers and random states as they
    were.

    Examples:
        >>> model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
        >>> batches = torch.randn(2, 8, 4)
        >>> plan = Plan(rules=(Rule(path="0", compute="fp16", cast="unit"), Rule(compute="fp32")))
        >>> (harm,) = measure_harm(model, plan, lambda number: model(batches[number]).square().mean().backward())
        >>> harm.path, harm.error < 1e-3 < harm.noise
        ('0', True)
    """
    table = draft_conversion(model, replace(plan, saved_budget="")).table
    layers = [path for path, module in model.named_modules() if find_kind(module) and table[path].compute not in WIDE]

    def differentiate(plan: Plan, number: int) -> list[Tensor]:
        with leave_no_trace(model), convert(model, plan) as conversion, conversion.autocast():
            run(number)
            return [p.grad.to(torch.float64) for p in model.parameters() if p.grad is not None]

    exact = Plan(rules=(Rule(compute="fp32"),))
    reference = differentiate(exact, 0)
    power = _add_squares(reference)
    noise = _add_squares(differentiate(exact, 1), reference) / 2 / power
    harms = []
    for path in layers:
        stated = {f.name: getattr(table[path], f.name) for f in fields(Settings) if getattr(table[path], f.name)}
        alone = Rule(path=path, **(stated | {"storage": "fp32", "master": "none", "cast": "unit", "output": "fp32"}))
        error = _add_squares(differentiate(Plan(rules=(alone, *exact.rules)), 0), reference) / power
        harms.append(HarmRecord(path=path, compute=table[path].compute, error=error, noise=noise))
    return tuple(harms)


def _add_squares(gradients: Sequence[Tensor], others: Sequence[Tensor] | None = None) -> float:
    """Sum of squares over all gradients, or over their differences to others."""
    if others is not None:
        gradients = [gradient - other for gradient, other in zip(gradients, others, strict=True)]
    return sum((gradient.square().sum().item() for gradient in gradients), 0.0)


def _has_untimed(model: nn.Module, timed: Mapping[str, LayerShape]) -> bool:
    """Whether layers other than the timed ones multiply weights."""
    return any(find_kind(module) in UNTIMED and path not in timed for path, module in model.named_modules())


def _list_candidates(profile: HardwareProfile) -> list[str]:
    """16-bit formats that are worth timing at the model's shapes. fp16 only where it can beat bf16, which needs no loss scale
    (`search.choose_formats`): on processors a convolution in fp16 can take seconds, and to time it as long."""
    found = {f: profile.find_capability(f) for f in CANDIDATES}
    best = {f: c.ratio_best for f, c in found.items() if c and c.ratio_best and _is_fast_somewhere(c)}
    return [f for f in best if f == "bf16" or best[f] >= NOISE * best.get("bf16", 0.0)]


def _is_fast_somewhere(capability: Capability) -> bool:
    """Whether a format was as fast as fp32 at some shape: "slower" is a mean, the model's shapes may be the others."""
    fast = capability.status in ("native", "slower")
    return fast and capability.ratio_best is not None and capability.ratio_best >= EQUAL


def _keep_tables(model: nn.Module, plan: Plan) -> Plan:
    """Tables that keep fp32 weights whatever their products gain."""
    formats, ruled = {rule.compute for rule in plan.rules}, {rule.path for rule in plan.rules}
    if formats == {"fp32"}:
        return plan
    in_one_pass = rows.KERNELS.library.functions is not None and "fp16" not in formats
    kept = [
        Rule(path=path, storage="fp32", master="none", why=why)
        for path, module in model.named_modules()
        if find_kind(module) == "embedding" and path not in ruled and (why := _explain_table(module, in_one_pass))
    ]
    return replace(plan, rules=(*kept, *plan.rules))


def _explain_table(table: nn.Module, in_one_pass: bool) -> str:
    """Why a table keeps fp32 weights; "" where it need not. in_one_pass: whether rows in 16 bits are updated in one pass on a
    processor. Otherwise to widen, step and narrow a few of them costs more than a table in 16 bits reads less."""
    if getattr(table, "max_norm", None) is not None:
        return "max_norm writes to the weights in every forward pass: of their truth only what 16 bits hold would stay"
    if getattr(table, "sparse", False) and not (in_one_pass and all(p.is_cpu for p in table.parameters())):
        return "sparse gradients: rows of an fp32 table are updated in place"
    return ""


def _follow_ties(model: nn.Module, plan: Plan) -> Plan:
    """Modules that share a parameter get the same formats: fp32 where one of the layers among them stays fp32."""
    rules, shared = {rule.path: rule for rule in plan.rules if rule.names_a_path}, _list_shared(model)
    for paths in shared * len(shared):  # as often, because sharing can form chains
        ruled = [rules[path] for path in paths if path in rules]
        if ruled:
            widest = next((rule for rule in ruled if rule.compute == "fp32"), ruled[0])
            for path in paths:
                others = ", ".join(other for other in paths if other != path)
                if path not in rules or rules[path].compute != widest.compute:
                    rules[path] = replace(widest, path=path, why=f"shares a weight with {others}")
    return replace(plan, rules=(*rules.values(), *(rule for rule in plan.rules if not rule.names_a_path)))
