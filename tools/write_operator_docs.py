"""Write the table of operations into docs/operators.md. Run it after changing the table; a test says when it is due."""

from collections import defaultdict
from pathlib import Path

from halfstep.numerics.operations import DIFFERENCES, TABLE

PAGE = Path(__file__).parent.parent / "docs" / "operators.md"
MARK = "<!-- tables: written by tools/write_operator_docs.py -->\n"


def describe_operations() -> str:
    """Both tables as Markdown."""
    groups: dict[tuple[str, str], list[str]] = defaultdict(list)
    for name, operation in TABLE.items():
        groups[operation.policy, operation.why].append(name)
    lines = ["| policy | operations | why |", "|---|---|---|"]
    lines += [f"| {policy} | {', '.join(map(_quote, names))} | {why} |" for (policy, why), names in groups.items()]
    lines += [
        "",
        "## Where torch.autocast differs",
        "",
        "| device | operations | torch | table | why not |",
        "|---|---|---|---|---|",
    ]
    for difference in DIFFERENCES:
        names = difference.names.split()
        ours = ", ".join(sorted({TABLE[name].policy for name in names}))
        spelled = ", ".join(map(_quote, names))
        lines.append(f"| {difference.device_type} | {spelled} | {difference.theirs} | {ours} | {difference.why} |")
    return "\n".join(lines) + "\n"


def _quote(name: str) -> str:
    return f"`{name}`"


if __name__ == "__main__":
    head, _, _ = PAGE.read_text(encoding="utf-8").partition(MARK)
    PAGE.write_text(head + MARK + describe_operations(), encoding="utf-8")
