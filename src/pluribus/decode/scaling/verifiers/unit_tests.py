"""Unit tests: the candidate's code runs, then the problem's tests in the same module.

1 if both go through within the time limit, else 0. The code is the last fenced block of the
candidate, or all of it. It runs in a process of its own, in an empty folder that is deleted
afterwards, without the user's site packages (`python -I`), with limits of time, processor time and
memory; what it started ends with it. Code that leaves early, by `exit()` say, has not passed.

This is no sandbox: the program may do what the user may. Run code of models you don't trust in a
container.
"""

import contextlib
import os
import re
import secrets
import signal
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

from pluribus.core.errors import InputError
from pluribus.decode.scaling.interface import Problem
from pluribus.decode.scaling.verifiers import verifier

FENCE = re.compile(r"```[\w+-]*\n(.*?)(?:^```|\Z)", re.DOTALL | re.MULTILINE)
# Runs in the child: limits, the candidate, the tests, and a file that says all went through.
LAUNCH = """
import resource, sys
cpu, memory, done = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3]
del sys.argv[1:]  # test runners read it
resource.setrlimit(resource.RLIMIT_CPU, (cpu, cpu))
resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
if memory:
    resource.setrlimit(resource.RLIMIT_AS, (memory, memory))
names = sys.modules["__main__"].__dict__
exec(compile(open("candidate.py", encoding="utf-8").read(), "candidate.py", "exec"), names)
try:
    exec(compile(open("tests.py", encoding="utf-8").read(), "tests.py", "exec"), names)
except SystemExit as stop:  # as unittest.main() ends
    if stop.code:
        raise
open(done, "x").close()
"""


@verifier("unit_tests", needs="tests")
@dataclass(frozen=True, kw_only=True)
class UnitTests:
    """Runs a candidate's code against tests."""

    seconds: float = 10.0
    memory: int = 2 << 30  # bytes of address space; 0 sets no limit

    def __post_init__(self) -> None:
        """Raise InputError for a limit out of range."""
        if not self.seconds > 0 or self.memory < 0:
            raise InputError(
                f"unit_tests: seconds is {self.seconds} and memory {self.memory}; give more than "
                "0, and 0 or more"
            )

    def score(self, problem: Problem, candidate: list[str]) -> list[float]:
        """Return one score. Raises InputError for a problem without tests."""
        if problem.tests is None:
            raise InputError(
                f"the problem {problem.id or problem.question[:40]!r} has no tests; give a program "
                "that fails if the code before it is wrong"
            )
        return [float(self._passes(code("".join(candidate)), problem.tests))]

    def _passes(self, program: str, tests: str) -> bool:
        with tempfile.TemporaryDirectory(prefix="pluribus-tests-") as folder:
            place = Path(folder)
            for name, text in (("candidate.py", program), ("tests.py", tests)):
                (place / name).write_text(text, "utf-8", errors="replace")
            done = place / secrets.token_hex(16)
            limits = [str(int(self.seconds) + 1), str(self.memory), str(done)]
            process = subprocess.Popen(
                [sys.executable, "-I", "-c", LAUNCH, *limits],
                cwd=folder,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                start_new_session=True,  # so that all it starts can be ended with it
                env={"PATH": os.environ.get("PATH", ""), "HOME": folder},
            )
            try:
                return process.wait(self.seconds) == 0 and done.exists()
            except subprocess.TimeoutExpired:
                return False
            finally:
                _end(process)


def _end(process: "subprocess.Popen[bytes]") -> None:
    """End a process and all of its session."""
    with contextlib.suppress(ProcessLookupError):  # all of it has ended by itself
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def code(text: str) -> str:
    """Return the last fenced block of a text, or all of it."""
    blocks = FENCE.findall(text)
    return blocks[-1] if blocks else text
