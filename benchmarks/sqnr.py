"""How much noise scaled formats add to each kind of layer, beside what theory says; writes benchmarks/results/sqnr.json.

    python benchmarks/sqnr.py

Signal to quantization noise, dB, of the result and of both gradients against fp64, for normal data of variance 1.

Theory: the error of an operand's number is even over a quantum q, the distance between the format's numbers there, so its
mean square is q^2 / 12, and errors are independent. A product of a and b, with mean square errors A and B, then has

    a^2 B + A b^2 + A B        summed as the product sums

For a float of p mantissa bits q^2 / 12 is 2^-2p / 26 of the number's square in the mean over a binade, 14.1 + 6.02 p dB (e4m3:
32.2, e5m2: 26.2), and a product of two such operands has 3 dB less. Attention, LSTM and GRU are not bilinear; they are measured.
"""

import json
import math
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from datetime import date
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from halfstep.machine.hardware import name_machine
from halfstep.numerics import attention, convolution, lookup, multiplication, recurrence
from halfstep.numerics.casting import ScaledTensor, measure_error
from halfstep.numerics.products import Operand, Product, Products, quantize_operand

RECIPES = {
    "fp8_e4m3, e5m2 gradients": Products.of("fp8_e4m3"),
    "fp8_e4m3, rows": Products.of("fp8_e4m3", scaling="row"),
    "fp8_e4m3, 1x128 and 128x128": Products.of("fp8_e4m3", scaling="1x128", weight_scaling="128x128"),
    "int8, rows": Products.of("int8"),
    "int8, SwitchBack": Products.of("int8", grad_weight="bf16"),
    "mxfp8_e4m3": Products.of("mxfp8_e4m3"),
    "mxfp6_e2m3": Products.of("mxfp6_e2m3"),
    "mxfp4": Products.of("mxfp4"),
    "nvfp4": Products.of("nvfp4"),
}
PARTS = ("output", "grad_input", "grad_weight")


@dataclass(frozen=True, kw_only=True)
class Row:
    """One part of one kind of layer in one recipe; theory is None where there is none."""

    layer: str
    recipe: str
    part: str
    sqnr: float
    theory: float | None


@dataclass(frozen=True, kw_only=True)
class Bilinear:
    """A layer that is a product: shapes of its operands, torch's function, ours, and what each product sums over."""

    left: tuple[int, ...]
    right: tuple[int, ...]
    plain: Callable[..., Tensor]
    scaled: Callable[..., Tensor]
    sums: tuple[tuple[Any, Any], ...]  # of the operands of output, grad_input, grad_weight
    takes_blocks: bool = True


PLACES = (1, 2, 3), (0, 2, 3)
BILINEAR = {
    "linear": Bilinear(left=(256, 192), right=(128, 192), plain=F.linear, scaled=multiplication.linear,
                       sums=((-1, -1), (-1, -2), (-2, -2))),
    "bmm": Bilinear(left=(4, 64, 128), right=(4, 128, 64), plain=torch.bmm, scaled=multiplication.bmm,
                    sums=((-1, -2), (-1, -1), (-2, -2))),
    "conv2d": Bilinear(left=(16, 16, 10, 10), right=(32, 16, 3, 3), plain=F.conv2d, scaled=convolution.conv2d,
                       sums=((PLACES[0], PLACES[0]), (PLACES[0], PLACES[1]), (PLACES[1], PLACES[1])), takes_blocks=False),
    "conv_transpose2d": Bilinear(left=(16, 32, 10, 10), right=(32, 16, 3, 3), plain=F.conv_transpose2d,
                                 scaled=convolution.conv_transpose2d, takes_blocks=False,
                                 sums=((PLACES[0], PLACES[1]), (PLACES[0], PLACES[0]), (PLACES[1], PLACES[1]))),
}  # fmt: skip


def find_noise(x: Tensor, operand: Operand, dims: int | tuple[int, ...]) -> Tensor:
    """The mean square error of each number, fp64."""
    copy = quantize_operand(x, operand, dims)
    if not isinstance(copy, ScaledTensor):
        return (x.frexp()[1].to(torch.float64) - 1 - 7).exp2().square() / 12  # bf16: 7 mantissa bits
    unit = replace(copy, values=torch.ones(copy.shape).to(copy.values.dtype)).dequantize(torch.float64)
    element = copy.format.element
    if element.kind == "integer":
        return unit.square() / 12
    power = ((x.to(torch.float64) / unit).frexp()[1] - 1).to(torch.float64).exp2().clamp_min(element.smallest_normal)
    return (power * unit * 2.0**-element.mantissa_bits).square() / 12


def propagate(
    product: Callable[[Tensor, Tensor], Tensor], a: Tensor, b: Tensor, noise_a: Tensor, noise_b: Tensor
) -> Tensor:
    """The mean square errors of a product."""
    return product(noise_a, b.square()) + product(a.square(), noise_b) + product(noise_a, noise_b)


def compare_bilinear(layer: Bilinear, products: Products) -> list[tuple[float, float]]:
    """Measured and predicted SQNR of the three products."""
    torch.manual_seed(0)
    left, right = torch.randn(layer.left), torch.randn(layer.right)
    g = torch.randn_like(layer.plain(left, right))
    leaves = [left.clone().requires_grad_(), right.clone().requires_grad_()]
    y = layer.scaled(*leaves, products=products)
    measured = [y.detach(), *torch.autograd.grad(y, leaves, g)]

    def differentiate(which: int, gradient: Tensor, other: Tensor) -> Tensor:
        inputs = [left.double().requires_grad_(), right.double().requires_grad_()]
        inputs[1 - which] = other
        return torch.autograd.grad(layer.plain(*inputs), inputs[which], gradient)[0]

    ways: tuple[tuple[Callable[[Tensor, Tensor], Tensor], Tensor, Tensor, Product], ...] = (
        (layer.plain, left, right, products.output), (partial(differentiate, 0), g, right, products.grad_input),
        (partial(differentiate, 1), g, left, products.grad_weight),
    )  # fmt: skip
    results = []
    for actual, (product, a, b, formats), (da, db) in zip(measured, ways, layer.sums, strict=True):
        exact = product(a.double(), b.double())
        noise = propagate(
            product, a.double(), b.double(), find_noise(a, formats.left, da), find_noise(b, formats.right, db)
        )
        theory = 10 * math.log10((exact.square().sum() / noise.sum()).item())
        results.append((measure_error(exact, actual, "fp32").sqnr, theory))
    return results


def compare_embedding(products: Products) -> tuple[float, float]:
    """Measured and predicted SQNR of the vectors."""
    torch.manual_seed(0)
    table = torch.randn(200, 128)
    operand = products.output.right
    vectors = lookup.embedding(torch.arange(200), table, products=products)
    theory = 10 * math.log10((table.double().square().sum() / find_noise(table, operand, -1).sum()).item())
    return measure_error(table, vectors, "fp32").sqnr, theory


def list_composed() -> dict[str, tuple[Callable[..., Tensor], list[Tensor]]]:
    """Layers of several products: a function of tensors and products, and the tensors."""
    torch.manual_seed(0)
    heads = [torch.randn(2, 4, 64, 32) for _ in range(3)]
    layers: dict[str, tuple[Callable[..., Tensor], list[Tensor]]] = {
        "attention": (attention.scaled_dot_product_attention, heads)
    }
    zeros = torch.zeros(1, 16, 64)
    for kind, function, hx in ((nn.LSTM, recurrence.lstm, (zeros, zeros)), (nn.GRU, recurrence.gru, zeros)):
        weights = [w.detach() for w in kind(64, 64).parameters()]
        layers[kind.__name__.lower()] = partial(_run, function, hx), [torch.randn(32, 16, 64), *weights]
    return layers


def _run(function: Callable[..., Any], hx: Any, x: Tensor, *weights: Tensor, products: Products) -> Tensor:
    """One recurrent layer."""
    result: Tensor = function(x, hx, weights, True, 1, 0.0, True, False, False, products=products)[0]
    return result


def compare_composed(function: Callable[..., Tensor], tensors: list[Tensor], products: Products) -> list[float]:
    """SQNR of the output and of the gradients of the first two tensors, against plain fp32.

    These are of queries and keys, and of a sequence and the weight that meets it.
    """
    fp32 = Product(left=Operand(format="fp32"), right=Operand(format="fp32"))
    results = []
    for recipe in (Products(output=fp32, grad_input=fp32, grad_weight=fp32), products):
        leaves = [t.clone().requires_grad_() for t in tensors]
        y = function(*leaves, products=recipe)
        torch.manual_seed(1)
        results.append([y.detach(), *torch.autograd.grad(y, leaves[:2], torch.randn_like(y))])
    return [measure_error(exact, actual, "fp32").sqnr for exact, actual in zip(*results, strict=True)]


def measure() -> list[Row]:
    """Every kind of layer in every recipe that it takes."""
    rows, composed = [], list_composed()
    for recipe, products in RECIPES.items():
        in_blocks = products.output.left.scaling.kind == "block"
        for name, layer in BILINEAR.items():
            if layer.takes_blocks or not in_blocks:
                for part, (sqnr, theory) in zip(PARTS, compare_bilinear(layer, products), strict=True):
                    rows.append(Row(layer=name, recipe=recipe, part=part, sqnr=sqnr, theory=theory))
        if products.output.right.scaling.rows <= 1:
            sqnr, theory = compare_embedding(products)
            rows.append(Row(layer="embedding", recipe=recipe, part="output", sqnr=sqnr, theory=theory))
        for name, (function, tensors) in composed.items():
            for part, sqnr in zip(PARTS, compare_composed(function, tensors, products), strict=True):
                rows.append(Row(layer=name, recipe=recipe, part=part, sqnr=sqnr, theory=None))
    return rows


def write_table(rows: list[Row]) -> str:
    """Markdown: a line a layer and part, a column a recipe; theory in brackets."""
    cells = {(r.layer, r.part, r.recipe): r for r in rows}
    lines = [f"| layer | {' | '.join(RECIPES)} |", "|---|" + "---|" * len(RECIPES)]
    for layer, part in dict.fromkeys((r.layer, r.part) for r in rows):
        found = [cells.get((layer, part, recipe)) for recipe in RECIPES]
        texts = ["" if r is None else f"{r.sqnr:.1f}" + (f" ({r.theory:.1f})" if r.theory else "") for r in found]
        lines.append(f"| {layer}, {part} | {' | '.join(texts)} |")
    return "\n".join(lines)


def main() -> None:
    """Print the table and write the numbers."""
    rows = measure()
    result = {
        "command": "python benchmarks/sqnr.py", "date": date.today().isoformat(), "machine": name_machine(),
        "torch": torch.__version__, "rows": [asdict(row) for row in rows],
    }  # fmt: skip
    path = Path(__file__).parent / "results" / "sqnr.json"
    path.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print(write_table(rows))


if __name__ == "__main__":
    main()
