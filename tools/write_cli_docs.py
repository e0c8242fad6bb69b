"""Paste the help of every command into docs/cli.md. Run it after changing the command line; a test says when it is due."""

import os
import subprocess
import sys
from pathlib import Path

PAGE = Path(__file__).parent.parent / "docs" / "cli.md"
COMMANDS = ("", "probe", "plan", "train", "compare", "report")


def describe_commands() -> str:
    """The page's text."""
    environment = os.environ | {"COLUMNS": "100", "NO_COLOR": "1", "TERM": "dumb"}
    parts = ["# Command line\n"]
    for command in COMMANDS:
        words = [sys.executable, "-m", "halfstep", *([command] if command else []), "--help"]
        text = subprocess.run(words, env=environment, capture_output=True, text=True, check=True).stdout
        lines = "\n".join(line.rstrip() for line in text.strip().splitlines())
        parts.append(f"## halfstep {command}".rstrip() + f"\n\n```text\n{lines}\n```\n")
    return "\n".join(parts)


if __name__ == "__main__":
    PAGE.write_text(describe_commands(), encoding="utf-8")
