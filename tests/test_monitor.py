import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from halfstep.control.monitor import BACKWARD, Audit, follow_modules, name_dtype, observe_shapes
from halfstep.conversion import convert
from halfstep.machine.timing import PRODUCTS, count_operations
from halfstep.plan import Plan
from helpers import SPLIT, has_hooks, make_cnn, make_mlp


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(8, 24)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).view(2, 5, 3, 2, 4).permute(2, 0, 3, 1, 4)
        attended: Tensor = F.scaled_dot_product_attention(q, k, v)
        return attended.transpose(1, 2).flatten(2)


def audit_training(model: nn.Module, x: Tensor, plan: str) -> Audit:
    with convert(model, Plan.parse(plan)) as conversion, conversion.audit() as audit:
        with conversion.autocast():
            loss = model(x).float().square().mean()
        loss.backward()
    return audit


MODELS = {
    "linear": (lambda: nn.Sequential(nn.Linear(8, 4)), (3, 8), "0"),
    "conv": (lambda: nn.Sequential(nn.Conv2d(2, 4, 3)), (2, 2, 6, 6), "0"),
    "attention": (Attention, (2, 5, 8), "qkv"),
}


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize(("plan", "format"), [("bf16-mixed", "bf16"), ("16-mixed", "fp16"), (SPLIT, "bf16")])
def test_audit_sees_products_of_both_passes_in_16_bits(name: str, plan: str, format: str) -> None:
    build, shape, path = MODELS[name]
    audit = audit_training(build(), torch.randn(*shape), plan)
    assert set(audit.computed[path]) == {format}
    assert set(audit.computed[f"{path} {BACKWARD}"]) == {format}
    assert BACKWARD not in audit.computed
    assert any(target == format for _, _, target in audit.casts)


@pytest.mark.parametrize("name", MODELS)
def test_audit_of_32_true_sees_fp32_products_and_no_casts(name: str) -> None:
    build, shape, _ = MODELS[name]
    audit = audit_training(build(), torch.randn(*shape), "32-true")
    assert {format for counts in audit.computed.values() for format in counts} == {"fp32"}
    assert not audit.casts
    assert not audit.cast_numbers


def test_audit_sees_the_attention_product_itself() -> None:
    audit = audit_training(Attention(), torch.randn(2, 5, 8), "bf16-mixed")
    assert audit.computed[""]["bf16"] >= 1


def test_audit_counts_every_product_of_a_linear_layer() -> None:
    audit = audit_training(nn.Sequential(nn.Linear(8, 4), nn.Linear(4, 2)), torch.randn(3, 8), "32-true")
    assert audit.computed["0"]["fp32"] == 1
    assert audit.computed["1"]["fp32"] == 1
    assert audit.computed[f"0 {BACKWARD}"]["fp32"] == 1  # the first layer's input needs no gradient
    assert audit.computed[f"1 {BACKWARD}"]["fp32"] == 2


def test_audit_counts_casts_and_converted_numbers() -> None:
    layer, x = nn.Linear(8, 4, bias=False), torch.randn(3, 8)
    with convert(layer, Plan.preset("bf16-mixed")) as conversion, conversion.audit() as audit, conversion.autocast():
        layer(x)
    assert audit.casts["", "fp32", "bf16"] == 2
    assert audit.cast_numbers["", "fp32", "bf16"] == 3 * 8 + 8 * 4


def test_audit_sees_no_cast_of_a_weight_that_is_stored_in_bf16() -> None:
    layer, x = nn.Linear(8, 4, bias=False), torch.randn(3, 8)
    with convert(layer, Plan.parse(SPLIT)) as conversion, conversion.audit() as audit, conversion.autocast():
        layer(x)
    assert audit.cast_numbers["", "fp32", "bf16"] == 3 * 8


def test_audit_sees_products_in_inference_mode() -> None:
    model = make_mlp()
    with torch.inference_mode(), Audit(model) as audit:
        model(torch.randn(2, 8))
    assert audit.computed["0"]["fp32"] == 1


def test_audit_leaves_no_hooks_behind() -> None:
    model = make_cnn()
    with Audit(model) as audit:
        assert has_hooks(model)
        model(torch.randn(2, 3, 8, 8))
    assert not has_hooks(model)
    assert audit.computed


def test_audit_leaves_no_hooks_behind_after_an_exception() -> None:
    model = make_mlp()
    with pytest.raises(RuntimeError, match="shapes"), Audit(model) as audit:
        model(torch.randn(2, 7))
    assert not has_hooks(model)
    assert "0" not in audit.computed


def test_audit_names_layers_right_after_an_exception_inside_its_block() -> None:
    model = make_mlp()
    with Audit(model) as audit:
        with pytest.raises(RuntimeError, match="shapes"):
            model(torch.randn(2, 7))
        audit.computed.clear()
        model(torch.randn(2, 8)).sum().backward()
    assert set(audit.computed) == {name for path in "024" for name in (path, f"{path} {BACKWARD}")}


class Mixing(nn.Module):
    """Products of its own around those of a layer that it uses twice, one time checkpointed."""

    def __init__(self, reentrant: bool) -> None:
        super().__init__()
        self.layer, self.reentrant = nn.Linear(4, 4), reentrant

    def forward(self, x: Tensor) -> Tensor:
        x = self.layer(x)
        own = x @ x.T
        again: Tensor = checkpoint(self.layer, own, use_reentrant=self.reentrant)
        return again


@pytest.mark.parametrize("reentrant", [True, False])
def test_audit_names_the_layer_whose_forward_a_backward_product_belongs_to(reentrant: bool) -> None:
    model = Mixing(reentrant)
    with Audit(model) as audit:
        (model(torch.randn(4, 4, requires_grad=True)) @ torch.ones(4, 1)).sum().backward()
    backward = {path: sum(counts.values()) for path, counts in audit.computed.items() if BACKWARD in path}
    # a product outside of the model counts twice, since nothing tells its forward from its backward pass
    assert backward == {BACKWARD: 2, f"layer {BACKWARD}": 4, f"(model) {BACKWARD}": 2}


def test_audit_names_no_layer_for_nodes_from_before_its_block() -> None:
    model = make_mlp()
    loss = model(torch.randn(2, 8)).sum()
    with Audit(model) as audit:
        loss.backward()
    assert set(audit.computed) == {BACKWARD}


def test_audit_names_layers_of_accumulated_and_replayed_passes() -> None:
    model, x = make_mlp(), torch.randn(2, 8)
    with Audit(model) as audit:
        losses = [model(x).sum() for _ in range(2)]
        for loss in losses:
            loss.backward(retain_graph=True)
            loss.backward()
    counts = {path: counts["fp32"] for path, counts in audit.computed.items() if BACKWARD in path}
    assert counts == {f"0 {BACKWARD}": 4, f"2 {BACKWARD}": 8, f"4 {BACKWARD}": 8}


def test_audit_says_which_layers_backward_casts() -> None:
    audit = audit_training(nn.Sequential(nn.Linear(8, 4)), torch.randn(3, 8), "bf16-mixed")
    assert audit.cast_numbers[f"0 {BACKWARD}", "bf16", "fp32"] == 8 * 4 + 4  # the gradients of weight and bias
    assert f"0 {BACKWARD}: cast bf16 -> fp32" in str(audit)


def test_audit_does_not_change_results() -> None:
    model, x = make_cnn(), torch.randn(2, 3, 8, 8)
    model.eval()
    plain = model(x)
    with Audit(model):
        assert torch.equal(model(x), plain)


def test_audit_as_text_names_layer_format_and_cast() -> None:
    audit = audit_training(nn.Sequential(nn.Linear(8, 4)), torch.randn(3, 8), "bf16-mixed")
    assert "0: 1 in bf16" in str(audit)
    assert "0: cast fp32 -> bf16" in str(audit)


def test_followed_modules_are_outermost_first_and_gone_afterwards() -> None:
    inner = nn.ReLU()
    model = nn.Sequential(nn.Sequential(inner))
    stack: list[str] = []
    seen: list[list[str]] = []
    inner.register_forward_hook(lambda *_: seen.append(list(stack)))
    with follow_modules(model, stack):
        model(torch.ones(1))
    assert seen == [["", "0", "0.0"]]
    assert stack == []


def test_dtypes_have_halfstep_names() -> None:
    assert [name_dtype(d) for d in (torch.float32, torch.bfloat16, torch.float16, torch.float64)] == [
        "fp32", "bf16", "fp16", "float64",
    ]  # fmt: skip


@pytest.mark.parametrize(("shape", "rows"), [((5, 8), 5), ((2, 3, 8), 6), ((8,), 1)])
def test_linear_shape_counts_all_rows_of_its_input(shape: tuple[int, ...], rows: int) -> None:
    model = nn.Sequential(nn.Linear(8, 4))
    with observe_shapes(model) as shapes:
        model(torch.randn(*shape))
    layer = shapes["0"]
    assert (layer.operation, layer.shape, layer.kind) == ("matmul", (rows, 8, 4), "linear")
    assert (layer.input_numbers, layer.output_numbers, layer.weight) == (rows * 8, rows * 4, (4, 8))
    assert not has_hooks(model)


def test_conv_shape_holds_stride_and_groups() -> None:
    model = nn.Sequential(nn.Conv2d(4, 8, 3, stride=2, groups=2, padding=1))
    with observe_shapes(model) as shapes:
        model(torch.randn(5, 4, 10, 12))
    layer = shapes["0"]
    assert (layer.operation, layer.shape, layer.kind) == ("conv2d", (5, 4, 8, 10, 12, 3, 2, 2), "conv")
    assert layer.output_numbers == 5 * 8 * 5 * 6


@pytest.mark.parametrize(
    ("layer", "numbers"),
    [
        (nn.Conv2d(1, 8, (1, 64)), (1, 64, 1, 1, 0, 0, 1, 1)),
        (nn.Conv2d(1, 8, (22, 1), stride=(2, 1)), (22, 1, 2, 1, 0, 0, 1, 1)),
        (nn.Conv2d(1, 8, 3), (3, 3, 1, 1, 0, 0, 1, 1)),
        (nn.Conv2d(1, 8, 3, padding="same", dilation=2), (3, 3, 1, 1, 2, 2, 2, 2)),
        (nn.Conv2d(1, 8, 3, padding="same"), (3, 1)),
        (nn.Conv2d(1, 8, 1, padding="valid", stride=2), (1, 2)),
    ],
    ids=str,
)
def test_conv_shape_is_that_of_the_layer_whatever_its_window(layer: nn.Conv2d, numbers: tuple[int, ...]) -> None:
    with observe_shapes(nn.Sequential(layer)) as shapes:
        y = layer(torch.randn(2, 1, 32, 80))
    shape = shapes["0"].shape
    assert shape == (2, 1, 8, 32, 80, *numbers, 1)
    assert count_operations("conv2d", shape) == 2 * y.numel() * layer.weight[0].numel()
    assert PRODUCTS["conv2d"](shape, torch.float32, "cpu")["output"][0]().shape == y.shape  # type: ignore[attr-defined]


def test_conv_without_a_batch_dimension_counts_as_a_batch_of_one() -> None:
    model = nn.Sequential(nn.Conv2d(4, 8, 3))
    with observe_shapes(model) as shapes:
        model(torch.randn(4, 10, 12))
    assert shapes["0"].shape == (1, 4, 8, 10, 12, 3, 3, 1, 1, 0, 0, 1, 1, 1)


def test_layer_that_is_called_twice_is_counted_twice() -> None:
    layer = nn.Linear(4, 4)
    model = nn.Sequential(layer, nn.ReLU(), layer)
    with observe_shapes(model) as shapes:
        model(torch.randn(2, 4))
    assert {path: seen.calls for path, seen in shapes.items()} == {"0": 2}


def test_shape_is_seen_when_the_input_is_a_keyword() -> None:
    class Keyword(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(4, 2)

        def forward(self, x: Tensor) -> Tensor:
            y: Tensor = self.fc(input=x)
            return y

    model = Keyword()
    with observe_shapes(model) as shapes:
        model(torch.randn(3, 4))
    assert shapes["fc"].shape == (3, 4, 2)


def test_observing_shapes_leaves_no_hooks_behind_after_an_exception() -> None:
    model = make_mlp()
    with pytest.raises(RuntimeError, match="shapes"), observe_shapes(model):
        model(torch.randn(2, 7))
    assert not has_hooks(model)
