"""Plans: what a rule matches, who decides a setting, and three written forms that come back as they were."""

import dataclasses
import json
import shlex
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from halfstep.errors import FormatError, PlanError
from halfstep.numerics.formats import FORMATS
from halfstep.plan import (
    ALIASES,
    CASTS,
    FUNCTIONS,
    KINDS,
    LOSS_SCALES,
    MASTERS,
    MEMORY_FORMATS,
    POSITIONS,
    PRESETS,
    PRODUCTS,
    RECOVERIES,
    SCALINGS,
    STATES,
    Plan,
    Rule,
    Settings,
)

MODEL = {
    "": "",
    "embed": "embedding",
    "blocks.0": "",
    "blocks.0.attention": "attention",
    "blocks.0.mlp.up": "linear",
    "blocks.0.norm": "norm",
    "blocks.10.mlp.up": "linear",
    "head": "linear",
}
LINE_BREAKS = ["\n", "\r", "\r\n", "\x0b", "\x0c", "\x1c", "\x85", "\u2028", "\u2029"]
ODD = st.text(
    st.characters(exclude_categories=["Cs"], exclude_characters="\n\r\x0b\x0c\x1c\x1d\x1e\x85\u2028\u2029"), max_size=20
)  # line breaks have a test of their own
PATHS = st.one_of(ODD.filter(lambda path: not path.startswith("re:")), st.just("re:(a|b)\\.[0-9]+ ='\"#"))


def maybe(*words: str) -> st.SearchStrategy[str | None]:
    return st.one_of(st.none(), st.sampled_from(words))


RULES = st.builds(
    Rule,
    path=PATHS,
    kind=maybe(*KINDS),
    position=maybe(*POSITIONS),
    compute=maybe(*FORMATS),
    grad=maybe(*FORMATS),
    grad_input=maybe(*FORMATS),
    grad_weight=maybe(*FORMATS),
    scaling=maybe(*SCALINGS),
    output=maybe(*FORMATS),
    storage=maybe(*FORMATS),
    master=maybe(*MASTERS),
    cast=maybe(*CASTS),
    saved=maybe(*FORMATS),
    memory_format=maybe(*MEMORY_FORMATS),
    why=ODD,
)
PLANS = st.builds(
    Plan,
    rules=st.lists(RULES, max_size=4).map(tuple),
    loss_scale=st.sampled_from(LOSS_SCALES),
    recovery=st.sampled_from(RECOVERIES),
    states=st.sampled_from(STATES),
    saved_budget=st.sampled_from(["", "64MiB", "1.5GiB", "300KiB"]),
    products=st.sampled_from(PRODUCTS),
    functions=st.sampled_from(FUNCTIONS),
    name=ODD,
)

FULL = Plan(
    rules=(
        Rule(
            path="blocks.*.mlp", kind="linear", position="last", compute="fp8_e4m3", grad="fp8_e5m2", grad_input="int8",
            grad_weight="bf16", scaling="row", output="fp16", storage="bf16", master="split", cast="unit", saved="int8",
            memory_format="contiguous", why="it's \"timed\" # 2 = fast \\ é",
        ),
        Rule(path="", output="fp32"),
        Rule(kind="norm", compute="fp32"),
    ),
    loss_scale="dynamic",
    name="all of it",
)  # fmt: skip


def through_text(plan: Plan, _: Path) -> Plan:
    return Plan.parse(str(plan))


def through_values(plan: Plan, _: Path) -> Plan:
    return Plan.from_dict(plan.to_dict())


def through_file(suffix: str) -> Callable[[Plan, Path], Plan]:
    def pass_through(plan: Plan, folder: Path) -> Plan:
        path = folder / f"plan{suffix}"
        plan.save(path)
        return Plan.load(path)

    return pass_through


FORMS = {
    "text": through_text,
    "values": through_values,
    "toml file": through_file(".toml"),
    "json file": through_file(".json"),
    "text file": through_file(".plan"),
}


@pytest.fixture(params=FORMS)
def form(request: pytest.FixtureRequest) -> Callable[[Plan, Path], Plan]:
    return FORMS[request.param]


def test_full_rule_states_every_field() -> None:
    rule = FULL.rules[0]
    assert [f.name for f in dataclasses.fields(Rule) if getattr(rule, f.name) == f.default] == []


def test_plan_with_every_field_stated_comes_back(form: Callable[[Plan, Path], Plan], tmp_path: Path) -> None:
    assert form(FULL, tmp_path) == FULL


@pytest.mark.parametrize("name", PRESETS)
def test_preset_comes_back(form: Callable[[Plan, Path], Plan], tmp_path: Path, name: str) -> None:
    assert form(PRESETS[name], tmp_path) == PRESETS[name]


def test_empty_plan_comes_back(form: Callable[[Plan, Path], Plan], tmp_path: Path) -> None:
    assert form(Plan(), tmp_path) == Plan()


@pytest.mark.parametrize("line_break", LINE_BREAKS, ids=[ascii(b) for b in LINE_BREAKS])
def test_line_break_in_a_reason_comes_back(form: Callable[[Plan, Path], Plan], tmp_path: Path, line_break: str) -> None:
    plan = Plan(rules=(Rule(path="a", compute="bf16", why=f"first{line_break}second"), Rule(compute="fp32")))
    assert form(plan, tmp_path) == plan


def test_any_plan_comes_back(form: Callable[[Plan, Path], Plan], tmp_path: Path) -> None:
    @settings(max_examples=60, deadline=None, database=None, suppress_health_check=[HealthCheck.too_slow])
    @given(PLANS)
    def check(plan: Plan) -> None:
        assert form(plan, tmp_path) == plan

    check()


def test_text_form_is_a_line_for_the_plan_and_a_line_a_rule() -> None:
    plan = Plan(rules=(Rule(path="a.*", compute="bf16", why="2x faster"), Rule(kind="norm")), name="mine")
    assert str(plan) == "name=mine loss_scale=none\npath='a.*' compute=bf16 why='2x faster'\npath='**' kind=norm"


def test_values_leave_out_what_is_not_stated() -> None:
    plan = Plan(rules=(Rule(path="", compute="bf16"),), name="mine")
    assert plan.to_dict() == {
        "schema": 1,
        "name": "mine",
        "loss_scale": "none",
        "rule": [{"path": "", "compute": "bf16"}],
    }


def test_text_may_hold_comments_and_empty_lines_and_no_head() -> None:
    text = "# mine\n\npath=a compute=bf16  # fast\n   \ncompute=fp32\n"
    assert Plan.parse(text) == Plan(rules=(Rule(path="a", compute="bf16"), Rule(compute="fp32")))


def test_reason_with_a_hash_in_quotes_is_no_comment() -> None:
    assert Plan.parse(f"path=a why={shlex.quote('a # b')}").rules[0].why == "a # b"


@pytest.mark.parametrize("name", PRESETS)
def test_preset_has_its_own_name_and_is_parsed_by_it(name: str) -> None:
    assert PRESETS[name].name == name
    assert Plan.preset(name) == Plan.parse(f" {name}\n") == PRESETS[name]


@pytest.mark.parametrize(("alias", "name"), ALIASES.items())
def test_alias_is_the_preset(alias: str, name: str) -> None:
    assert Plan.preset(alias) == PRESETS[name]


def test_presets_are_those_of_lightning_fabric_and_two_in_8_bits() -> None:
    assert set(PRESETS) == {"32-true", "bf16-mixed", "16-mixed", "bf16-true", "16-true", "fp8-mixed", "int8-mixed"}
    assert {name for name, plan in PRESETS.items() if plan.loss_scale == "dynamic"} == {"16-mixed"}


@pytest.mark.parametrize(
    ("name", "path", "expected"),
    [
        ("32-true", "head", Settings()),
        ("bf16-mixed", "head", Settings(compute="bf16")),
        ("16-mixed", "head", Settings(compute="fp16")),
        ("bf16-true", "head", Settings(compute="bf16", storage="bf16", cast="unit")),
        ("16-true", "head", Settings(compute="fp16", storage="fp16", cast="unit")),
        ("bf16-true", "blocks.0.norm", Settings(output="bf16", cast="unit")),
        ("bf16-true", "", Settings(compute="bf16", storage="bf16", output="fp32", cast="unit")),
    ],
)
def test_preset_resolves_to_what_its_name_means(name: str, path: str, expected: Settings) -> None:
    resolution = Plan.preset(name).resolve(MODEL)
    assert resolution.table[path] == expected
    assert resolution.dead == ()


@pytest.mark.parametrize(
    ("pattern", "paths"),
    [
        ("**", set(MODEL)),
        ("", {""}),
        ("*", {"", "embed", "head"}),
        ("head", {"head"}),
        ("hea", set()),
        ("ead", set()),
        ("blocks.*", {"blocks.0"}),
        ("blocks.**", {p for p in MODEL if p.startswith("blocks.")}),
        ("**.up", {"blocks.0.mlp.up", "blocks.10.mlp.up"}),
        ("blocks.*.mlp.*", {"blocks.0.mlp.up", "blocks.10.mlp.up"}),
        ("blocks.1*.mlp.up", {"blocks.10.mlp.up"}),
        ("blocks*0", set()),
        ("**0", {"blocks.0"}),
        ("blocks.0.nor.", set()),
        ("blocksx0", set()),
        ("re:blocks.0", {"blocks.0"}),
        ("re:blocks\\.\\d+\\.mlp\\.up", {"blocks.0.mlp.up", "blocks.10.mlp.up"}),
        ("re:.*(up|head)", {"blocks.0.mlp.up", "blocks.10.mlp.up", "head"}),
        ("re:", {""}),
        ("re:block", set()),
    ],
)
def test_pattern_matches_whole_paths(pattern: str, paths: set[str]) -> None:
    rule = Rule(path=pattern)
    assert {path for path, kind in MODEL.items() if rule.matches(path, kind)} == paths


def test_dot_in_a_glob_is_a_dot() -> None:
    assert not Rule(path="a.b").matches("axb", "")
    assert Rule(path="re:a.b").matches("axb", "")


@pytest.mark.parametrize("kind", KINDS)
def test_kind_matches_only_its_modules(kind: str) -> None:
    rule = Rule(kind=kind)
    assert {path for path, other in MODEL.items() if rule.matches(path, other)} == {
        path for path, other in MODEL.items() if other == kind
    }


def test_path_and_kind_must_both_match() -> None:
    rule = Rule(path="blocks.**", kind="linear")
    assert rule.matches("blocks.0.mlp.up", "linear")
    assert not rule.matches("head", "linear")
    assert not rule.matches("blocks.0.norm", "norm")


def test_first_rule_that_states_a_setting_decides_it() -> None:
    plan = Plan(
        rules=(
            Rule(path="head", compute="fp16", why="first"),
            Rule(kind="linear", compute="bf16", storage="bf16", why="second"),
            Rule(compute="tf32", storage="fp32", master="split", cast="unit", output="fp32"),
        )
    )
    table = plan.resolve(MODEL).table
    assert table["head"] == Settings(
        compute="fp16", storage="bf16", master="split", cast="unit", output="fp32", why="first"
    )
    assert table["blocks.0.mlp.up"].compute == "bf16"
    assert table["embed"] == Settings(compute="tf32", master="split", cast="unit", output="fp32")


def test_what_no_rule_states_is_fp32_and_uncast() -> None:
    assert Plan().resolve(MODEL).table == dict.fromkeys(MODEL, Settings())
    assert Settings() == Settings(
        compute="fp32", grad="", grad_input="", grad_weight="", scaling="tensor", output="", storage="fp32",
        master="none", cast="op", saved="", memory_format="", why="",
    )  # fmt: skip


def test_rule_is_stated_with_the_formats_own_names() -> None:
    rule = Rule(compute="float32", output="half", storage="bfloat16")
    assert (rule.compute, rule.output, rule.storage) == ("fp32", "fp16", "bf16")


def test_rule_takes_dtypes_as_formats() -> None:
    rule = Rule(compute=torch.bfloat16, storage=torch.float32)  # type: ignore[arg-type]
    assert (rule.compute, rule.storage) == ("bf16", "fp32")
    with pytest.raises(FormatError, match="unknown format 'complex64'"):
        Rule(compute=torch.complex64)  # type: ignore[arg-type]


def test_rule_that_names_a_path_nothing_has_is_dead() -> None:
    alive, dead = Rule(path="head", compute="bf16"), Rule(path="haed", compute="bf16")
    resolution = Plan(rules=(alive, dead)).resolve(MODEL)
    assert resolution.dead == (dead,)
    with pytest.raises(PlanError) as caught:
        resolution.require_alive()
    message = str(caught.value)
    assert message.startswith(
        "rule 'path=haed compute=bf16' matches no module: unknown path 'haed'; did you mean 'head'?"
    )
    assert "blocks.0.attention" in message


def test_rule_whose_path_matches_only_another_kind_is_dead() -> None:
    rule = Rule(path="head", kind="norm", compute="bf16")
    assert Plan(rules=(rule,)).resolve(MODEL).dead == (rule,)


def test_dead_rules_are_named_in_the_order_of_the_plan() -> None:
    first, second = Rule(path="zzz"), Rule(path="aaa")
    resolution = Plan(rules=(first, Rule(path="head"), second)).resolve(MODEL)
    assert resolution.dead == (first, second)


def test_rule_that_names_only_a_kind_may_match_nothing() -> None:
    resolution = Plan(rules=(Rule(kind="recurrent", compute="bf16"), Rule(compute="fp32"))).resolve(MODEL)
    assert resolution.dead == ()
    resolution.require_alive()


def test_plans_and_rules_are_frozen_and_hashable() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        FULL.name = "other"  # type: ignore[misc]
    with pytest.raises(dataclasses.FrozenInstanceError):
        FULL.rules[0].path = "other"  # type: ignore[misc]
    assert len({FULL, Plan.parse(str(FULL))}) == 1


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("bf16-mixd", "unknown precision 'bf16-mixd'; did you mean 'bf16-mixed'? Allowed: 16, 16-mixed, 16-true, 32, "),
        ("", "unknown precision ''. Allowed: "),
        ("path=a kind=liner", "unknown kind 'liner'; did you mean 'linear'? Allowed: attention, conv, embedding, "),
        (
            "path=a master=splt",
            "unknown master 'splt'; did you mean 'split'? Allowed: fp32, kahan, none, split, split24, stochastic",
        ),
        ("path=a cast=ops", "unknown cast 'ops'; did you mean 'op'? Allowed: op, unit"),
        ("loss_scale=dynamc", "unknown loss_scale 'dynamc'; did you mean 'dynamic'? Allowed: dynamic, layer, none"),
        ("path=a computee=bf16", "unknown key in a rule 'computee'; did you mean 'compute'? Allowed: cast, compute, "),
        (
            "name=x nme=y",
            "unknown key in a plan 'nme'; did you mean 'name'? Allowed: functions, loss_scale, name, products, recovery, rest, "
            "rule, saved_budget, schema, states",
        ),
        ("path=a path=b", "line 1 of the plan is 'path=a path=b'; write key=value words, each key once"),
        ("path=a\npath=b bf16", "line 2 of the plan is 'path=b bf16'; write key=value words, each key once"),
        ("path=a\npath='b", "line 2 of the plan cannot be read: No closing quotation"),
        ("path=re:( compute=bf16", "path 're:(' is no regular expression: "),
    ],
)
def test_text_that_is_no_plan_says_what_is_wrong(text: str, message: str) -> None:
    with pytest.raises(PlanError) as caught:
        Plan.parse(text)
    assert str(caught.value).startswith(message)


@pytest.mark.parametrize("slot", ["compute", "output", "storage"])
def test_unknown_format_in_a_rule_names_the_nearest(slot: str) -> None:
    with pytest.raises(FormatError, match=r"^unknown format 'bf61'; did you mean 'bf16'\?"):
        Rule(**{slot: "bf61"})


def test_unknown_preset_names_the_nearest() -> None:
    with pytest.raises(PlanError, match=r"^unknown precision 'fp61'; did you mean 'fp16'\?"):
        Plan.preset("fp61")


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"schema": 2}, "the plan has schema 2; this version reads schema 1"),
        (
            {"rules": []},
            "unknown key in a plan 'rules'; did you mean 'rule'? Allowed: functions, loss_scale, name, products, recovery, rest, "
            "rule, saved_budget, schema, states",
        ),
        ({"name": 3}, "plan key 'name' takes a string; got 3"),
        ({"loss_scale": True}, "plan key 'loss_scale' takes a string; got True"),
        ({"rule": {"path": "a"}}, "'rule' takes a list of tables; write [[rule]]"),
        ({"rule": [{"path": 3}]}, "rule key 'path' takes a string; got 3"),
        ({"rule": [{"computes": "bf16"}]}, "unknown key in a rule 'computes'; did you mean 'compute'? Allowed: "),
        ({"rule": [{"compute": "bf61"}]}, "unknown format 'bf61'; did you mean 'bf16'? Allowed: "),
    ],
)
def test_values_that_are_no_plan_say_what_is_wrong(values: dict[str, object], message: str) -> None:
    with pytest.raises((PlanError, FormatError)) as caught:
        Plan.from_dict(values)
    assert str(caught.value).startswith(message)


def test_schema_may_be_left_out() -> None:
    assert Plan.from_dict({"rule": [{"compute": "bf16"}]}) == Plan(rules=(Rule(compute="bf16"),))


def test_missing_file_is_named(tmp_path: Path) -> None:
    path = tmp_path / "absent.toml"
    with pytest.raises(PlanError) as caught:
        Plan.load(path)
    assert str(caught.value).startswith(f"plan file {path} cannot be read: ")


def test_folder_is_no_plan(tmp_path: Path) -> None:
    with pytest.raises(PlanError, match="cannot be read"):
        Plan.load(tmp_path)


def test_file_that_is_no_text_is_named(tmp_path: Path) -> None:
    path = tmp_path / "plan.toml"
    path.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(PlanError, match=r"plan\.toml cannot be read: "):
        Plan.load(path)


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("plan.toml", "rule = [", "is malformed: "),
        ("plan.json", "{", "is malformed: "),
        ("plan.json", '{"schema": 2}', ": the plan has schema 2; this version reads schema 1"),
        ("plan.toml", "[[rule]]\ncompute = 'bf61'", ": unknown format 'bf61'; did you mean 'bf16'?"),
        ("plan.toml", "[[rule]]\npath = 're:['", ": path 're:[' is no regular expression: "),
        ("plan.txt", "path=a b", ": line 1 of the plan is 'path=a b'"),
        ("plan.txt", "bf16-mixd", ": unknown precision 'bf16-mixd'; did you mean 'bf16-mixed'?"),
    ],
)
def test_file_that_is_no_plan_is_named_with_the_problem(tmp_path: Path, name: str, text: str, message: str) -> None:
    path = tmp_path / name
    path.write_text(text, encoding="utf-8")
    with pytest.raises(PlanError) as caught:
        Plan.load(path)
    given, problem = f"plan file {path}", str(caught.value)
    assert problem.startswith(given)
    assert problem.removeprefix(given).strip().startswith(message.strip())


@pytest.mark.parametrize("text", ["3", "null", "[1, 2]", "[]", '"bf16"', '{"rule": [3]}', '{"rule": ["compute=bf16"]}'])
def test_json_of_another_shape_is_a_plan_error(tmp_path: Path, text: str) -> None:
    path = tmp_path / "plan.json"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(PlanError):
        Plan.load(path)


def test_toml_rule_that_is_no_table_is_a_plan_error(tmp_path: Path) -> None:
    path = tmp_path / "plan.toml"
    path.write_text('rule = ["compute=bf16"]', encoding="utf-8")
    with pytest.raises(PlanError):
        Plan.load(path)


def test_saved_form_follows_the_suffix(tmp_path: Path) -> None:
    for suffix in (".toml", ".json", ".txt"):
        FULL.save(tmp_path / f"plan{suffix}")
    assert "[[rule]]" in (tmp_path / "plan.toml").read_text(encoding="utf-8")
    assert json.loads((tmp_path / "plan.json").read_text(encoding="utf-8")) == FULL.to_dict()
    assert (tmp_path / "plan.txt").read_text(encoding="utf-8") == f"{FULL}\n"


def test_file_may_hold_only_a_presets_name(tmp_path: Path) -> None:
    path = tmp_path / "plan.txt"
    path.write_text("bf16-true\n", encoding="utf-8")
    assert Plan.load(path) == PRESETS["bf16-true"]


@pytest.mark.parametrize(
    ("modules", "first", "last"),
    [
        (MODEL, "embed", "head"),
        ({"": "", "norm": "norm", "fc": "linear"}, "fc", "fc"),
        ({"": "", "a": "attention", "a.out": "linear", "b": "attention", "b.out": "linear"}, "a", "b"),
        ({"": "linear"}, "", ""),
        ({"": "", "ab": "linear", "abc": "linear"}, "ab", "abc"),
        ({"": "", "norm": "norm"}, None, None),
    ],
)
def test_position_finds_the_ends_of_a_model(modules: dict[str, str], first: str | None, last: str | None) -> None:
    rules = (Rule(position="first", compute="bf16"), Rule(position="last", storage="bf16"))
    resolution = Plan(rules=rules).resolve(modules)
    assert [path for path, s in resolution.table.items() if s.compute == "bf16"] == [p for p in modules if p == first]
    assert [path for path, s in resolution.table.items() if s.storage == "bf16"] == [p for p in modules if p == last]
    assert resolution.dead == ()


def test_a_path_that_is_not_at_the_end_it_names_is_dead() -> None:
    rule = Rule(path="embed", position="last", compute="bf16")
    assert Plan(rules=(rule,)).resolve(MODEL).dead == (rule,)


def test_8_bit_presets_keep_the_ends_in_16_bits_and_say_why() -> None:
    for name in ("fp8-mixed", "int8-mixed"):
        table = Plan.preset(name).resolve(MODEL).table
        assert table["blocks.0.mlp.up"].compute in ("fp8_e4m3", "int8")
        for end in ("embed", "head"):
            assert table[end].compute == "bf16"
            assert table[end].why


def test_formats_of_products_end_with_the_rule_that_decides_compute() -> None:
    rules = (
        Rule(path="head", grad_weight="bf16"),
        Rule(path="head", compute="fp32", why="by hand"),
        Rule(kind="linear", compute="fp8_e4m3", grad="fp8_e5m2", scaling="row"),
    )
    table = Plan(rules=rules).resolve(MODEL).table
    assert (table["head"].compute, table["head"].grad, table["head"].scaling) == ("fp32", "", "tensor")
    assert table["head"].grad_weight == "bf16"
    assert (table["blocks.0.mlp.up"].grad, table["blocks.0.mlp.up"].scaling) == ("fp8_e5m2", "row")


def test_the_rest_of_a_plan_round_trips_and_is_auto_or_fp32() -> None:
    plan = Plan(rules=(Rule(path="head", compute="fp32"),), rest="auto")
    assert Plan.parse(str(plan)) == Plan.from_dict(plan.to_dict()) == plan
    with pytest.raises(PlanError, match="unknown rest 'automatic'; did you mean 'auto'"):
        Plan(rest="automatic")
    with pytest.raises(PlanError, match="both choose"):
        Plan(rest="auto", saved_budget="1MiB")


def test_rules_are_a_tuple_of_rules() -> None:
    rule = Rule(compute="bf16")
    assert Plan(rules=(each for each in [rule])).rules == (rule,)  # type: ignore[arg-type]
    assert hash(Plan(rules=[rule])) == hash(Plan(rules=(rule,)))  # type: ignore[arg-type]
    for wrong in (rule, "compute=bf16", None):
        with pytest.raises(PlanError, match="rules takes several Rules"):
            Plan(rules=wrong)  # type: ignore[arg-type]
