"""A step that goes by what the one before has looked at: the same bits whatever a user changes in between."""

import copy
import pickle
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import Adam, AdamW, Optimizer

from halfstep.mechanisms import master_weights
from halfstep.mechanisms.master_weights import MasterWeights
from halfstep.mechanisms.optimizer_states import NarrowStates
from halfstep.numerics import repeated_steps
from halfstep.numerics.repeated_steps import RepeatedStep, RepeatedSteps
from halfstep.numerics.updates import KERNELS
from helpers import bits, narrow_all, seeded

SHAPES = [(32, 5), (64,), (4, 8, 2, 2), (33,), (), (0, 3)]
pytestmark = pytest.mark.skipif(KERNELS.library.functions is None, reason=KERNELS.library.why)


@dataclass
class Run:
    """A training run in the middle of which something happens."""

    params: list[nn.Parameter]
    masters: MasterWeights
    optimizer: Optimizer
    gradients: list[Tensor]  # of the next step

    @property
    def group(self) -> dict[str, Any]:
        return self.optimizer.param_groups[0]

    @property
    def state(self) -> dict[str, Any]:
        """Of the first parameter."""
        held: dict[str, Any] = self.optimizer.state[self.params[0]]
        return held

    def replace_gradient(self, number: int, gradient: Tensor) -> None:
        self.gradients[number] = gradient


def add_group(run: Run) -> None:
    run.params.append(nn.Parameter(torch.ones(3)))
    run.optimizer.add_param_group({"params": [run.params[-1]], "lr": 0.5})
    run.gradients.append(torch.ones(3))


def move_to_the_other_group(run: Run) -> None:
    one, other = (group["params"] for group in run.optimizer.param_groups)
    other.insert(0, one.pop())


def swap_groups(run: Run) -> None:
    one, other = (group["params"] for group in run.optimizer.param_groups)
    one[0], other[0] = other[0], one[0]


def load(run: Run) -> None:
    saved = copy.deepcopy(run.optimizer.state_dict())
    for state in saved["state"].values():
        state["exp_avg"] = state["exp_avg"].float() + 1.0
    dtypes = [p.dtype for p in run.params]
    with torch.no_grad():
        run.optimizer.load_state_dict(saved)
    for parameter, dtype in zip(
        run.params, dtypes, strict=True
    ):  # which casts states to 16 bits, as the stepper undoes
        if dtype is torch.bfloat16:
            for name in ("exp_avg", "exp_avg_sq"):
                run.optimizer.state[parameter][name] = run.optimizer.state[parameter][name].float()


def lay_out_otherwise(tensor: Tensor) -> Tensor:
    return tensor.t().contiguous().t()


def replace_state_data(run: Run) -> None:
    run.state["exp_avg"].data = run.state["exp_avg"] + 1.0


def replace_state_layout(run: Run) -> None:
    run.state["exp_avg"].data = lay_out_otherwise(run.state["exp_avg"])


def swap_states(run: Run) -> None:
    run.state["exp_avg"], run.state["exp_avg_sq"] = run.state["exp_avg_sq"], run.state["exp_avg"].abs()


def begin_again(run: Run) -> None:
    del run.optimizer.state[run.params[0]]


def replace_data(run: Run) -> None:
    run.params[0].data = torch.full_like(run.params[0], 3.0).detach()


def replace_layout(run: Run) -> None:
    run.params[0].data = lay_out_otherwise(run.params[0].detach() * 2)


def write_in_place(run: Run) -> None:
    with torch.no_grad():
        run.params[0].fill_(3.0)


def set_steps(run: Run) -> None:
    run.state["step"].fill_(40)


def set_all_steps(run: Run) -> None:
    for state in run.optimizer.state.values():
        state["step"].fill_(40)


def widen_one(run: Run) -> None:
    run.masters.widen(run.params[0])
    run.gradients[0] = run.gradients[0].float()


def narrow_one(run: Run) -> None:
    run.masters.widen(run.params[0])
    run.masters.narrow(run.params[0], torch.bfloat16, "fp32")


def register_hook(run: Run) -> None:
    run.optimizer.register_step_post_hook(lambda *_: None)


CHANGES: dict[
    str, tuple[Callable[[Run], object], bool | None]
] = {  # and whether the step after it can go by the one before
    "nothing": (lambda run: None, True),
    "lr": (lambda run: run.group.update(lr=0.3), True),
    "betas and decay": (lambda run: run.group.update(betas=(0.5, 0.6), weight_decay=0.0), True),
    "the bits of torch's loop": (lambda run: run.group.update(fused=False), True),
    "maximize": (lambda run: run.group.update(maximize=True), False),
    "a hook": (register_hook, False),
    "a gradient is None": (lambda run: run.gradients.pop(), False),
    "a gradient of another width": (lambda run: run.replace_gradient(0, run.gradients[0].float() + 1e-3), None),
    "a gradient that lies otherwise": (
        lambda run: run.replace_gradient(0, lay_out_otherwise(run.gradients[0])),
        False,
    ),
    "a group is added": (add_group, False),
    "a parameter in another group": (move_to_the_other_group, False),
    "parameters swap groups": (swap_groups, False),
    "a checkpoint is loaded": (load, True),
    "a state's data": (replace_state_data, True),
    "a state's layout": (replace_state_layout, False),
    "states are swapped": (swap_states, True),
    "a state begins again": (begin_again, False),
    "another tensor as a state": (lambda run: run.state.update(exp_avg=run.state["exp_avg"] + 1.0), True),
    "a weight's data": (replace_data, None),
    "a weight's layout": (replace_layout, False),
    "a weight in place": (write_in_place, None),
    "one has made more steps": (set_steps, False),
    "all have made more steps": (set_all_steps, True),
}
BEHIND_MASTERS = {"a weight is wide again": (widen_one, False), "a weight behind another master": (narrow_one, False)}
CASES = [("none", name) for name in CHANGES] + [("split", name) for name in (*CHANGES, *BEHIND_MASTERS)]


@pytest.fixture
def taken(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """Whether each step went by the one before."""
    steps: list[bool] = []

    def note(self: RepeatedSteps, *args: Any) -> bool:
        steps.append(inner(self, *args))
        return steps[-1]

    inner = RepeatedSteps.take
    monkeypatch.setattr(RepeatedSteps, "take", note)
    return steps


def begin(kind: str, build: Callable[..., Optimizer] = AdamW) -> Run:
    with seeded(0):
        tensors = [torch.randn(shape) for shape in SHAPES]
    tensors[2] = tensors[2].to(memory_format=torch.channels_last)
    params = [nn.Parameter(tensor) for tensor in tensors]
    masters = narrow_all(MasterWeights(), params, kind)
    groups = [{"params": params[:3]}, {"params": params[3:], "lr": 0.03}]
    return Run(params, masters, build(groups, lr=0.01, weight_decay=0.1, fused=True), [])


def train(run: Run, change: Callable[[Run], Any], steps: int = 6) -> list[Tensor]:
    """Weights and states after steps, before the fourth of which something changes."""
    noise = torch.Generator().manual_seed(1)
    for number in range(steps):
        run.gradients = [
            torch.empty_like(p, requires_grad=False).copy_(torch.randn(p.shape, generator=noise)) for p in run.params
        ]
        if number == 3:
            change(run)
        run.masters.step(run.optimizer, dict(zip(run.params, run.gradients, strict=False)), 0.3)
    states = [value for p in run.params for _, value in sorted(run.optimizer.state.get(p, {}).items())]
    return [run.masters.read(p) for p in run.params] + states


@pytest.mark.parametrize(("kind", "name"), CASES)
def test_whatever_changes_between_steps_the_bits_are_those_of_looking_at_everything(
    monkeypatch: pytest.MonkeyPatch, taken: list[bool], kind: str, name: str
) -> None:
    change, goes_on = (CHANGES | BEHIND_MASTERS)[name]
    ours = train(begin(kind), change)
    seen = taken[:]
    monkeypatch.setattr(RepeatedStep, "of", lambda *_: None)
    theirs = train(begin(kind), change)
    for a, b in zip(ours, theirs, strict=True):
        assert torch.equal(bits(a.detach()), bits(b.detach()))
    assert seen[:3] == [False, True, True]
    if goes_on is not None and name != "a hook":
        assert seen[3] is goes_on
    if name == "nothing":
        assert seen == [False] + [True] * 5


@pytest.mark.parametrize("build", [AdamW, Adam])
def test_steps_that_are_alike_have_torchs_bits(taken: list[bool], build: Any) -> None:
    found = []
    for one_pass in (True, False):
        run = begin("split", build)
        run.masters.fused = one_pass
        for group in run.optimizer.param_groups:
            group["fused"] = False
        found.append(train(run, lambda _: None, 20))
    assert taken == [False] + [True] * 19
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def test_versions_move_schedulers_are_told_and_no_gradient_is_held(taken: list[bool]) -> None:
    run = begin("none")
    scheduler = torch.optim.lr_scheduler.StepLR(run.optimizer, 1, gamma=0.5)
    versions = []
    for _ in range(3):
        given = {p: torch.ones_like(p) for p in run.params}
        run.masters.step(run.optimizer, given)
        scheduler.step()
        versions.append(run.params[0]._version)
        assert given == {}
    assert taken == [False, True, True] and versions[0] < versions[1] < versions[2]
    assert run.group["lr"] == pytest.approx(0.01 / 8)


def test_parameters_that_come_one_by_one_keep_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    run = begin("split")
    monkeypatch.setattr(RepeatedStep, "of", lambda *_: pytest.fail("kept"))
    for _ in range(2):
        for parameter in run.params:
            run.masters.step(run.optimizer, {parameter: torch.ones_like(parameter)})


def test_without_torchs_guards_every_step_looks_at_every_tensor(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(repeated_steps, "TensorGuards", None)
    weight = nn.Parameter(torch.ones(4))
    optimizer, masters = AdamW([weight]), MasterWeights()
    masters.step(optimizer, {weight: torch.ones(4)})
    assert RepeatedStep.of(optimizer, {weight: torch.ones(4)}, {}) is None


def test_states_of_equal_parameters_stay_with_theirs_in_another_order() -> None:
    def train(reorder: bool) -> list[Tensor]:
        params = [nn.Parameter(torch.full((64,), value)) for value in (1.0, 2.0)]
        masters, optimizer = MasterWeights(), AdamW(params, lr=0.1)
        for number in range(4):
            if reorder and number == 2:
                optimizer.state[params[0]] = optimizer.state.pop(params[0])  # now behind that of the other
            gradients = [torch.full((64,), value * (number + 1)) for value in (1.0, -3.0)]
            masters.step(optimizer, dict(zip(params, gradients, strict=True)))
        return [p.detach() for p in params]

    assert all(map(torch.equal, train(reorder=True), train(reorder=False)))


@pytest.mark.parametrize("kind", ["none", "split"])
def test_where_no_step_is_like_the_one_before_little_is_noted(
    monkeypatch: pytest.MonkeyPatch, taken: list[bool], kind: str
) -> None:
    noted: list[int] = []
    inner = RepeatedStep.of

    def note(*args: Any) -> RepeatedStep | None:
        noted.append(len(taken))
        return inner(*args)

    monkeypatch.setattr(RepeatedStep, "of", note)
    run = begin(kind)
    for number in range(64):  # as with gradients that come and go
        given = {p: torch.ones_like(p) for p in run.params}
        del given[run.params[number % 2]]
        run.masters.step(run.optimizer, given)
    assert len(noted) < 8
    for _ in range(70):
        run.masters.step(run.optimizer, {p: torch.ones_like(p) for p in run.params})
    assert taken[-2:] == [True, True]


def test_after_steps_that_were_alike_one_that_is_not_is_noted_at_once(taken: list[bool]) -> None:
    run = begin("split")
    for missing in (None, None, None, 0, 0, 0, None, None, None):
        given = {p: torch.ones_like(p) for p in run.params}
        if missing is not None:
            del given[run.params[missing]]
        run.masters.step(run.optimizer, given)
    assert taken == [False, True, True] * 3


def test_nothing_is_noted_of_weights_that_are_kept_in_another_way() -> None:
    run = begin("split")
    for change in (run.masters.widen, lambda p: run.masters.narrow(p, torch.bfloat16, "fp32")):
        run.masters.step(run.optimizer, {p: torch.ones_like(p) for p in run.params})
        assert len(run.masters._repeated) == 1
        change(run.params[0])
        assert len(run.masters._repeated) == 0


@pytest.mark.parametrize("copy_it", [copy.deepcopy, lambda masters: pickle.loads(pickle.dumps(masters))])
def test_masters_can_be_copied_between_steps(copy_it: Callable[[MasterWeights], MasterWeights]) -> None:
    run = begin("split")
    run.masters.step(run.optimizer, {p: torch.ones_like(p) for p in run.params})
    copied = copy_it(run.masters)
    assert len(copied) == len(run.params) and len(copied._repeated) == 0


def test_a_look_at_stalls_lists_the_parameters_once(monkeypatch: pytest.MonkeyPatch) -> None:
    listed: list[Optimizer] = []
    inner = master_weights._find_places

    def find(optimizer: Optimizer) -> Any:
        listed.append(optimizer)
        return inner(optimizer)

    monkeypatch.setattr(master_weights, "_find_places", find)
    run = begin("split")
    run.masters.step(run.optimizer, {p: torch.ones_like(p) for p in run.params}, watch=True)
    assert listed == [run.optimizer]


def test_of_states_in_8_bits_nothing_is_noted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(RepeatedStep, "of", lambda *_: pytest.fail("noted"))
    params = [nn.Parameter(torch.ones(64, 64)) for _ in range(2)]
    optimizer, masters = AdamW(params), MasterWeights()
    widened = NarrowStates(optimizer).widened
    for _ in range(2):
        masters.step(optimizer, {p: torch.ones_like(p) for p in params}, widened=widened)
