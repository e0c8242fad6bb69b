"""Dropout, GELU, cross entropy and attention beside torch's functions: time forward and backward, by turns.

    python benchmarks/functions.py                      writes benchmarks/results/functions.json
    python benchmarks/functions.py --rounds 2           a look

Every round runs both ways one after another, in turns of who is first; a ratio is torch's time by ours within a round, with its
median and quartiles. On one thread the time is that of the processor, which other work on the machine disturbs less. Logits are
cast to fp32 for torch's cross entropy, as torch.autocast does. Attention is measured by kernel also where `ROUTES` would choose
torch's; `route` says what it chose here.
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable, Iterator
from datetime import date
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from halfstep.machine.hardware import name_machine, read_load
from halfstep.numerics import scaled_attention
from halfstep.numerics.dropouts import KERNELS, dropout
from halfstep.numerics.gelus import gelu
from halfstep.numerics.losses import cross_entropy

ROOT = Path(__file__).parent.parent
ATTENTION = (  # batch, heads, length, features, causal, padding mask, dropout
    (8, 8, 256, 64, True, False, 0.0),
    (8, 8, 256, 64, True, False, 0.2),
    (12, 6, 256, 64, True, False, 0.2),
    (16, 6, 128, 64, False, True, 0.1),
    (8, 8, 1024, 64, True, False, 0.0),
    (8, 8, 1024, 64, True, False, 0.1),
)
Call = Callable[[], Tensor]
Case = tuple[str, Call, Call, tuple[Tensor, ...], dict[str, Any]]  # name, ours, torch's, leaves, what else to say


def list_cases() -> Iterator[Case]:
    for dtype in (torch.bfloat16, torch.float32):
        x = torch.randn(1 << 22).to(dtype).requires_grad_()
        yield f"dropout 4 Mi {str(dtype)[6:]}", lambda x=x: dropout(x, 0.1), lambda x=x: F.dropout(x, 0.1), (x,), {}
    x = torch.randn(1 << 22).bfloat16().requires_grad_()
    yield "gelu 4 Mi bfloat16", lambda x=x: gelu(x), lambda x=x: F.gelu(x), (x,), {}
    for classes in (8192, 256):
        x = (3 * torch.randn(2048, classes)).bfloat16().requires_grad_()
        y = torch.randint(0, classes, (2048,))
        ours, torchs = lambda x=x, y=y: cross_entropy(x, y), lambda x=x, y=y: F.cross_entropy(x.float(), y)
        yield f"cross entropy 2048 x {classes} bfloat16", ours, torchs, (x,), {}
    for case in ATTENTION:
        yield make_attention(*case)


def make_attention(batch: int, heads: int, length: int, features: int, causal: bool, padding: bool, p: float) -> Case:
    q, k, v = (torch.randn(batch, heads, length, features).bfloat16().requires_grad_() for _ in range(3))
    mask = None
    if padding:
        mask = (torch.arange(length) < torch.randint(length // 2, length + 1, (batch, 1)))[:, None, None]
    shape = scaled_attention.describe_shape(q, k, v, mask, causal)
    ours = lambda: scaled_attention.scaled_dot_product_attention(q, k, v, mask, p, causal)  # noqa: E731
    torchs = lambda: F.scaled_dot_product_attention(q, k, v, mask, p, causal)  # noqa: E731
    ours()  # times the ways
    more = {} if p else {"route": scaled_attention.ROUTES[shape]}
    scaled_attention.ROUTES[shape] = "kernel"
    words = ["causal"] * causal + ["padding"] * padding + [f"dropout {p}"] * bool(p)
    name = f"attention {batch} x {heads} x {length} x {features} bfloat16 {', '.join(words)}"
    return name, ours, torchs, (q, k, v), more


def time_call(call: Call, leaves: tuple[Tensor, ...], clock: Callable[[], float]) -> tuple[float, float]:
    """Milliseconds of the forward pass, and of both."""
    start = clock()
    out = call()
    middle = clock()
    torch.autograd.grad(out, leaves, torch.ones_like(out))
    return 1e3 * (middle - start), 1e3 * (clock() - start)


def measure(case: Case, rounds: int, clock: Callable[[], float]) -> dict[str, Any]:
    name, ours, torchs, leaves, more = case
    pairs: list[list[tuple[float, float]]] = []
    for number in range(rounds + 2):
        first, second = (ours, torchs) if number % 2 else (torchs, ours)
        one, other = time_call(first, leaves, clock), time_call(second, leaves, clock)
        pairs.append([one, other] if number % 2 else [other, one])
    pairs = pairs[2:]
    ratios = [torchs[1] / ours[1] for ours, torchs in pairs]
    low, middle, high = statistics.quantiles(ratios, n=4)
    found = {
        f"{who}_{what}_ms": round(statistics.median(pair[i][j] for pair in pairs), 3)
        for i, who in enumerate(("halfstep", "torch"))
        for j, what in enumerate(("forward", "both"))
    }
    return {"case": name, **found, "ratio": round(middle, 2), "quartiles": [round(low, 2), round(high, 2)], **more}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    clock = time.process_time if options.threads == 1 else time.perf_counter
    head = {
        "command": f"python benchmarks/functions.py --rounds {options.rounds} --threads {options.threads}",
        "date": date.today().isoformat(),
        "machine": name_machine(),
        "torch": torch.__version__,
        "kernels": KERNELS.describe(),
        "load_before": round(read_load(), 2),
    }
    rows = []
    for case in list_cases():
        rows.append(measure(case, options.rounds, clock))
        print(json.dumps(rows[-1]), flush=True)
    text = json.dumps(head | {"load_after": round(read_load(), 2), "rows": rows}).replace('}, {"case', '},\n{"case')
    path = ROOT / "benchmarks" / "results" / "functions.json"
    path.write_text(text.replace('"rows": [', '"rows": [\n') + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
