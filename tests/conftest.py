"""One torch thread and no network for every test and every process that a test starts."""

import os

os.environ.update(OMP_NUM_THREADS="1", HF_HUB_OFFLINE="1", MPLBACKEND="agg", TOKENIZERS_PARALLELISM="false")
os.environ.setdefault("MUJOCO_GL", "egl")
