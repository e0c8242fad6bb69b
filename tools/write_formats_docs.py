"""Write docs/formats.md and its figures from the table of formats. Run it after changing a format; a test says when it is due."""

import math
from collections.abc import Iterable, Sequence
from itertools import pairwise
from pathlib import Path

import torch

from halfstep.numerics.formats import FORMATS, Format
from halfstep.numerics.rounding import MODES, round_to
from halfstep.report.charts import HEIGHT, WIDTH, Line, draw_lines

DOCS = Path(__file__).parent.parent / "docs"
PLAIN = [format for format in FORMATS.values() if not format.block]
BLOCKS = [format for format in FORMATS.values() if format.block]

UNITS = {
    "fp32": "every processor and GPU",
    "tf32": "NVIDIA from 8.0 (Ampere)",
    "bf16": "NVIDIA from 8.0; AMD CDNA; x86 with avx512_bf16 or amx_bf16; Arm with bf16",
    "fp16": "NVIDIA from 7.0 (Volta); AMD CDNA; x86 with avx512_fp16 or amx_fp16; Arm with fp16",
    "fp8_e4m3": "NVIDIA from 8.9 (Ada, Hopper); AMD CDNA 4",
    "fp8_e5m2": "NVIDIA from 8.9 (Ada, Hopper); AMD CDNA 4",
    "fp8_e4m3fnuz": "AMD CDNA 3 (MI300)",
    "fp8_e5m2fnuz": "AMD CDNA 3 (MI300)",
    "fp6_e2m3": "in mxfp6_e2m3",
    "fp6_e3m2": "in mxfp6_e3m2",
    "fp4_e2m1": "in mxfp4 and nvfp4",
    "int8": "NVIDIA from 7.5 (Turing); AMD CDNA; x86 with avx512_vnni or amx_int8; Arm with i8mm",
    "int4": "NVIDIA 7.5 to 8.9",
    "e8m0": "only as the scale of a block",
    "mxfp8_e4m3": "NVIDIA from 10.0 (Blackwell); AMD CDNA 4",
    "mxfp8_e5m2": "NVIDIA from 10.0; AMD CDNA 4",
    "mxfp6_e2m3": "NVIDIA from 10.0; AMD CDNA 4",
    "mxfp6_e3m2": "NVIDIA from 10.0; AMD CDNA 4",
    "mxfp4": "NVIDIA from 10.0; AMD CDNA 4",
    "nvfp4": "NVIDIA from 10.0",
}
"""Who multiplies a format. NVIDIA's numbers are compute capabilities (PTX ISA, `mma`); AMD: ROCm, "Precision support"."""

PAGE = """# Number formats

<!-- Written by tools/write_formats_docs.py. -->

Every format that a plan may name, complete: from the columns below every code of it has one meaning. `halfstep.find_format(name)`
gives the same facts to a program, all limits derived from bits and bias.

{plain}

*Precision* counts the leading one: the number of significant bits. *Beyond*: what a number too large for the format becomes
unless you say otherwise, the largest number or infinity; in a format without infinity, NaN.

A block format stores numbers of a plain format, its element, with a scale for every block of them along the dimension that a
product sums over, so that a value is element x scale (x the tensor's scale):

{blocks}

Who multiplies them. That a unit exists does not say that it pays: `halfstep probe` times it. A format without a unit can be
rehearsed: numbers are rounded to it, and multiplied in a wider one.

{units}

## How far they reach

![Ranges of the formats on a logarithmic scale](figures/format-ranges.svg)

The exponent's bits set the range, the mantissa's the precision. The pale part is that of subnormal numbers, where every halving
costs one bit of precision. `bf16` is `fp32` with 16 bits less precision and the same range, so what fits into one fits into the
other; `fp16` has three bits more and ends at 65504, which is why it needs a loss scale.

```python
import halfstep

e4m3, e5m2 = halfstep.find_format("fp8_e4m3"), halfstep.find_format("float8_e5m2")
print(e4m3.max, e5m2.max)  # 448.0 57344.0
assert [e4m3.decode(code) for code in range(0x38, 0x41)] == [1, 1.125, 1.25, 1.375, 1.5, 1.625, 1.75, 1.875, 2]
```

There are two families of fp8. In the "fnuz" formats of AMD's MI300 the code of negative zero is the only NaN and the bias is one
more, so `fp8_e4m3fnuz` ends at 240, and a tensor scaled to 448 overflows there.

## Where their numbers lie

![All numbers of the narrow formats between 0 and 8](figures/format-numbers.svg)

A float's numbers crowd around zero and thin out by half at each power of two; an integer's keep their distance, and need a scale
that is chosen well. Below the smallest normal number a float is an integer format too.

![Largest relative rounding error over the size of the number](figures/format-errors.svg)

The relative error is at most 2^-precision wherever the numbers are normal, whatever their size: a plateau whose width is the
format's range. To the left of it numbers drown in the spacing of subnormals, to the right they are cut off. Scaling moves a
tensor along this axis until its numbers stand on the plateau; the narrower it is, the fewer numbers may share a scale. That is
why fp8 gets along with one scale a tensor and 4 bits take one for every 16 or 32 numbers.

## Rounding

`round_to` rounds a tensor to a format and leaves its dtype as it is:

```python
import torch
from halfstep.numerics.rounding import round_to

x = torch.tensor([0.3, 2.5, 3.4, -5.2, 100.0])
assert round_to(x, "fp4_e2m1").tolist() == [0.5, 2.0, 3.0, -6.0, 6.0]
assert round_to(x, "fp4_e2m1", mode="toward_zero").tolist() == [0.0, 2.0, 3.0, -4.0, 6.0]
```

![What each mode makes of the numbers between -7 and 7 in fp4_e2m1](figures/rounding-modes.svg)

`nearest_even` is what processors do; of two numbers at the same distance it takes the one with an even code, so ties do not
add up to a drift. `up` rounds a scale so that nothing overflows. `stochastic` takes the upper or the lower number at random, more
often the nearer, so that the mean is the number itself: steps far smaller than the spacing are not lost but come rarely. The
picture shows both and the mean. Its noise comes in as an argument, from a hash of seed, parameter, step and element:

```python
import torch
from halfstep.numerics.noise import derive_keys, draw_noise
from halfstep.numerics.rounding import round_to

third = torch.full((100_000,), 1 / 3)
assert round_to(third, "fp4_e2m1").mean() == 0.5
noise = draw_noise(derive_keys(0, 0, 0), start=0, count=third.numel())
drawn = round_to(third, "fp4_e2m1", mode="stochastic", noise=noise)
assert set(drawn.tolist()) == {{0.0, 0.5}} and abs(drawn.mean() - 1 / 3) < 0.003
```

Beyond the largest number:

```python
import torch
from halfstep.numerics.rounding import round_to

far = torch.tensor([500.0, float("inf"), float("nan")])
print(round_to(far, "fp8_e4m3").tolist())  # [448.0, 448.0, nan]
print(round_to(far, "fp8_e4m3", saturate=False).tolist())  # [nan, nan, nan]
print(round_to(far, "fp8_e5m2", saturate=False).tolist())  # [512.0, inf, nan]
```

NaN stays NaN in every format, also where it has no code, so that a step that is broken is seen. fp64 is rounded once, not by way
of fp32. Integers are rounded and clamped.

## Blocks

A block format is a description; the numbers are those of its element:

```python
import halfstep
import torch
from halfstep.numerics.rounding import round_to

nvfp4 = halfstep.find_format("nvfp4")
print(nvfp4.element.name, nvfp4.block, nvfp4.scale, nvfp4.tensor_scale, nvfp4.bits_per_number)
# fp4_e2m1 16 fp8_e4m3 fp32 4.5

block = torch.tensor([0.013, -0.002, 0.027, 0.006])  # as a block of mxfp4 would be: one power of two for all of them
scale = round_to(block.abs().max() / 6, "e8m0", mode="up")
assert scale == 2**-7
assert (round_to(block / scale, "fp4_e2m1") * scale).tolist() == [0.01171875, -0.00390625, 0.0234375, 0.0078125]
```
"""


def show(number: float) -> str:
    """A number as a reader likes it: whole ones in full, powers of two as such, others to four digits."""
    fraction, exponent = math.frexp(number)
    if fraction == 0.5 and not 1 <= number <= 256:
        return f"2^{exponent - 1}"
    return str(int(number)) if number == int(number) and abs(number) < 1e6 else f"{number:.4g}"


def write_table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table in Markdown."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def list_plain() -> str:
    """The table of formats without blocks."""
    rows = []
    for f in PLAIN:
        fields = [f"{f.exponent_bits}+{f.mantissa_bits}", str(f.bias)] if f.kind != "integer" else ["", ""]
        beyond = "largest" if f.saturates else "infinity" if f.has_infinity else "NaN"
        nan = {"ieee": "many codes", "last": "last code", "negative_zero": "code of -0", "none": "no"}[f.specials]
        rows.append([f"`{f.name}`", str(f.bits), *fields, str(f.mantissa_bits + 1), show(f.max), show(f.smallest_normal),
                     show(f.smallest_subnormal) if f.has_subnormals else "none", show(f.eps),
                     "yes" if f.has_infinity else "no", nan, beyond, f"{f.storage_bits}",
                     ", ".join(f"`{alias}`" for alias in f.aliases)])  # fmt: skip
    return write_table(
        ["format", "bits", "exponent + mantissa", "bias", "precision", "largest", "smallest normal", "smallest subnormal",
         "1 to next", "infinity", "NaN", "beyond", "bits in memory", "also called"], rows
    )  # fmt: skip


def list_blocks() -> str:
    """The table of block formats."""
    rows = (
        [f"`{f.name}`", f"`{f.element.name}`", str(f.block), f"`{f.scale}`", f"`{f.tensor_scale}`" if f.tensor_scale else "none",
         f"{f.bits_per_number:g}", ", ".join(f"`{alias}`" for alias in f.aliases)]
        for f in BLOCKS
    )  # fmt: skip
    return write_table(
        ["format", "element", "block", "scale", "scale of the tensor", "bits a number, scale included", "also called"],
        rows,
    )  # fmt: skip


STYLE = (
    "text{font:12px sans-serif;fill:#555}.grid{stroke:#bbb;stroke-width:.5}.bar{fill:#2471a3}.pale{fill:#2471a3;opacity:.35}"
    ".mark{stroke:#2471a3;stroke-width:1;fill:none}.line{fill:none;stroke-width:1.5}.mean{stroke-dasharray:4 3}"
    "@media(prefers-color-scheme:dark){text{fill:#bbb}.grid{stroke:#555}.bar,.pale{fill:#5dade2}.mark{stroke:#5dade2}}"
)
COLOURS = ("#c0392b", "#e08e0b", "#7d3c98", "#138d75", "#2471a3", "#808b96")


def wrap(parts: Iterable[str], width: int, height: int, label: str) -> str:
    """An <svg> that stands alone as a file and follows the reader's light or dark theme."""
    colours = "".join(f".c{i}{{stroke:{colour}}}" for i, colour in enumerate(COLOURS))
    head = f'<svg viewBox="0 0 {width} {height}" role="img" aria-label="{label}" xmlns="http://www.w3.org/2000/svg">'
    return "\n".join([f"{head}<style>{STYLE}{colours}</style>", *parts, "</svg>\n"])


def draw_ranges() -> str:
    """One bar a format from its smallest to its largest number, on a logarithmic axis."""
    low, high, left, row = -152.0, 130.0, 104, 20
    height = row * len(PLAIN) + 34

    def place(exponent: float) -> float:
        return round(left + (exponent - low) / (high - low) * (WIDTH - left - 8), 1)

    parts = []
    for tick in range(-150, 129, 50):
        parts.append(f'<line class="grid" x1="{place(tick)}" x2="{place(tick)}" y1="4" y2="{height - 28}"/>')
        parts.append(f'<text x="{place(tick)}" y="{height - 12}" text-anchor="middle">2^{tick}</text>')
    for i, f in enumerate(PLAIN):
        y = 6 + i * row
        start, normal, end = (place(math.log2(n)) for n in (f.smallest_subnormal, f.smallest_normal, f.max))
        parts.append(f'<text x="{left - 6}" y="{y + 11}" text-anchor="end">{f.name}</text>')
        parts.append(f'<rect class="pale" x="{start}" y="{y}" width="{round(normal - start, 1)}" height="13"/>')
        parts.append(f'<rect class="bar" x="{normal}" y="{y}" width="{round(end - normal, 1)}" height="13"/>')
    return wrap(parts, WIDTH, height, "From the smallest to the largest positive number of each format")


def list_numbers(format: Format, largest: float) -> list[float]:
    """The numbers of a narrow format from 0 to `largest`."""
    decoded = {format.decode(code) for code in range(1 << format.bits)}
    return sorted(n for n in decoded if 0 <= n <= largest)


def draw_numbers() -> str:
    """A line a format, with a tick for every number from 0 to 8."""
    left, row = 104, 22
    narrow = [f for f in PLAIN if f.bits <= 8]
    height = row * len(narrow) + 30

    def place(number: float) -> float:
        return round(left + number / 8 * (WIDTH - left - 12), 1)

    parts = [f'<text x="{place(n)}" y="{height - 8}" text-anchor="middle">{n}</text>' for n in range(9)]
    for i, f in enumerate(narrow):
        y = 6 + i * row
        ticks = " ".join(dict.fromkeys(f"M{place(n)} {y}v13" for n in list_numbers(f, 8.0)))
        parts.append(
            f'<text x="{left - 6}" y="{y + 11}" text-anchor="end">{f.name}</text><path class="mark" d="{ticks}"/>'
        )
    return wrap(parts, WIDTH, height, "The numbers of each format from 0 to 8")


def find_errors(format: Format) -> list[tuple[float, float]]:
    """(log2 x, log2 of the relative error) at the midpoints between neighbours, and a way beyond the largest number."""
    numbers = list_numbers(format, format.max)
    points = [((low + high) / 2, (high - low) / (high + low)) for low, high in pairwise(numbers)]
    points += [(format.max * 2 ** (k / 4), 1 - 2 ** (-k / 4)) for k in range(1, 17)]
    return [(math.log2(x), math.log2(error)) for x, error in points]


def draw_errors() -> str:
    """The largest relative error of rounding to nearest, over the size of the number."""
    names = ("fp4_e2m1", "fp6_e3m2", "fp6_e2m3", "fp8_e5m2", "fp8_e4m3", "int8")
    lines = [Line(name, tuple(find_errors(FORMATS[name])), i) for i, name in enumerate(names)]
    chart = draw_lines(lines, "log2 of the number", "log2 of the largest relative error")
    legend = (f'<text style="fill:{COLOURS[i]}" x="{56 + 84 * i}" y="12">{name}</text>' for i, name in enumerate(names))
    body = chart[chart.index(">") + 1 : -len("</svg>")]
    return wrap([*legend, f'<g transform="translate(0 16)">{body}</g>'], WIDTH, HEIGHT + 16, "Relative rounding errors")


def draw_modes() -> str:
    """A panel a mode: what becomes of the numbers from -7 to 7 in fp4_e2m1."""
    size, gap, scale = 150, 26, 150 / 14
    x = torch.linspace(-7, 7, 1401, dtype=torch.float64)

    def trace(y: torch.Tensor) -> str:
        """A path through the corners of a staircase."""
        turns = [0, *((y.diff() != 0).nonzero()[:, 0] + 1).tolist()]
        steps = [(x[a].item(), y[a].item()) for a in turns] + [(x[-1].item(), y[-1].item())]
        corners = [f"{(a + 7) * scale:.1f} {(7 - b) * scale:.1f}" for a, b in steps[:1]]
        for (_, before), (a, b) in pairwise(steps):
            corners += [
                f"{(a + 7) * scale:.1f} {(7 - before) * scale:.1f}",
                f"{(a + 7) * scale:.1f} {(7 - b) * scale:.1f}",
            ]
        return "M" + " L".join(dict.fromkeys(corners))

    parts = []
    for i, mode in enumerate(MODES):
        left, top = 8 + (i % 3) * (size + gap), 22 + (i // 3) * (size + gap + 14)
        middle = size / 2
        lines = [f'<path class="grid" d="M0 {middle}h{size}M{middle} 0v{size}M0 {size}L{size} 0"/>']
        if mode == "stochastic":
            for each in ("up", "down"):
                lines.append(f'<path class="line c5" d="{trace(round_to(x, "fp4_e2m1", mode=each))}"/>')
            mean = x.clamp(-6, 6)
            points = " L".join(f"{(a + 7) * scale:.1f} {(7 - mean[j].item()) * scale:.1f}"
                               for j, a in ((0, -7), (100, -6), (1300, 6), (1400, 7)))  # fmt: skip
            lines.append(f'<path class="line mean c0" d="M{points}"/>')
        else:
            lines.append(f'<path class="line c0" d="{trace(round_to(x, "fp4_e2m1", mode=mode))}"/>')
        parts.append(f'<g transform="translate({left} {top})"><text x="0" y="-7">{mode}</text>{"".join(lines)}</g>')
    return wrap(parts, 3 * size + 2 * gap + 16, 2 * (size + gap) + 28, "Rounding to fp4_e2m1 in each mode")


def describe_formats() -> dict[Path, str]:
    """The page and its figures."""
    units = write_table(["format", "units"], ([f"`{name}`", UNITS[name]] for name in FORMATS))
    return {
        DOCS / "formats.md": PAGE.format(plain=list_plain(), blocks=list_blocks(), units=units),
        DOCS / "figures" / "format-ranges.svg": draw_ranges(),
        DOCS / "figures" / "format-numbers.svg": draw_numbers(),
        DOCS / "figures" / "format-errors.svg": draw_errors(),
        DOCS / "figures" / "rounding-modes.svg": draw_modes(),
    }


if __name__ == "__main__":
    for path, text in describe_formats().items():
        path.write_text(text, encoding="utf-8")
