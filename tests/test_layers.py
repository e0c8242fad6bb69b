import math
import time
from collections import OrderedDict
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from halfstep.control.monitor import Audit
from halfstep.conversion import convert
from halfstep.errors import ModelError, UnsupportedError
from halfstep.mechanisms.layers import Gate, Unit, cast_floats, find_kind, make_unit, undo_unit
from halfstep.plan import KINDS, Plan
from halfstep.stepper import prepare
from helpers import copy_weights, make_cnn, make_mlp, make_profile, seeded


@pytest.mark.parametrize(
    ("module", "kind"),
    [
        (nn.Linear(2, 2), "linear"),
        (nn.Bilinear(2, 2, 2), "linear"),
        (nn.Conv1d(2, 2, 1), "conv"),
        (nn.Conv2d(2, 2, 1), "conv"),
        (nn.ConvTranspose3d(2, 2, 1), "conv"),
        (nn.Embedding(2, 2), "embedding"),
        (nn.EmbeddingBag(2, 2), "embedding"),
        (nn.BatchNorm2d(2), "norm"),
        (nn.LayerNorm(2), "norm"),
        (nn.GroupNorm(1, 2), "norm"),
        (nn.RMSNorm(2), "norm"),
        (nn.InstanceNorm1d(2), "norm"),
        (nn.MultiheadAttention(2, 1), "attention"),
        (nn.LSTM(2, 2), "recurrent"),
        (nn.GRUCell(2, 2), "recurrent"),
        (nn.ReLU(), ""),
        (nn.Sequential(), ""),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, nn.Module) else None,
)
def test_kind_follows_the_class(module: nn.Module, kind: str) -> None:
    assert find_kind(module) == kind
    assert kind in (*KINDS, "")


def test_kind_of_a_subclass_is_that_of_its_base() -> None:
    class Special(nn.Linear):
        pass

    assert find_kind(Special(2, 2)) == "linear"


def test_unit_is_the_same_object_with_the_same_keys_and_is_still_an_instance_of_its_class() -> None:
    layer = nn.Linear(4, 2)
    weight, keys = layer.weight, list(layer.state_dict())
    make_unit(layer, Unit, "cpu", "bf16", "")
    assert isinstance(layer, nn.Linear)
    assert isinstance(layer, Unit)
    assert type(layer).__name__ == "Linear"
    assert layer.weight is weight
    assert list(layer.state_dict()) == keys
    assert find_kind(layer) == "linear"


def test_unit_computes_in_its_format_and_undo_gives_fp32_back() -> None:
    layer, x = nn.Linear(4, 2), torch.randn(3, 4)
    plain = layer(x)
    make_unit(layer, Unit, "cpu", "bf16", "")
    assert layer(x).dtype is torch.bfloat16
    undo_unit(layer)
    assert type(layer) is nn.Linear
    assert "_halfstep" not in vars(layer)
    assert torch.equal(layer(x), plain)


def test_unit_converts_its_result_to_the_output_format() -> None:
    layer = nn.Linear(4, 2)
    make_unit(layer, Unit, "cpu", "bf16", "fp32")
    y = layer(torch.ones(1, 4))
    assert y.dtype is torch.float32
    assert torch.equal(y, y.bfloat16().float())


def test_gate_converts_only_the_result() -> None:
    layer, x = nn.Linear(4, 2), torch.randn(3, 4)
    plain = layer(x)
    make_unit(layer, Gate, "cpu", "fp32", "bf16")
    assert torch.equal(layer(x), plain.bfloat16())


def test_hooks_run_on_a_unit_and_stay_after_undo() -> None:
    layer = nn.Linear(4, 2)
    calls: list[str] = []
    layer.register_forward_pre_hook(lambda _module, _args: calls.append("before"))
    layer.register_forward_hook(lambda _module, _args, _result: calls.append("after"))
    make_unit(layer, Unit, "cpu", "bf16", "")
    layer(torch.ones(1, 4))
    undo_unit(layer)
    layer(torch.ones(1, 4))
    assert calls == ["before", "after", "before", "after"]


def test_undo_restores_the_class_of_the_root() -> None:
    layer = nn.Linear(4, 2)
    conversion = convert(layer, Plan.parse("bf16-true"))
    assert type(layer) is not nn.Linear
    conversion.undo()
    assert type(layer) is nn.Linear


def test_undo_restores_a_container_that_is_the_root() -> None:
    model = make_mlp()
    with convert(model, Plan.preset("bf16-true")):
        assert isinstance(model, Gate)
        assert isinstance(model, nn.Sequential)
    assert type(model) is nn.Sequential


def test_casting_reaches_into_containers_and_leaves_integers_and_other_values_alone() -> None:
    values = {"x": torch.ones(2), "ids": torch.ones(2, dtype=torch.int64), "nest": (torch.ones(1), [None, "a", 3])}
    cast = cast_floats(values, torch.bfloat16)
    assert cast["x"].dtype is cast["nest"][0].dtype is torch.bfloat16
    assert cast["ids"] is values["ids"]
    assert cast["nest"][1] == [None, "a", 3]


def test_keyword_inputs_are_cast() -> None:
    layer = nn.Linear(4, 2)
    make_unit(layer, Unit, "cpu", "bf16", "")
    assert layer(input=torch.ones(1, 4)).dtype is torch.bfloat16


def test_fp32_unit_computes_in_fp32_under_bf16_autocast() -> None:
    model = make_mlp()
    make_unit(model[2], Unit, "cpu", "fp32", "")
    with Audit(model) as audit, torch.autocast("cpu", torch.bfloat16):
        model(torch.randn(4, 8)).float().sum().backward()
    assert {path: set(counts) for path, counts in audit.computed.items() if path in "024"} == {
        "0": {"bf16"}, "2": {"fp32"}, "4": {"bf16"},
    }  # fmt: skip


def test_bf16_unit_inside_fp32_unit_computes_in_bf16() -> None:
    inner = nn.Linear(4, 4)
    outer = nn.Sequential(inner, nn.Linear(4, 4))
    make_unit(outer, Unit, "cpu", "fp32", "")
    make_unit(inner, Unit, "cpu", "bf16", "fp32")
    with Audit(outer) as audit, torch.autocast("cpu", torch.bfloat16):
        outer(torch.randn(2, 4))
    assert set(audit.computed["0"]) == {"bf16"}
    assert set(audit.computed["1"]) == {"fp32"}


def test_autocast_outside_is_in_force_again_after_a_unit_and_after_its_exception() -> None:
    class Failing(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            raise ValueError("no")

    unit = Failing()
    make_unit(unit, Unit, "cpu", "fp32", "")
    with torch.autocast("cpu", torch.bfloat16):
        with pytest.raises(ValueError, match="no"):
            unit(torch.ones(1))
        assert torch.is_autocast_enabled("cpu")
        assert nn.Linear(2, 2)(torch.ones(1, 2)).dtype is torch.bfloat16
    assert not torch.is_autocast_enabled("cpu")


def test_gradients_of_a_bf16_unit_on_fp32_weights_are_fp32() -> None:
    model = make_cnn()
    make_unit(model[0], Unit, "cpu", "bf16", "fp32")
    model(torch.randn(4, 3, 8, 8)).sum().backward()
    assert {p.grad.dtype for p in model.parameters() if p.grad is not None} == {torch.float32}


def test_two_modules_that_share_a_weight_may_compute_in_two_formats() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    model[1].weight = model[0].weight
    with (
        convert(model, Plan.parse("path=1 compute=fp16\ncompute=bf16")) as conversion,
        conversion.audit() as audit,
        conversion.autocast(),
    ):
        model(torch.randn(2, 4))
    assert set(audit.computed["0"]) == {"bf16"}
    assert set(audit.computed["1"]) == {"fp16"}


# --- a loss scale for each layer

LAYERWISE = "loss_scale=layer\nkind=linear compute=fp16 cast=unit\nkind=conv compute=fp16 cast=unit"


@pytest.mark.parametrize(
    ("build", "shape"),
    [
        (lambda: nn.Linear(12, 7), (5, 12)),
        (lambda: nn.Linear(12, 7, bias=False), (2, 5, 12)),
        (lambda: nn.Conv2d(6, 4, 3, padding=1, groups=2), (3, 6, 8, 8)),
        (lambda: nn.Conv1d(6, 4, 3, stride=2), (3, 6, 11)),
        (lambda: nn.ConvTranspose2d(6, 4, 3, stride=2), (3, 6, 5, 5)),
    ],
)
@pytest.mark.parametrize("size", [2.0**-60, 2.0**-30, 1.0, 2.0**30, 2.0**60])
def test_layer_scale_gives_the_gradients_of_fp32_at_any_size(
    build: Callable[[], nn.Module], shape: tuple[int, ...], size: float
) -> None:
    with seeded(0):
        layer, x = build(), torch.randn(shape)
        upstream = torch.randn_like(layer(x)) * size
    results = []
    for plan in ("32-true", LAYERWISE):
        with convert(layer, Plan.parse(plan)):
            inputs = x.clone().requires_grad_()
            layer(inputs).backward(upstream)
            results.append([inputs.grad, *(p.grad for p in layer.parameters())])
            layer.zero_grad()
    for expected, actual in zip(*results, strict=True):
        assert actual.dtype is torch.float32
        error = (actual - expected).norm() / expected.norm()
        assert error < 2e-3


def test_layer_scale_trains_what_no_single_scale_can() -> None:
    """Two heads whose gradients are 2^50 apart."""

    def build() -> nn.Module:
        with seeded(0):
            return nn.ModuleDict({"large": nn.Linear(4, 1), "small": nn.Linear(4, 1)})

    weights: dict[str, dict[str, Tensor]] = {}
    skipped = {}
    for plan in ("32-true", "16-mixed", LAYERWISE):
        model = build()
        for parameter in model.parameters():
            nn.init.zeros_(parameter)
        stepper = prepare(model, torch.optim.SGD(model.parameters(), lr=1e-3), plan)
        for _ in range(40 if plan == "16-mixed" else 1):
            with stepper.autocast():
                large, small = (head(torch.ones(8, 4)).float().mean() for head in model.children())
            stepper.step(2.0**20 * large + 2.0**-30 * small)
        weights[plan], skipped[plan] = copy_weights(model), stepper.skipped
    assert skipped == {"32-true": 0, "16-mixed": 40, LAYERWISE: 0}
    for name, expected in weights["32-true"].items():
        assert (expected != 0).all()
        torch.testing.assert_close(weights[LAYERWISE][name], expected, rtol=2e-3, atol=0)


def test_layer_scale_with_a_gradient_of_nan_or_zero_stays_what_it_is() -> None:
    layer = nn.Linear(3, 2)
    with convert(layer, Plan.parse(LAYERWISE)):
        layer(torch.ones(1, 3)).backward(torch.zeros(1, 2))
        assert layer.weight.grad is not None
        assert not layer.weight.grad.any()
        layer.zero_grad()
        layer(torch.ones(1, 3)).backward(torch.tensor([[math.nan, 1.0]]))
        assert layer.weight.grad is not None
        assert layer.weight.grad.isnan().any()


def test_layer_scale_is_refused_where_it_cannot_be_kept() -> None:
    with pytest.raises(UnsupportedError, match="cast=unit and storage=fp32"):
        convert(nn.Sequential(nn.Linear(2, 2)), Plan.parse("loss_scale=layer\ncompute=fp16"))
    with pytest.raises(UnsupportedError, match="module '0': loss_scale=layer"):
        convert(nn.Sequential(nn.LSTM(2, 2)), Plan.parse("loss_scale=layer\nkind=recurrent compute=fp16 cast=unit"))


def test_layer_scale_takes_what_the_layer_takes() -> None:
    transposed, plain = nn.ConvTranspose2d(2, 2, 3, stride=2), nn.Linear(3, 2)
    with convert(transposed, Plan.parse(LAYERWISE)), convert(plain, Plan.parse(LAYERWISE)):
        assert transposed(torch.ones(1, 2, 4, 4), output_size=[10, 10]).shape == (1, 2, 10, 10)
        assert plain(input=torch.ones(4, 3)).shape == (4, 2)
        plain(torch.ones(0, 3)).sum().backward()
    normed = nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Linear(2, 2)))
    with pytest.raises(UnsupportedError, match="loss_scale=layer"):
        convert(normed, Plan.parse(LAYERWISE))


@dataclass
class Output:
    logits: Tensor
    name: str = "out"


class Returning(nn.Module):
    """Returns a dataclass that torch's pytree does not know."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Output:
        return Output(self.layer(x))


@pytest.mark.parametrize("mode", ["bf16-true", "16-true", "auto"])
def test_a_model_that_returns_a_dataclass_returns_it_in_fp32(mode: str) -> None:
    model = Returning()
    stepper = prepare(model, torch.optim.SGD(model.parameters(), lr=0.1), mode, profile=make_profile("native"))
    with stepper.autocast():
        output = model(torch.ones(4, 8))
        loss = output.logits.float().square().mean()
    assert isinstance(output, Output) and output.name == "out"
    assert mode == "auto" or output.logits.dtype is torch.float32
    assert stepper.step(loss).applied


def test_what_is_converted_already_is_refused_and_left_as_it_was() -> None:
    plan = Plan.parse("path=head compute=fp32\ncompute=bf16")
    model = nn.Sequential(OrderedDict(body=nn.Linear(4, 4), head=nn.Linear(4, 2)))
    first = convert(model, plan)
    x = torch.ones(1, 4)
    with first.autocast():
        before = model(x)
    for again in (model, nn.Sequential(model)):
        with pytest.raises(ModelError, match="is converted already; undo that first"):
            convert(again, Plan.parse("compute=bf16"))
    with first.autocast():
        assert torch.equal(model(x), before)
    first.undo()
    assert type(model.head) is nn.Linear and model(x).dtype is torch.float32


def test_a_model_of_which_a_part_is_prepared_is_refused() -> None:
    body = make_mlp()
    stepper = prepare(body, torch.optim.SGD(body.parameters(), lr=0.1), "32-true")
    whole = nn.Sequential(body, nn.Linear(3, 1))
    with pytest.raises(ModelError, match="'0', a part of the model, is prepared already"):
        prepare(whole, torch.optim.SGD(whole.parameters(), lr=0.1), "32-true")
    stepper.restore()
    prepare(whole, torch.optim.SGD(whole.parameters(), lr=0.1), "32-true")


@pytest.mark.filterwarnings("ignore:`torch.nn.utils.weight_norm`:FutureWarning")
@pytest.mark.parametrize("mode", ["bf16-true", "compute=bf16 storage=bf16 master=split", "bf16-mixed"])
@pytest.mark.parametrize(
    "make",
    [
        nn.utils.parametrizations.spectral_norm,
        nn.utils.parametrizations.orthogonal,
        nn.utils.parametrizations.weight_norm,
        nn.utils.spectral_norm,
        nn.utils.weight_norm,
    ],
    ids=lambda make: f"{make.__module__.rpartition('.')[2]}.{make.__name__}",
)
def test_weights_that_are_made_of_others_are_made_in_fp32(make: Callable[[nn.Module], nn.Module], mode: str) -> None:
    with seeded(0):
        model = nn.Sequential(make(nn.Linear(8, 8)), nn.Linear(8, 1))
    stepper = prepare(model, torch.optim.SGD(model.parameters(), lr=0.1), mode)
    for _ in range(2):
        with stepper.autocast():
            loss = model(torch.ones(4, 8)).float().square().mean()
        assert stepper.step(loss).applied
    made_of = [p for name, p in model.named_parameters() if "original" in name or name.endswith(("_orig", "_g", "_v"))]
    assert made_of and {p.dtype for p in made_of} == {torch.float32}


def test_a_weight_that_another_one_is_made_of_is_in_fp32_wherever_it_is_used() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table, self.head = nn.Embedding(9, 8), nn.Linear(8, 9, bias=False)
            self.head.weight = self.table.weight
            nn.utils.parametrizations.weight_norm(self.head)
            self.table.weight = self.head.parametrizations.weight.original1  # type: ignore[union-attr, assignment]

        def forward(self, x: Tensor) -> Tensor:
            y: Tensor = self.head(self.table(x))
            return y

    model = Tied()
    stepper = prepare(model, torch.optim.SGD(model.parameters(), lr=0.1), "bf16-true")
    with stepper.autocast():
        loss = model(torch.arange(9)).float().square().mean()
    assert stepper.step(loss).applied and model.table.weight.dtype is torch.float32


def test_what_a_unit_is_given_in_a_dataclass_is_the_callers_own() -> None:
    class Keeping(nn.Linear):
        def forward(self, x: Tensor, kept: Output) -> Tensor:  # type: ignore[override]
            kept.name = "written"
            return super().forward(x)

    layer, kept = Keeping(8, 3), Output(torch.ones(1))
    make_unit(layer, Unit, "cpu", "bf16", "")
    layer(torch.ones(1, 8), kept)
    assert kept.name == "written"


def test_weights_that_cannot_be_made_leave_no_cache_behind() -> None:
    class Failing(nn.Module):
        def forward(self, weight: Tensor) -> Tensor:
            if self.training:
                raise MemoryError
            return weight

    layer = nn.Linear(16, 16).eval()
    parametrize.register_parametrization(layer, "weight", Failing().eval())
    with convert(nn.Sequential(layer), Plan.parse("kind=linear compute=fp8_e4m3\ncompute=fp32")) as conversion:
        conversion.model.train()
        try:
            conversion.model(torch.ones(1, 16))
        except MemoryError as error:
            assert error.__traceback__ is not None and not parametrize._cache_enabled


def test_products_of_a_parametrization_are_none_of_the_layer_that_is_scaled() -> None:
    class LowRank(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Parameter(torch.randn(2, 64)), nn.Parameter(torch.randn(64, 2))

        def forward(self, weight: Tensor) -> Tensor:
            return weight + self.b @ self.a

    with seeded(0):
        layer, x = nn.Linear(64, 64), torch.randn(16, 64)
        parametrize.register_parametrization(layer, "weight", LowRank())
    made: list[Tensor] = []
    layer.parametrizations.weight[0].register_forward_hook(lambda *args: made.append(args[2].detach()))  # type: ignore[index, union-attr]
    expected = layer.weight.detach()
    with convert(nn.Sequential(layer), Plan.parse("kind=linear compute=fp8_e4m3\ncompute=fp32")) as conversion:
        conversion.model(x)
    assert torch.equal(made[-1], expected)


def test_two_threads_leave_each_other_the_parameters_of_a_norm() -> None:
    class Waiting(nn.LayerNorm):
        def forward(self, x: Tensor) -> Tensor:
            y = super().forward(x)
            time.sleep(0.01)
            return y

    model = nn.Sequential(Waiting(8))
    weight = model[0].weight
    with convert(model, Plan.parse("compute=bf16 storage=bf16 master=split")), ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda _: model(torch.ones(2, 8)), range(8)))
        assert model[0].weight is weight and weight.dtype is torch.bfloat16


@pytest.mark.parametrize("mode", ["bf16-true", "compute=bf16 storage=bf16 master=split"])
def test_units_are_traced_into_one_graph(mode: str) -> None:
    torch._dynamo.reset()
    with seeded(0):
        model = nn.Sequential(nn.Linear(8, 8), nn.LayerNorm(8), nn.Linear(8, 2))
    x = torch.randn(4, 8)
    with convert(model, Plan.parse(mode)) as conversion:
        compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
        with conversion.autocast():
            found, right = compiled(x), model(x)
        assert found.dtype is right.dtype and torch.equal(found, right)
        found.float().sum().backward()
        assert model[1].weight.grad is not None and model[1].weight is dict(model.named_parameters())["1.weight"]
