"""The speed benchmark: what follows from runs, and that every workload trains in every arm, at reduced sizes."""

import itertools
import json
import math
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from torch import nn
from torch._dynamo.utils import counters

import compare_results
import merge_results
import scaling
import speed
import speed_worker
from halfstep.machine.hardware import probe_hardware
from halfstep.records import HardwareProfile
from halfstep.stepping import plan_in_force
from speed_summary import average_geometrically, judge, show, show_means, summarize
from speed_worker import ARMS, TorchTrainer, build_trainers, count_products, measure
from turns import END, Process, take_turns
from workloads.catalogue import QUICK, WORKLOADS
from workloads.synthetic import ClickLog, MarkovText
from workloads.template import MARGIN_SHARE, has_fallen

RATE = 100.0  # GFLOP/s in bf16
SMALL = {name: workload(0, small=True) for name, workload in WORKLOADS.items()}
EAGER = [name for name, arm in ARMS.items() if not arm.compiled]


def make_run(
    arm: str,
    number: int,
    step_ms: float,
    loss: float,
    *,
    speeds: Sequence[float] = (1.0,),
    spin_ms: float = 10.0,
    **more: Any,
) -> dict[str, Any]:
    """speeds: of the machine in each turn."""
    start = {"start_loss": 4.0, "flops": 10**9} if arm == "fp32" else {}
    turns = [
        {
            "step_ms": step_ms / speed,
            "bf16": RATE * speed,
            "bf16_sustained": RATE * speed / 2,
            "spin_ms": spin_ms / speed,
        }
        for speed in speeds
    ]
    return {
        "workload": "w", "arm": arm, "round": number, "step_ms": step_ms, "cpu_ms": step_ms, "loss": loss, "setup_s": 1.0,
        "peak_memory_bytes": 100 + number, "turns": turns, "load": 0.1,
    } | start | more  # fmt: skip


def make_runs() -> list[dict[str, Any]]:
    """Three rounds: fp32 falls from 4 to 2, so the margin is 0.04."""
    runs = []
    for number, noise in enumerate((0.0, 0.1, -0.1)):
        runs.append(make_run("fp32", number, 30.0 + number, 2.0 + noise))
        runs.append(make_run("torch-amp", number, 20.0, 2.1 + noise))
        runs.append(make_run("halfstep", number, 10.0, 2.001 + noise + number / 1000))
    return runs


@pytest.fixture(scope="module")
def profile() -> HardwareProfile:
    """Of this machine, whatever it is doing; the user's cache is left alone."""
    return probe_hardware(quick=True)


@pytest.fixture(autouse=True)
def one_thread(profile: HardwareProfile, monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setattr(plan_in_force, "get_profile", lambda device: profile)
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def test_verdicts_are_of_paired_differences_against_a_share_of_the_fall() -> None:
    arms = summarize(make_runs(), ["fp32", "torch-amp", "halfstep"])["workloads"]["w"]
    assert arms["margin"] == pytest.approx(MARGIN_SHARE * 2.0)
    assert arms["arms"]["halfstep"]["verdict"] == "equivalent"  # the noise that both share is no difference
    assert arms["arms"]["halfstep"]["difference"] == pytest.approx(0.002)
    assert arms["arms"]["torch-amp"]["verdict"] == "worse"
    assert arms["arms"]["fp32"]["verdict"] == "reference"


def test_ratios_are_taken_within_a_round() -> None:
    summary = summarize(make_runs(), ["fp32", "torch-amp", "halfstep"])
    assert summary["workloads"]["w"]["arms"]["fp32"]["ratio"] == {"median": 3.1, "min": 3.0, "max": 3.2}
    assert summary["geomean"] == {"fp32": 3.1, "torch-amp": 2.0}
    assert summary["not_equivalent"] == {"fp32": {}, "torch-amp": {"w": "worse"}, "halfstep": {}}


def test_the_geometric_mean_is_over_workloads_and_takes_the_best_of_ours() -> None:
    runs = make_runs() + [make_run(r["arm"], r["round"], 2.0, 2.0, workload="v") for r in make_runs()]
    runs += [make_run("halfstep-compile", number, 5.0, 2.0) for number in range(3)]
    summary = summarize(runs, ["fp32", "torch-amp", "halfstep", "halfstep-compile"])
    assert summary["geomean"]["torch-amp"] == pytest.approx(math.sqrt(2.0 * 1.0), abs=1e-4)
    assert summary["geomean_best"]["torch-amp"] == pytest.approx(math.sqrt(4.0 * 1.0), abs=1e-4)
    assert summary["geomean_over"]["torch-amp"] == 2
    assert average_geometrically([1.0, 4.0]) == pytest.approx(2.0)


def test_the_floor_is_operations_by_rate() -> None:
    rows = summarize(make_runs(), ["fp32", "halfstep"])["workloads"]["w"]["arms"]
    assert rows["halfstep"]["floor_share"] == 1.0  # 1 GFLOP at 100 GFLOP/s: 10 ms
    assert rows["fp32"]["floor_share"] == pytest.approx(10 / 31, abs=1e-4)
    assert rows["halfstep"]["sustained_share"] == 2.0  # by half of that rate


@pytest.mark.parametrize(
    ("loss", "reference_loss", "word"),
    [(3.5, 2.0, "not trained"), (math.nan, 2.0, "worse"), (1.5, 2.0, "better"), (3.9, 3.9, "no reference")],
)
def test_a_run_that_has_not_trained_is_not_judged_equivalent(loss: float, reference_loss: float, word: str) -> None:
    mine = {n: make_run("halfstep", n, 1.0, loss) for n in range(3)}
    reference = {n: make_run("fp32", n, 1.0, reference_loss) for n in range(3)}
    assert judge("halfstep", mine, reference, 0.04)["verdict"] == word


def test_a_disturbed_round_is_named() -> None:
    runs = [*make_runs()[:-1], make_run("halfstep", 2, 10.0, 2.0, spin_ms=12.0)]
    rows = summarize(runs, ["fp32", "halfstep"])["workloads"]["w"]["arms"]
    assert rows["halfstep"]["disturbed"] == [2] and rows["fp32"]["disturbed"] == []


def test_arms_that_failed_are_shown_and_not_counted() -> None:
    failed = [
        {"workload": "w", "arm": "halfstep-compile", "round": n, "error": "RuntimeError: " + "no" * 40}
        for n in range(3)
    ]
    arms = ["fp32", "halfstep", "halfstep-compile"]
    summary = summarize([*make_runs(), *failed], arms)
    assert summary["workloads"]["w"]["arms"]["halfstep-compile"]["errors"] == [failed[0]["error"]] * 3
    assert "halfstep-compile" not in summary["geomean"]
    with (console := Console(width=140)).capture() as shown:
        console.print(show(summary | {"arms": arms}))
    assert "halfstep-compile " in shown.get() and "failed: RuntimeError" in shown.get().replace("\n", "")
    assert show_means(summary | {"arms": arms}).row_count == 1  # fp32


def test_an_interrupted_benchmark_keeps_what_it_has(tmp_path: Path) -> None:
    path, arms = tmp_path / "results" / "r.json", ["fp32", "halfstep"]

    def measure_or_stop(workload: str, arms: Sequence[str], number: int) -> list[dict[str, Any]]:
        if number == 2:
            raise KeyboardInterrupt
        return [make_run(arm, number, 10.0, 2.0) for arm in arms]

    def keep(runs: list[dict[str, Any]]) -> None:
        speed.write(path, summarize(runs, arms) | {"runs": runs})

    with pytest.raises(KeyboardInterrupt):
        speed.conduct(speed.order_groups(["w"], arms, 3), measure_or_stop, keep, lambda run: None)
    kept = json.loads(path.read_text(encoding="utf-8"))
    assert len(kept["runs"]) == 4
    assert {arm: row["rounds"] for arm, row in kept["workloads"]["w"]["arms"].items()} == {
        "fp32": [0, 1], "halfstep": [0, 1]
    }  # fmt: skip
    assert list(path.parent.iterdir()) == [path]


def test_arms_take_turns_at_starting_first() -> None:
    order = list(speed.order_groups(["a", "b"], ["x", "y", "z"], 3))
    assert [group[:2] for group in order] == [(0, "a"), (0, "b"), (1, "a"), (1, "b"), (2, "a"), (2, "b")]
    assert [group[2][0] for group in order] == ["x", "y", "y", "z", "z", "x"]
    assert all(sorted(group[2]) == ["x", "y", "z"] for group in order)


def test_a_machine_that_changes_its_speed_between_turns_changes_no_ratio() -> None:
    """Steps made while the machine is three times as fast count in no arm's favour, nor do they raise its share of the floor."""
    speeds = (1.0, 3.0, 0.5)
    fast = make_run("halfstep", 0, 20.0, 2.0, speeds=speeds) | {"step_ms": 40.0}  # most of its steps in the slow turn
    slow = make_run("fp32", 0, 50.0, 2.0, speeds=speeds)
    summary = summarize([slow, fast], ["fp32", "halfstep"])
    rows = summary["workloads"]["w"]["arms"]
    assert rows["fp32"]["ratio"]["median"] == 2.5 and summary["geomean"] == {"fp32": 2.5}
    assert rows["halfstep"]["floor_share"] == 0.5  # of 1e9 operations at 100 GFLOP/s


PUPIL = """
import json, sys
name, fails = sys.argv[1:]
made = []
for line in sys.stdin:
    if line.strip() == fails:
        sys.exit("ValueError: so it is")
    made.append(line.strip())
    print(json.dumps({"step_ms": [1.0], "name": name} if line.strip() != "end" else {"made": made}), flush=True)
"""


def start_pupil(name: str, fails: str = "never") -> Process:
    return Process([sys.executable, "-c", PUPIL, name, fails], {}, timeout=60.0)


def test_processes_take_turns_and_are_gauged_in_each() -> None:
    with start_pupil("gauge") as gauge:
        found = take_turns(start_pupil, ["a", "b"], gauge, turns=3, steps=4)
    assert found["a"]["made"] == ["0", "4", "4", "4", "end"] == found["b"]["made"]
    assert len(found["b"]["turns"]) == 3
    assert {(turn["name"], turn["gauge"]["name"]) for turn in found["b"]["turns"]} == {("b", "gauge")}


@pytest.mark.parametrize("fails", ["0", "4", "end"])
def test_a_process_that_fails_gives_its_last_words_and_the_others_go_on(fails: str) -> None:
    def start(name: str) -> Process:
        return start_pupil(name, fails if name == "a" else "never")

    with start_pupil("gauge") as gauge:
        found = take_turns(start, ["a", "b"], gauge, turns=2, steps=4)
    assert found["a"]["error"] == "ValueError: so it is"
    assert found["b"]["made"] == ["0", "4", "4", "end"]


def test_a_process_that_takes_too_long_is_an_error() -> None:
    with Process([sys.executable, "-c", "import time; input(); time.sleep(60)"], {}, timeout=0.1) as process:
        assert process.ask("0") == {"error": "took over 0.1 s"}


def test_a_process_of_the_benchmark_answers_lines() -> None:
    """The real thing, at the size of a test: what it prints besides answers does not reach them."""
    code = (
        "import speed, speed_worker, sys\n"
        "class Loud(speed_worker.WORKLOADS['mlp']):\n"
        "    def __init__(self, seed): print('noise'); super().__init__(seed, small=True)\n"
        "speed_worker.WORKLOADS['mlp'] = Loud\n"
        "speed.answer(speed_worker.serve('mlp', 'fp32', 0, warmup=2, threads=1, lines=sys.stdin))"
    )
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    with Process([sys.executable, "-c", code], environment, timeout=300.0) as process:
        assert process.ask("0") == {"step_ms": []}
        assert len(process.ask("3")["step_ms"]) == 3
        found = process.ask(END)
    assert len(found["losses"]) == 2 + 1 + 3 and found["flops"] > 0 and found["start_loss"] > 0


def test_a_run_that_fails_gives_its_last_words() -> None:
    code = "import sys; print('noise'); sys.exit('ValueError: so it is')"
    assert speed.call([speed.sys.executable, "-c", code], {}, 60.0) == {"error": "ValueError: so it is"}
    code = "print('noise'); print('{\"a\": 1}')"
    assert speed.call([speed.sys.executable, "-c", code], {}, 60.0) == {"a": 1}


def test_the_command_line_takes_known_names_only(capsys: pytest.CaptureFixture[str]) -> None:
    options = speed.parse(["--quick"])
    assert (
        options.only == list(QUICK)
        and options.rounds == 2
        and options.arms == [name for name in EAGER if name != "halfstep-memory"]
    )
    assert speed.parse([]).only == list(WORKLOADS) and speed.parse([]).arms == list(ARMS)
    assert speed.parse(["--only", "gpt,mlp", "--arms", "fp32"]).only == ["gpt", "mlp"]
    with pytest.raises(SystemExit):
        speed.parse(["--only", "gtp"])
    assert "got gtp" in capsys.readouterr().err


def test_two_results_are_compared_beyond_the_spread_of_both() -> None:
    before_arms: dict[str, Any] = {}
    after_arms: dict[str, Any] = {}
    old = {"workloads": {"w": {"arms": before_arms}}, "machine": "one"}
    new = {"workloads": {"w": {"arms": after_arms}}, "machine": "two"}
    row = {"peak_memory_bytes": 100, "verdict": "equivalent"}
    times = {
        "faster": ([10.0, 11.0], [8.0, 9.0]),
        "": ([10.0, 11.0], [9.0, 10.5]),
        "slower": ([8.0, 9.0], [10.0, 11.0]),
    }
    for arm, (before, after) in times.items():
        before_arms[arm] = row | {"step_ms": before}
        after_arms[arm] = row | {"step_ms": after, "peak_memory_bytes": 50, "verdict": "worse"}
    before_arms["gone"] = row | {"step_ms": [1.0]}
    after_arms["failed"] = row | {"step_ms": []}
    rows = {found["arm"]: found for found in compare_results.compare(old, new)}
    assert {arm: rows[arm]["change"] for arm in times} == {arm: arm for arm in times}
    assert rows["faster"]["ratio"] == pytest.approx(10.5 / 8.5)
    assert rows["faster"]["memory_ratio"] == 0.5
    assert rows["faster"]["verdicts"] == ("equivalent", "worse")
    assert rows["gone"]["only_in"] == "old" and rows["failed"]["only_in"] == "neither"
    assert compare_results.list_differences(old, new) == ["machine: one -> two"]
    assert compare_results.show(list(rows.values())).row_count == 5


def make_part(workload: str, step_ms: float, **head: Any) -> dict[str, Any]:
    runs = [make_run("halfstep", 0, step_ms, 2.0, workload=workload)]
    same = dict.fromkeys(merge_results.SHARED, "same") | {"arms": ["halfstep"], "date": "2026-01-01", "steps": 4}
    return same | summarize(runs, ["halfstep"]) | {"runs": runs} | head


def test_parts_become_one_result_and_the_last_counts() -> None:
    once = merge_results.merge([make_part("mlp", 5.0), make_part("gpt", 7.0, command="b"), make_part("mlp", 9.0)])
    assert list(once["workloads"]) == ["gpt", "mlp"]  # in the order of the catalogue
    assert once["workloads"]["mlp"]["arms"]["halfstep"]["step_ms"] == [9.0] and len(once["runs"]) == 2
    assert [part.get("command") for part in once["parts"]] == [None, "b", None]
    twice = merge_results.merge([once, make_part("gpt", 8.0, date="2026-02-03", steps=20)])
    assert [part["steps"] for part in twice["parts"]] == [4, 4, 4, 20] and twice["date"] == "2026-02-03"
    assert twice["workloads"]["gpt"]["arms"]["halfstep"]["step_ms"] == [8.0]
    assert show(twice).row_count == 2


def test_parts_of_different_machines_are_not_merged() -> None:
    with pytest.raises(ValueError, match="differ in machine, threads;"):
        merge_results.merge([make_part("mlp", 5.0), make_part("gpt", 5.0, machine="other", threads=9)])


def test_a_small_and_steady_change_is_not_marked() -> None:
    assert compare_results.describe_change([10.0, 10.0], [9.9, 9.9]) == ""


@pytest.mark.parametrize(("name", "arm"), list(itertools.product(WORKLOADS, EAGER)))
def test_every_workload_trains_in_every_arm(name: str, arm: str) -> None:
    found = measure(SMALL[name], ARMS[arm], warmup=1, steps=1, start=arm == "fp32")
    assert math.isfinite(found["loss"]) and found["step_ms"] > 0
    assert len(found["losses"]) == 2 and all(map(math.isfinite, found["losses"]))
    assert ("plans" in found) == ARMS[arm].halfstep and ("start_loss" in found) == (arm == "fp32")


@pytest.mark.parametrize("arm", ["torch-amp-compile", "halfstep-compile"])
@pytest.mark.parametrize("name", ["mlp", "dcgan", "bert"])
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")  # which the tracer looks at
def test_compiled_arms_train(name: str, arm: str, monkeypatch: pytest.MonkeyPatch) -> None:
    compiled = []
    counters.clear()

    def trace_only(model: nn.Module) -> nn.Module:
        """Compile with a backend that runs what was traced: the C++ compiler would take most of a minute."""
        compiled.append(model)
        return torch.compile(model, dynamic=False, backend="aot_eager")  # type: ignore[return-value]

    monkeypatch.setattr(speed_worker, "compile_model", trace_only)
    torch._dynamo.reset()
    found = measure(SMALL[name], ARMS[arm], warmup=1, steps=2)
    assert math.isfinite(found["loss"]) and len(compiled) == len(SMALL[name].build_models())
    assert counters["graph_break"] == {} and counters["stats"]["unique_graphs"] >= len(compiled)


@pytest.mark.parametrize("name", list(WORKLOADS))
def test_rounds_pair_arms_and_differ_among_themselves(name: str) -> None:
    first, again, other = (
        measure(WORKLOADS[name](seed, small=True), ARMS["fp32"], warmup=1, steps=1)["losses"] for seed in (0, 0, 1)
    )
    assert first == again != other


@pytest.mark.parametrize("name", [name for name in WORKLOADS if name not in ("resnet18", "airbench", "dcgan")])
def test_the_loss_of_a_workload_falls(name: str) -> None:
    workload = SMALL[name]
    trainers = build_trainers(workload, ARMS["fp32"])
    for trainer in trainers.values():
        assert isinstance(trainer, TorchTrainer)
        for group in (g for optimizer in trainer.optimizers for g in optimizer.param_groups):
            group["lr"] *= 10.0  # reduced sizes see few samples
    start = workload.evaluate(trainers)
    for step in range(60):
        workload.take_step(trainers, workload.make_batch(step))
    assert has_fallen(start, [workload.evaluate(trainers)], 0.02)


def test_products_are_counted_forward_and_backward() -> None:
    mlp = SMALL["mlp"]
    assert isinstance(mlp, WORKLOADS["mlp"])
    weights = [16 * 32, 32 * 32, 32 * 32, 32 * 10]
    assert count_products(mlp) == 2 * 8 * (3 * sum(weights) - weights[0])  # no gradient of the input
    lstm = SMALL["lstm"]
    tokens, width, vocabulary, length = 2 * 16, 32, 64, 16
    layer, head = 2 * tokens * 4 * width * width, 2 * tokens * width * vocabulary
    first_state = layer // length  # of the hidden state that begins as a constant, no gradient
    assert count_products(lstm) == 3 * (2 * layer + head) - first_state


def test_a_network_apart_gets_the_same_gradients_as_in_the_usual_loop() -> None:
    losses = {arm: measure(SMALL["dcgan"], ARMS[arm], warmup=1, steps=2)["losses"] for arm in ("fp32", "fp32-tuned")}
    assert losses["fp32"] == pytest.approx(losses["fp32-tuned"], rel=1e-3)


def test_halfstep_refuses_to_time_a_step_that_was_skipped() -> None:
    model = nn.Linear(2, 1)
    trainer = speed_worker.HalfstepTrainer(model, [torch.optim.SGD(model.parameters(), lr=0.1)])
    with trainer.autocast():
        loss = model(torch.ones(1, 2)).sum() * torch.inf
    with pytest.raises(AssertionError, match="skipped"):
        trainer.step(loss)


def test_markov_text_follows_its_chain() -> None:
    text = MarkovText(50)
    tokens = text.draw(4, 20, torch.Generator().manual_seed(0))
    assert tokens.shape == (4, 20)
    for now, then in itertools.pairwise(tokens.unbind(1)):
        assert all(t in text.successors[n] for n, t in zip(now, then, strict=True))


def test_clicks_follow_the_hidden_model() -> None:
    log = ClickLog(rows=20, tables=3, dense=5)
    features, categories, clicks = log.draw(4000, torch.Generator().manual_seed(0))
    said = features @ log.weights + 2 * log.effects[torch.arange(3), categories].sum(1)
    assert float(((said > 0) == clicks.bool()).float().mean()) > 0.75


def test_held_out_bytes_are_not_trained_on() -> None:
    workload = SMALL["nanogpt-char"]
    held_out = bytes(workload.source.held_out.tolist())  # type: ignore[attr-defined]
    inputs, targets = workload.make_held_out(0)
    assert bytes(inputs[0].tolist()) in held_out
    assert torch.equal(inputs[:, 1:], targets[:, :-1])


def test_the_growth_of_a_gpt_is_drawn() -> None:
    grid, base = {"width": (32, 64), "threads": (1, 2)}, {"width": 32, "threads": 1}
    places = scaling.list_points(grid, base)
    assert [sizes for _, sizes in places] == [
        {"width": 32, "threads": 1}, {"width": 64, "threads": 1}, {"width": 32, "threads": 1}, {"width": 32, "threads": 2}
    ]  # fmt: skip
    arms = {arm: {"step_ms": 2.0 + n, "peak_memory_bytes": 2**21} for n, arm in enumerate(scaling.SCALED_ARMS)}
    points = [{"changed": key, "sizes": sizes, "arms": arms} for key, sizes in places]
    drawn = scaling.draw(points, dict.fromkeys(arms, 2**20), grid)
    assert drawn.count('class="line') == len(arms) * 2 * len(grid) and drawn.count("<svg") == 1 + 2 * len(grid)


def test_a_point_of_the_growth_runs() -> None:
    found = scaling.run_point({"width": 32, "layers": 1, "batch": 1, "context": 8, "threads": 1}, "halfstep", 1)
    assert found["step_ms"] > 0 and found["peak_memory_bytes"] > 0
