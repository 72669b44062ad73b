"""Plays episodes of MetaWorld with the public `openpi-client`; see `.ci/clients`. Needs no torch."""

import hashlib
import json
import sys

import numpy as np
from openpi_client.websocket_client_policy import WebsocketClientPolicy

from vla_bench.benchmarks.metaworld import MetaWorld

url, asked = sys.argv[1], json.loads(sys.argv[2])
policy = WebsocketClientPolicy(host=url)
names = policy.get_server_metadata()["observation"]
shown = {"cameras": asked["cameras"], "image_size": asked["image_size"], "max_steps": asked["max_steps"]}
benchmark = MetaWorld(tasks=[asked["task"]], **shown)
for episode in range(asked["episodes"]):
    env = benchmark.make(asked["task"], asked["first_seed"] + episode)
    observation, step, executed = env.reset(), None, []
    while step is None or not step.done:
        message = {names[c]: np.asarray(image) for c, image in zip(asked["cameras"], observation["image"])}
        message |= {"observation/state": observation["state"], "prompt": observation["lang"]}
        for action in policy.infer(message)["actions"][: asked["n_action_steps"]]:
            step = env.step(action)
            executed.append(action)
            if step.done:
                break
        observation = step.observation
    env.close()
    policy.infer({"endpoint": "reset"})
    digest = hashlib.sha256(np.asarray(executed, "<f8").tobytes()).hexdigest()[:16]
    print(
        json.dumps({"episode": episode, "success": step.success, "steps": len(executed), "actions": digest})
    )
benchmark.close()
