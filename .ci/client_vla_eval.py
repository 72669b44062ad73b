"""Runs episodes of MetaWorld in the public harness `vla-eval`; see `.ci/clients`. Needs no torch."""

import hashlib
import json
import sys
import tempfile

import numpy as np
from vla_eval.api import run
from vla_eval.benchmarks.base import StepBenchmark, StepResult
from vla_eval.specs import GRIPPER_CLOSE_POS, IMAGE_RGB, LANGUAGE, POSITION_DELTA, RAW

from vla_bench.benchmarks.metaworld import MetaWorld


class HarnessMetaWorld(StepBenchmark):
    """MetaWorld as a benchmark of the harness."""

    def __init__(self, task: str, first_seed: int, **shown):
        super().__init__()
        self.task, self.first_seed = task, first_seed
        self.cameras = shown["cameras"]
        self.benchmark = MetaWorld(tasks=[task], **shown)

    def get_tasks(self):
        return [{"name": self.task}]

    def reset(self, task):
        self.env = self.benchmark.make(self.task, self.first_seed + task["episode_idx"])
        self.episode, self.executed = task["episode_idx"], []
        return self.env.reset()

    def step(self, action):
        self.executed.append(np.asarray(action["actions"]))
        step = self.env.step(self.executed[-1])
        return StepResult(step.observation, 0.0, step.done, {"success": step.success})

    def make_obs(self, raw_obs, task):
        images = {camera: np.asarray(image) for camera, image in zip(self.cameras, raw_obs["image"])}
        return {"images": images, "task_description": raw_obs["lang"], "state": raw_obs["state"]}

    def get_step_result(self, step_result):
        self.env.close()
        digest = hashlib.sha256(np.asarray(self.executed, "<f8").tobytes()).hexdigest()[:16]
        success = step_result.info["success"]
        record = {"episode": self.episode, "success": success, "steps": len(self.executed), "actions": digest}
        print(json.dumps(record), flush=True)
        return {"success": success}

    def get_action_spec(self):
        return {"position": POSITION_DELTA, "gripper": GRIPPER_CLOSE_POS}

    def get_observation_spec(self):
        return {**dict.fromkeys(self.cameras, IMAGE_RGB), "language": LANGUAGE, "state": RAW}

    def cleanup(self):
        self.benchmark.close()


if __name__ == "__main__":
    url, asked = sys.argv[1], json.loads(sys.argv[2])
    shown = ("task", "first_seed", "cameras", "image_size", "max_steps")
    entry = {"benchmark": "client_vla_eval:HarnessMetaWorld", "params": {name: asked[name] for name in shown}}
    entry |= {"episodes_per_task": asked["episodes"], "max_steps": asked["max_steps"]}
    with tempfile.TemporaryDirectory() as folder:
        run({"benchmarks": [entry]}, server_url=url, output_dir=folder, no_save=True)
