"""Train for long while everything goes wrong, and prove that nothing is left of it.

    python benchmarks/soak.py                    writes benchmarks/results/soak.json; about half an hour on one quiet core

A small network on scikit-learn's digits, 20,000 steps, six seeds, in four ways (the last two from one seed):

    clean     nothing goes wrong
    faulty    5 % of the steps have a gradient that is not finite, 1 % more a batch with NaN in it
    without   the batches of those steps are never shown; everything else is the same
    killed    as faulty, in a process that is killed (SIGKILL) at random moments and goes on from its last checkpoint

Expected: killed equals faulty and faulty equals without, bit for bit, in weights, optimizer state and schedule; and the
accuracy of faulty is equivalent to that of clean over the seeds. Under 16-mixed the faults drive the loss scale down, so
faulty differs from without by what underflows, and only the accuracy is compared.
"""

import argparse
import datetime
import hashlib
import json
import platform
import random
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from halfstep.checkpoint import load_checkpoint, save_checkpoint
from halfstep.comparison import judge_equivalence
from halfstep.machine.hardware import name_machine
from halfstep.stepper import Stepper, prepare
from halfstep.tasks.image_classification import ImageClassification, Options
from halfstep.training import TrainSettings, build_optimizer, build_schedule

ROOT = Path(__file__).parent.parent
STEPS, EVERY, MARGIN = 20_000, 500, 0.5
PLANS = {"split": "compute=bf16 storage=bf16 master=split", "16-mixed": "16-mixed"}


class Overflow(torch.autograd.Function):
    """The identity, whose gradient is infinite."""

    @staticmethod
    def forward(_context: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(_context: Any, *gradients: Tensor) -> Tensor:
        return torch.full_like(gradients[0], torch.inf)


def find_fault(seed: int, step: int) -> str:
    """What goes wrong in a step: a pure function, so that a killed run meets the same faults again."""
    drawn = random.Random(seed * 1_000_003 + step).random()
    return "gradient" if drawn < 0.05 else "batch" if drawn < 0.06 else ""


class Digits(ImageClassification):
    """The digits, with a network that has running statistics and dropout to be kept straight."""

    def build_model(self) -> nn.Module:
        torch.manual_seed(self.settings.seed)
        return nn.Sequential(
            nn.Flatten(), nn.Linear(64, 64), nn.BatchNorm1d(64), nn.ReLU(), nn.Dropout(0.1), nn.Linear(64, 10)
        )


def build(plan: str, seed: int) -> tuple[Digits, Stepper]:
    settings = TrainSettings(
        steps=STEPS, batch_size=32, lr=1e-3, schedule="cosine", warmup=200, seed=seed, weight_decay=0.01
    )
    task = Digits(Options(), settings)
    model = task.build_model()
    optimizer = build_optimizer(model, settings, fused=False)
    return task, prepare(model, optimizer, PLANS[plan], schedulers=build_schedule(optimizer, settings), clip=1.0)


def train(arm: str, plan: str, seed: int, folder: Path) -> dict[str, Any]:
    """Train one arm, from its checkpoint where it has one."""
    task, stepper = build(plan, seed)
    path, done = folder / f"{arm}-{plan}-{seed}.safetensors", 0
    if path.exists():
        state = load_checkpoint(path)
        stepper.load_state_dict(state["stepper"])
        stepper.model.load_state_dict(state["model"])
        stepper.optimizer.load_state_dict(state["optimizer"])
        stepper.schedulers[0].load_state_dict(state["schedule"])
        done = state["done"]
    for step in range(done + 1, STEPS + 1):
        fault = find_fault(seed, step) if arm != "clean" else ""
        if not (fault and arm == "without"):
            make_step(task, stepper, step, fault)
        if arm == "killed" and step % EVERY == 0:
            save_checkpoint(path, collect_state(stepper, step))
    stepper.model.eval()
    with torch.no_grad(), stepper.autocast():
        metric = task.evaluate(stepper.model)
    return {"accuracy": metric, "applied": stepper.applied, "skipped": stepper.skipped, "scale": stepper.scale,
            "fingerprint": fingerprint(collect_state(stepper, 0)["model"], stepper)}  # fmt: skip


def make_step(task: Digits, stepper: Stepper, step: int, fault: str) -> None:
    x, y = task.make_batch(step)
    if fault == "batch":
        x[0, 0, 4, 4] = torch.nan
    torch.manual_seed(step)  # of the dropout
    stepper.model.train()
    with stepper.autocast():
        logits = stepper.model(x)
        loss = nn.functional.cross_entropy(Overflow.apply(logits) if fault == "gradient" else logits, y)
    outcome = stepper.step(loss)
    if bool(fault) != outcome.skipped and stepper.plan.loss_scale == "none":
        raise AssertionError(f"step {step} had fault '{fault}' and was {outcome.status}: {outcome.cause}")


def collect_state(stepper: Stepper, done: int) -> dict[str, Any]:
    return {
        "done": done, "stepper": stepper.state_dict(), "model": dict(stepper.model.state_dict()),
        "optimizer": stepper.optimizer.state_dict(), "schedule": stepper.schedulers[0].state_dict(),
    }  # fmt: skip


def fingerprint(weights: dict[str, Tensor], stepper: Stepper) -> str:
    """A hash over every bit of weights, buffers, optimizer state and learning rate."""
    digest = hashlib.sha256()
    states = [value for state in stepper.optimizer.state.values() for value in state.values()]
    for tensor in [*weights.values(), *states]:
        digest.update(tensor.detach().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    digest.update(repr([group["lr"] for group in stepper.optimizer.param_groups]).encode())
    return digest.hexdigest()


def train_killed(plan: str, seed: int, folder: Path, kills: int) -> dict[str, Any]:
    """Run the killed arm in processes of its own; each but the last is killed after a random while."""
    noise, result = random.Random(seed), folder / f"killed-{plan}-{seed}.json"
    done = 0
    while not result.exists():
        words = [sys.executable, __file__, "--child", plan, str(seed), str(folder), "--steps", str(STEPS)]
        child = subprocess.Popen(words)
        if done < kills:
            time.sleep(noise.uniform(3.0, 9.0))
            child.kill()
            done += 1
        child.wait()
    return json.loads(result.read_text()) | {"kills": done}


def main() -> None:
    global STEPS
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--child", nargs=3, metavar=("PLAN", "SEED", "FOLDER"), help=argparse.SUPPRESS)
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--seeds", type=int, default=6)
    parser.add_argument("--kills", type=int, default=8)
    options = parser.parse_args()
    STEPS = options.steps
    torch.set_num_threads(1)
    if options.child:
        plan, seed, folder = options.child
        result = train("killed", plan, int(seed), Path(folder))
        (Path(folder) / f"killed-{plan}-{seed}.json").write_text(json.dumps(result))
        return
    run(options.seeds, options.kills)


def run(seeds: int, kills: int) -> None:
    import tempfile

    results: dict[str, Any] = {}
    for plan in PLANS:
        arms: dict[str, list[dict[str, Any]]] = {"clean": [], "faulty": [], "without": [], "killed": []}
        for seed in range(seeds):
            with tempfile.TemporaryDirectory() as folder:
                for arm in ("clean", "faulty", *(["without"] if seed == 0 else [])):
                    arms[arm].append(train(arm, plan, seed, Path(folder)))
                if seed == 0:
                    arms["killed"].append(train_killed(plan, seed, Path(folder), kills))
        differences = [f["accuracy"] - c["accuracy"] for f, c in zip(arms["faulty"], arms["clean"], strict=True)]
        verdict = judge_equivalence(differences, MARGIN, higher_is_better=True)
        results[plan] = {
            "arms": arms,
            "faulty_to_clean": {
                "verdict": verdict.word,
                "mean": verdict.difference,
                "interval": verdict.interval,
                "margin": MARGIN,
            },
            "faulty_is_without": arms["faulty"][0]["fingerprint"] == arms["without"][0]["fingerprint"],
            "killed_is_faulty": arms["killed"][0]["fingerprint"] == arms["faulty"][0]["fingerprint"],
        }
        print(plan, json.dumps({k: v for k, v in results[plan].items() if k != "arms"}), flush=True)
    head = {"command": f"python benchmarks/soak.py --seeds {seeds}", "date": datetime.date.today().isoformat(),
            "machine": name_machine(),
            "python": platform.python_version(), "torch": torch.__version__, "steps": STEPS}  # fmt: skip
    path = ROOT / "benchmarks" / "results" / "soak.json"
    path.write_text(json.dumps(head | {"plans": results}, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
