"""Two processes that train together, over gloo: whatever one of them meets, they decide alike and stay equal to the bit."""

import json
import os
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from halfstep.distributed import Alone, communicates, find_ranks
from halfstep.errors import ModelError, UnsupportedError
from halfstep.stepper import prepare
from halfstep.stepping.agreement import agree_on_finding
from halfstep.window import Finding
from helpers import SPLIT, assert_same, make_mlp

STOCHASTIC = "compute=bf16 storage=bf16 master=stochastic"
MODES = {"32-true": "32-true", "bf16-mixed": "bf16-mixed", "16-mixed": "16-mixed", "split": SPLIT}
SUFFIX = {"input": ": so is the input", "loss": ", though every output of the model is finite"}
Results = list[dict[str, Any]]
Play = Callable[..., Results]


class RanksError(Exception):
    """What each rank said of its error."""


class Pair:
    """The two processes of ranks.py."""

    def __init__(self) -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = str(free.getsockname()[1])
        self.processes = []
        for rank in range(2):
            environment = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1",
                           "MASTER_PORT": port, "OMP_NUM_THREADS": "1"}  # fmt: skip
            self.processes.append(
                subprocess.Popen(
                    [sys.executable, str(Path(__file__).with_name("ranks.py"))], env=os.environ | environment, text=True,
                    stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
                )
            )  # fmt: skip

    def play(self, folder: Path, scenario: str, **arguments: Any) -> Results:
        """What both ranks return."""
        order = json.dumps({"scenario": scenario, "arguments": arguments, "folder": str(folder)})
        for process in self.processes:
            assert process.stdin is not None
            process.stdin.write(order + "\n")
            process.stdin.flush()
        said = [process.stdout.readline().strip() for process in self.processes if process.stdout is not None]
        if said != ["done", "done"]:
            raise RanksError(*said)
        return [torch.load(folder / f"{rank}.pt") for rank in range(2)]

    def end(self) -> None:
        for process in self.processes:
            process.communicate(timeout=60)


@pytest.fixture(scope="module")
def pair() -> Iterator[Pair]:
    pair = Pair()
    yield pair
    pair.end()


@pytest.fixture
def play(pair: Pair, tmp_path: Path) -> Play:
    return lambda scenario, **arguments: pair.play(tmp_path, scenario, **arguments)


def assert_alike(results: Results) -> dict[str, Any]:
    """Everything that both ranks tell is the same; gives that of the first."""
    first, second = results
    assert_same(first.get("weights", {}), second.get("weights", {}))
    assert [first[key] for key in first if key not in ("weights", "before")] == [
        second[key] for key in second if key not in ("weights", "before")
    ]
    return first


@pytest.mark.parametrize("how", ["ddp", "by hand"])
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("fault", ["input", "loss"])
def test_bad_batch_of_one_rank_is_skipped_by_all(play: Play, mode: str, how: str, fault: str) -> None:
    run = assert_alike(play("train", mode=MODES[mode], how=how, fault=fault, bad=[3, 4, 11]))
    skipped = [i for i, outcome in enumerate(run["outcomes"]) if outcome[0] == "skipped"]
    assert skipped == [3, 4, 11]
    causes = {run["outcomes"][i][4] for i in skipped}
    assert causes == {f"rank 1: the loss is nan{SUFFIX[fault]}"}
    assert run["scale"] == (2.0**16 if mode == "16-mixed" else 1.0)
    assert not torch.equal(run["weights"]["0.weight"], run["before"]["0.weight"])


@pytest.mark.parametrize("how", ["ddp", "by hand"])
@pytest.mark.parametrize("mode", ["bf16-mixed", "split"])
def test_window_with_a_bad_micro_batch_on_one_rank_is_skipped_by_all(play: Play, mode: str, how: str) -> None:
    run = assert_alike(play("train", mode=MODES[mode], how=how, accumulate=2, bad=[4]))
    assert [outcome[0] for outcome in run["outcomes"]] == ["accumulated", "applied"] * 2 + [
        "accumulated", "skipped",
    ] + ["accumulated", "applied"] * 7  # fmt: skip


def test_noise_of_stochastic_rounding_is_the_same_on_all_ranks(play: Play) -> None:
    run = assert_alike(play("train", mode=STOCHASTIC, how="ddp", bad=[5]))
    assert sum(outcome[0] == "applied" for outcome in run["outcomes"]) == 19


@pytest.mark.parametrize(
    ("policy", "told"),
    [("back-off", "multiplied by 0.5"), ("roll-back", "from applied step 7 to 4"), ("skip", "")],
)
def test_recovery_is_decided_alike(play: Play, policy: str, told: str) -> None:
    run = assert_alike(play("recover", policy=policy))
    (recovery,) = {outcome[6] for outcome in run["outcomes"][9:10]}
    assert told in recovery


def test_run_that_is_stopped_stops_on_all_ranks(play: Play) -> None:
    with pytest.raises(RanksError) as caught:
        play("recover", policy="stop")
    first, second = caught.value.args
    assert first == second
    assert first.startswith("TrainingError: training stopped at applied step 7: 1 step in a row failed")
    assert "the last: rank 1: the loss is nan" in first


def test_bad_batch_leaves_no_trace_in_running_statistics(play: Play) -> None:
    run = assert_alike(play("batch_norm"))
    assert [outcome[0] for outcome in run["outcomes"]] == ["applied"] * 2 + ["skipped"] + ["applied"] * 3
    assert len(run["finite"]) == 6 and all(run["finite"])


def test_window_may_be_averaged_once_where_weights_are_kept_in_fp32(play: Play) -> None:
    assert [outcome[0] for outcome in assert_alike(play("no_sync", mode="bf16-mixed"))["outcomes"]] == [
        "accumulated", "applied", "accumulated", "applied",
    ]  # fmt: skip


@pytest.mark.parametrize(("mode", "how"), [("bf16-mixed", "ddp"), (SPLIT, "by hand")])
@pytest.mark.parametrize("bad", [0, 3])
def test_lbfgs_searches_along_the_mean_loss_and_one_bad_evaluation_undoes_the_step_on_all(
    play: Play, mode: str, how: str, bad: int
) -> None:
    run = assert_alike(play("lbfgs", mode=mode, how=how, bad=bad))
    assert [outcome[0] for outcome in run["outcomes"]] == ["skipped" if bad else "applied"] + ["applied"] * 3
    assert len(run["seen"]) >= 8


@pytest.mark.parametrize(("mode", "how"), [("bf16-mixed", "ddp"), (SPLIT, "by hand")])
def test_optimizer_of_ones_own_trains_together(play: Play, mode: str, how: str) -> None:
    assert [o[0] for o in assert_alike(play("own_optimizer", mode=mode, how=how))["outcomes"]] == ["applied"] * 4


@pytest.mark.parametrize(("scenario", "more"), [("own_optimizer", {}), ("lbfgs", {"bad": 0})])
def test_optimizer_that_would_take_the_hooks_off_narrow_weights_is_refused(
    play: Play, scenario: str, more: dict[str, Any]
) -> None:
    with pytest.raises(RanksError, match=r"UnsupportedError: .* widens 16-bit weights where they are"):
        play(scenario, mode=SPLIT, how="ddp", **more)


@pytest.mark.parametrize("how", ["ddp", "by hand"])
@pytest.mark.parametrize("fused", [False, True])
def test_scalers_of_all_ranks_skip_together(play: Play, how: str, fused: bool) -> None:
    run = assert_alike(play("scaler", how=how, torchs=False, fused=fused, bad=[3, 11]))
    assert run["scales"] == [2.0**10] * 3 + [2.0**9] * 8 + [2.0**8] * 9
    assert all(bool(torch.isfinite(value).all()) for value in run["weights"].values())


def test_scaler_of_a_rank_without_gradients_keeps_nobody_waiting(play: Play) -> None:
    first, second = play("scaler_without_gradients")
    assert first["scales"] == second["scales"] == [2.0**10, 2.0**10, 2.0**9, 2.0**9]
    assert (first["applied"], second["applied"]) == (3, 2)


def test_scalers_that_do_not_agree_would_be_seen(play: Play) -> None:
    first, second = play("scaler", how="by hand", torchs=True, fused=False, bad=[3, 11])
    assert first["scales"] != second["scales"]
    assert not torch.equal(first["weights"]["0.weight"], second["weights"]["0.weight"])


def test_closure_of_a_scaler_searches_along_the_mean_loss(play: Play) -> None:
    assert_alike(play("scaler_closure"))


def test_auto_takes_the_plan_of_the_first_rank_before_the_model_is_wrapped(play: Play) -> None:
    run = assert_alike(play("auto"))
    assert "master=split" in run["plan"]
    assert [outcome[0] for outcome in run["outcomes"]] == ["applied"] * 3
    assert "run one training batch through stepper.model before you wrap it" in run["refused"]


def test_ranks_that_train_models_of_their_own_do_not_wait_for_each_other(play: Play) -> None:
    first, second = play("apart")
    assert [outcome[0] for outcome in first["outcomes"]] == ["applied"] * 5
    assert [outcome[0] for outcome in second["outcomes"]] == ["applied"] * 2 + ["skipped"] + ["applied"] * 3


def test_gradients_that_were_not_averaged_are_refused_before_weights_part(play: Play) -> None:
    for result in play("not_averaged"):
        assert result["refused"].startswith("the gradients of the ranks differ: their norm is ")
        assert_same(result["weights"], result["before"])
        assert result["dropped"]


def test_micro_batches_of_16_bit_weights_that_were_not_averaged_are_refused(play: Play) -> None:
    with pytest.raises(RanksError, match="the gradients of the ranks differ"):
        play("no_sync", mode=SPLIT)


def test_mistakes_are_refused_by_prepare(play: Play) -> None:
    run = assert_alike(play("mistakes"))
    assert [text.partition(";")[0] for text in run["refused"]] == [
        "release=True updates a parameter before its gradient is averaged over the 2 ranks",
        "DistributedDataParallel has taken its buffers for fp32 gradients",
    ]


# --- in one process


class Told:
    """Ranks whose others have found what they are given."""

    def __init__(self, *others: Finding) -> None:
        self.others, self.size = others, 1 + len(others)

    def maximize(self, numbers: torch.Tensor) -> torch.Tensor:
        rows = [[float(bool(f.cause)), f.norm, -f.norm] for f in self.others]
        return torch.stack([numbers, *torch.tensor(rows, dtype=numbers.dtype)]).amax(0)

    def average(self, numbers: torch.Tensor) -> torch.Tensor:
        return numbers

    def gather(self, value: Any) -> list[Any]:
        return [value, *self.others]


CPU = torch.device("cpu")


def test_finding_nearest_to_its_origin_is_the_one_that_all_report() -> None:
    spread = Finding(cause="12 gradients are not finite", nonfinite=True)
    origin = Finding(cause="the loss is nan", nonfinite=True, forward_nonfinite=True)
    without = Finding(cause="no gradient")
    assert agree_on_finding(spread, Told(origin), CPU).cause == "rank 1: the loss is nan"
    assert agree_on_finding(without, Told(spread), CPU).cause == "rank 1: 12 gradients are not finite"
    assert agree_on_finding(Finding(norm=1.0), Told(Finding(norm=1.0), without), CPU).cause == "rank 2: no gradient"
    assert agree_on_finding(origin, Told(origin), CPU).cause == "rank 0: the loss is nan"


def test_norms_that_differ_by_the_rounding_of_a_sum_are_equal_and_others_are_not() -> None:
    assert agree_on_finding(Finding(norm=1.0), Told(Finding(norm=1.0 + 2.0**-20)), CPU).norm == 1.0 + 2.0**-20
    assert agree_on_finding(Finding(norm=1e30), Told(Finding(norm=1e30)), CPU).norm == 1e30
    with pytest.raises(ModelError, match=r"their norm is 1 here and goes from 1 to 1.01;"):
        agree_on_finding(Finding(norm=1.0), Told(Finding(norm=1.01)), CPU)


def test_a_process_by_itself_talks_to_nobody() -> None:
    assert find_ranks() == Alone()
    finding = Finding(cause="the loss is nan")
    assert agree_on_finding(finding, find_ranks(), CPU) is finding
    assert agree_on_finding(finding, Alone(), CPU) is finding
    assert Alone().gather(3) == [3]


def test_layer_is_not_looked_for_by_a_forward_pass_that_others_would_have_to_join(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model, x = make_mlp(), torch.full((2, 8), torch.nan)
    stepper = prepare(model, torch.optim.SGD(model.parameters(), lr=0.1), "32-true")
    assert stepper.step(model(x).sum()).layer == "(input)"
    monkeypatch.setattr("halfstep.window.communicates", lambda _: True)
    outcome = stepper.step(model(x).sum())
    assert (outcome.layer, outcome.cause) == ("", "the loss is nan")


def test_batch_norm_over_all_ranks_communicates_where_there_are_several(monkeypatch: pytest.MonkeyPatch) -> None:
    model = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.SyncBatchNorm(2))
    assert not communicates(model)
    monkeypatch.setattr("halfstep.distributed.find_ranks", lambda: Told(Finding()))
    assert communicates(model)
    assert not communicates(model[0])


def test_sharded_model_is_refused() -> None:
    model = make_mlp()
    model.get_parameter("0.weight").to_local = lambda: None  # type: ignore[attr-defined]
    with pytest.raises(UnsupportedError, match="sharded over ranks"):
        prepare(model, torch.optim.SGD(model.parameters(), lr=0.1), "32-true")
