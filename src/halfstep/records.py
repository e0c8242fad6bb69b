"""Facts that are written down. Frozen values; one JSON object a line on disk.

A line is `{"schema": 1, "record": "StepRecord", ...fields}`. Numbers that JSON cannot hold (NaN, infinity) are
written as the strings "NaN", "Infinity" and "-Infinity", so that a NaN loss stays a NaN loss. Reading a line of
another schema, an unknown record or an unknown field raises RecordError with the file and line.
"""

import dataclasses
import json
import math
import shlex
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path
from typing import IO, Any, Literal, get_args, get_type_hints

from pydantic import ConfigDict, TypeAdapter, ValidationError

from halfstep.errors import RecordError, describe_unknown

SCHEMA = 1


class Record:
    """Root of all records; pydantic reads and writes the dataclasses below through this configuration."""

    __pydantic_config__ = ConfigDict(extra="forbid", ser_json_inf_nan="strings")


@dataclass(frozen=True, kw_only=True)
class Measurement(Record):
    """A timed operation. `shape` is (m, k, n) for a matmul, and for a convolution what `machine.timing` says."""

    operation: str  # matmul | conv2d | cast | copy | dispatch
    product: str  # output | grad_input | grad_weight | all; "" where it does not apply
    format: str
    shape: tuple[int, ...]
    milliseconds: float  # the fastest of its repetitions
    rate: float = 0.0  # GFLOP/s for products, GB/s for casts and copies


@dataclass(frozen=True, kw_only=True)
class Capability(Record):
    """What the machine does with a format, why we say so, and how its products compare with fp32."""

    format: str
    status: Literal["native", "emulated", "slower", "unsupported"]
    ratio: float | None  # time in fp32 / time in this format: geometric mean over the timed matmul shapes
    ratio_best: float | None  # the same, at the shape where the format does best
    why: str


@dataclass(frozen=True, kw_only=True)
class HardwareProfile(Record):
    """One machine, as it was measured.

    Examples:
        >>> profile = HardwareProfile(device="cpu", machine="M", unit="AVX2", torch_version="2.13", threads=2, date="")
        >>> profile.find_capability("bf16") is None
        True
    """

    device: str  # cpu | cuda
    machine: str  # the processor's own name
    unit: str  # instruction set or Tensor Core generation
    torch_version: str
    threads: int
    date: str
    load: float = 0.0  # processes per core that wanted to run in the minute before
    capabilities: tuple[Capability, ...] = ()
    measurements: tuple[Measurement, ...] = ()

    def find_capability(self, format_name: str) -> Capability | None:
        return next((c for c in self.capabilities if c.format == format_name), None)


@dataclass(frozen=True, kw_only=True)
class StepOutcome(Record):
    """What one call of `Stepper.step` did.

    Examples:
        >>> StepOutcome(status="applied", step=1, scale_before=1.0, scale_after=1.0).applied
        True
    """

    status: Literal["applied", "skipped", "accumulated"]
    step: int  # optimizer steps applied so far
    scale_before: float
    scale_after: float
    cause: str = ""  # why a step was skipped; empty otherwise
    tensors: tuple[str, ...] = ()  # parameters whose gradient was not finite, in the model's order
    gradient_norm: float | None = None  # 2-norm over all gradients after unscaling, before clipping
    layer: str = ""  # the first layer whose numbers were not finite: in the forward pass, else in the backward pass
    forward_nonfinite: bool = False  # whether the loss already was not finite
    recovery: str = ""  # what the plan's recovery policy did about it, and why
    stalls: tuple[str, ...] = ()  # parameter groups whose weights this update did not move, with the numbers

    @property
    def applied(self) -> bool:
        return self.status == "applied"

    @property
    def skipped(self) -> bool:
        return self.status == "skipped"

    def __str__(self) -> str:
        """One line: what was done, why, and the numbers that matter.

        Examples:
            >>> print(StepOutcome(status="applied", step=3, scale_before=1.0, scale_after=1.0, gradient_norm=0.25))
            step 3: applied; gradient norm 0.25
            >>> print(StepOutcome(status="skipped", step=3, scale_before=4.0, scale_after=2.0, cause="inf in fc.weight"))
            step 3: skipped, inf in fc.weight; loss scale 4 -> 2
        """
        said = [f"step {self.step}: {self.status}{self.cause and f', {self.cause}'}"]
        if self.layer and self.layer not in self.cause:
            said.append(f"first in layer {self.layer}")
        if self.gradient_norm is not None:
            said.append(f"gradient norm {self.gradient_norm:.3g}")
        if self.scale_before != self.scale_after:
            said.append(f"loss scale {self.scale_before:g} -> {self.scale_after:g}")
        elif self.scale_after != 1:
            said.append(f"loss scale {self.scale_after:g}")
        return "; ".join([*said, *filter(None, [self.recovery, *self.stalls])])


@dataclass(frozen=True, kw_only=True)
class Stall(Record):
    """Weights of one parameter group that an update did not move, though their gradient was not zero.

    The numbers are those of a sample of at most about 65,000 weights of the group, spread evenly; all of a smaller one.

    Examples:
        >>> stall = Stall(group=0, storage="bf16", master="none", learning_rate=1e-6, weights=1000, stuck=990,
        ...               median_weight=0.03, smallest_step=6e-5, median_update=1e-6, learning_rate_needed=6e-5)
        >>> str(stall).split("; ")[-1]
        'use master=split, or lr >= 6e-05'
    """

    group: int  # number of the optimizer's parameter group
    storage: str  # format of the live weights
    master: str  # how their fp32 truth is kept
    learning_rate: float
    weights: int  # that had a gradient other than zero
    stuck: int  # of those: the value is the same after the update
    median_weight: float  # of their absolute values
    smallest_step: float  # the smallest change that moves the median weight: half a unit in its last place
    median_update: float | None  # of absolute values, in fp32; None where it cannot be told
    learning_rate_needed: (
        float | None
    )  # at which the median update moves the median weight; None where it cannot be told

    @property
    def share(self) -> float:
        return self.stuck / self.weights

    def __str__(self) -> str:
        update = "" if self.median_update is None else f", its update was {self.median_update:.3g}"
        needed = "a larger lr" if self.learning_rate_needed is None else f"lr >= {self.learning_rate_needed:.2g}"
        exact = "split" if self.storage == "bf16" else "fp32"
        coarse = self.storage != "fp32" and self.master in ("none", "kahan", "split24")
        remedy = f"use master={exact}, or {needed}" if coarse else f"fp32 is too coarse for it; use {needed}"
        return (
            f"parameter group {self.group} stalls at lr={self.learning_rate:.3g}: {100 * self.share:.1f} % of its "
            f"{self.storage} weights (master={self.master}) that had a gradient did not move; the median weight "
            f"{self.median_weight:.3g} moves by {self.smallest_step:.2g} or more{update}; {remedy}"
        )


@dataclass(frozen=True, kw_only=True)
class StepRecord(Record):
    """One training step as it was written down."""

    step: int  # batches seen, from 1
    loss: float
    milliseconds: float  # forward, backward and update
    samples: int
    learning_rate: float
    outcome: StepOutcome


@dataclass(frozen=True, kw_only=True)
class EvaluationRecord(Record):
    """The held-out metric after a step."""

    step: int
    metric: str
    value: float
    train_seconds: float  # time spent in steps until here; evaluation is not counted


@dataclass(frozen=True, kw_only=True)
class LayerRecord(Record):
    """What a plan gave one module, and why."""

    path: str
    kind: str
    compute: str
    storage: str
    master: str
    parameters: int
    why: str = ""
    grad: str = ""  # format of the gradient in its products; "" as compute
    saved: str = ""  # format in which its activations wait for the backward pass; "" as they are
    grad_input: str = (
        ""  # format of both operands of the product that gives the gradient of the input; "" as the others
    )
    grad_weight: str = ""  # the same for the gradient of the weight
    scaling: str = (
        ""  # which numbers share a scale: delayed | row | 1x128 | 128x128; "" all of a tensor, or a format's blocks
    )
    memory_format: str = ""  # of a 2-d convolution: channels_last | contiguous; "" as it was

    def describe_compute(self) -> str:
        """Formats of products and saved activations in words, without those that follow from what was said.

        Examples:
            >>> LayerRecord(path="fc", kind="linear", compute="int8", storage="fp32", master="none", parameters=4,
            ...             grad="int8", grad_weight="bf16", scaling="row", saved="int4").describe_compute()
            'int8, grad_weight bf16, scales by row, saves int4'
        """
        grad = self.grad or self.compute
        words = [self.compute, f"gradient {grad}" if grad != self.compute else ""]
        for product in ("grad_input", "grad_weight"):
            own = getattr(self, product)
            words.append(f"{product} {own}" if own and not own == grad == self.compute else "")
        if self.scaling:
            words.append("delayed scales" if self.scaling == "delayed" else f"scales by {self.scaling}")
        return ", ".join(filter(None, [*words, f"saves {self.saved}" if self.saved else ""]))

    def describe_storage(self) -> str:
        """Storage, master and memory format in words: "fp32", or "bf16 + split, channels_last"."""
        stored = self.storage if self.storage == "fp32" else f"{self.storage} + {self.master}"
        return f"{stored}, {self.memory_format}" if self.memory_format else stored

    def __str__(self) -> str:
        return f"{self.describe_compute()}, weights {self.describe_storage()}"


def group_layers(layers: Iterable[LayerRecord]) -> list[LayerRecord]:
    """Layers of equal settings and reason in one record each, in order, with their parameters added up."""
    groups: dict[LayerRecord, list[LayerRecord]] = {}
    for layer in layers:
        groups.setdefault(replace(layer, path="", parameters=0), []).append(layer)
    merged = []
    for common, members in groups.items():
        path = members[0].path or "(model)"
        path += f" and {len(members) - 1} more" if len(members) > 1 else ""
        merged.append(replace(common, path=path, parameters=sum(m.parameters for m in members)))
    return merged


@dataclass(frozen=True, kw_only=True)
class HarmRecord(Record):
    """What one layer's formats do to the gradient of the whole model, all other layers being in fp32.

    Examples:
        >>> HarmRecord(path="fc", compute="fp8_e4m3", error=0.001, noise=0.5).sqnr_db
        30.0
    """

    path: str
    compute: str
    error: float  # |g' - g|^2 / |g|^2, over the gradients of all parameters; g in fp32 on the same batch
    noise: float  # the same between batches: half of |g1 - g2|^2, over |g|^2; what training lives with anyway

    @property
    def sqnr_db(self) -> float:
        """Signal to quantization noise ratio of the gradient, in dB; infinite where nothing changed."""
        return -10 * math.log10(self.error) if self.error else math.inf


@dataclass(frozen=True, kw_only=True)
class PlanRecord(Record):
    """The plan in force from a step on, as text, with what it came to layer by layer.

    `str` is the short form: what most layers of each kind got, those that got something else with the reason, and what runs
    updates and functions.

    Examples:
        >>> layer = LayerRecord(path="0", kind="linear", compute="bf16", storage="fp32", master="none", parameters=12)
        >>> print(PlanRecord(step=0, plan="name=bf16-mixed", layers=(layer,), updates=("AdamW: native",)))
        plan bf16-mixed, in force from step 0
          1 linear: bf16, weights fp32 (12 parameters)
          updates of AdamW: native
    """

    step: int
    plan: str
    layers: tuple[LayerRecord, ...]
    why: str = ""
    seconds: float = 0.0  # time that choosing it took
    updates: tuple[str, ...] = ()  # what computes the update of each optimizer
    functions: tuple[str, ...] = ()  # with a fast equal that the first step has called, and what runs in their place
    operations: tuple[str, ...] = ()  # for each 16-bit format that operations are cast to: who casts them, and why
    kernels: tuple[str, ...] = ()  # commands that compiled what is "native" in updates and functions
    unheld: tuple[str, ...] = ()  # parameters that require gradients and that no optimizer holds: they do not train

    @property
    def name(self) -> str:
        """The plan's name; "" where it has none."""
        try:
            words = shlex.split(self.plan.partition("\n")[0])
        except ValueError:  # a name of several lines
            return ""
        return dict(word.split("=", 1) for word in words if "=" in word).get("name", "")

    def __str__(self) -> str:
        took = f", chosen in {self.seconds:.2g} s" if self.seconds else ""
        lines = [f"plan {self.name or 'without a name'}, in force from step {self.step}{took}"]
        lines += [f"  {self.why}"] if self.why else []
        usual, exceptions = _find_usual(self.layers)
        for settings, members in usual.items():
            count, numbers = len(members), sum(layer.parameters for layer in members)
            lines.append(f"  {count} {settings.kind or 'other'}: {settings} ({numbers:,} parameters)")
        unlike = group_layers(exceptions)
        for layer in unlike[:SHOWN]:
            why = f": {layer.why}" if layer.why and layer.why != self.why else ""
            lines.append(f"  but {layer.path} ({layer.kind or 'other'}): {layer}{why}")
        lines += [f"  and {len(unlike) - SHOWN} more exceptions, in .layers"] if len(unlike) > SHOWN else []
        lines += [f"  no optimizer holds {describe_some(self.unheld)}: not trained"] if self.unheld else []
        lines += [f"  operations in {said.partition(':')[0]}" for said in self.operations]
        lines += [f"  fast functions: {said}" for said in self.functions]
        lines += [f"  updates of {said}" for said in self.updates]
        return "\n".join([*lines, *(f"  native is compiled by {command}" for command in self.kernels)])


SHOWN = 8  # exceptions in the short form of a plan record


def _find_usual(layers: Iterable[LayerRecord]) -> tuple[dict[LayerRecord, list[LayerRecord]], list[LayerRecord]]:
    """For each kind the settings that most of its layers have, with those layers; and all other layers."""
    kinds: dict[str, dict[LayerRecord, list[LayerRecord]]] = {}
    for layer in layers:
        settings = replace(layer, path="", parameters=0, why="")
        kinds.setdefault(layer.kind, {}).setdefault(settings, []).append(layer)
    usual = dict(max(groups.items(), key=lambda group: len(group[1])) for groups in kinds.values())
    return usual, [layer for layer in layers if replace(layer, path="", parameters=0, why="") not in usual]


def describe_some(names: Sequence[str], count: int = 3) -> str:
    """The first few names, and how many more there are.

    Examples:
        >>> describe_some(["a", "b", "c", "d"])
        'a, b, c and 1 more'
    """
    more = f" and {len(names) - count} more" if len(names) > count else ""
    return ", ".join(names[:count]) + more


@dataclass(frozen=True, kw_only=True)
class RunRecord(Record):
    """The head of a run: what is trained, how, on what."""

    task: str
    arm: str
    precision: str
    seed: int
    steps: int
    recipe: str  # the recipe's TOML text
    machine: str
    torch_version: str
    threads: int
    date: str
    settings: dict[str, str] = field(default_factory=dict)  # process settings and their reasons
    recipe_file: str = (
        ""  # the recipe as its file had it, before options of the command; "" for one that comes with halfstep
    )


@dataclass(frozen=True, kw_only=True)
class SavedRecord(Record):
    """What one module saved for the backward pass in one way, in one forward pass.

    Examples:
        >>> str(SavedRecord(path="fc", format="int8", why="", tensors=1, bytes=1024, kept=264, sqnr=41.0))
        'fc: 1 tensor, 1024 bytes kept in 264 as int8 (41.0 dB)'
    """

    path: str  # of the module; "" for the model itself and for what was saved outside of it
    format: str  # bf16 | int8 | int4 | bits | positive | two values | integers; "" for tensors kept as they are
    why: str  # the rule by which they are; "" for tensors in fewer bits
    tensors: int  # saved; what several operations save counts for each
    bytes: int  # that it would take as it is, counted once
    kept: int  # bytes that it takes
    sqnr: float | None  # signal to rounding noise in dB, where it was measured

    def __str__(self) -> str:
        error = "" if self.sqnr is None else f" ({self.sqnr:.1f} dB)"
        way = f"kept in {self.kept} as {self.format}{error}" if self.format else f"as they are: {self.why}"
        return f"{self.path or 'the model'}: {self.tensors} tensor{'s' * (self.tensors != 1)}, {self.bytes} bytes {way}"


@dataclass(frozen=True, kw_only=True)
class EndRecord(Record):
    """The end of a run."""

    step: int
    reason: str  # finished | interrupted | failed
    peak_memory_bytes: int
    skipped_steps: int
    error: str = ""  # why it failed


@dataclass(frozen=True, kw_only=True)
class Point(Record):
    """A point of a learning curve: the mean over seeds after `step` steps and `seconds` of training."""

    step: int
    seconds: float
    value: float


@dataclass(frozen=True, kw_only=True)
class ArmResult(Record):
    """What one way of training came to, over all seeds."""

    name: str
    verdict: str  # reference | equivalent | worse | better | inconclusive | not trained | not tested | failed
    metric_mean: float
    metric_sd: float
    metrics: tuple[float, ...]  # one a seed
    difference: float  # metric minus the reference's, mean over paired seeds
    interval: tuple[float, float]  # 90 % confidence interval of the difference
    step_ms: float  # median over steps and seeds, without the first tenth
    step_ms_spread: tuple[float, float]  # the same for the fastest and for the slowest turn
    peak_memory_bytes: int  # largest over seeds
    skipped_steps: int
    seconds_to_target: float | None = None  # training time until the target metric; None when it was not reached
    setup_seconds: float = 0.0  # of it, choosing the plan
    speedup: dict[str, float] = field(default_factory=dict)  # rival -> its time per step over ours
    memory_ratio: dict[str, float] = field(default_factory=dict)  # rival -> our peak memory over its
    loss: tuple[Point, ...] = ()
    evaluations: tuple[Point, ...] = ()
    plan: PlanRecord | None = None
    harms: tuple[HarmRecord, ...] = ()  # of a rehearsal: what its layers do to the gradient, mean over seeds
    failure: str = ""  # what ended it, where it did not train to the end


@dataclass(frozen=True, kw_only=True)
class ComparisonRecord(Record):
    """Several ways of training the same thing, from paired seeds, side by side."""

    recipe_name: str
    recipe: str
    metric: str
    unit: str
    higher_is_better: bool
    margin: float
    target: float
    seeds: int
    steps: int
    machine: str
    torch_version: str
    threads: int
    date: str
    seconds: float
    command: str
    arms: tuple[ArmResult, ...]
    control: str  # what the gate said of the arm that it must reject
    gate_works: bool
    speedup: dict[str, float] = field(default_factory=dict)  # of the arm `halfstep`
    memory_ratio: dict[str, float] = field(default_factory=dict)


KINDS: dict[str, type[Record]] = {
    kind.__name__: kind
    for kind in (
        Measurement, Capability, HardwareProfile, StepOutcome, Stall, StepRecord, EvaluationRecord,
        LayerRecord, HarmRecord, PlanRecord, RunRecord, SavedRecord, EndRecord, Point, ArmResult, ComparisonRecord,
    )
}  # fmt: skip


@cache
def _adapter(name: str) -> TypeAdapter[Any]:
    return TypeAdapter(KINDS[name])


def encode(record: Record) -> str:
    """One JSON object on one line.

    Examples:
        >>> encode(EndRecord(step=3, reason="finished", peak_memory_bytes=0, skipped_steps=0))[:36]
        '{"schema":1,"record":"EndRecord","st'
    """
    body = _adapter(type(record).__name__).dump_json(record).decode()
    head = f'{{"schema":{SCHEMA},"record":"{type(record).__name__}"'
    return head + ("," + body[1:] if body != "{}" else "}")


def decode(line: str) -> Record:
    """The record of a line. Raises RecordError for another schema, an unknown record or an unknown field."""
    try:
        fields = json.loads(line)
    except json.JSONDecodeError as error:
        raise RecordError(f"not a JSON object: {line[:60]!r} ({error.msg})") from None
    if not isinstance(fields, dict) or fields.pop("schema", None) != SCHEMA:
        raise RecordError(f"not a record of schema {SCHEMA}: {line[:60]!r}")
    name = fields.pop("record", None)
    if not isinstance(name, str) or name not in KINDS:
        raise RecordError(describe_unknown("record", name, KINDS))
    kind = KINDS[name]
    try:
        record: Record = _adapter(name).validate_python(fields)
    except ValidationError as error:
        raise RecordError(f"{name}: {_first_problem(error, kind)}") from None
    return record


def _first_problem(error: ValidationError, kind: type) -> str:
    """The first of pydantic's complaints as one of ours."""
    problem = error.errors(include_url=False)[0]
    where = ".".join(str(part) for part in problem["loc"])
    if problem["type"] == "unexpected_keyword_argument":
        for part in problem["loc"][:-1]:
            kind = _find_record(kind, str(part))
        return describe_unknown("field", where, [f.name for f in dataclasses.fields(kind)])
    return f"field '{where}': {problem['msg']} (got {problem['input']!r:.60})"


def _find_record(kind: type, field_name: str) -> type:
    """The record type within a field's annotation; the kind itself for an index into a list."""
    annotation = get_type_hints(kind).get(field_name)
    inner = [a for a in (annotation, *get_args(annotation)) if isinstance(a, type) and dataclasses.is_dataclass(a)]
    return inner[0] if inner else kind


def append(file: IO[str], records: Iterable[Record]) -> None:
    """Write records at the end of an open file and hand them to the system at once.

    Raises RecordError when the disk is full or the file cannot be written.
    """
    try:
        for record in records:
            file.write(encode(record) + "\n")
        file.flush()
    except OSError as error:
        raise RecordError(
            f"the record cannot be written ({error.strerror}); free some space, then go on with --resume"
        ) from None


def read(path: Path) -> Iterator[Record]:
    """All records of a file. A last line that was cut off by a crash is left out.

    Raises RecordError, with the line's number, for what cannot be read.
    """
    try:
        lines = path.read_bytes().splitlines(keepends=True)
    except OSError as error:
        raise RecordError(f"record {path} cannot be read ({error.strerror}); give the folder of a run") from None
    if lines and not lines[-1].endswith(b"\n"):
        lines.pop()
    for number, line in enumerate(lines, start=1):
        try:
            yield decode(line.decode(errors="replace"))
        except RecordError as error:
            raise RecordError(f"{path}, line {number}: {error}") from None
