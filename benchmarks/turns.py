"""Processes that take turns: all arms of a workload are alive at once, and one at a time makes a few steps.

A machine may change its speed from minute to minute, a virtual one threefold. Arms that run one after another meet different
machines then, and their ratio says little. Arms that take turns of a few seconds meet the same one, and so does the gauge, a
process that measures in every turn how fast a matrix product is at that moment.

A process answers every line that it is told with a line of JSON; while it is not asked it waits for its next line and uses
no processor time.
"""

import json
import select
import subprocess
import tempfile
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from types import TracebackType
from typing import IO, Any, Self, cast

Answer = dict[str, Any]
END = "end"  # asks a process for what it has found


class Process:
    """A command that is told lines and answers with lines of JSON. What fails is an answer with the key "error".

    Examples:
        >>> import sys
        >>> with Process([sys.executable, "-c", "print(len(input()))"], {}, timeout=60.0) as process:
        ...     process.ask("four")
        4
    """

    def __init__(self, command: Sequence[str], environment: dict[str, str], timeout: float) -> None:
        self.timeout = timeout
        self._said = tempfile.TemporaryFile("w+")  # noqa: SIM115  (what it writes besides answers; closed by __exit__)
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._said, text=True, env=environment
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._process.kill()
        self._process.communicate()
        self._said.close()

    def ask(self, line: str) -> Any:
        """Tell it a line and wait for its answer."""
        questions, answers = cast("IO[str]", self._process.stdin), cast("IO[str]", self._process.stdout)
        try:
            print(line, file=questions, flush=True)
        except BrokenPipeError:
            return self._explain_end()
        if not select.select([answers], [], [], self.timeout)[0]:
            return {"error": f"took over {self.timeout:g} s"}
        answer = answers.readline()
        return json.loads(answer) if answer else self._explain_end()

    def _explain_end(self) -> Answer:
        self._process.wait()
        self._said.seek(0)
        return {"error": find_last_words(self._said.read())}


def find_last_words(said: str) -> str:
    """The line that names the error, in what a process wrote before it ended.

    Examples:
        >>> find_last_words("Traceback\\nValueError: so it is\\nbye")
        'ValueError: so it is'
    """
    lines = [line for line in said.strip().splitlines() if line.strip()]
    return next((line for line in reversed(lines) if "Error" in line), lines[-1] if lines else "it said nothing")


def take_turns(
    start: Callable[[str], Process], names: Sequence[str], gauge: Process, *, turns: int, steps: int
) -> dict[str, Answer]:
    """Start processes one after another, ask each for some steps in every turn, and then for what they have found.

    Another process is first in each turn. The answer to END gets a key `turns` with a
    dictionary for every turn: what the process answered, and under `gauge` what the gauge did.
    """
    found: dict[str, Answer] = {}
    taken: dict[str, list[Answer]] = {name: [] for name in names}
    with ExitStack() as stack:
        running: dict[str, Process] = {}

        def ask(name: str, line: str) -> Answer:
            answer: Answer = running[name].ask(line)
            if "error" in answer:
                found[name] = answer
                del running[name]
            return answer

        for name in names:
            running[name] = stack.enter_context(start(name))
            ask(name, "0")
        for turn in range(turns):
            gauged = gauge.ask("measure")
            present, shift = list(running), turn % max(1, len(running))
            for name in present[shift:] + present[:shift]:
                taken[name].append(ask(name, str(steps)) | {"gauge": gauged})
        for name in list(running):
            found[name] = ask(name, END) | {"turns": taken[name]}
    return {name: found[name] for name in names}
