"""Plans: which module gets which number formats, as a frozen value that can be read, saved and compared.

A plan is an ordered list of rules. A rule has keys (which modules it is for) and settings (what they get):

    keys       path         dotted module path: a glob (`*` within one name, `**` across names) or `re:` and a regex
               kind         linear | conv | embedding | norm | attention | recurrent
               position     first | last: of the modules that multiply weights (all kinds but norm), in the order in
                            which the model defines them; what lies inside one of them does not count
    settings   compute      format of the module's inputs and weights in its products
               grad         format of the gradient that enters its backward products; left out: as `compute`
               grad_input   format of both operands of the product that gives the gradient of the input, and
               grad_weight  of the one that gives the gradient of the weight; left out: as `compute` and `grad`
               scaling      which numbers of an 8-bit operand share a scale: tensor | delayed | row | 1x128 | 128x128;
                            left out: tensor; block formats bring their own
               output       format of what it returns; left out: as computed
               storage      format its live weights are kept in
               master       how the fp32 truth behind 16-bit weights is kept: fp32 | split | kahan | split24 |
                            stochastic | none
               cast         where activations are converted: `op` (every operation under the module, as torch.autocast
                            does it) or `unit` (only around the module itself)
               saved        format in which activations wait for the backward pass; left out: as they are
               memory_format   order in memory of a 2-d convolution's weight and of what it is given: channels_last |
                            contiguous; left out: as they are

For each setting of a module, the first rule that matches the module and states the setting decides; what no rule
states is fp32, uncast. `grad`, `grad_input`, `grad_weight` and `scaling` say more about `compute`: of them, nothing
counts that stands behind the rule that decided it. A rule that names a path and matches nothing is an error, because it
is nearly always a typo. A rule that names only a kind or a position may match nothing: "all embeddings" is a policy,
also for a model without any.

Formats are named by string, so the file can be read without torch. A plan has three written forms, all of which
round-trip: text (`str(plan)`, one rule a line), TOML and JSON.
"""

import functools
import json
import re
import shlex
import tomllib
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

import tomli_w

from halfstep.errors import PlanError, describe_unknown
from halfstep.numerics.formats import find_format

SCHEMA = 1
KINDS = ("linear", "conv", "embedding", "norm", "attention", "recurrent")
MASTERS = ("fp32", "split", "kahan", "split24", "stochastic", "none")
POSITIONS = ("first", "last")
CASTS = ("op", "unit")
MEMORY_FORMATS = ("channels_last", "contiguous")
OF_PRODUCTS = ("grad", "grad_input", "grad_weight", "scaling")  # settings that say more about `compute`
SCALINGS = ("tensor", "delayed", "row", "1x128", "128x128")
LOSS_SCALES = ("none", "dynamic", "layer")
RARE = ("states", "recovery", "products", "functions", "saved_budget", "rest")  # written where they are not the default
HEAD = ("name", "loss_scale", *RARE)  # keys of the plan itself
UNITS = {"KiB": 2**10, "MiB": 2**20, "GiB": 2**30}  # of memory, in bytes
STATES = ("fp32", "8-bit")
PRODUCTS = ("native", "emulated")
FUNCTIONS = ("torch", "fast")
RESTS = ("fp32", "auto")
RECOVERIES = ("skip", "back-off", "roll-back", "widen", "stop")


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What one module gets. The defaults are plain fp32 training."""

    compute: str = "fp32"
    grad: str = ""  # "" means as compute
    grad_input: str = ""  # "" means as compute and grad
    grad_weight: str = ""
    scaling: str = "tensor"
    output: str = ""  # "" means as computed
    storage: str = "fp32"
    master: str = "none"
    cast: str = "op"
    saved: str = ""  # "" means as they are
    memory_format: str = ""  # "" means as they are
    why: str = ""


@dataclass(frozen=True, kw_only=True)
class Rule:
    """Keys and settings; a setting that is None is left to later rules.

    Examples:
        >>> Rule(path="head", compute="float32").compute
        'fp32'

    Raises PlanError or FormatError, naming the nearest word, for an unknown kind, position, format, scaling, master, cast
    or memory format.
    """

    path: str = "**"
    kind: str | None = None
    position: str | None = None
    compute: str | None = None
    grad: str | None = None
    grad_input: str | None = None
    grad_weight: str | None = None
    scaling: str | None = None
    output: str | None = None
    storage: str | None = None
    master: str | None = None
    cast: str | None = None
    saved: str | None = None
    memory_format: str | None = None
    why: str = ""

    def __post_init__(self) -> None:
        for slot in ("compute", "grad", "grad_input", "grad_weight", "output", "storage", "saved"):
            name = getattr(self, slot)
            if name is not None:
                object.__setattr__(self, slot, find_format(name).name)
        words = {
            "kind": KINDS, "position": POSITIONS, "scaling": SCALINGS, "master": MASTERS, "cast": CASTS,
            "memory_format": MEMORY_FORMATS,
        }  # fmt: skip
        for slot, allowed in words.items():
            word = getattr(self, slot)
            if word is not None and word not in allowed:
                raise PlanError(describe_unknown(slot, word, allowed))
        _compile(self.path)

    @property
    def names_a_path(self) -> bool:
        return self.path != "**"

    def matches(self, path: str, kind: str, positions: Collection[str] = ()) -> bool:
        """Whether the rule is for the module at `path` of that kind ("" where it is none of KINDS).

        positions: which of POSITIONS the module has in its model; one that is alone has both.
        """
        if self.kind not in (None, kind) or (self.position is not None and self.position not in positions):
            return False
        return _compile(self.path).fullmatch(path) is not None

    def __str__(self) -> str:
        """One line: the keys and settings that are stated, as `key=value`."""
        stated = {f.name: getattr(self, f.name) for f in fields(self) if getattr(self, f.name) not in (None, f.default)}
        return " ".join(f"{key}={shlex.quote(str(value))}" for key, value in ({"path": self.path} | stated).items())


@functools.cache
def _compile(path: str) -> re.Pattern[str]:
    """A glob or `re:` pattern as a regex for fullmatch."""
    if path.startswith("re:"):
        source = path[3:]
    else:
        tokens = re.split(r"(\*\*|\*)", path)
        source = "".join({"**": ".*", "*": r"[^.]*"}.get(token, re.escape(token)) for token in tokens)
    try:
        return re.compile(source)
    except re.error as error:
        raise PlanError(f"path '{path}' is no regular expression: {error}; check the pattern after 're:'") from None


@dataclass(frozen=True, kw_only=True)
class Resolution:
    """A plan laid over one model: the exact table, and the rules that named a path nothing has."""

    table: Mapping[str, Settings]
    dead: tuple[Rule, ...]

    def require_alive(self) -> None:
        """Raises PlanError, naming the nearest path, when a rule is dead."""
        if self.dead:
            rule = self.dead[0]
            raise PlanError(
                f"rule '{rule}' matches no module: {describe_unknown('path', rule.path, [p for p in self.table if p])}"
            )


@dataclass(frozen=True, kw_only=True)
class Plan:
    """Ordered rules, how the loss is scaled, and what is done about steps that fail (`control.controller` says how).

    saved_budget: how much memory saved activations may take, as "64MiB" (KiB, MiB, GiB): when the first batch arrives, formats
        are chosen that fit with the least harm, for all modules of which no rule states `saved`.
    rest: what becomes of that which no rule states: "fp32", or "auto": it is chosen by timing when the first batch arrives, as
        for the precision of that name. Then `loss_scale` and `functions` are chosen too where they are left at their defaults.

    Examples:
        >>> plan = Plan.preset("bf16-mixed")
        >>> Plan.parse(str(plan)) == plan
        True
    """

    rules: tuple[Rule, ...] = ()
    loss_scale: str = "none"
    states: str = "fp32"  # of the optimizer, as `mechanisms.optimizer_states` keeps them
    recovery: str = "skip"
    products: str = "native"  # emulated: with the numerics of units that are not here, also where there is a unit
    functions: str = "torch"  # fast: those of `mechanisms.functions` in place of torch's own
    saved_budget: str = ""  # "" means that nothing is chosen
    rest: str = "fp32"  # auto: chosen by timing
    name: str = ""

    def __post_init__(self) -> None:
        rules = tuple(self.rules) if isinstance(self.rules, Iterable) else (None,)
        if not all(isinstance(rule, Rule) for rule in rules):
            raise PlanError(f"rules takes several Rules, as (Rule(compute='bf16'),); got {self.rules!r:.80}")
        object.__setattr__(self, "rules", rules)
        object.__setattr__(self, "saved_budget", "".join(str(self.saved_budget).split()))
        if self.saved_budget and self.saved_bytes <= 0:
            raise PlanError(f"saved_budget={self.saved_budget} leaves no room; give a number above 0, such as 64MiB")
        words = {
            "loss_scale": LOSS_SCALES, "states": STATES, "recovery": RECOVERIES, "products": PRODUCTS,
            "functions": FUNCTIONS, "rest": RESTS,
        }  # fmt: skip
        for key, allowed in words.items():
            if getattr(self, key) not in allowed:
                raise PlanError(describe_unknown(key, getattr(self, key), allowed))
        if self.rest == "auto" and self.saved_budget:
            raise PlanError(
                f"rest=auto and saved_budget={self.saved_budget} both choose by measuring the first batch; give one of them, and "
                "the other in the plan that `choose_plan` returns"
            )

    @property
    def saved_bytes(self) -> int:
        """The budget of saved activations in bytes; 0 where there is none.

        Examples:
            >>> Plan(saved_budget="1.5 KiB").saved_bytes
            1536
        """
        if not self.saved_budget:
            return 0
        found = re.fullmatch(rf"(\d+(?:\.\d+)?)({'|'.join(UNITS)})", self.saved_budget)
        if found is None:
            raise PlanError(
                f"saved_budget takes a number and a unit ({', '.join(UNITS)}), as 64MiB; got '{self.saved_budget:.60}'"
            )
        return int(float(found[1]) * UNITS[found[2]])

    @staticmethod
    def preset(name: str) -> "Plan":
        """The plan of a precision name as Lightning Fabric spells it, or of an alias.

        Examples:
            >>> Plan.preset("bf16").name
            'bf16-mixed'

        Raises PlanError, naming the nearest preset, when there is none.
        """
        name = ALIASES.get(name, name)
        if name == "auto":
            raise PlanError(
                "'auto' is not a plan but a choice of one: give it to prepare(), which chooses at the first batch"
            )
        if name not in PRESETS:
            raise PlanError(describe_unknown("precision", name, ["auto", *PRESETS, *ALIASES]))
        return PRESETS[name]

    @staticmethod
    def parse(text: str) -> "Plan":
        """A plan from a preset's name or from the text that `str(plan)` gives.

        Examples:
            >>> Plan.parse("bf16-mixed").loss_scale
            'none'
        """
        if "=" not in text:
            return Plan.preset(text.strip())
        head: dict[str, str] = {}
        rules: list[Rule] = []
        for number, words in _split_lines(text):
            pairs = dict(word.split("=", 1) for word in words if "=" in word)
            if len(pairs) != len(words):
                raise PlanError(
                    f"line {number} of the plan is '{' '.join(words)}'; write key=value words, each key once"
                )
            if set(HEAD) & set(pairs):
                head |= pairs
            else:
                rules.append(_rule_from(pairs))
        return _plan_from(head | {"rule": rules})

    def __str__(self) -> str:
        """The text form: a line for the plan, then a line a rule."""
        head = f"name={shlex.quote(self.name)} loss_scale={self.loss_scale}"
        head += "".join(f" {key}={value}" for key, value in self._rare().items())
        return "\n".join([head, *map(str, self.rules)])

    def _rare(self) -> dict[str, str]:
        """Keys of the head that are written only where they are not the default."""
        return {key: getattr(self, key) for key in RARE if getattr(self, key) != getattr(Plan, key)}

    def to_dict(self) -> dict[str, Any]:
        """Plain values, as they stand in TOML and JSON; settings that are not stated are left out."""
        rules = [{key: value for key, value in asdict(rule).items() if value not in (None, "")} for rule in self.rules]
        rules = [{"path": rule.path} | stated for rule, stated in zip(self.rules, rules, strict=True)]
        return {"schema": SCHEMA, "name": self.name, "loss_scale": self.loss_scale, **self._rare(), "rule": rules}

    @staticmethod
    def from_dict(values: Mapping[str, Any]) -> "Plan":
        """The inverse of `to_dict`. Raises PlanError for another schema or an unknown key."""
        if not isinstance(values, Mapping):
            raise PlanError(f"a plan is a table with schema, name, loss_scale and rule; got {values!r:.60}")
        values = dict(values)
        schema = values.pop("schema", SCHEMA)
        if schema != SCHEMA:
            raise PlanError(f"the plan has schema {schema!r}; this version reads schema {SCHEMA}")
        return _plan_from(values)

    @staticmethod
    def load(path: Path) -> "Plan":
        """A plan from a `.toml` or `.json` file, or from any other file in text form."""
        try:
            text = Path(path).read_bytes().decode()
        except (OSError, UnicodeDecodeError) as error:
            raise PlanError(f"plan file {path} cannot be read: {error}") from None
        try:
            if Path(path).suffix == ".toml":
                return Plan.from_dict(tomllib.loads(text))
            if Path(path).suffix == ".json":
                return Plan.from_dict(json.loads(text))
            return Plan.parse(text)
        except (tomllib.TOMLDecodeError, json.JSONDecodeError) as error:
            raise PlanError(f"plan file {path} is malformed: {error}") from None
        except ValueError as error:
            raise PlanError(f"plan file {path}: {error}") from None

    def save(self, path: Path) -> None:
        """Write the plan; the form follows the suffix (`.toml`, `.json`, else text)."""
        path = Path(path)
        if path.suffix == ".toml":
            text = tomli_w.dumps(self.to_dict())
        elif path.suffix == ".json":
            text = json.dumps(self.to_dict(), indent=2) + "\n"
        else:
            text = f"{self}\n"
        path.write_bytes(text.encode())

    def match(self, modules: Mapping[str, str]) -> dict[str, list[Rule]]:
        """The rules that match each module, in their order. modules: as `resolve` takes them."""
        ends = _find_ends(modules)
        places = {path: [word for word, end in zip(POSITIONS, ends, strict=True) if end == path] for path in modules}
        return {
            path: [rule for rule in self.rules if rule.matches(path, kind, places[path])]
            for path, kind in modules.items()
        }

    def resolve(self, modules: Mapping[str, str]) -> Resolution:
        """Lay the rules over modules given as path -> kind ("" for none of KINDS; the model itself has path "").

        Examples:
            >>> Plan(rules=(Rule(path="*.head", compute="bf16"),)).resolve({"a.head": "linear"}).table["a.head"].compute
            'bf16'
        """
        matching = self.match(modules)
        table = {path: _merge(rules) for path, rules in matching.items()}
        alive = {rule for rules in matching.values() for rule in rules}
        dead = tuple(rule for rule in self.rules if rule.names_a_path and rule not in alive)
        return Resolution(table=table, dead=dead)


def _find_ends(modules: Mapping[str, str]) -> tuple[str | None, str | None]:
    """Paths of the first and the last module that multiplies weights; what lies inside such a module is a part of it."""
    outermost: list[str] = []
    for path, kind in modules.items():
        if kind not in ("", "norm") and not (outermost and path.startswith(f"{outermost[-1]}.")):
            outermost.append(path)
    return (outermost[0], outermost[-1]) if outermost else (None, None)


def _merge(rules: Iterable[Rule]) -> Settings:
    """What rules that match one module give it: for each setting the first that states it decides."""
    settings: dict[str, str] = {}
    for rule in rules:
        done = OF_PRODUCTS if "compute" in settings else ()
        for slot in fields(Settings):
            value = getattr(rule, slot.name)
            if value not in (None, "") and slot.name not in done:
                settings.setdefault(slot.name, value)
    return replace(Settings(), **settings)


def _split_lines(text: str) -> Iterator[tuple[int, list[str]]]:
    """Number and words of each line; a line goes on while a quotation is open. Raises PlanError for one that never ends."""
    pending, began = "", 0
    for number, line in enumerate(text.split("\n"), start=1):
        pending, began = (f"{pending}\n{line}", began) if pending else (line, number)
        try:
            words = shlex.split(pending, comments=True)
        except ValueError:
            continue
        pending = ""
        if words:
            yield began, words
    if pending:
        raise PlanError(f"line {began} of the plan cannot be read: No closing quotation")


def _rule_from(values: Mapping[str, Any]) -> Rule:
    if not isinstance(values, Mapping):
        raise PlanError(f"a rule is a table of keys and settings; got {values!r:.60}; write [[rule]]")
    allowed = [f.name for f in fields(Rule)]
    for key, value in values.items():
        if key not in allowed:
            raise PlanError(describe_unknown("key in a rule", key, allowed))
        if not isinstance(value, str):
            raise PlanError(f"rule key '{key}' takes a string; got {value!r}")
    return Rule(**values)


def _plan_from(values: Mapping[str, Any]) -> Plan:
    values = dict(values)
    rules = values.pop("rule", [])
    for key, value in values.items():
        if key not in HEAD:
            raise PlanError(describe_unknown("key in a plan", key, ["schema", *HEAD, "rule"]))
        if not isinstance(value, str):
            raise PlanError(f"plan key '{key}' takes a string; got {value!r}")
    if not isinstance(rules, list):
        raise PlanError("'rule' takes a list of tables; write [[rule]]")
    return Plan(rules=tuple(rule if isinstance(rule, Rule) else _rule_from(rule) for rule in rules), **values)


def _mixed(compute: str, **plan: str) -> Plan:
    rule = Rule(compute=compute, storage="fp32", cast="op")
    return Plan(rules=(rule,), **plan)


def _true(storage: str, **plan: str) -> Plan:
    """Weights, activations and gradients in one 16-bit format. Statistics of normalisation stay fp32, as they do
    inside every 16-bit kernel; the model returns fp32, so that the loss is summed in fp32."""
    return Plan(
        rules=(
            Rule(path="", output="fp32"),
            Rule(kind="norm", compute="fp32", storage="fp32", output=storage, cast="unit"),
            Rule(compute=storage, storage=storage, master="none", cast="unit"),
        ),
        **plan,
    )


def _scaled(compute: str, grad: str, **settings: str) -> Plan:
    """Products of linear and convolution layers in 8 bits, all else as in bf16-mixed.

    The ends stay in 16 bits, as in every 8-bit recipe that is known to hold (DeepSeek-V3, arXiv 2412.19437, section
    3.3.1; torchao's and Transformer Engine's): they hold few of the multiplications and most of the harm.
    """
    products = {"compute": compute, "grad": grad, **settings}
    return Plan(
        rules=(
            Rule(position="first", compute="bf16", why="reads the data: its errors reach every other layer"),
            Rule(position="last", compute="bf16", why="gives the result: its errors reach the loss unaveraged"),
            Rule(kind="linear", **products),
            Rule(kind="conv", **products),
            Rule(compute="bf16", storage="fp32", cast="op"),
        ),
    )


PRESETS: dict[str, Plan] = {
    "32-true": Plan(rules=(Rule(compute="fp32", storage="fp32"),), name="32-true"),
    "bf16-mixed": _mixed("bf16", name="bf16-mixed"),
    "16-mixed": _mixed("fp16", name="16-mixed", loss_scale="dynamic"),
    "bf16-true": _true("bf16", name="bf16-true"),
    "16-true": _true("fp16", name="16-true"),
    "fp8-mixed": replace(_scaled("fp8_e4m3", "fp8_e5m2", scaling="tensor"), name="fp8-mixed"),
    "int8-mixed": replace(_scaled("int8", "int8", scaling="row", grad_weight="bf16"), name="int8-mixed"),
}
AUTO = Plan(rest="auto", name="auto")
ALIASES = {"32": "32-true", "fp32": "32-true", "bf16": "bf16-mixed", "16": "16-mixed", "fp16": "16-mixed",
           "fp16-mixed": "16-mixed", "fp16-true": "16-true", "fp8": "fp8-mixed", "int8": "int8-mixed"}  # fmt: skip
