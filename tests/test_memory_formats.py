"""Memory formats of convolutions: what a plan states is done and undone, numbers stay, and `auto` takes what was faster."""

import copy
import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap
from torch.nn import functional as F
from torch.optim import SGD, AdamW, Optimizer

from halfstep.control import memory_formats, sensitivity, trials
from halfstep.control.memory_formats import ConvolutionCost, measure_convolutions, propose_memory_formats
from halfstep.control.monitor import observe_shapes
from halfstep.control.sensitivity import choose_plan, measure_costs
from halfstep.conversion import convert
from halfstep.errors import UnsupportedError
from halfstep.machine.timing import Stopwatch
from halfstep.mechanisms.memory_formats import MEMORY_FORMATS, lay_out
from halfstep.plan import Plan, Rule
from halfstep.records import Measurement
from halfstep.stepper import Stepper, prepare
from helpers import assert_same, copy_weights, make_cnn, make_profile, seeded

LAST = torch.channels_last
CONV_LAST = "kind=conv memory_format=channels_last"
SPLIT = "compute=bf16 storage=bf16 master=split"


def is_last(x: Tensor) -> bool:
    return x.is_contiguous(memory_format=LAST) and not x.is_contiguous()


def make_images(count: int) -> list[tuple[Tensor, Tensor]]:
    with seeded(5):
        return [(torch.randn(4, 3, 8, 8), torch.randn(4, 3)) for _ in range(count)]


def train(stepper: Stepper, batches: list[tuple[Tensor, Tensor]]) -> None:
    for x, y in batches:
        with stepper.autocast():
            loss = F.mse_loss(stepper.model(x).float(), y)
        assert stepper.step(loss).applied


# --- one convolution


@pytest.mark.parametrize("memory_format", list(MEMORY_FORMATS))
@pytest.mark.parametrize("name", ["input", ""])
def test_a_convolution_is_laid_out_and_given_back(memory_format: str, name: str) -> None:
    layer, x = nn.Conv2d(3, 4, 3), torch.randn(2, 3, 5, 5)
    layer, x = (layer, x.to(memory_format=LAST)) if memory_format == "contiguous" else (layer, x)
    if memory_format == "contiguous":
        layer = layer.to(memory_format=LAST)  # type: ignore[call-overload]
    weight, strides, expected = layer.weight, layer.weight.stride(), layer(x)
    expected.sum().backward()
    undo = lay_out(layer, memory_format)
    result = layer(**{name: x}) if name else layer(x)
    wanted = memory_format == "channels_last"
    assert (is_last(weight), is_last(weight.grad), is_last(result)) == (wanted, wanted, wanted)  # type: ignore[arg-type]
    torch.testing.assert_close(result, expected)
    undo()
    assert layer.weight is weight
    assert weight.stride() == strides
    assert is_last(layer(x)) != wanted


def test_what_is_no_batch_of_images_is_left_alone() -> None:
    layer = nn.Conv2d(3, 4, 3)
    lay_out(layer, "channels_last")
    assert layer(torch.randn(3, 5, 5)).shape == (4, 3, 3)


def test_gradients_of_single_samples_are_as_before() -> None:
    layer, x = nn.Conv2d(3, 4, 3), torch.randn(2, 3, 5, 5)

    def differentiate() -> Tensor:
        def total(weights: dict[str, Tensor], image: Tensor) -> Tensor:
            result: Tensor = functional_call(layer, weights, (image[None],)).square().sum()
            return result

        weights = {name: p.detach() for name, p in layer.named_parameters()}
        result: Tensor = vmap(grad(total), (None, 0))(weights, x)["weight"]
        return result

    before = differentiate()
    lay_out(layer, "channels_last")
    torch.testing.assert_close(differentiate(), before)


# --- a plan


@pytest.mark.parametrize("rest", ["compute=fp32", "compute=bf16", SPLIT, "kind=conv compute=int8\ncompute=bf16"])
def test_a_plan_lays_out_what_it_states_and_undoing_gives_it_back(rest: str) -> None:
    model, (x, _) = make_cnn().eval(), make_images(1)[0]
    strides, before = [p.stride() for p in model.parameters()], copy_weights(model)
    with convert(model, Plan.parse(rest)) as conversion, conversion.autocast():
        expected = model(x)
    with convert(model, Plan.parse(f"{CONV_LAST}\n{rest}")) as conversion, conversion.autocast():
        assert [is_last(m.weight) for m in model if isinstance(m, nn.Conv2d)] == [True, True]
        result = model(x)
        layers = {layer.path: layer for layer in conversion.describe()}
    torch.testing.assert_close(result, expected, rtol=0.05, atol=0.05)
    assert [layers[path].memory_format for path in ("0", "1", "3", "7")] == ["channels_last", "", "channels_last", ""]
    assert layers["0"].describe_storage().endswith(", channels_last")
    assert [p.stride() for p in model.parameters()] == strides
    assert_same(copy_weights(model), before)


@pytest.mark.parametrize("layer", [nn.Conv2d(3, 4, 3), nn.Conv2d(3, 4, 1), nn.Conv2d(3, 3, 3, groups=3)])
def test_a_contiguous_model_still_returns_what_can_be_viewed(layer: nn.Conv2d) -> None:
    model, x = nn.Sequential(layer), torch.randn(2, 3, 5, 5)
    with convert(model, Plan.parse(CONV_LAST)):
        model(x).view(-1)
        assert is_last(model[0](x))
    assert not model._forward_hooks


def test_a_model_in_channels_last_returns_what_it_did() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3)).to(memory_format=LAST)  # type: ignore[call-overload]
    with convert(model, Plan.parse(CONV_LAST)):
        assert is_last(model(torch.randn(2, 3, 5, 5)))


@pytest.mark.parametrize("layer", [nn.Linear(2, 2), nn.Conv1d(1, 1, 1), nn.Conv3d(1, 1, 1), nn.BatchNorm2d(2)])
def test_other_layers_are_refused(layer: nn.Module) -> None:
    message = rf"'0' is a {type(layer).__name__}, and memory_format=contiguous is for 2-d convolutions; give that rule"
    with pytest.raises(UnsupportedError, match=message):
        convert(nn.Sequential(layer), Plan.parse("memory_format=contiguous"))


# --- training


def make_plain_cnn() -> nn.Sequential:
    """Without normalisation: the gradient of a bias before one is rounding noise, which AdamW makes large."""
    with seeded(0):
        return nn.Sequential(nn.Conv2d(3, 64, 3), nn.ReLU(), nn.Conv2d(64, 8, 3), nn.Flatten(), nn.Linear(128, 3))


OPTIMIZERS: list[Callable[[Any], Optimizer]] = [
    lambda p: AdamW(p, lr=1e-2, fused=True),
    lambda p: SGD(p, lr=0.1, momentum=0.9, fused=True),
]


@pytest.mark.parametrize("rest", ["compute=fp32", SPLIT, "states=8-bit\ncompute=fp32"])
@pytest.mark.parametrize("make", OPTIMIZERS)
def test_states_follow_a_change_of_memory_format(make: Callable[[Any], Optimizer], rest: str) -> None:
    """Fused kernels walk through memory: with the strides of before, states would belong to other weights."""
    images, models = make_images(6), [make_plain_cnn(), make_plain_cnn()]
    for model, changed in zip(models, (rest, f"{rest}\n{CONV_LAST}"), strict=True):
        stepper = prepare(model, make(model.parameters()), Plan.parse(rest))
        train(stepper, images[:3])
        stepper.adopt(Plan.parse(changed))
        train(stepper, images[3:5])
        stepper.restore()
        train(prepare(model, stepper.optimizer, Plan.parse(rest)), images[5:])
    torch.testing.assert_close(copy_weights(models[1]), copy_weights(models[0]), rtol=0.01, atol=2e-3)


def test_a_run_goes_on_in_its_memory_formats() -> None:
    images, models = make_images(6), [make_cnn(), make_cnn(), make_cnn()]
    plan = Plan.parse(f"{CONV_LAST}\n{SPLIT}")
    straight, first = (prepare(m, OPTIMIZERS[0](m.parameters()), plan) for m in models[:2])
    second = prepare(models[2], OPTIMIZERS[0](models[2].parameters()), "32-true")
    train(straight, images)
    train(first, images[:3])
    second.load_state_dict(first.state_dict())
    models[2].load_state_dict(models[1].state_dict())
    second.optimizer.load_state_dict(first.optimizer.state_dict())
    train(second, images[3:])
    assert is_last(dict(models[2].named_parameters())["0.weight"])
    assert_same(copy_weights(models[2]), copy_weights(models[0]))


# --- what is chosen


TIMES = st.floats(0.01, 10.0)
COSTS = st.builds(
    ConvolutionCost,
    path=st.just(""),
    products=st.fixed_dictionaries(dict.fromkeys(MEMORY_FORMATS, TIMES)),
    conversion=TIMES,
)


@given(costs=st.lists(COSTS, min_size=1, max_size=6))
def test_no_other_formats_are_cheaper_than_those_that_are_proposed(costs: list[ConvolutionCost]) -> None:
    costs = [ConvolutionCost(path=str(i), products=c.products, conversion=c.conversion) for i, c in enumerate(costs)]

    def add_up(formats: tuple[str, ...]) -> float:
        pairs = zip(costs, formats, ("contiguous", *formats), strict=False)
        return sum(c.products[now] + (c.conversion if now != before else 0.0) for c, now, before in pairs)

    proposed = propose_memory_formats(costs)[0]
    least = min(add_up(formats) for formats in itertools.product(MEMORY_FORMATS, repeat=len(costs)))
    assert add_up(tuple(proposed[c.path] for c in costs)) == pytest.approx(least)


def test_convolutions_are_timed_in_all_number_formats_and_both_orders() -> None:
    model, plan = nn.Sequential(make_cnn(), nn.Linear(3, 3)), Plan.parse("path=0.0 compute=fp32\ncompute=bf16")
    with observe_shapes(model) as shapes:
        model(make_images(1)[0][0])
    watch = Stopwatch(seconds=0.001)
    timed = measure_costs(shapes, ("fp32", "bf16"), watch)
    costs = measure_convolutions(model, shapes, timed, plan, watch)
    assert [cost.path for cost in costs] == ["0.0", "0.3"]
    assert [cost.products for cost in costs] == [timed[0].orders["fp32"], timed[1].orders["bf16"]]
    assert all(set(cost.products) == set(MEMORY_FORMATS) for cost in costs)
    assert all(min(*cost.products.values(), cost.conversion) > 0 for cost in costs)
    assert timed[0].products == {f: min(timed[0].orders[f].values()) for f in ("fp32", "bf16")}


def test_a_format_that_is_fast_in_one_order_only_is_chosen_with_that_order(monkeypatch: pytest.MonkeyPatch) -> None:
    times = {"conv2d": {"fp32": 2.0, "bf16": 3.0}, "conv2d, channels_last": {"fp32": 2.5, "bf16": 1.0}}
    pretend(monkeypatch, lambda operation, format: times.get(operation, times["conv2d"])[format], trial=(3.0, 2.0))
    choice = choose_plan(make_cnn(), (make_images(1)[0][0],), profile=make_profile())
    rules = choice.plan.rules
    assert {rule.path for rule in rules if rule.compute == "bf16"} >= {"0", "3"}
    assert {rule.path for rule in rules if rule.memory_format == "channels_last"} == {"0", "3"}


def pretend(
    monkeypatch: pytest.MonkeyPatch, product: Callable[[str, str], float], *, trial: tuple[float, float]
) -> None:
    """Products take the milliseconds that `product` says of operation and format; a trial of both orders takes `trial`."""

    def time_products(operation: str, shape: tuple[int, ...], format: str, watch: Stopwatch) -> list[Measurement]:
        ms = product(operation, format)
        return [Measurement(operation=operation, product="output", format=format, shape=shape, milliseconds=ms)]

    def race(
        model: nn.Module, args: Any, kwargs: Any, plans: tuple[Plan, ...], watch: Stopwatch
    ) -> dict[Plan, list[float]]:
        asks = any(rule.memory_format for rule in plans[1].rules)
        for plan in plans:
            with convert(model, plan) as conversion, conversion.autocast():
                model(*args, **kwargs)
        return {plan: [ms] for plan, ms in zip(plans, trial if asks else (2.0, 1.0), strict=True)}

    monkeypatch.setattr(sensitivity, "time_products", time_products)
    monkeypatch.setattr(memory_formats, "_time_conversion", lambda *_: 0.1)
    monkeypatch.setattr(trials, "race", race)


def last_takes(ms: float) -> Callable[[str, str], float]:
    """Convolutions take that in channels_last and 1 ms in the other order; fp32 takes twice as long."""
    return lambda operation, format: (ms if "last" in operation else 1.0) * (2.0 if format == "fp32" else 1.0)


def choose(model: nn.Module) -> tuple[dict[str, str], str]:
    choice = choose_plan(model, (make_images(1)[0][0],), profile=make_profile())
    assert Plan.parse(str(choice.plan)) == choice.plan
    return {rule.path: rule.memory_format for rule in choice.plan.rules if rule.memory_format}, choice.why


def test_auto_states_the_memory_formats_that_win_with_their_times(monkeypatch: pytest.MonkeyPatch) -> None:
    pretend(monkeypatch, last_takes(0.5), trial=(3.0, 2.0))
    model = make_cnn()
    strides = [p.stride() for p in model.parameters()]
    formats, why = choose(model)
    assert formats == {"0": "channels_last", "3": "channels_last"}
    assert "3 ms become 2 with memory formats chosen by timing" in why
    assert [p.stride() for p in model.parameters()] == strides


@pytest.mark.parametrize(("last", "trial"), [(0.5, (3.0, 2.99)), (2.0, (3.0, 2.0))])
def test_auto_leaves_what_loses_the_trial_and_what_is_there(
    monkeypatch: pytest.MonkeyPatch, last: float, trial: tuple[float, float]
) -> None:
    pretend(monkeypatch, last_takes(last), trial=trial)
    formats, why = choose(make_cnn())
    assert not formats
    assert "memory formats" not in why


def test_a_model_that_cannot_run_in_an_order_keeps_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    class Viewing(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.head = nn.Conv2d(3, 4, 3), nn.Linear(144, 3)

        def forward(self, x: Tensor) -> Tensor:
            result: Tensor = self.head(self.conv(x).view(len(x), -1))
            return result

    pretend(monkeypatch, last_takes(0.5), trial=(3.0, 2.0))
    assert not choose(Viewing())[0]


def test_rules_beside_it_stay_in_force() -> None:
    plan = Plan(rules=(Rule(path="0", memory_format="channels_last", why="timed"), *Plan.parse(SPLIT).rules))
    with convert(make_cnn(), plan) as conversion:
        first = conversion.describe()[0]
    assert (first.storage, first.master, first.memory_format, first.why) == ("bf16", "split", "channels_last", "timed")


def test_copies_and_pickles_of_a_model_go_on(tmp_path: Path) -> None:
    model, (x, _) = make_cnn(), make_images(1)[0]
    prepare(model, OPTIMIZERS[0](model.parameters()), Plan.parse(CONV_LAST))
    torch.save(model, tmp_path / "model.pt")
    for other in (copy.deepcopy(model), torch.load(tmp_path / "model.pt", weights_only=False)):
        assert torch.equal(other(x), model(x))
