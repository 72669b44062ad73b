"""Runs notebooks and programs, each in a process of its own that needs not import torch and transformers again.

`python tests/notebook_server.py` imports the libraries that nearly every one of them wants, and nothing else: it
computes nothing and starts no thread, so a copy of it (`os.fork`) is as good as a new interpreter, and is there in
milliseconds instead of seconds. For every line on its standard input it makes such a copy, runs what is asked for
there, and answers with one line of JSON: `{"returncode", "output", "seconds"}`. A line is JSON, too:

    {"notebook": PATH}                                            as `nbdev-test PATH`
    {"program": ["-m", MODULE, WORD, …] or [FILE, WORD, …],       as `python` with these words
     "cwd": FOLDER, "env": {NAME: VALUE}}                         both may be left out

The package itself is imported by each of them anew: its registries are their own.
"""

import importlib
import json
import os
import runpy
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


def run_here(request: dict, output: int) -> int:
    """Runs what is asked for in this process, its output going to a file; returns the exit status."""
    from nbdev.test import nbdev_test

    null = os.open(os.devnull, os.O_RDONLY)
    for source, target in ((null, 0), (output, 1), (output, 2)):
        os.dup2(source, target)
    os.environ.update(request.get("env", {}))
    os.chdir(request.get("cwd", "."))
    try:
        if "notebook" in request:
            nbdev_test(request["notebook"], n_workers=0)
        else:
            run_program(request["program"])
    except SystemExit as stopped:
        if isinstance(stopped.code, str):
            print(stopped.code, file=sys.stderr)
        return 1 if isinstance(stopped.code, str) else int(stopped.code or 0)
    except BaseException:
        traceback.print_exc()
        return 1
    return 0


def run(request: dict) -> dict:
    """Runs it in a copy of this process. A copy that is killed has the negative number of its signal."""
    began = time.monotonic()
    with tempfile.TemporaryFile() as output:
        child = os.fork()
        if not child:
            status = run_here(request, output.fileno())
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(status)
        _, status = os.waitpid(child, 0)
        output.seek(0)
        text = output.read().decode(errors="replace")
    seconds = round(time.monotonic() - began, 2)
    return {"returncode": os.waitstatus_to_exitcode(status), "output": text, "seconds": seconds}


def main() -> None:
    for library in LIBRARIES:
        importlib.import_module(library)
    for line in sys.stdin:
        print(json.dumps(run(json.loads(line))), flush=True)


if __name__ == "__main__":
    main()
