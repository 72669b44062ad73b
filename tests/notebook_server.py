"""Runs notebooks one at a time, each in a process of its own that needs not import torch and transformers again.

`python tests/notebook_server.py` imports the libraries that nearly every notebook wants, and nothing else: it computes
nothing and starts no thread, so a copy of it (`os.fork`) is as good as a new interpreter, and is there in milliseconds
instead of seconds. For every line on its standard input, the path of a notebook, it makes such a copy, runs the
notebook there with `nbdev-test`, and answers with one line of JSON: `{"path", "returncode", "output", "seconds"}`.
The package itself is imported by each notebook anew: its registries are the notebook's own.
"""

import importlib
import json
import os
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


def run_here(path: str, output: int) -> int:
    """Runs a notebook in this process, with standard output and error going to a file; returns the exit status."""
    from nbdev.test import nbdev_test

    null = os.open(os.devnull, os.O_RDONLY)
    for source, target in ((null, 0), (output, 1), (output, 2)):
        os.dup2(source, target)
    try:
        nbdev_test(path, n_workers=0)
    except SystemExit as stopped:
        return int(stopped.code or 0)
    except BaseException:
        traceback.print_exc()
        return 1
    return 0


def run(path: str) -> dict:
    """Runs a notebook in a copy of this process. A copy that is killed has the negative number of its signal."""
    began = time.monotonic()
    with tempfile.TemporaryFile() as output:
        child = os.fork()
        if not child:
            status = run_here(path, output.fileno())
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(status)
        _, status = os.waitpid(child, 0)
        output.seek(0)
        text = output.read().decode(errors="replace")
    seconds = round(time.monotonic() - began, 2)
    code = os.waitstatus_to_exitcode(status)
    return {"path": path, "returncode": code, "output": text, "seconds": seconds}


def main() -> None:
    for library in LIBRARIES:
        importlib.import_module(library)
    for line in sys.stdin:
        print(json.dumps(run(line.strip())), flush=True)


if __name__ == "__main__":
    main()
