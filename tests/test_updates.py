"""Updates in one pass: one body over the truth and the kernels, and torch's own optimizers beside them."""

import itertools
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from halfstep.numerics import kernels, rows, updates
from halfstep.numerics.codebooks import BLOCK, Quantized, make_zeros, quantize
from halfstep.numerics.updates import BEGINS, COPY, GOES_ON, NONE, SPLIT, WIDE, AdamStep, SgdStep, Weight, lie_alike
from halfstep.numerics.words import join, split
from helpers import bits, require_refusal, seeded

STORAGES = [WIDE, SPLIT, COPY]
both = pytest.mark.parametrize(
    ("update_adam", "update_sgd"),
    [(updates.update_adam_slowly, updates.update_sgd_slowly), (updates.update_adam, updates.update_sgd)],
    ids=["truth", "kernels"],
)
storages = pytest.mark.parametrize("storage", STORAGES, ids=["wide", "split", "copy"])
sizes = pytest.mark.parametrize("count", [1, 7, 1024, 70_001])


@pytest.fixture(autouse=True, params=[1, 2], ids=lambda count: f"threads {count}")
def threads(request: pytest.FixtureRequest) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
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


def read(weight: Weight) -> Tensor:
    if weight.rest is None:
        return weight.live
    return join(weight.live, weight.rest) if weight.storage == SPLIT else weight.rest


def test_the_kernels_of_this_machine_agree_with_torch_where_it_has_a_compiler() -> None:
    if any(map(kernels.shutil.which, kernels.COMPILERS)) and "AVX512" in torch.backends.cpu.get_cpu_capability():
        assert updates.KERNELS.describe().startswith("native: ")


ADAMS: dict[str, tuple[Any, dict[str, Any]]] = {
    "AdamW": (torch.optim.AdamW, {"weight_decay": 0.1}),
    "AdamW without decay": (torch.optim.AdamW, {"weight_decay": 0.0}),
    "Adam": (torch.optim.Adam, {"weight_decay": 0.1}),
    "Adam from the far end": (torch.optim.Adam, {"betas": (0.3, 0.9), "eps": 1e-4}),
}


def run_torch(
    kind: Any, start: Tensor, gradients: list[Tensor], factor: float, **extra: Any
) -> tuple[Tensor, dict[str, Tensor]]:
    parameter = nn.Parameter(start.clone())
    optimizer = kind([parameter], **extra)
    for gradient in gradients:
        parameter.grad = gradient.float() * factor
        optimizer.step()
    return parameter.detach(), optimizer.state[parameter]


def run_adam(
    update: Callable[..., None], weight: Weight, gradients: list[Tensor], options: dict[str, Any]
) -> tuple[Tensor, Tensor]:
    exp_avg, exp_avg_sq = torch.zeros(2, weight.live.numel())
    for t, gradient in enumerate(gradients, 1):
        update(weight, gradient, exp_avg, exp_avg_sq, AdamStep.of(count=t, **options))
    return exp_avg, exp_avg_sq


def take_options(kind: Any, extra: dict[str, Any], *, factor: float, nearest: bool) -> dict[str, Any]:
    group = kind([torch.zeros(1)], lr=0.02, **extra).param_groups[0]
    options: dict[str, Any] = {
        "lr": group["lr"],
        "betas": group["betas"],
        "eps": group["eps"],
        "decay": group["weight_decay"],
    }
    return options | {"decoupled": kind is torch.optim.AdamW, "factor": factor, "nearest": nearest}


def draw(count: int, steps: int, dtype: torch.dtype, seed: int = 0) -> tuple[Tensor, list[Tensor]]:
    with seeded(seed):
        return torch.randn(count), [torch.randn(count).mul_(10.0 ** (i % 5 - 3)).to(dtype) for i in range(steps)]


@both
@storages
@sizes
@pytest.mark.parametrize("name", ADAMS)
def test_adam_has_the_bits_of_torchs_loop(
    update_adam: Callable[..., None], update_sgd: object, storage: int, count: int, name: str
) -> None:
    kind, extra = ADAMS[name]
    start, gradients = draw(count, 12, torch.bfloat16 if storage != WIDE else torch.float32)
    expected, state = run_torch(kind, start, gradients, 0.37, lr=0.02, fused=False, **extra)
    weight = keep(start, storage)
    options = take_options(kind, extra, factor=0.37, nearest=False)
    exp_avg, exp_avg_sq = run_adam(update_adam, weight, gradients, options)
    assert torch.equal(bits(read(weight)), bits(expected))
    assert torch.equal(bits(exp_avg), bits(state["exp_avg"]))
    assert torch.equal(bits(exp_avg_sq), bits(state["exp_avg_sq"]))
    if storage == COPY:
        assert torch.equal(weight.live, expected.to(torch.bfloat16))


@both
@storages
@pytest.mark.parametrize("name", ADAMS)
def test_adam_with_nearest_roots_has_the_bits_of_torchs_fused_one_in_whole_vectors(
    update_adam: Callable[..., None], update_sgd: object, storage: int, name: str
) -> None:
    kind, extra = ADAMS[name]
    start, gradients = draw(4096, 200, torch.float32)
    expected, state = run_torch(kind, start, gradients, 1.0, lr=0.02, fused=True, **extra)
    weight = keep(start, storage)
    exp_avg, exp_avg_sq = run_adam(update_adam, weight, gradients, take_options(kind, extra, factor=1.0, nearest=True))
    assert torch.equal(bits(read(weight)), bits(expected))
    assert torch.equal(bits(exp_avg_sq), bits(state["exp_avg_sq"]))
    assert torch.equal(bits(exp_avg), bits(state["exp_avg"]))


@both
def test_the_numbers_that_fill_no_vector_stay_within_a_few_units_of_torchs_fused_adamw(
    update_adam: Callable[..., None], update_sgd: object
) -> None:
    start, gradients = draw(15, 300, torch.float32)
    expected, _ = run_torch(torch.optim.AdamW, start, gradients, 1.0, lr=0.02, fused=True)
    weight = keep(start, SPLIT)
    options = take_options(torch.optim.AdamW, {}, factor=1.0, nearest=True)
    run_adam(update_adam, weight, gradients, options)
    torch.testing.assert_close(read(weight), expected, rtol=2e-6, atol=2e-6)  # a step moves a weight by up to 0.02


@both
@storages
@sizes
@pytest.mark.parametrize(
    ("momentum", "dampening", "nesterov", "decay"),
    [(0.0, 0.0, False, 0.0), (0.0, 0.0, False, 0.1), (0.9, 0.3, False, 0.1), (0.9, 0.0, True, 0.0)],
)
def test_sgd_has_the_bits_of_torchs_loop(
    update_adam: object, update_sgd: Callable[..., None], storage: int, count: int, momentum: float, dampening: float,
    nesterov: bool, decay: float,
) -> None:  # fmt: skip
    start, gradients = draw(count, 12, torch.bfloat16 if storage != WIDE else torch.float32, seed=3)
    extra: dict[str, Any] = {"momentum": momentum, "dampening": dampening, "nesterov": nesterov, "weight_decay": decay}
    expected, state = run_torch(torch.optim.SGD, start, gradients, 0.37, lr=0.03, fused=False, **extra)
    weight, buffer = keep(start, storage), torch.full((count,), torch.nan) if momentum else None
    for t, gradient in enumerate(gradients):
        way = NONE if buffer is None else GOES_ON if t else BEGINS
        update_sgd(weight, gradient, buffer, SgdStep(momentum, 1 - dampening, -0.03, decay, 0.37, way, nesterov))
    assert torch.equal(bits(read(weight)), bits(expected))
    if buffer is not None:
        assert torch.equal(bits(buffer), bits(state["momentum_buffer"]))


@storages
@pytest.mark.parametrize("nearest", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_kernels_give_the_bits_of_the_truth_at_the_ends_of_fp32(
    storage: int, nearest: bool, dtype: torch.dtype
) -> None:
    tiny = [0.0, -0.0, 1e-45, -1e-40, 1e-38, 3e38, -3e38, 1.0, -1e-20, 65504.0]
    start, gradient = torch.tensor(list(itertools.product(tiny, tiny))).T.contiguous()
    found = []
    for update in (updates.update_adam_slowly, updates.update_adam):
        weight = keep(start, storage)
        options: dict[str, Any] = {
            "lr": 0.1,
            "betas": (0.9, 0.99),
            "eps": 1e-8,
            "decay": 0.1,
            "decoupled": True,
            "nearest": nearest,
        }
        found.append([read(weight), *run_adam(update, weight, [gradient.to(dtype)] * 3, options), weight.live])
    for truth, fast in zip(*found, strict=True):
        assert torch.equal(truth.nan_to_num(7.0), fast.nan_to_num(7.0))


def run_narrow(
    update: Callable[..., Any], weight: Weight, gradients: list[Tensor], options: dict[str, Any]
) -> tuple[Any, Any]:
    states: tuple[Any, Any] = make_zeros(weight.live.shape), make_zeros(weight.live.shape)
    for t, gradient in enumerate(gradients, 1):
        states = update(weight, gradient, *states, AdamStep.of(count=t, **options))
    return states


def assert_same_narrow(truth: tuple[Any, Any], fast: tuple[Any, Any]) -> None:
    for a, b in zip(truth, fast, strict=True):
        if isinstance(a, Tensor):  # not finite
            assert isinstance(b, Tensor) and torch.equal(a.nan_to_num(7.0), b.nan_to_num(7.0))
            continue
        assert isinstance(b, Quantized) and (a.signed, a.shape) == (b.signed, b.shape)
        assert torch.equal(bits(a.scales), bits(b.scales)) and torch.equal(a.codes, b.codes)


@storages
@pytest.mark.parametrize("count", [1, 7, BLOCK, 1029, 4097, 70_001])
@pytest.mark.parametrize("nearest", [True, False])
@pytest.mark.parametrize("name", ADAMS)
def test_states_in_8_bits_have_the_codes_of_the_truth(storage: int, count: int, nearest: bool, name: str) -> None:
    kind, extra = ADAMS[name]
    start, gradients = draw(count, 7, torch.float32 if storage == WIDE else torch.bfloat16)
    gradients = [gradients[0].abs(), *gradients[1:4], torch.zeros_like(gradients[0]), *gradients[5:]]
    options = take_options(kind, extra, factor=0.37, nearest=nearest)
    found = []
    for update in (updates.update_adam_narrow_slowly, updates.update_adam_narrow):
        weight = keep(start, storage)
        found.append((run_narrow(update, weight, gradients, options), read(weight), weight.live))
    assert_same_narrow(found[0][0], found[1][0])
    assert torch.equal(bits(found[0][1]), bits(found[1][1]))
    assert torch.equal(found[0][2], found[1][2])


def test_states_in_8_bits_move_weights_as_fp32_states_do_in_the_first_step_and_nearly_so_later() -> None:
    start, gradients = draw(5000, 6, torch.float32)
    options = take_options(torch.optim.AdamW, {}, factor=1.0, nearest=True)
    for steps, share in ((1, 0.0), (6, 0.1)):
        wide, narrow = keep(start, WIDE), keep(start, WIDE)
        run_adam(updates.update_adam, wide, gradients[:steps], options)
        run_narrow(updates.update_adam_narrow, narrow, gradients[:steps], options)
        assert (narrow.live - wide.live).norm() <= share * (wide.live - start).norm()


def test_each_number_gets_the_code_that_the_truth_gives_it() -> None:
    """Gradients are means where beta1 is 0. All fp16 numbers up to 1, what lies halfway between them, and the neighbours of
    both, with both signs and without."""
    halves = torch.arange(0x3C01, dtype=torch.int16).view(torch.float16).float()
    between = torch.cat([halves, (halves[1:] + halves[:-1]) / 2])
    numbers = torch.cat([between, between.nextafter(torch.tensor(0.0)), between.nextafter(torch.tensor(1.0))])
    blocks = torch.nn.functional.pad(numbers, (0, -len(numbers) % (BLOCK - 1))).view(-1, BLOCK - 1)
    positive = torch.cat([blocks, torch.ones(len(blocks), 1)], 1).view(-1)  # 1 is the scale of each
    options: dict[str, Any] = {
        "lr": 0.0,
        "betas": (0.0, 0.5),
        "eps": 1.0,
        "decay": 0.0,
        "decoupled": True,
        "nearest": True,
    }
    for gradient in (positive, positive * torch.tensor([1.0, -1.0]).repeat(len(positive) // 2)):
        exp_avg, _ = run_narrow(updates.update_adam_narrow, Weight(torch.zeros_like(gradient)), [gradient], options)
        expected = quantize(gradient)
        assert exp_avg.signed == expected.signed and torch.equal(exp_avg.codes, expected.codes)


@storages
@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf, 1e19, 1e30])
@pytest.mark.parametrize("name", ["AdamW", "Adam"])
def test_states_that_would_not_be_finite_are_left_to_the_truth(storage: int, bad: float, name: str) -> None:
    kind, extra = ADAMS[name]
    start, gradients = draw(40_000, 2, torch.float32)
    gradients[1][39_999] = bad
    options = take_options(kind, extra, factor=1.0, nearest=True)
    found = []
    for update in (updates.update_adam_narrow_slowly, updates.update_adam_narrow):
        weight = keep(start, storage)
        found.append((run_narrow(update, weight, gradients, options), read(weight).nan_to_num(7.0)))
    assert_same_narrow(found[0][0], found[1][0])
    assert torch.equal(found[0][1], found[1][1])
    assert isinstance(found[1][0][1], Quantized) == (bad == 1e19)


def test_of_a_group_only_what_does_not_fit_is_left_and_its_steps_are_not_counted() -> None:
    functions = updates.KERNELS.library.functions
    if functions is None:
        pytest.skip("no kernels here")
    step = AdamStep.of(lr=0.02, betas=(0.9, 0.99), eps=1e-6, decay=0.1, decoupled=True, count=1)
    sizes = [5000, 70_000, 1, 4096, 257]
    group: list[Any] = []
    expected: list[tuple[Tensor, Any]] = []
    for i, size in enumerate(sizes):
        start, (gradient,) = draw(size, 1, torch.float32, seed=i)
        if i == 1:
            gradient[-1] = torch.inf
        states = make_zeros(start.shape), make_zeros(start.shape)
        group.append((Weight(start.clone()), gradient, *states, torch.zeros(())))
        truth = Weight(start.clone())
        if i == 1:
            expected.append((truth.live, states))
        else:
            expected.append((truth.live, updates.update_adam_narrow_slowly(truth, gradient, *states, step)))
    found = updates.run_adam_narrow(functions, group, step)
    assert [states is not None for states in found] == [i != 1 for i in range(len(sizes))]
    for (weight, _, m, v, steps), after, (live, truth_states) in zip(group, found, expected, strict=True):
        assert steps.item() == (after is not None)
        assert torch.equal(bits(weight.live), bits(live))
        assert_same_narrow(truth_states, after or (m, v))


def test_codes_of_weights_that_do_not_lie_row_by_row_are_left_to_the_truth() -> None:
    with seeded(1):
        start, gradient = torch.randn(70, 64), torch.randn(70, 64)
    options = take_options(torch.optim.AdamW, {}, factor=1.0, nearest=True)
    turned, straight = Weight(start.T.contiguous().T), Weight(start.clone())
    assert updates.take_narrow(turned, gradient, make_zeros(start.shape), make_zeros(start.shape)) is None
    found = [run_narrow(updates.update_adam_narrow, w, [gradient] * 2, options) for w in (turned, straight)]
    assert_same_narrow(*found)
    assert torch.equal(turned.live, straight.live)


@both
@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_a_gradient_that_is_not_finite_is_seen_in_the_weight(
    update_adam: Callable[..., None], update_sgd: object, bad: float
) -> None:
    weight = keep(torch.ones(40), SPLIT)
    gradient = torch.ones(40)
    gradient[35] = bad
    options: dict[str, Any] = {"lr": 0.1, "betas": (0.9, 0.99), "eps": 1e-8, "decay": 0.0, "decoupled": True}
    run_adam(update_adam, weight, [gradient], options)
    assert weight.live.isnan().nonzero().tolist() == [[35]]


def test_tensors_that_lie_otherwise_are_left_to_the_truth_and_give_the_same() -> None:
    options: dict[str, Any] = {
        "lr": 0.1,
        "betas": (0.9, 0.99),
        "eps": 1e-8,
        "decay": 0.1,
        "decoupled": True,
        "count": 1,
    }
    with seeded(1):
        start, gradient = torch.randn(6, 4), torch.randn(4, 6).T
    found = []
    for update in (updates.update_adam_slowly, updates.update_adam):
        weight, states = Weight(start.clone()), torch.zeros(2, 6, 4)
        update(weight, gradient, states[0], states[1], AdamStep.of(**options))
        found.append(weight.live)
    assert torch.equal(*found)


def test_which_tensors_lie_alike() -> None:
    x = torch.zeros(2, 3, 4, 5)
    nhwc = x.to(memory_format=torch.channels_last)
    assert lie_alike(x, x.clone()) and lie_alike(nhwc, nhwc.clone())
    assert not lie_alike(x, nhwc) and not lie_alike(nhwc, x)
    gaps, over = torch.zeros(4, 4)[:, ::2], torch.zeros(1, 3).expand(3, 3)
    assert not lie_alike(gaps, gaps) and not lie_alike(over, over)
    assert not lie_alike(torch.zeros(6), torch.zeros(2, 3)) and not lie_alike(x, x.to_sparse())
    assert not lie_alike(torch.zeros(3, device="meta"))


def test_a_kernel_that_rounds_otherwise_is_not_used(monkeypatch: pytest.MonkeyPatch, tmp_path: Any) -> None:
    if updates.KERNELS.library.functions is None:
        pytest.skip("no kernels here")
    changes = (
        ("fmaf(a.second * g, g, v * a.kept)", "a.second * g * g + v * a.kept"),
        ("a.step * m / (root", "m / (root"),
        ("fmaf(s.step, g, w)", "w + s.step * g"),
        ("as_word(x + 0.5f) - 0x3F000000", "as_word(x + 0.5f) - 0x3EFFFFFF"),
        ("codes[i] | ((codes[i] == 0) & (x[i] > 0.0f))", "codes[i]"),
        ("negative |= step_mean(m[i], g[i], a) < 0.0f", "negative |= step_mean(m[i], g[i], a) > 0.0f"),
    )
    require_refusal(updates.KERNELS, changes, monkeypatch, tmp_path)


def test_weights_that_are_split_otherwise_are_noticed(monkeypatch: pytest.MonkeyPatch, tmp_path: Any) -> None:
    if updates.KERNELS.library.functions is None:
        pytest.skip("no kernels here")
    text = kernels.HEADER.read_text("utf-8")
    assert text.count("(word + 0x8000) >> 16") == 1
    (tmp_path / "kernels.h").write_text(text.replace("(word + 0x8000) >> 16", "word >> 16"), "utf-8")
    monkeypatch.setattr(kernels, "HEADER", tmp_path / "kernels.h")
    monkeypatch.setattr(kernels, "TRIES", (("-march=native",),))
    for found in (updates.KERNELS, rows.KERNELS):
        (tmp_path / found.source.name).write_text(found.source.read_text("utf-8"), "utf-8")
        monkeypatch.setattr(found, "source", tmp_path / found.source.name)
        library = found.find(tmp_path)
        assert library.functions is None and "does not compute what" in library.why


def test_a_group_of_many_sizes_is_shared_out_whole() -> None:
    functions = updates.KERNELS.library.functions
    if functions is None:
        pytest.skip("no kernels here")
    step = AdamStep.of(lr=0.02, betas=(0.9, 0.99), eps=1e-6, decay=0.1, decoupled=True, count=1)
    for sizes in ([0, 1, 70_000, 0, 0, 3, 1024, 1025, 0], [0], [0, 0, 5], [40_000] * 3, [2] * 400, [64] * 900):
        groups = []
        for _ in range(2):
            parts = [draw(size, 1, torch.float32, seed=i) for i, size in enumerate(sizes)]
            steps = torch.zeros(len(sizes)).unbind()
            groups.append(
                [
                    (Weight(w), g, torch.zeros_like(w), torch.zeros_like(w), n)
                    for (w, (g,)), n in zip(parts, steps, strict=True)
                ]
            )
        updates.run_adam(functions, groups[0], step)
        for weight, gradient, exp_avg, exp_avg_sq, _ in groups[1]:
            updates.update_adam_slowly(weight, gradient, exp_avg, exp_avg_sq, step)
        for ours, theirs in zip(*groups, strict=True):
            assert torch.equal(ours[0].live, theirs[0].live) and torch.equal(ours[2], theirs[2])
            assert torch.equal(ours[3], theirs[3]) and ours[4].item() == 1
