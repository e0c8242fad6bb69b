"""Updates of rows: one body over the truth and the kernels, and torch's own optimizers beside them."""

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from halfstep.numerics import kernels, rows
from halfstep.numerics.rows import RowStep, Table, measure_norms, sum_rows, take_table
from halfstep.numerics.updates import COPY, SPLIT, WIDE, Weight
from halfstep.numerics.words import split
from helpers import bits, require_refusal, seeded

both = pytest.mark.parametrize("update", [rows.update_rows_slowly, rows.update_rows], ids=["truth", "kernels"])
storages = pytest.mark.parametrize("storage", [WIDE, SPLIT, COPY], ids=["wide", "split", "copy"])
shapes = pytest.mark.parametrize(
    "shape", [(1, 1), (40, 1), (50, 3), (300, 64), (3000, 5), (7, 1500), (9, 4, 6)], ids=str
)
native = pytest.mark.skipif(rows.KERNELS.library.functions is None, reason=rows.KERNELS.library.why)
Update = Callable[[Table, RowStep], None]


@pytest.fixture(autouse=True, params=[1, 2], ids=lambda count: f"threads {count}")
def threads(request: pytest.FixtureRequest) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    with torch.sparse.check_sparse_tensor_invariants(True):  # torch warns where nothing is said of them
        yield
    torch.set_num_threads(before)


def keep(value: Tensor, storage: int) -> Weight:
    if storage == WIDE:
        return Weight(value.clone())
    live, rest = torch.empty_like(value, dtype=torch.bfloat16), torch.empty_like(value, dtype=torch.int16)
    if storage == COPY:
        return Weight(live.copy_(value), value.clone())
    split(value.clone(), live, rest)
    return Weight(live, rest)


def sparse(numbers: Tensor, values: Tensor, shape: tuple[int, ...]) -> Tensor:
    return torch.sparse_coo_tensor(numbers[None], values, shape, check_invariants=True)


def draw(shape: tuple[int, ...], steps: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, list[Tensor]]:
    """A table, and gradients in which two thirds of its rows occur, half of those twice."""
    with seeded(0):
        start, gradients = torch.randn(shape), []
        for i in range(steps):
            some = torch.randperm(shape[0])[: max(1, 2 * shape[0] // 3)]
            numbers = torch.cat([some, some[::2]])
            numbers = numbers[torch.randperm(len(numbers))]
            values = torch.randn(len(numbers), *shape[1:]).mul_(10.0 ** (i % 5 - 3)).to(dtype)
            gradients.append(sparse(numbers, values, shape))
    return start, gradients


OPTIONS: dict[str, tuple[Any, dict[str, Any]]] = {
    "SparseAdam": (torch.optim.SparseAdam, {"lr": 0.02}),
    "SparseAdam, other betas": (torch.optim.SparseAdam, {"lr": 0.02, "betas": (0.4, 0.97), "eps": 1e-3}),
    "Adagrad": (torch.optim.Adagrad, {"lr": 0.02}),
    "Adagrad that decays": (torch.optim.Adagrad, {"lr": 0.02, "lr_decay": 0.1, "initial_accumulator_value": 0.3}),
    "SGD": (torch.optim.SGD, {"lr": 0.02}),
}


def find_step(kind: Any, group: dict[str, Any], count: int, *, wide: bool) -> RowStep:
    if kind is torch.optim.SparseAdam:
        return RowStep.of_adam(lr=group["lr"], betas=group["betas"], eps=group["eps"], count=count, factor=0.37)
    if kind is torch.optim.Adagrad:
        return RowStep.of_adagrad(
            lr=group["lr"], lr_decay=group["lr_decay"], eps=group["eps"], count=count, factor=0.37
        )
    return RowStep.of_sgd(lr=group["lr"], each=wide, factor=0.37)


@both
@storages
@shapes
@pytest.mark.parametrize("name", OPTIONS)
def test_rows_are_updated_to_the_bits_of_torch(update: Update, storage: int, shape: tuple[int, ...], name: str) -> None:
    kind, extra = OPTIONS[name]
    start, gradients = draw(shape, 6, torch.float32 if storage == WIDE else torch.bfloat16)
    parameter = nn.Parameter(start.clone())
    optimizer, weight = kind([parameter], **extra), keep(start, storage)
    beside = {"SparseAdam": 2, "Adagrad": 1, "SGD": 0}[kind.__name__]
    first = extra.get("initial_accumulator_value", 0.0)
    states = tuple(torch.full(shape, first) for _ in range(beside))
    for count, gradient in enumerate(gradients, 1):
        scaled = gradient.to(torch.float32) * 0.37
        parameter.grad = scaled if storage == WIDE else scaled.coalesce()
        optimizer.step()
        table = Table(weight, gradient._indices()[0].contiguous(), gradient._values(), states)
        update(table, find_step(kind, optimizer.param_groups[0], count, wide=storage == WIDE))
    assert torch.equal(bits(weight.read()), bits(parameter.detach()))
    if storage != WIDE:
        assert torch.equal(weight.live, keep(parameter.detach(), storage).live)
    held = [optimizer.state[parameter].get(name) for name in ("exp_avg", "exp_avg_sq", "sum")]
    for ours, theirs in zip(states, [state for state in held if state is not None], strict=True):
        assert torch.equal(bits(ours), bits(theirs))


def test_occurrences_are_summed_in_their_order() -> None:
    with seeded(1):
        numbers, values = torch.randint(17, (500,)), torch.randn(500, 6)
    distinct, sums = sum_rows(numbers, values)
    expected: dict[int, Tensor] = {}
    for number, value in zip(numbers.tolist(), values, strict=True):
        expected[number] = expected[number] + value if number in expected else value
    assert distinct.tolist() == sorted(expected)
    assert all(torch.equal(sums[i], expected[number]) for i, number in enumerate(distinct.tolist()))
    assert not torch.equal(sums, sum_rows(numbers.flip(0), values.flip(0))[1])


@native
@storages
@pytest.mark.parametrize("kind", [rows.ADAM, rows.ADAGRAD, rows.SGD, rows.SGD_EACH])
@pytest.mark.parametrize("height", [1, 30, 5000, 3_000_000])
def test_kernels_sum_rows_that_occur_many_times_as_the_truth_does(kind: int, storage: int, height: int) -> None:
    with seeded(height):
        numbers = torch.cat([torch.randint(height, (400,)), torch.randint(min(height, 5), (300,))])
        start, values = torch.randn(height, 2), torch.randn(700, 2)
    found = []
    for update in (rows.update_rows_slowly, rows.update_rows):
        states = tuple(start.abs() for _ in range({rows.ADAM: 2, rows.ADAGRAD: 1}.get(kind, 0)))
        weight = keep(start, storage)
        update(Table(weight, numbers, values, states), RowStep(0.1, 0.2, 1e-3, -0.1, 0.7, kind))
        found.append((weight.read(), *states))
    assert all(torch.equal(bits(a), bits(b)) for a, b in zip(*found, strict=True))
    still = torch.ones(height, dtype=torch.bool).index_fill_(0, numbers, False)
    assert torch.equal(found[1][0][still], start[still]) and not torch.equal(found[1][0], start)


@native
def test_many_tables_of_many_shapes_are_one_call_with_the_same_result() -> None:
    functions, step = rows.KERNELS.library.functions, RowStep(0.1, 0.2, 1e-3, -0.1, 0.7, rows.ADAM)
    assert functions is not None
    found = []
    for together in (True, False):
        tables = []
        for shape in [(2000, 64), (1, 1), (5, 3000), (30, 0, 4), (700, 7), (0, 3), (400, 16)]:
            start, (gradient,) = draw(shape, 1) if all(shape) else (torch.zeros(shape), [None])
            if gradient is not None:
                numbers, values = gradient._indices()[0], gradient._values()
                tables.append(Table(Weight(start), numbers, values, (torch.zeros(shape), torch.zeros(shape))))
        tables.insert(2, tables[1]._replace(rows=tables[1].rows[:0], values=tables[1].values[:0]))  # no entries
        for some in [tables] if together else [[table] for table in tables]:
            assert rows.run_rows(functions, some, step)
        found.append([tensor for table in tables for tensor in (table.weight.live, *table.states)])
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))
    assert all(bool(tensor.any()) for tensor in found[0])


@native
@pytest.mark.parametrize("bad", [-1, 4])
def test_a_row_that_the_table_does_not_have_moves_nothing(bad: int) -> None:
    functions = rows.KERNELS.library.functions
    assert functions is not None
    good = Table(Weight(torch.ones(4, 2)), torch.tensor([1]), torch.ones(1, 2))
    wrong = good._replace(rows=torch.tensor([bad]))
    assert not rows.run_rows(functions, [good, wrong], RowStep.of_sgd(lr=1.0, each=True))
    assert bool((good.weight.live == 1).all())


@native
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_norms_are_those_of_the_summed_rows(dtype: torch.dtype) -> None:
    gradients = [draw(shape, 1, dtype)[1][0] for shape in [(300, 64), (7, 1500), (1, 1), (2000, 3)]]
    norms = measure_norms(gradients)
    assert norms is not None
    expected = [torch.linalg.vector_norm(g.to_dense().to(torch.float64)).item() for g in gradients]
    if dtype is torch.bfloat16:
        wide = [g.to(torch.float32).coalesce().values().to(torch.float64) for g in gradients]
        expected = [torch.linalg.vector_norm(values).item() for values in wide]
    assert norms.tolist() == pytest.approx(expected, rel=1e-6)
    mixed = [g.to(torch.float32) if i % 2 else g for i, g in enumerate(gradients)]
    again = measure_norms(mixed)
    assert again is not None and torch.equal(again, norms)
    gradients[1]._values()[3, 4] = torch.nan
    again = measure_norms(gradients)
    assert again is not None and again.isnan().tolist() == [False, True, False, False]


def test_norms_of_what_names_no_whole_rows_are_left_to_torch() -> None:
    single = torch.sparse_coo_tensor(torch.tensor([[0], [1]]), torch.ones(1), (3, 3), check_invariants=True)
    assert measure_norms([single]) is None
    assert measure_norms([single.to(torch.float64)]) is None


def test_tables_that_the_kernels_cannot_work_on_are_not_taken() -> None:
    (gradient,) = draw((6, 4), 1)[1]
    good, state = Weight(torch.zeros(6, 4)), torch.zeros(6, 4)
    assert (take_table(good, gradient, state) is not None) == (rows.KERNELS.library.functions is not None)
    refused: list[tuple[Weight, Tensor, Tensor]] = [
        (Weight(torch.zeros(4, 6).T), gradient, torch.zeros(4, 6).T),
        (Weight(torch.zeros(5, 4)), gradient, torch.zeros(5, 4)),
        (Weight(torch.zeros(6, 4, dtype=torch.float64)), gradient, state),
        (Weight(torch.zeros(6, 4, dtype=torch.bfloat16)), gradient, state),
        (Weight(torch.zeros(6, 4, dtype=torch.bfloat16), torch.zeros(6, 4, dtype=torch.int8)), gradient, state),
        (good, gradient.to(torch.float64), state),
        (good, gradient, state.to(torch.bfloat16)),
        (good, gradient, torch.zeros(6, 5)),
        (good, gradient.to_dense(), state),
        (good, gradient.to_dense().to_sparse(), state),
    ]
    assert [take_table(*case) for case in refused] == [None] * len(refused)


def test_the_kernels_of_this_machine_agree_with_the_truth_where_it_has_a_compiler() -> None:
    if any(map(kernels.shutil.which, kernels.COMPILERS)) and "AVX512" in torch.backends.cpu.get_cpu_capability():
        assert rows.KERNELS.describe().startswith("native: ")


@native
def test_a_kernel_that_rounds_otherwise_is_not_used(monkeypatch: pytest.MonkeyPatch, tmp_path: Any) -> None:
    changes = (
        ("w += up[i] / (root[i] + n.eps) * n.step", "w += n.step * up[i] / (root[i] + n.eps)"),
        ("sum[i] += read_number", "sum[i] = read_number"),
        ("fmaf(n.step, g, w)", "w + n.step * g"),
        ("state[i] + g[i] * g[i]", "fmaf(g[i], g[i], state[i])"),
    )
    require_refusal(rows.KERNELS, changes, monkeypatch, tmp_path)
