import copy
import re
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from halfstep.conversion import Conversion, convert
from halfstep.errors import ModelError, PlanError, PrecisionWarning, UnsupportedError
from halfstep.mechanisms.layers import DTYPES
from halfstep.numerics.formats import FORMATS
from halfstep.plan import Plan, Rule
from halfstep.stepper import prepare
from helpers import (
    FP32_MASTER,
    NO_MASTER,
    PRESET_NAMES,
    SPLIT,
    assert_near,
    assert_same,
    copy_weights,
    has_hooks,
    make_cnn,
    make_mlp,
    make_regression_batches,
    seeded,
)

PLANS = (*PRESET_NAMES, SPLIT, FP32_MASTER, NO_MASTER)
EXACT = ("32-true", "bf16-mixed", "16-mixed", SPLIT, FP32_MASTER)  # plans under which the fp32 truth is kept
MASTERED = (SPLIT, FP32_MASTER)


class TiedModel(nn.Module):
    """A small language model whose head is its embedding."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(11, 8)
        self.body = nn.Linear(8, 8)
        self.head = nn.Linear(8, 11, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, ids: Tensor) -> Tensor:
        logits: Tensor = self.head(torch.tanh(self.body(self.embedding(ids))))
        return logits


def describe_classes(model: nn.Module) -> list[type]:
    return [type(module) for module in model.modules()]


def run_backward(conversion: Conversion, *inputs: Tensor) -> Tensor:
    with conversion.autocast():
        output: Tensor = conversion.model(*inputs)
        loss = output.float().square().mean()
    loss.backward()
    return output


@pytest.mark.parametrize("plan", PLANS)
def test_undo_gives_back_objects_classes_dtypes_and_keys(plan: str) -> None:
    model = make_mlp()
    parameters, classes, keys = list(model.parameters()), describe_classes(model), list(model.state_dict())
    with convert(model, Plan.parse(plan)) as conversion:
        assert list(model.state_dict()) == keys
        assert all(now is before for now, before in zip(model.parameters(), parameters, strict=True))
        run_backward(conversion, torch.randn(4, 8))
    assert all(now is before for now, before in zip(model.parameters(), parameters, strict=True))
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert describe_classes(model) == classes
    assert list(model.state_dict()) == keys
    assert not has_hooks(model)
    assert not any(m._state_dict_hooks or m._load_state_dict_pre_hooks for m in model.modules())
    assert all(vars(m).keys() == vars(type(m)()).keys() for m in model.modules() if isinstance(m, nn.ReLU))


@pytest.mark.parametrize("plan", EXACT)
def test_undo_gives_back_the_same_weights_bit_for_bit_where_the_truth_is_kept(plan: str) -> None:
    model = make_cnn() if "storage" not in plan else make_mlp()
    before = copy_weights(model)
    convert(model, Plan.parse(plan)).undo()
    assert_same(copy_weights(model), before)


@pytest.mark.parametrize("plan", ["bf16-true", NO_MASTER])
def test_undo_gives_back_rounded_weights_where_no_truth_is_kept(plan: str) -> None:
    model = make_mlp()
    before = copy_weights(model)
    convert(model, Plan.parse(plan)).undo()
    for name, weight in model.state_dict().items():
        assert torch.equal(weight, before[name].bfloat16().float())


@pytest.mark.parametrize("plan", PLANS)
def test_undo_restores_the_model_after_forward_raised(plan: str) -> None:
    model = make_mlp()
    before, classes = copy_weights(model), describe_classes(model)
    with pytest.raises(RuntimeError, match=r"shape|size"), convert(model, Plan.parse(plan)) as conversion:
        run_backward(conversion, torch.randn(2, 7))
    assert describe_classes(model) == classes
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    if plan in EXACT:
        assert_same(copy_weights(model), before)


def test_second_undo_does_nothing() -> None:
    model = make_mlp()
    conversion = convert(model, Plan.parse(SPLIT))
    conversion.undo()
    with torch.no_grad():
        model.get_parameter("0.weight").fill_(1.5)
    conversion.undo()
    assert float(model.get_parameter("0.weight").detach().mean()) == 1.5
    assert model[0].weight.dtype is torch.float32


@pytest.mark.parametrize("plan", PLANS)
def test_state_dict_is_fp32_with_the_same_keys(plan: str) -> None:
    model = make_mlp()
    before = copy_weights(model)
    with convert(model, Plan.parse(plan)):
        state = model.state_dict()
        assert list(state) == list(before)
        assert {value.dtype for value in state.values()} == {torch.float32}
        if plan in EXACT:
            assert_same(dict(state), before)


@pytest.mark.parametrize("plan", MASTERED)
def test_state_dict_of_a_part_of_the_model_holds_the_truth(plan: str) -> None:
    model = make_mlp()
    before = copy_weights(model[2])
    with convert(model, Plan.parse(plan)):
        assert_same(dict(model[2].state_dict()), before)


@pytest.mark.parametrize("plan", MASTERED)
def test_state_dict_is_not_changed_by_training_afterwards(plan: str) -> None:
    model = make_mlp()
    stepper = prepare(model, torch.optim.SGD(model.parameters(), lr=0.1), plan)
    state = dict(model.state_dict())
    kept = {name: value.clone() for name, value in state.items()}
    with stepper.autocast():
        loss = model(torch.randn(4, 8)).float().square().mean()
    assert stepper.step(loss).applied
    assert_same(state, kept)
    assert not torch.equal(model.state_dict()["0.weight"], kept["0.weight"])


@pytest.mark.parametrize("plan", MASTERED)
def test_loading_fp32_values_restores_the_truth_and_the_live_weight(plan: str) -> None:
    model, wanted = make_mlp(0), copy_weights(make_mlp(1))
    with convert(model, Plan.parse(plan)) as conversion:
        model.load_state_dict(wanted)
        assert_same(dict(model.state_dict()), wanted)
        assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
        for name, parameter in model.named_parameters():
            assert_near(parameter.detach().float(), wanted[name], torch.bfloat16)
        conversion.undo()
        assert_same(copy_weights(model), wanted)


def test_loading_into_bf16_without_master_rounds() -> None:
    model, wanted = make_mlp(0), copy_weights(make_mlp(1))
    with convert(model, Plan.parse(NO_MASTER)):
        model.load_state_dict(wanted)
        assert torch.equal(model.get_parameter("0.weight"), wanted["0.weight"].bfloat16())


@pytest.mark.parametrize("plan", MASTERED)
def test_loading_some_keys_changes_only_these(plan: str) -> None:
    model = make_mlp()
    before = copy_weights(model)
    with convert(model, Plan.parse(plan)):
        model.load_state_dict({"0.bias": torch.full((16,), 1 / 3)}, strict=False)
        assert_same(dict(model.state_dict()), before | {"0.bias": torch.full((16,), 1 / 3)})


@pytest.mark.parametrize("plan", [SPLIT, FP32_MASTER, NO_MASTER])
def test_loading_a_wrong_shape_says_size_mismatch_and_changes_nothing(plan: str) -> None:
    model = nn.Sequential(nn.Linear(4, 2))
    with convert(model, Plan.parse(plan)) as conversion:
        before = copy_weights(model)
        with pytest.raises(RuntimeError, match="size mismatch"):
            model.load_state_dict({"0.weight": torch.ones(3, 4)}, strict=False)
        assert_same(copy_weights(model), before)
        conversion.undo()
        assert_same(copy_weights(model), before)


@pytest.mark.parametrize("plan", [*PRESET_NAMES, SPLIT, FP32_MASTER])
def test_tied_weight_stays_one_parameter(plan: str) -> None:
    model = TiedModel()
    before = copy_weights(model)
    with convert(model, Plan.parse(plan)) as conversion:
        assert model.head.weight is model.embedding.weight
        state = model.state_dict()
        assert torch.equal(state["head.weight"], state["embedding.weight"])
        run_backward(conversion, torch.arange(6))
        assert model.embedding.weight.grad is not None
    assert model.head.weight is model.embedding.weight
    if plan in EXACT:
        assert_same(copy_weights(model), before)


@pytest.mark.parametrize("plan", MASTERED)
def test_tied_weight_can_be_loaded(plan: str) -> None:
    model, wanted = TiedModel(), copy_weights(TiedModel())
    with convert(model, Plan.parse(plan)):
        model.load_state_dict(wanted)
        assert_same(dict(model.state_dict()), wanted)


def test_tied_weight_with_two_storages_is_refused_and_names_both_modules() -> None:
    model = TiedModel()
    before = copy_weights(model)
    with pytest.raises(PlanError, match=r"'embedding' and 'head' share a parameter") as caught:
        convert(model, Plan.parse(f"path=head compute=bf16 storage=fp32 master=none\n{SPLIT}"))
    assert "\n" not in str(caught.value)
    assert_same(copy_weights(model), before)
    assert describe_classes(model) == describe_classes(TiedModel())


def test_tied_weight_with_two_masters_is_refused() -> None:
    with pytest.raises(PlanError, match=r"master fp32.*master split|master split.*master fp32"):
        convert(TiedModel(), Plan.parse(f"path=head {FP32_MASTER}\n{SPLIT}"))


def test_rule_that_matches_no_module_is_refused_with_the_nearest_path() -> None:
    with pytest.raises(PlanError, match="did you mean 'head'"):
        convert(TiedModel(), Plan.parse("path=haed compute=fp32\ncompute=bf16"))


@pytest.mark.parametrize("format", [name for name in FORMATS if name not in DTYPES])
@pytest.mark.parametrize("slot", ["storage", "output"])
def test_format_that_cannot_be_honoured_is_refused_and_the_model_untouched(format: str, slot: str) -> None:
    model = make_mlp()
    before, classes = copy_weights(model), describe_classes(model)
    with pytest.raises(UnsupportedError) as caught:
        convert(model, Plan.parse(f"path=2 {slot}={format}\n{SPLIT}"))
    message = str(caught.value)
    assert "\n" not in message
    assert "module '2'" in message
    assert f"{slot}={format}" in message
    assert_same({name: p.detach() for name, p in model.named_parameters()}, before)
    assert describe_classes(model) == classes


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ("compute=fp32 storage=bf16", ("storage=bf16", "compute=fp32")),
        ("compute=fp16 storage=bf16 master=fp32", ("storage=bf16", "compute=fp16")),
        ("compute=bf16 storage=fp32 master=split", ("master=split", "storage")),
        ("compute=fp16 storage=fp16 master=split", ("master=split", "storage=fp16")),
        ("compute=bf16 storage=fp32 master=kahan", ("master=kahan", "fp32 weights are their own truth")),
        ("compute=fp16 storage=fp16 master=kahan", ("master=kahan", "storage=fp16 has no range", "master=fp32")),
        ("compute=fp16 storage=fp16 master=split24", ("master=split24", "storage=fp16 is not a prefix", "master=fp32")),
        (
            "compute=fp16 storage=fp16 master=stochastic",
            ("master=stochastic", "storage=fp16 has no range", "master=fp32"),
        ),
    ],
)
def test_settings_that_contradict_each_other_are_refused_and_the_model_untouched(
    settings: str, words: tuple[str, str]
) -> None:
    model = make_mlp()
    with pytest.raises(UnsupportedError) as caught:
        convert(model, Plan.parse(f"path=4 {settings}\ncompute=fp32"))
    assert "\n" not in str(caught.value)
    assert "module '4'" in str(caught.value)
    assert all(word in str(caught.value) for word in words)
    assert_same(copy_weights(model), copy_weights(make_mlp()))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_model_that_is_16_bits_wide_already_is_refused(dtype: torch.dtype) -> None:
    model = make_mlp().to(dtype)
    with pytest.raises(ModelError, match=r"'0\.weight' is .* already"):
        convert(model, Plan.preset("bf16-mixed"))
    assert {p.dtype for p in model.parameters()} == {dtype}
    assert describe_classes(model) == describe_classes(make_mlp())


def test_model_that_is_16_bits_wide_in_one_layer_is_refused_and_left_as_it_was() -> None:
    model = make_mlp()
    model[4].bfloat16()
    with pytest.raises(ModelError, match=r"'4\.weight'"):
        convert(model, Plan.parse(SPLIT))
    assert model[0].weight.dtype is torch.float32
    assert describe_classes(model) == describe_classes(make_mlp())


@pytest.mark.parametrize(
    "plan",
    ["path=2 compute=fp32\ncompute=bf16", f"path=2 compute=fp32 storage=fp32 master=none\n{SPLIT}",
     f"path=2 compute=fp32 storage=fp32\n{Plan.preset('bf16-true')}"],
    ids=["mixed", "split", "true"],
)  # fmt: skip
def test_one_fp32_layer_in_a_bf16_model_really_runs_in_fp32(plan: str) -> None:
    model = make_mlp()
    with convert(model, Plan.parse(plan)) as conversion, conversion.audit() as audit:
        run_backward(conversion, torch.randn(4, 8))
        assert model[2].weight.dtype is torch.float32
    ran = {path: set(counts) for path, counts in audit.computed.items()}
    assert (ran["0"], ran["2"], ran["4"]) == ({"bf16"}, {"fp32"}, {"bf16"})
    assert [ran[f"{path} (backward)"] for path in "024"] == [{"bf16"}, {"fp32"}, {"bf16"}]


def test_one_bf16_layer_in_an_fp32_model_really_runs_in_bf16() -> None:
    with convert(make_mlp(), Plan.parse(f"path=2 {SPLIT}\ncompute=fp32")) as conversion, conversion.audit() as audit:
        run_backward(conversion, torch.randn(4, 8))
    ran = {path: set(counts) for path, counts in audit.computed.items()}
    assert (ran["0"], ran["2"], ran["4"]) == ({"fp32"}, {"bf16"}, {"fp32"})


def test_one_bf16_layer_that_returns_fp32_runs_in_an_fp32_model() -> None:
    plan = Plan.parse(f"path=2 output=fp32 {SPLIT}\ncompute=fp32")
    with convert(make_mlp(), plan) as conversion, conversion.audit() as audit:
        run_backward(conversion, torch.randn(4, 8))
    ran = {path: set(counts) for path, counts in audit.computed.items()}
    assert (ran["0"], ran["2"], ran["4"]) == ({"fp32"}, {"bf16"}, {"fp32"})


def test_bf16_layer_under_an_uncast_container_in_an_fp32_block_really_runs_in_bf16() -> None:
    model = nn.Sequential(nn.Sequential(nn.Sequential(nn.Linear(4, 4))))
    plan = "path=0.0 compute=fp32 cast=unit\npath=0.0.0 compute=bf16 cast=op\npath=0 compute=fp32\ncompute=bf16"
    with convert(model, Plan.parse(plan)) as conversion, conversion.audit() as audit, conversion.autocast():
        model(torch.randn(2, 4))
    assert set(audit.computed["0.0.0"]) == {"bf16"}


@pytest.mark.parametrize("plan", PRESET_NAMES)
def test_model_with_batch_norm_runs_and_keeps_its_statistics_in_fp32(plan: str) -> None:
    model, plain, x = make_cnn(), make_cnn(), torch.randn(8, 3, 8, 8)
    expected = plain(x)
    with convert(model, Plan.preset(plan)) as conversion:
        output = run_backward(conversion, x)
        assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
        assert model[1].running_mean.dtype is torch.float32
        torch.testing.assert_close(model[1].running_mean, plain[1].running_mean, rtol=0.02, atol=0.02)
        torch.testing.assert_close(output.float(), expected, rtol=0.1, atol=0.05)
        model.eval()
        with torch.no_grad(), conversion.autocast():
            assert conversion.model(x).isfinite().all()


@pytest.mark.parametrize("plan", [SPLIT, FP32_MASTER, NO_MASTER])
@pytest.mark.parametrize("norm", ["batch", "layer", "layer on fp32"])
def test_norm_weights_in_bf16_either_run_or_are_refused_by_name(plan: str, norm: str) -> None:
    layer: nn.Module = nn.BatchNorm1d(8) if norm == "batch" else nn.LayerNorm(8)
    before = nn.Identity() if norm == "layer on fp32" else nn.Linear(8, 8)
    model = nn.Sequential(before, layer, nn.Linear(8, 3))
    try:
        conversion = convert(model, Plan.parse(plan))
    except UnsupportedError as error:
        assert "module '1'" in str(error)
        return
    with conversion:
        run_backward(conversion, torch.randn(4, 8))


@pytest.mark.parametrize("plan", PRESET_NAMES)
@pytest.mark.parametrize("mode", ["train", "eval", "inference"])
def test_transformer_layer_runs_in_every_mode(plan: str, mode: str) -> None:
    torch.manual_seed(0)
    model, x = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True, dropout=0.0), torch.randn(2, 3, 8)
    expected = model(x)
    model.train(mode == "train")
    with (
        convert(model, Plan.preset(plan)) as conversion,
        torch.set_grad_enabled(mode != "inference"),
        conversion.autocast(),
    ):
        output = model(x)
    torch.testing.assert_close(output.float(), expected, rtol=0.05, atol=0.05)


@pytest.mark.parametrize("mode", ["train", "eval", "inference"])
def test_rules_for_parts_of_a_transformer_layer_hold_in_every_mode(mode: str) -> None:
    torch.manual_seed(0)
    model, x = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True, dropout=0.0), torch.randn(2, 3, 8)
    expected = model(x)
    model.train(mode == "train")
    plan = Plan.parse("path='re:.+' compute=fp32\ncompute=bf16")
    with convert(model, plan) as conversion, torch.set_grad_enabled(mode != "inference"), conversion.autocast():
        assert_near(model(x), expected, torch.float32)


@pytest.mark.parametrize("plan", ["bf16-true", "16-true"])
def test_true_presets_return_fp32_and_store_norms_in_fp32(plan: str) -> None:
    model = make_cnn()
    with convert(model, Plan.preset(plan)) as conversion:
        with conversion.autocast():
            assert model(torch.randn(2, 3, 8, 8)).dtype is torch.float32
        assert model[1].weight.dtype is torch.float32
        assert model[0].weight.dtype is not torch.float32


def test_bf16_mixed_output_equals_torch_autocast_bit_for_bit() -> None:
    model, x = make_cnn(), torch.randn(4, 3, 8, 8)
    with torch.autocast("cpu", torch.bfloat16):
        expected = make_cnn()(x)
    with convert(model, Plan.preset("bf16-mixed")) as conversion, conversion.autocast():
        assert torch.equal(model(x), expected)


# --- who casts operations


class Adding(nn.Module):
    """Adds up 512 results of 512 each: more than fp16 holds, and less than bf16 does."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(8, 512, bias=False)
        nn.init.constant_(self.layer.weight, 64.0)

    def forward(self, x: Tensor) -> Tensor:
        total: Tensor = self.layer(x).sum(dim=-1)
        return total


@pytest.mark.parametrize(
    "plan", ["16-mixed", "path=0** compute=fp16\ncompute=fp32", "path=0** compute=fp16\ncompute=bf16"]
)
def test_sums_in_fp16_on_a_processor_do_not_overflow(plan: str) -> None:
    model, x = nn.Sequential(Adding()), torch.ones(1, 8)
    with torch.autocast("cpu", torch.float16):
        assert model(x).isinf().all()  # what torch does there
    with convert(model, Plan.parse(plan)) as conversion, conversion.audit() as audit:
        y = run_backward(conversion, x)
        assert y.tolist() == [512.0 * 512]
        assert y.dtype is torch.float32
        assert audit.computed["0.layer"] == {"fp16": 1}
        assert conversion.twins["fp16"].name == "OperatorMode"
    assert model.get_parameter("0.layer.weight").grad is not None


@pytest.mark.parametrize(
    ("plan", "twins"),
    [
        ("32-true", {}),
        ("bf16-mixed", {"bf16": "torch.autocast"}),
        ("16-mixed", {"fp16": "OperatorMode"}),
        ("16-true", {"fp16": "OperatorMode"}),
        ("bf16-true", {"bf16": "torch.autocast"}),
        ("path=0 compute=fp16\ncompute=bf16", {"bf16": "torch.autocast", "fp16": "OperatorMode"}),
    ],
)
def test_who_casts_operations_is_said_with_the_reason(plan: str, twins: dict[str, str]) -> None:
    with convert(make_mlp(), Plan.parse(plan)) as conversion:
        assert {format: twin.name for format, twin in conversion.twins.items()} == twins
        said = conversion.describe_operations()
    assert [line.partition(":")[0] for line in said] == [f"{format} by {name}" for format, name in twins.items()]
    assert all("overflow" in line for line in said if "OperatorMode" in line)


@pytest.mark.parametrize("plan", ["16-mixed", "16-true"])
def test_fp16_on_a_processor_keeps_transformers_and_compiled_models_whole(plan: str) -> None:
    def make() -> nn.Module:
        with seeded(0):
            return nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True)

    results = []
    with seeded(1):
        x = torch.randn(2, 3, 8)
    for wrap in (lambda m: m, lambda m: torch.compile(m, backend="aot_eager")):
        torch._dynamo.reset()
        with convert(make(), Plan.preset(plan)) as conversion:
            run: Any = wrap(conversion.model)
            with conversion.autocast():
                loss = run(x).float().square().sum()
            with conversion.stand_by():
                loss.backward()
            results.append(
                [loss.detach(), *(p.grad.float() for p in conversion.model.parameters() if p.grad is not None)]
            )
    assert len(results[0]) == len(results[1]) == 1 + len(list(make().parameters()))
    for plain, compiled in zip(*results, strict=True):
        torch.testing.assert_close(compiled, plain, rtol=1e-2, atol=1e-2)
    with torch.no_grad():
        truth = make()(x).square().sum()
    torch.testing.assert_close(results[0][0], truth, rtol=1e-2, atol=0)


def test_integer_and_double_buffers_and_frozen_parameters_survive() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4))
    model[0].weight.requires_grad_(False)
    with convert(model, Plan.preset("bf16-true")) as conversion:
        run_backward(conversion, torch.randn(4, 4))
        assert model.state_dict()["1.num_batches_tracked"].dtype is torch.int64
        assert not model[0].weight.requires_grad
    assert not model[0].weight.requires_grad
    assert model[0].weight.grad is None


def test_description_names_storage_master_and_reason_of_every_layer() -> None:
    plan = Plan.parse("path=0 compute=bf16 storage=bf16 master=split why='measured faster'\ncompute=fp32")
    with convert(make_mlp(), plan) as conversion:
        layers = {layer.path: layer for layer in conversion.describe()}
    assert set(layers) == {"0", "2", "4"}
    assert (layers["0"].kind, layers["0"].storage, layers["0"].master) == ("linear", "bf16", "split")
    assert (layers["0"].why, layers["0"].parameters) == ("measured faster", 8 * 16 + 16)
    assert (layers["2"].compute, layers["2"].storage) == ("fp32", "fp32")


def test_description_names_scales_and_products_of_their_own() -> None:
    def describe(plan: str) -> list[tuple[str, str, str]]:
        with convert(make_mlp(), Plan.parse(plan)) as conversion:
            return [(layer.grad_input, layer.grad_weight, layer.scaling) for layer in conversion.describe()]

    assert describe("int8-mixed") == [("", "", ""), ("", "bf16", "row"), ("", "", "")]
    assert describe("fp8-mixed") == [("", "", "")] * 3
    delayed = "path=4 compute=fp8_e4m3 grad_input=bf16 scaling=delayed\ncompute=bf16 scaling=row grad_weight=bf16"
    assert describe(delayed) == [("", "", ""), ("", "", ""), ("bf16", "", "delayed")]


@pytest.mark.parametrize("plan", PLANS)
def test_deep_copy_of_a_converted_model_trains_apart_from_its_original(plan: str) -> None:
    model = make_mlp()
    x, y = make_regression_batches(1)[0]
    with convert(model, Plan.parse(plan)) as conversion:
        twin = copy.deepcopy(model)
        original = copy_weights(model)
        for name, value in twin.state_dict().items():
            assert_near(value, original[name], torch.bfloat16)
        optimizer = torch.optim.SGD(twin.parameters(), lr=0.1)
        losses: list[float] = []
        for _ in range(10):
            with conversion.autocast():
                loss = F.mse_loss(twin(x).float(), y)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.item())
        assert losses[-1] < losses[0]
        assert_same(copy_weights(model), original)
        state: dict[str, Any] = dict(twin.state_dict())
        for name, parameter in twin.named_parameters():
            assert_near(state[name], parameter.detach().float(), torch.bfloat16)
            assert not torch.equal(state[name], original[name]), name


@pytest.mark.parametrize("plan", MASTERED)
def test_loading_into_a_deep_copy_leaves_the_original_alone(plan: str) -> None:
    model = make_mlp()
    with convert(model, Plan.parse(plan)):
        original = copy_weights(model)
        twin = copy.deepcopy(model)
        twin.load_state_dict(copy_weights(make_mlp(1)))
        assert_same(copy_weights(model), original)
        expected = copy_weights(make_mlp(1))["0.weight"]
        assert_near(twin.get_parameter("0.weight").detach().float(), expected, torch.bfloat16)


SCALED = "path=1 compute=int8 grad=int8 scaling=row\ncompute=bf16"


def test_scaled_products_run_inside_their_module_alone_and_are_undone() -> None:
    model = nn.Sequential(nn.Linear(8, 16), nn.Linear(16, 16), nn.Linear(16, 4))
    classes, weights = [type(m) for m in model], list(model.parameters())
    x = torch.randn(32, 8)
    with convert(model, Plan.parse(SCALED)) as conversion, conversion.autocast():
        hidden = model[0](x)
        ours = model[1](hidden)
        exact = hidden.float() @ model[1].get_parameter("weight").T + model[1].get_parameter("bias")
        assert type(model[1]) is not nn.Linear and isinstance(model[1], nn.Linear)
        assert ours.dtype == hidden.dtype == torch.bfloat16
        error = ((ours.float() - exact).norm() / exact.norm()).item()
        assert 2.0**-9 < error < 2.0**-6
        model(x).float().square().mean().backward()
    assert all(p.grad is not None and p.grad.dtype == torch.float32 for p in model.parameters())
    assert [type(m) for m in model] == classes
    assert [id(p) for p in model.parameters()] == [id(p) for p in weights]
    assert "_halfstep_inside" not in model[1].__dict__


def test_scaled_products_inside_a_model_in_fp32_give_fp32() -> None:
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    plan = Plan.parse("path=0 compute=fp8_e4m3 grad=fp8_e5m2\ncompute=fp32")
    with convert(model, plan) as conversion, conversion.autocast():
        assert model[0](torch.randn(4, 8)).dtype == torch.float32


def test_scaled_products_behind_bf16_weights_with_an_exact_master() -> None:
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    plan = Plan.parse("path=0 compute=fp8_e4m3 storage=bf16 master=split\ncompute=bf16 storage=bf16 master=split")
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with convert(model, plan) as conversion, conversion.autocast():
        model(torch.randn(4, 8)).sum().backward()
        assert model[0].weight.grad is not None and model[0].weight.grad.dtype == torch.bfloat16
        assert_same(model.state_dict(), before)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("compute=fp8_e4m3", "the model is a Sequential, and compute=fp8_e4m3 is for Linear,"),
        (
            "path=1 compute=fp8_e4m3 scaling=1x128\npath=0 compute=int8 output=int8\ncompute=bf16",
            "module '0': output=int8",
        ),
        ("path=0 compute=e8m0\ncompute=bf16", "module '0': products take"),
        ("compute=bf16 grad=fp8_e5m2", "the model is a Sequential, and grad=fp8_e5m2 is for Linear,"),
        (
            "path=0 compute=nvfp4 scaling=row\ncompute=bf16",
            "module '0': nvfp4 brings its own scales; leave scaling=row out",
        ),
        (
            "path=0 saved=fp8_e4m3\ncompute=bf16",
            "module '0': saved=fp8_e4m3 cannot be honoured; activations are saved in fp32",
        ),
        (
            "loss_scale=layer products=emulated\npath=0 compute=fp16 cast=unit\ncompute=fp32",
            "module '0': loss_scale=layer",
        ),
    ],
)
def test_scaled_products_that_cannot_be_are_refused(text: str, message: str) -> None:
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    with pytest.raises(UnsupportedError, match=re.escape(message)):
        convert(model, Plan.parse(text))
    assert type(model[0]) is nn.Linear


def test_emulated_products_round_as_the_unit_would() -> None:
    """fp16 operands, fp32 sum, one rounding: what torch's own fp16 kernel gives, up to the order of its sums."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 64, bias=False))
    x, results = torch.randn(16, 64), []
    for products in ("native", "emulated"):
        with convert(model, Plan.parse(f"products={products}\ncompute=fp16")) as conversion, conversion.autocast():
            results.append(model(x))
    assert results[0].dtype == results[1].dtype == torch.float16
    exact = x.half().double() @ model[0].get_parameter("weight").half().double().T
    assert torch.equal(results[1], exact.half()) or (results[1] - exact).abs().max() < 2.0**-10 * exact.abs().max()
    assert (results[0] - results[1]).abs().max() < 2.0**-9 * exact.abs().max()


MODULES: dict[str, tuple[Callable[[], nn.Module], Callable[[], tuple[Tensor, ...]]]] = {
    "linear": (lambda: nn.Linear(8, 8), lambda: (torch.randn(16, 8),)),
    "conv1d": (lambda: nn.Conv1d(4, 8, 3), lambda: (torch.randn(4, 4, 16),)),
    "conv2d": (lambda: nn.Conv2d(4, 8, 3, padding=1), lambda: (torch.randn(4, 4, 8, 8),)),
    "conv_transpose2d": (lambda: nn.ConvTranspose2d(4, 8, 3), lambda: (torch.randn(4, 4, 8, 8),)),
    "embedding": (lambda: nn.Embedding(16, 8), lambda: (torch.randint(16, (4, 4)),)),
    "embedding bag": (lambda: nn.EmbeddingBag(16, 8, mode="sum"), lambda: (torch.randint(16, (4, 4)),)),
    "attention": (lambda: nn.MultiheadAttention(8, 2, batch_first=True), lambda: (torch.randn(2, 6, 8),) * 3),
    "lstm": (lambda: nn.LSTM(8, 8, 2, bidirectional=True), lambda: (torch.randn(5, 2, 8),)),
    "gru": (lambda: nn.GRU(8, 8), lambda: (torch.randn(5, 2, 8),)),
}


@pytest.mark.parametrize("kind", MODULES)
@pytest.mark.parametrize("train", [True, False])
def test_every_kind_of_module_follows_a_scaled_rule(kind: str, train: bool) -> None:
    """Against the exact module: off by about what 4 significant bits bring, so it ran in fp8 and nowhere narrower."""
    torch.manual_seed(0)
    build, make = MODULES[kind]
    model = nn.ModuleList([build()]).train(train)
    inputs = make()

    def run() -> tuple[Tensor, Tensor]:
        result = model[0](*inputs)
        result = result[0] if isinstance(result, tuple) else result
        result.float().square().sum().backward()
        gradient = torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])
        model.zero_grad()
        return result.detach().float(), gradient

    exact = run()
    with convert(model, Plan.parse("path=0 compute=fp8_e4m3\ncompute=fp32")) as conversion, conversion.autocast():
        ours = run()
        with torch.no_grad():
            again = model[0](*inputs)
    again = again[0] if isinstance(again, tuple) else again
    assert torch.equal(again, ours[0])
    for value, reference in zip(ours, exact, strict=True):
        error = ((value - reference).norm() / reference.norm()).item()
        assert 2.0**-9 < error < 0.1
    assert all(torch.equal(*pair) for pair in zip(run(), exact, strict=True))


@pytest.mark.parametrize(
    "module", [nn.RNN(4, 4), nn.LSTMCell(4, 4), nn.Bilinear(4, 4, 4)], ids=lambda m: type(m).__name__
)
def test_modules_whose_products_cannot_be_replaced_are_refused(module: nn.Module) -> None:
    with pytest.raises(UnsupportedError, match="compute=int8 is for Linear, Conv1d"):
        convert(nn.ModuleList([module]), Plan.parse("path=0 compute=int8\ncompute=fp32"))


def test_audit_names_what_is_emulated_and_what_emulates_it() -> None:
    model = nn.Sequential(nn.Linear(32, 32), nn.Linear(32, 32), nn.Linear(32, 32))
    plan = Plan.parse("path=0 compute=fp8_e4m3 grad=fp8_e5m2\npath=1 compute=int8 scaling=row\ncompute=bf16")
    with convert(model, plan) as conversion:
        with conversion.audit() as audit, conversion.autocast():
            model(torch.randn(32, 32))
        formats = [r.compute for r in conversion.describe()]
    assert formats == ["fp8_e4m3", "int8", "bf16"]
    assert set(audit.computed["0"]) == {"fp8_e4m3 emulated in bf16"}
    assert set(audit.computed["1"]) <= {"int8", "int8 emulated in fp32"}
    assert set(audit.computed["2"]) == {"bf16"}


def test_blocks_are_refused_for_convolutions_before_anything_runs() -> None:
    with pytest.raises(UnsupportedError, match="module '0': convolutions take scaling=tensor"):
        convert(nn.Sequential(nn.Conv2d(3, 4, 3)), Plan.parse("path=0 compute=mxfp8_e4m3\ncompute=bf16"))


def test_a_subclass_with_a_forward_of_its_own_is_refused() -> None:
    class Scaled(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return torch.einsum("bi,oi->bo", x, self.weight)

    with pytest.raises(UnsupportedError, match="module '0' is a Scaled"):
        convert(nn.Sequential(Scaled(4, 4)), Plan.parse("path=0 compute=int8\ncompute=bf16"))


def test_a_model_that_is_one_scaled_layer_has_bf16_around_it() -> None:
    model = nn.Linear(8, 8)
    with convert(model, Plan.parse("compute=fp8_e4m3 grad=fp8_e5m2")) as conversion, conversion.autocast():
        y = model(torch.randn(4, 8))
        assert y.dtype == torch.bfloat16
        assert (y.float() @ torch.ones(8, 1)).dtype == torch.bfloat16


def test_emulation_leaves_embeddings_to_torch() -> None:
    model = nn.Sequential(nn.Embedding(5, 4), nn.Linear(4, 4))
    results = []
    for products in ("native", "emulated"):
        plan = Plan.parse(f"products={products}\ncompute=fp16")
        with convert(model, plan) as conversion, conversion.autocast():
            results.append(model[0](torch.arange(5)))
    assert results[0].dtype == results[1].dtype
    assert torch.equal(*results)


def test_scaled_products_outside_autocast_warn_and_give_fp32_like_all_else() -> None:
    model = nn.Sequential(*(nn.Linear(8, 8) for _ in range(3)))
    with convert(model, Plan.preset("fp8-mixed")):
        with pytest.warns(PrecisionWarning, match=r"run the model and the loss inside `with stepper.autocast\(\):`"):
            y = model(torch.randn(4, 8))
        assert y.dtype == torch.float32
        with torch.no_grad():
            assert model(torch.randn(4, 8)).dtype == torch.float32


@pytest.mark.parametrize("name", ["fp8-mixed", "int8-mixed"])
def test_a_model_of_which_no_layer_is_in_8_bits_is_warned_of(name: str) -> None:
    with pytest.warns(PrecisionWarning, match="no layer of this model is in"):
        convert(nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8)), Plan.preset(name))


def test_a_layer_with_scaled_products_does_not_claim_a_saved_format() -> None:
    model = nn.Sequential(*(nn.Linear(8, 8) for _ in range(3)))
    with convert(
        model, replace(Plan.preset("int8-mixed"), rules=(Rule(saved="int8"), *Plan.preset("int8-mixed").rules))
    ) as c:
        assert [(r.compute, r.saved) for r in c.describe()] == [("bf16", "int8"), ("int8", ""), ("bf16", "int8")]
