"""bf16 weights that do not move: how far behind fp32 each master falls at a tiny learning rate.

    python benchmarks/stall.py                  writes benchmarks/results/stall.json and docs/figures/stall.svg

A student network follows a teacher of the same shape with AdamW, once in fp32 and once with bf16 weights behind each
master, from the same weights on the same batches. What is drawn is the distance from the fp32 student's weights as a share
of the way that these have gone: 1 for weights that stand still, 0 for the same weights; drawn as its logarithm, a line a seed.
"""

import argparse
import json
import math
from dataclasses import asdict
from datetime import date
from pathlib import Path

import torch
from torch import Tensor, nn

import halfstep
from halfstep.machine.hardware import name_machine
from halfstep.report.charts import WIDTH, Line, draw_lines

ROOT = Path(__file__).parent.parent
MASTERS = ("none", "stochastic", "split24", "kahan", "split", "fp32")
COLOURS = ("#c0392b", "#e08e0b", "#7d3c98", "#138d75", "#2471a3", "#808b96")
LEARNING_RATE = 1e-5
EVERY = 25  # steps between two points of a line
STYLE = (
    "text{font:12px sans-serif;fill:#555}.grid{stroke:#bbb;stroke-width:.5}.line{fill:none;stroke-width:1.2}"
    "@media(prefers-color-scheme:dark){text{fill:#bbb}.grid{stroke:#555}}"
)


def make_network() -> nn.Sequential:
    return nn.Sequential(nn.Linear(32, 128), nn.Tanh(), nn.Linear(128, 8))


def flatten(model: nn.Module) -> Tensor:
    return torch.cat([value.flatten() for value in model.state_dict().values()])


def train(plan: str, seed: int, steps: int) -> tuple[list[Tensor], list[float], list[dict[str, object]]]:
    """Weights and mean loss at every EVERY-th step, from step 0, and the stalls of the last update."""
    torch.manual_seed(seed)
    teacher, student = make_network(), make_network()
    noise = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.AdamW(student.parameters(), lr=LEARNING_RATE, weight_decay=0.0)
    stepper = halfstep.prepare(student, optimizer, plan)
    stepper.conversion.masters.seed = seed
    weights, losses, recent = [flatten(student).clone()], [], []
    for step in range(1, steps + 1):
        x = torch.randn(64, 32, generator=noise)
        with torch.no_grad():
            goal = teacher(x)
        with stepper.autocast():
            loss = nn.functional.mse_loss(student(x.to(student[0].weight.dtype)).float(), goal)
        stepper.step(loss)
        recent.append(loss.item())
        if step % EVERY == 0:
            weights.append(flatten(student).clone())
            losses.append(sum(recent) / len(recent))
            recent = []
    x = torch.randn(64, 32, generator=noise).to(student[0].weight.dtype)
    nn.functional.mse_loss(student(x).float(), teacher(x.float()).detach()).backward()
    gradients = {p: p.grad for p in student.parameters() if p.grad is not None}
    stalls = stepper.conversion.masters.step(optimizer, gradients, watch=True)
    return weights, losses, [asdict(stall) for stall in stalls]


def measure(seeds: int, steps: int) -> dict[str, dict[str, object]]:
    """Master -> distances and losses of each seed, and the stalls seen."""
    results: dict[str, dict[str, object]] = {}
    references = [train("32-true", seed, steps)[0] for seed in range(seeds)]
    for master in MASTERS:
        distances, losses, stalls = [], [], []
        for seed, reference in enumerate(references):
            found, loss, seen = train(f"compute=bf16 storage=bf16 master={master}", seed, steps)
            way = [float((now - reference[0]).norm()) for now in reference[1:]]
            behind = [float((a - b).norm()) for a, b in zip(found[1:], reference[1:], strict=True)]
            distances.append([round(d / w, 5) for d, w in zip(behind, way, strict=True)])
            losses.append([round(value, 6) for value in loss])
            stalls.append(seen)
        results[master] = {"distance": distances, "loss": losses, "stalls": stalls}
        print(f"{master:11s} distance at the end: {', '.join(f'{d[-1]:.4f}' for d in distances)}")
    return results


def draw(results: dict[str, dict[str, object]]) -> str:
    """The lines of all seeds with a legend, as a file of its own."""
    lines = [
        Line(f"{master}, seed {seed}", tuple((EVERY * (i + 1), math.log10(y)) for i, y in enumerate(distance)), colour)
        for colour, master in enumerate(results)
        for seed, distance in enumerate(results[master]["distance"])  # type: ignore[arg-type,call-overload]
    ]
    chart = draw_lines(lines, f"step, AdamW at lr={LEARNING_RATE:g}", "log10(distance from fp32 / way of fp32)")
    colours = "".join(f".c{i}{{stroke:{colour}}}" for i, colour in enumerate(COLOURS))
    legend = "".join(
        f'<text style="fill:{COLOURS[i]}" x="{60 + 84 * i}" y="-8">{name}</text>' for i, name in enumerate(results)
    )
    start = chart.index(">")
    height = int(chart.split('viewBox="0 0 ')[1].split('"')[0].split()[1])
    head = chart[:start].replace(f"0 0 {WIDTH} {height}", f"0 -24 {WIDTH} {height + 24}")
    return f'{head} xmlns="http://www.w3.org/2000/svg"><style>{STYLE}{colours}</style>{legend}{chart[start + 1 :]}\n'


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=1000)
    options = parser.parse_args()
    torch.set_num_threads(1)  # the network is tiny
    results = measure(options.seeds, options.steps)
    head = {
        "command": f"python benchmarks/stall.py --seeds {options.seeds} --steps {options.steps}",
        "date": date.today().isoformat(),
        "machine": name_machine(),
        "torch": torch.__version__,
        "learning_rate": LEARNING_RATE,
        "steps_between_points": EVERY,
    }
    (ROOT / "docs" / "figures").mkdir(exist_ok=True)
    (ROOT / "docs" / "figures" / "stall.svg").write_text(draw(results))
    text = json.dumps(head | {"masters": results}, indent=None)
    (ROOT / "benchmarks" / "results" / "stall.json").write_text(text.replace('}, "', '},\n"') + "\n")


if __name__ == "__main__":
    main()
