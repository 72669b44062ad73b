"""Runs notebooks, tests and programs, each in a process of its own that needs not import torch and transformers again.

`python tests/notebook_server.py` imports the libraries that nearly every one of them wants, and nothing else: it
computes nothing and starts no thread, so a copy of it (`os.fork`) is as good as a new interpreter, and is there in
milliseconds instead of seconds. For every line on its standard input it makes such a copy, runs what is asked for
there, and answers with one line of JSON: `{"returncode", "output", "seconds"}`. A line is JSON, too:

    {"notebook": PATH}                                         as `nbdev-test PATH`
    {"pytest": [WORD, ...]}                                    as `pytest` with these words
    {"program": ["-m", MODULE, WORD, ...] or [FILE, WORD, ...]}  as `python` with these words

`"cwd": FOLDER` and `"env": {NAME: VALUE}` may be added; with `"limit": SECONDS` a copy that takes longer is killed, and
all that it started with it. The package itself is imported by each copy anew: its registries are the copy's own.
"""

import gc
import importlib
import json
import os
import runpy
import signal
import sys
import tempfile
import time
import traceback

LIBRARIES = (
    "accelerate",
    "matplotlib.pyplot",
    "matplotlib_inline.backend_inline",
    "nbdev.test",
    "omegaconf",
    "pyarrow.parquet",
    "pytest",
    "safetensors.torch",
    "scipy.stats",
    "tokenizers",
    "torch",
    "transformers.models.auto.modeling_auto",
    "transformers.models.auto.processing_auto",
    "transformers.models.qwen2_5_vl.modeling_qwen2_5_vl",
)


def run_program(words: list[str]) -> None:
    """What `python` does with these words."""
    if words[0] == "-m":
        sys.argv, sys.path[0] = words[1:], os.getcwd()
        runpy.run_module(words[1], run_name="__main__", alter_sys=True)
    else:
        sys.argv, sys.path[0] = words, os.path.dirname(os.path.abspath(words[0]))
        runpy.run_path(words[0], run_name="__main__")


def execute(asked: dict) -> int:
    """Runs what was asked for in this process; returns the exit status."""
    os.environ.update(asked.get("env", {}))
    os.chdir(asked.get("cwd", "."))
    if "pytest" in asked:
        import pytest

        return int(pytest.main(asked["pytest"]))
    if "program" in asked:
        run_program(asked["program"])
        return 0
    from nbdev.test import nbdev_test

    nbdev_test(asked["notebook"], n_workers=0)
    return 0


def run_here(asked: dict, output: int) -> int:
    """`execute` with standard output and error going to a file."""
    null = os.open(os.devnull, os.O_RDONLY)
    for source, target in ((null, 0), (output, 1), (output, 2)):
        os.dup2(source, target)
    try:
        return execute(asked)
    except SystemExit as stopped:
        if isinstance(stopped.code, str):
            print(stopped.code, file=sys.stderr)
        return 1 if isinstance(stopped.code, str) else int(stopped.code or 0)
    except BaseException:
        traceback.print_exc()
        return 1


def wait(child: int, limit: float | None) -> int:
    """Waits for a copy, `limit` seconds at most if there is a limit; then what it started is killed as well."""
    if limit is None:
        return os.waitpid(child, 0)[1]
    ends, done, status = time.monotonic() + limit, 0, 0
    while not done and time.monotonic() < ends:
        done, status = os.waitpid(child, os.WNOHANG)
        time.sleep(0 if done else 0.01)
    try:
        os.killpg(child, signal.SIGKILL)
    except ProcessLookupError:  # nothing is left of the group
        pass
    return status if done else os.waitpid(child, 0)[1]


def run(asked: dict) -> dict:
    """Runs it in a copy of this process. One that is killed has the negative number of its signal."""
    began, limit = time.monotonic(), asked.get("limit")
    with tempfile.TemporaryFile() as output:
        child = os.fork()
        if not child:
            if limit is not None:
                os.setpgid(0, 0)
            status = run_here(asked, output.fileno())
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(status)
        code = os.waitstatus_to_exitcode(wait(child, limit))
        output.seek(0)
        text = output.read().decode(errors="replace")
    return {"returncode": code, "output": text, "seconds": round(time.monotonic() - began, 2)}


def main() -> None:
    for library in LIBRARIES:
        importlib.import_module(library)
    gc.freeze()  # what a copy's garbage collector need not look at, it need not copy either
    for line in sys.stdin:
        print(json.dumps(run(json.loads(line))), flush=True)


if __name__ == "__main__":
    main()
