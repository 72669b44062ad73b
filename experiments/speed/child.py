"""The other process of a comparison: it gets a line, and answers with a line of JSON."""

import json
import subprocess
import tempfile
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
    ):
        self.errors = tempfile.TemporaryFile()  # with its progress bars and warnings
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": self.errors}
        self.process = subprocess.Popen(command, text=True, cwd=root, env=environment, **pipes)

    def answer(self) -> dict:
        """The next thing that it tells."""
        line = self.process.stdout.readline()
        while line and not line.startswith('{"'):
            line = self.process.stdout.readline()
        if not line:
            status = self.process.wait()
            self.errors.seek(0)
            said = self.errors.read().decode(errors="replace").strip().splitlines() or ["nothing"]
            raise SystemExit(f"{' '.join(self.process.args)} ended with status {status}; it said: {said[-1]}")
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
