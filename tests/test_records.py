"""Records: every field survives a line of JSON; what cannot be read says why and where."""

import dataclasses
import io
import json
import math
import types
import typing
from pathlib import Path
from typing import Any, Literal

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from halfstep import records
from halfstep.errors import RecordError
from halfstep.plan import Plan
from halfstep.records import (
    ArmResult,
    Capability,
    EndRecord,
    HardwareProfile,
    LayerRecord,
    PlanRecord,
    Point,
    Record,
    RunRecord,
    StepOutcome,
    StepRecord,
    append,
    decode,
    encode,
    read,
)

TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=12)
NUMBERS = st.floats(allow_nan=False)  # NaN has tests of its own: it is not equal to itself
LINE_BREAKS = ["\n", "\r", "\r\n", "\x0b", "\x0c", "\x1c", "\x85", "\u2028", "\u2029"]
POINT = Point(step=7, seconds=1.5, value=0.25)


def values_of(hint: Any) -> st.SearchStrategy[Any]:
    """Values of an annotation that appears in a record."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin is Literal:
        return st.sampled_from(arguments)
    if origin in (typing.Union, types.UnionType):
        return st.one_of(*map(values_of, arguments))
    if origin is tuple and arguments[-1] is Ellipsis:
        return st.lists(values_of(arguments[0]), max_size=3).map(tuple)
    if origin is tuple:
        return st.tuples(*map(values_of, arguments))
    if origin is dict:
        return st.dictionaries(TEXT, values_of(arguments[1]), max_size=3)
    if dataclasses.is_dataclass(hint):
        return records_of(typing.cast(type[Record], hint))
    simple = {str: TEXT, int: st.integers(-(2**63), 2**63), float: NUMBERS, bool: st.booleans(), type(None): st.none()}
    return simple[hint]


def records_of(kind: type[Record]) -> st.SearchStrategy[Record]:
    hints = typing.get_type_hints(kind)
    fields = dataclasses.fields(kind)  # type: ignore[arg-type]
    return st.fixed_dictionaries({f.name: values_of(hints[f.name]) for f in fields}).map(lambda v: kind(**v))


def other_than_default(hint: Any) -> Any:
    """One value of an annotation that no field has as its default."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin is Literal:
        return arguments[-1]
    if origin in (typing.Union, types.UnionType):
        return other_than_default(arguments[0])
    if origin is tuple:
        return tuple(other_than_default(a) for a in arguments if a is not Ellipsis)
    if origin is dict:
        return {"key": other_than_default(arguments[1])}
    if dataclasses.is_dataclass(hint):
        return filled(typing.cast(type[Record], hint))
    return {str: "word", int: 41, float: 2.75, bool: True}[hint]


def filled(kind: type[Record]) -> Record:
    hints = typing.get_type_hints(kind)
    return kind(**{f.name: other_than_default(hints[f.name]) for f in dataclasses.fields(kind)})  # type: ignore[arg-type]


def same(one: Any, other: Any) -> bool:
    """Equal, with NaN equal to NaN."""
    if dataclasses.is_dataclass(one):
        names = [f.name for f in dataclasses.fields(one)]
        return type(one) is type(other) and all(same(getattr(one, n), getattr(other, n)) for n in names)
    if isinstance(one, tuple):
        return isinstance(other, tuple) and len(one) == len(other) and all(map(same, one, other))
    if isinstance(one, dict):
        return isinstance(other, dict) and one.keys() == other.keys() and all(same(one[k], other[k]) for k in one)
    if isinstance(one, float) and math.isnan(one):
        return isinstance(other, float) and math.isnan(other)
    return type(one) is type(other) and bool(one == other)


def test_every_record_of_the_module_is_in_the_table_of_kinds() -> None:
    defined = {
        name
        for name, value in vars(records).items()
        if isinstance(value, type) and issubclass(value, Record) and value is not Record
    }
    assert set(records.KINDS) == defined
    assert all(kind.__name__ == name for name, kind in records.KINDS.items())


@pytest.mark.parametrize("kind", records.KINDS.values(), ids=list(records.KINDS))
def test_record_with_no_field_at_its_default_comes_back(kind: type[Record]) -> None:
    record = filled(kind)
    for field in dataclasses.fields(kind):  # type: ignore[arg-type]
        default = field.default_factory() if callable(field.default_factory) else field.default
        assert getattr(record, field.name) != default
    assert same(decode(encode(record)), record)


def test_plans_from_before_scales_and_operations_were_written_are_read() -> None:
    line = (
        '{"schema":1,"record":"PlanRecord","step":0,"plan":"int8-mixed","layers":[{"path":"fc","kind":"linear","compute":"int8",'
        '"storage":"fp32","master":"none","parameters":4,"why":"","grad":"int8","saved":""}],"why":"","seconds":0.0}'
    )
    plan = decode(line)
    assert isinstance(plan, records.PlanRecord)
    assert plan.operations == ()
    assert (plan.layers[0].grad, plan.layers[0].scaling, plan.layers[0].grad_weight) == ("int8", "", "")


@pytest.mark.parametrize("kind", records.KINDS.values(), ids=list(records.KINDS))
def test_any_record_comes_back_from_one_line(kind: type[Record]) -> None:
    @settings(max_examples=25, deadline=None, database=None)
    @given(records_of(kind))
    def check(record: Record) -> None:
        line = encode(record)
        assert "\n" not in line and "\r" not in line
        assert same(decode(line), record)

    check()


@pytest.mark.parametrize("number", [math.nan, math.inf, -math.inf, -0.0, 5e-324, 1.7976931348623157e308])
def test_every_float_survives_wherever_it_stands(number: float) -> None:
    arm = filled(ArmResult)
    assert isinstance(arm, ArmResult)
    arm = dataclasses.replace(
        arm,
        metric_mean=number,
        metrics=(number, 1.0, number),
        interval=(number, number),
        seconds_to_target=number,
        speedup={"fp32": number},
        loss=(Point(step=1, seconds=number, value=number),),
    )
    back = decode(encode(arm))
    assert same(back, arm)
    assert isinstance(back, ArmResult)
    assert math.copysign(1, back.metric_mean) == math.copysign(1, number)


def test_nonfinite_numbers_stand_in_the_line_as_strings() -> None:
    fields = json.loads(encode(Point(step=1, seconds=math.inf, value=math.nan)))
    assert fields == {"schema": 1, "record": "Point", "step": 1, "seconds": "Infinity", "value": "NaN"}
    assert json.loads(encode(dataclasses.replace(POINT, value=-math.inf)))["value"] == "-Infinity"


def test_none_stays_none() -> None:
    capability = Capability(format="fp8_e4m3", status="unsupported", ratio=None, ratio_best=None, why="no unit")
    assert decode(encode(capability)) == capability


def test_schema_and_record_stand_first() -> None:
    assert encode(POINT) == '{"schema":1,"record":"Point","step":7,"seconds":1.5,"value":0.25}'


def test_records_are_frozen() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        POINT.step = 8  # type: ignore[misc]


@pytest.mark.parametrize("status", ["applied", "skipped", "accumulated"])
def test_outcome_says_whether_the_weights_moved(status: Literal["applied", "skipped", "accumulated"]) -> None:
    outcome = StepOutcome(status=status, step=1, scale_before=1.0, scale_after=1.0)
    assert (outcome.applied, outcome.skipped) == (status == "applied", status == "skipped")


def test_outcome_reads_as_one_line_without_what_does_not_matter() -> None:
    plain = StepOutcome(status="accumulated", step=7, scale_before=1.0, scale_after=1.0)
    assert str(plain) == "step 7: accumulated"
    full = StepOutcome(
        status="skipped", step=7, scale_before=65536.0, scale_after=65536.0, cause="the loss is nan", layer="net.fc",
        gradient_norm=math.nan, recovery="weights of step 5 are back", stalls=("parameter group 0 stalls",),
    )  # fmt: skip
    assert str(full) == (
        "step 7: skipped, the loss is nan; first in layer net.fc; gradient norm nan; loss scale 65536; "
        "weights of step 5 are back; parameter group 0 stalls"
    )
    assert str(dataclasses.replace(full, cause="2 gradients of net.fc are not finite")).count("net.fc") == 1


def test_profile_finds_a_capability_by_format() -> None:
    capability = Capability(format="bf16", status="native", ratio=2.0, ratio_best=3.0, why="timed")
    profile = HardwareProfile(
        device="cpu", machine="m", unit="u", torch_version="2", threads=1, date="d", capabilities=(capability,)
    )
    assert profile.find_capability("bf16") is capability
    assert profile.find_capability("fp16") is None


def line_with(**changes: Any) -> str:
    return json.dumps(json.loads(encode(POINT)) | changes)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("", "not a JSON object: ''"),
        ("nonsense", "not a JSON object: 'nonsense'"),
        (encode(POINT)[:20], "not a JSON object: "),
        ("[]", "not a record of schema 1: '[]'"),
        ("3", "not a record of schema 1: '3'"),
        ("{}", "not a record of schema 1: '{}'"),
        (line_with(schema=2), "not a record of schema 1: "),
        (line_with(schema="1"), "not a record of schema 1: "),
        (line_with(record="Pint"), "unknown record 'Pint'; did you mean 'Point'? Allowed: ArmResult, Capability, "),
        (line_with(record=None), "unknown record 'None'. Allowed: "),
        (line_with(record=["Point"]), "unknown record '['Point']'"),
        (line_with(valu=1), "Point: unknown field 'valu'; did you mean 'value'? Allowed: seconds, step, value"),
        (line_with(step="x"), "Point: field 'step': "),
        (line_with(step=1.5), "Point: field 'step': "),
        (line_with(value=None), "Point: field 'value': "),
        ('{"schema":1,"record":"Point","step":1,"seconds":1.0}', "Point: field 'value': Field required"),
    ],
)
def test_line_that_is_no_record_says_what_is_wrong(line: str, message: str) -> None:
    with pytest.raises(RecordError) as caught:
        decode(line)
    assert str(caught.value).startswith(message)


def test_word_outside_a_closed_set_names_the_set() -> None:
    capability = Capability(format="bf16", status="native", ratio=None, ratio_best=None, why="")
    with pytest.raises(RecordError, match=r"^Capability: field 'status': .*'unsupported' \(got 'natve'\)$"):
        decode(encode(capability).replace('"native"', '"natve"'))


def test_unknown_field_of_a_record_within_a_record_is_named_with_its_own_fields() -> None:
    outcome = StepOutcome(status="applied", step=1, scale_before=1.0, scale_after=1.0)
    step = StepRecord(step=1, loss=1.0, milliseconds=1.0, samples=1, learning_rate=0.1, outcome=outcome)
    fields = json.loads(encode(step))
    fields["outcome"]["scale_befor"] = 1.0
    with pytest.raises(RecordError, match=r"outcome\.scale_befor.*did you mean 'scale_before'\?"):
        decode(json.dumps(fields))


def test_appended_records_are_read_in_order(tmp_path: Path) -> None:
    path = tmp_path / "run.jsonl"
    written = [POINT, EndRecord(step=3, reason="finished", peak_memory_bytes=1, skipped_steps=0)]
    for record in written:
        with path.open("a", encoding="utf-8") as file:
            append(file, [record])
    assert list(read(path)) == written


def test_append_hands_lines_to_the_system_at_once() -> None:
    class File(io.StringIO):
        flushed = ""

        def flush(self) -> None:
            self.flushed = self.getvalue()

    file = File()
    append(file, [POINT, POINT])
    assert file.flushed == f"{encode(POINT)}\n{encode(POINT)}\n"


def test_empty_file_holds_no_records(tmp_path: Path) -> None:
    path = tmp_path / "run.jsonl"
    path.touch()
    assert list(read(path)) == []


@pytest.mark.parametrize("kept", range(0, len(encode(POINT)) + 1, 8))
def test_last_line_that_was_cut_off_is_left_out(tmp_path: Path, kept: int) -> None:
    path = tmp_path / "run.jsonl"
    path.write_text(encode(POINT) + "\n" + encode(POINT)[:kept], encoding="utf-8")
    assert list(read(path)) == [POINT]


def test_last_line_that_was_cut_off_within_a_character_is_left_out(tmp_path: Path) -> None:
    accented = Capability(format="bf16", status="native", ratio=None, ratio_best=None, why="é")
    line = (encode(accented) + "\n").encode()
    path = tmp_path / "run.jsonl"
    path.write_bytes(line + line[: line.index("é".encode()) + 1])
    assert list(read(path)) == [accented]


def test_unreadable_line_is_named_by_file_and_number(tmp_path: Path) -> None:
    path = tmp_path / "run.jsonl"
    path.write_text(f"{encode(POINT)}\n{{}}\n{encode(POINT)}\n", encoding="utf-8")
    reader = read(path)
    assert next(reader) == POINT
    with pytest.raises(RecordError) as caught:
        next(reader)
    assert str(caught.value).startswith(f"{path}, line 2: not a record of schema 1: '{{}}")


@pytest.mark.parametrize("line_break", LINE_BREAKS, ids=[ascii(b) for b in LINE_BREAKS])
def test_line_break_within_a_text_does_not_break_the_file(tmp_path: Path, line_break: str) -> None:
    head = filled(RunRecord)
    assert isinstance(head, RunRecord)
    written = [dataclasses.replace(head, recipe=f"first{line_break}second"), POINT]
    path = tmp_path / "run.jsonl"
    with path.open("w", encoding="utf-8") as file:
        append(file, written)
    assert list(read(path)) == written


# --- a plan, for a reader


def layer_of(path: str, *, kind: str = "linear", compute: str = "bf16", why: str = "") -> LayerRecord:
    return LayerRecord(path=path, kind=kind, compute=compute, storage="fp32", master="none", parameters=1000, why=why)


def test_a_plan_record_reads_as_what_was_chosen_the_exceptions_and_what_runs() -> None:
    layers = (layer_of("0"), layer_of("1"), layer_of("2", compute="fp32", why="no gain"), layer_of("3", kind="norm"))
    record = PlanRecord(
        step=0, plan="name=auto loss_scale=none\ncompute=bf16", layers=layers, why="9 ms against 15", seconds=0.75,
        updates=("AdamW: native",), functions=("dropout: native",), kernels=("cc -O3",), unheld=("3.weight",),
        operations=("bf16 by torch.autocast: a long story",),
    )  # fmt: skip
    assert str(record).splitlines() == [
        "plan auto, in force from step 0, chosen in 0.75 s",
        "  9 ms against 15",
        "  2 linear: bf16, weights fp32 (2,000 parameters)",
        "  1 norm: bf16, weights fp32 (1,000 parameters)",
        "  but 2 (linear): fp32, weights fp32: no gain",
        "  no optimizer holds 3.weight: not trained",
        "  operations in bf16 by torch.autocast",
        "  fast functions: dropout: native",
        "  updates of AdamW: native",
        "  native is compiled by cc -O3",
    ]


def test_a_plan_record_shows_few_exceptions_and_says_how_many_there_are() -> None:
    odd = [layer_of(f"odd{i}", compute="fp32", why=f"reason {i}") for i in range(20)]
    text = str(PlanRecord(step=0, plan="", layers=(*(layer_of(f"{i}") for i in range(30)), *odd)))
    assert text.count("but odd") == records.SHOWN
    assert f"and {20 - records.SHOWN} more exceptions" in text
    assert "plan without a name" in text


@pytest.mark.parametrize("name", ["it's", "two\nlines", "a b", ""])
def test_a_plan_record_reads_any_name(name: str) -> None:
    record = PlanRecord(step=0, plan=str(Plan(name=name)), layers=())
    assert record.name == ("" if "\n" in name else name)
    assert str(record)
