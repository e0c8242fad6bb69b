"""One of two processes that train together, started as torchrun starts them. What it is told on standard input, both are told.

test -> {"scenario": name, "folder": path, ...}     both run the function of that name with the rest as arguments
rank -> done                                        what it returned lies in folder/RANK.pt
rank -> Kind: text                                  of an error
"""

import datetime
import json
import math
import os
import sys
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, distributed, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import LBFGS, SGD, AdamW

from halfstep import GradScaler
from halfstep.control.sensitivity import Choice
from halfstep.distributed import Alone
from halfstep.plan import Plan
from halfstep.records import StepOutcome
from halfstep.stepper import Stepper, prepare
from halfstep.stepping import plan_in_force
from helpers import SPLIT, copy_weights, make_cnn, make_mlp, make_regression_batches, seeded

RANK, STEPS = int(os.environ.get("RANK", "0")), 20
Result = dict[str, Any]
Batches = list[tuple[Tensor, Tensor]]


def average_by_hand(model: nn.Module) -> None:
    """As a loop without a wrapper does it, in the backward pass."""

    def average(parameter: Tensor) -> None:
        if parameter.grad is not None:
            distributed.all_reduce(parameter.grad)
            parameter.grad /= distributed.get_world_size()

    for parameter in model.parameters():
        parameter.register_post_accumulate_grad_hook(average)


def wrap(model: nn.Module, how: str) -> nn.Module:
    """The model as its loop calls it."""
    if how == "ddp":
        return DistributedDataParallel(model)
    if how == "by hand":
        average_by_hand(model)
    return model


def make_batches(count: int = STEPS) -> Batches:
    """Each rank's own."""
    return make_regression_batches(2 * count)[RANK::2]


def describe(outcome: StepOutcome) -> tuple[Any, ...]:
    """What has to be the same on every rank."""
    return (outcome.status, outcome.step, outcome.scale_before, outcome.scale_after, outcome.cause, outcome.layer,
            outcome.recovery, outcome.tensors, repr(outcome.gradient_norm))  # fmt: skip


def take_steps(stepper: Stepper, call: nn.Module, batches: Batches, bad: dict[int, str]) -> list[Any]:
    """The usual loop. What is `bad` is so on the second rank alone: "input", or "loss", whose gradients are finite."""
    outcomes = []
    for number, (x, y) in enumerate(batches):
        fault = bad.get(number, "") if RANK == 1 else ""
        with stepper.autocast():
            loss = F.mse_loss(call(x * math.nan if fault == "input" else x).float(), y)
        outcomes.append(describe(stepper.step(loss + math.nan if fault == "loss" else loss)))
    return outcomes


def train(*, mode: str, how: str, accumulate: int = 1, fault: str = "input", bad: list[int]) -> Result:
    model = make_mlp()
    stepper = prepare(model, AdamW(model.parameters(), lr=1e-2), mode, accumulate=accumulate, clip=0.5)
    before = copy_weights(model)
    outcomes = take_steps(stepper, wrap(model, how), make_batches(), dict.fromkeys(bad, fault))
    return {"weights": copy_weights(model), "before": before, "outcomes": outcomes, "scale": stepper.scale}


def recover(*, policy: str) -> Result:
    """Three losses in a row that are not finite, on one rank."""
    model = make_mlp()
    stepper = prepare(model, SGD(model.parameters(), lr=0.1), "bf16-mixed", recovery=policy)
    stepper.recovery_rule = replace(stepper.recovery_rule, every=4)
    outcomes = take_steps(stepper, wrap(model, "ddp"), make_batches(), dict.fromkeys((7, 8, 9), "loss"))
    return {"weights": copy_weights(model), "outcomes": outcomes}


def batch_norm() -> Result:
    """Running statistics of one rank must not keep what a bad batch left there; nobody waits for a rank that looks for it."""
    model = make_cnn()
    stepper = prepare(model, SGD(model.parameters(), lr=0.1), "32-true")
    with seeded(RANK):
        batches = [(torch.randn(4, 3, 8, 8), torch.randn(4, 3)) for _ in range(6)]
    outcomes = take_steps(stepper, DistributedDataParallel(model), batches, {2: "input"})
    statistics = [bool(torch.isfinite(value).all()) for value in model.buffers()]
    return {"weights": {n: p.detach() for n, p in model.named_parameters()}, "outcomes": outcomes, "finite": statistics}


def no_sync(*, mode: str) -> Result:
    """Windows that are averaged once, in the backward pass of their last micro-batch."""
    model = make_mlp()
    stepper = prepare(model, SGD(model.parameters(), lr=0.1), mode, accumulate=2)
    call, outcomes = DistributedDataParallel(model), []
    for number, (x, y) in enumerate(make_batches(4)):
        with nullcontext() if number % 2 else call.no_sync(), stepper.autocast():
            outcomes.append(describe(stepper.step(F.mse_loss(call(x).float(), y))))
    return {"weights": copy_weights(model), "outcomes": outcomes}


class Seeing(LBFGS):
    """Notes the losses that it is told."""

    def step(self, closure: Any) -> Any:  # type: ignore[override]
        def note() -> float:
            self.seen.append(closure())
            return self.seen[-1]

        self.seen: list[float] = getattr(self, "seen", [])
        return super().step(note)


def lbfgs(*, mode: str, how: str, bad: int) -> Result:
    """The line search looks at losses; evaluation number `bad` is not finite on one rank."""
    model, ((x, y),) = make_mlp(), make_batches(1)
    optimizer = Seeing(model.parameters(), max_iter=4, line_search_fn="strong_wolfe")
    stepper = prepare(model, optimizer, mode)
    call, outcomes, calls = wrap(model, how), [], 0

    def closure() -> Tensor:
        nonlocal calls
        calls += 1
        return F.mse_loss(call(x).float(), y) + (math.nan if calls == bad and RANK == 1 else 0.0)

    for _ in range(4):
        outcomes.append(describe(stepper.step(closure=closure)))
    return {"weights": copy_weights(model), "outcomes": outcomes, "calls": calls, "seen": optimizer.seen}


class OwnSGD(SGD):
    """As a loop may bring its own optimizer."""


def own_optimizer(*, mode: str, how: str) -> Result:
    model = make_mlp()
    stepper = prepare(model, OwnSGD(model.parameters(), lr=0.1), mode)
    outcomes = take_steps(stepper, wrap(model, how), make_batches(4), {})
    return {"weights": copy_weights(model), "outcomes": outcomes}


def scaler(*, how: str, torchs: bool, fused: bool, bad: list[int]) -> Result:
    """A loop with a GradScaler. By hand it unscales, looks at its own gradients, and averages them then."""
    model = make_mlp()
    kind: Callable[..., torch.amp.GradScaler] = torch.amp.GradScaler if torchs else GradScaler
    optimizer, scales = AdamW(model.parameters(), lr=1e-2, fused=fused), []
    scaler, call = kind("cpu", 2.0**10), wrap(model, how if how == "ddp" else "")
    for number, (x, y) in enumerate(make_batches()):
        optimizer.zero_grad()
        with torch.autocast("cpu", torch.float16):
            loss = F.mse_loss(call(x).float(), y)
        scaler.scale(loss * (math.inf if number in bad and RANK == 1 else 1.0)).backward()
        scaler.unscale_(optimizer)
        if how == "by hand":
            for parameter in model.parameters():
                assert parameter.grad is not None
                clean = parameter.grad.nan_to_num(0.0, 0.0, 0.0)
                distributed.all_reduce(clean)
                parameter.grad = clean / 2
        scaler.step(optimizer)
        scaler.update()
        scales.append(scaler.get_scale())
    return {"weights": copy_weights(model), "scales": scales}


def scaler_without_gradients() -> Result:
    """The second rank has none in its second step, and one that is not finite in its third."""
    model, scales = make_mlp(), []
    optimizer, scaler = SGD(model.parameters(), lr=0.1), GradScaler("cpu", 2.0**10)
    for number, (x, y) in enumerate(make_batches(4)):
        optimizer.zero_grad()
        scaler.scale(F.mse_loss(model(x), y) * (math.inf if RANK == 1 and number == 2 else 1.0)).backward()
        if RANK == 1 and number == 1:
            optimizer.zero_grad()
        scaler.step(optimizer)
        scaler.update()
        scales.append(scaler.get_scale())
    return {"scales": scales, "applied": scaler.get_outcome().step}


def scaler_closure() -> Result:
    model, ((x, y),) = make_mlp(), make_batches(1)
    optimizer = LBFGS(model.parameters(), max_iter=4, line_search_fn="strong_wolfe")
    scaler, call, calls = GradScaler("cpu", 2.0**10), DistributedDataParallel(model), 0

    def closure() -> Tensor:
        nonlocal calls
        calls += 1
        optimizer.zero_grad()
        loss = F.mse_loss(call(x), y)
        scaler.scale(loss).backward()
        return loss

    for _ in range(4):
        scaler.step(optimizer, closure)
        scaler.update()
    return {"weights": copy_weights(model), "calls": calls}


def auto() -> Result:
    """Each rank measures something else; the first one's word holds."""
    plans = [Plan.parse(SPLIT), Plan.preset("32-true")]
    plan_in_force.choose_plan = lambda *_, **__: Choice(plan=plans[RANK], why="by hand", seconds=0.0)
    model, batches = make_mlp(), make_batches(3)
    stepper = prepare(model, SGD(model.parameters(), lr=0.1), "auto")
    try:
        DistributedDataParallel(model)(batches[0][0])
    except ValueError as error:
        refused = str(error)
    with stepper.autocast():
        model(batches[0][0])
    outcomes = take_steps(stepper, DistributedDataParallel(model), batches, {})
    return {"weights": copy_weights(model), "outcomes": outcomes, "plan": str(stepper.plan), "refused": refused}


def apart() -> Result:
    """Ranks that train models of their own, and take different numbers of steps."""
    model = make_mlp(RANK)
    stepper = prepare(model, SGD(model.parameters(), lr=0.1), "32-true", ranks=Alone())
    outcomes = take_steps(stepper, model, make_batches()[: 5 + RANK], {2: "loss"})
    return {"outcomes": outcomes}


def not_averaged() -> Result:
    model = make_mlp()
    stepper = prepare(model, SGD(model.parameters(), lr=0.1), "32-true")
    before = copy_weights(model)
    try:
        take_steps(stepper, model, make_batches(1), {})
    except ValueError as error:
        dropped = stepper.flush() is None and all(p.grad is None for p in model.parameters())
        return {"refused": str(error), "weights": copy_weights(model), "before": before, "dropped": dropped}
    return {}


def mistakes() -> Result:
    """What `prepare` says of them."""
    model = make_mlp()
    refused = []
    for given, options in ((model, {"release": True}), (DistributedDataParallel(model), {})):
        try:
            prepare(given, SGD(model.parameters(), lr=0.1), "32-true", **options)  # type: ignore[arg-type]
        except ValueError as error:
            refused.append(str(error))
    return {"refused": refused}


def main() -> None:
    distributed.init_process_group("gloo", timeout=datetime.timedelta(seconds=60))
    for line in sys.stdin:
        order = json.loads(line)
        try:
            result = globals()[order.pop("scenario")](**order.pop("arguments"))
            torch.save(result, Path(order["folder"]) / f"{RANK}.pt")
            print("done", flush=True)
        except Exception as error:
            print(f"{type(error).__name__}: {error}".replace("\n", " "), flush=True)
    distributed.destroy_process_group()


if __name__ == "__main__":
    main()
