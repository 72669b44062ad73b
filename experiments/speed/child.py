"""The other process of a comparison: it gets a line, and answers with a line of JSON."""

import json
import subprocess
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path


class Child:
    """A process that answers. What its libraries print in between is passed over."""

    def __init__(
        self,
        command: Sequence[str],
        environment: Mapping[str, str] | None = None,
        root: Path | None = None,  # where it runs
        quiet: bool = True,  # without its progress bars and warnings
    ):
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
        pipes |= {"stderr": subprocess.DEVNULL} if quiet else {}
        self.process = subprocess.Popen(command, text=True, cwd=root, env=environment, **pipes)

    def answer(self) -> dict:
        """The next thing that it tells."""
        line = self.process.stdout.readline()
        while line and not line.startswith('{"'):
            line = self.process.stdout.readline()
        if not line:
            raise SystemExit(f"{' '.join(self.process.args)} ended with status {self.process.wait()}")
        return json.loads(line)

    def ask(self, text: str) -> dict:
        """What it answers to a line."""
        self.process.stdin.write(f"{text}\n")
        self.process.stdin.flush()
        return self.answer()

    def close(self) -> None:
        """Ends it."""
        with suppress(BrokenPipeError):
            self.process.stdin.close()
        self.process.wait()
