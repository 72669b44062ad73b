"""Where the time of a prediction goes, as the reply says it, and the notebook that shows it."""

import json
import threading
import time
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pytest

from vla_bench.config import ConfigError
from vla_bench.serving.client import PolicyClient
from vla_bench.serving.latency import (
    PARTS,
    ask,
    latency_percentiles,
    latency_text,
    plot_latency,
    split_latency,
)
from vla_bench.serving.policy import Policy
from vla_bench.serving.server import serve_in_thread
from vla_bench.timing import timed, timed_part

ROOT = Path(__file__).parents[2]
DATASET = "tests/fixtures/version_0_1/dataset"


def test_the_parts_add_up_to_the_round_trip():
    split = split_latency(30.0, {"infer_ms": 20.0, "prepare_ms": 6.0, "queue_ms": 4.0, "batch": 2})
    assert split == {"wire": 6.0, "queue": 4.0, "prepare": 6.0, "model": 14.0}
    assert sum(split_latency(30.0, {"infer_ms": 20.0}).values()) == 30.0


def test_the_reply_says_how_long_each_part_took(toy):
    policy_class, observation = toy

    class Slow(policy_class):
        def predict_batch(self, observations, seeds):
            with timed_part("prepare"):
                time.sleep(0.02)
            return super().predict_batch(observations, seeds)

    with serve_in_thread(Slow(seconds=0.04)) as server, PolicyClient(server.url) as client:
        chunks, rows = ask(client, [observation(level) for level in (10, 20, 30)], seed=9)
    assert chunks[:, 0].tolist() == [[10.25, 9], [20.25, 9], [30.25, 9]]
    for row in rows:
        assert row["prepare"] >= 20 and row["model"] >= 40 and row["queue"] >= 0 and row["wire"] > 0


def test_a_wait_for_others_is_the_queues(toy):
    policy_class, observation = toy
    with serve_in_thread(policy_class(seconds=0.1, batch_size=1)) as server:
        clients = [PolicyClient(server.url) for _ in range(2)]
        found = {}

        def drive(number):
            found[number] = ask(clients[number], [observation()] * 4)[1]

        threads = [threading.Thread(target=drive, args=(number,)) for number in range(2)]
        for each in threads:
            each.start()
        for each in threads:
            each.join(30)
        for client in clients:
            client.close()
    waits = [row["queue"] for rows in found.values() for row in rows]
    assert np.median(waits) > 40
    assert all(row["model"] < 200 for rows in found.values() for row in rows)


def test_a_policy_says_how_long_it_prepares(run, llava_observation):
    policy = Policy.from_pretrained(run)
    with timed() as parts:
        policy.predict(llava_observation, seed=0)
    assert list(parts) == ["prepare"] and 0 < parts["prepare"]
    with serve_in_thread(policy) as server, PolicyClient(server.url) as client:
        rows = ask(client, [llava_observation] * 3)[1]
    assert all(0 < row["prepare"] and 0 < row["model"] for row in rows)


def test_an_error_ends_a_part_too():
    with pytest.raises(ValueError), timed() as parts, timed_part("prepare"):
        raise ValueError
    assert parts["prepare"] >= 0
    with timed() as parts:
        pass
    assert parts == {}


def test_percentiles_are_of_each_part():
    rows = [dict(zip(PARTS, (1.0, 0.0, 2.0, float(model)))) for model in range(1, 102)]
    table = latency_percentiles(rows, (50, 100))
    assert (
        table["model"] == [51.0, 101.0]
        and table["round trip"] == [54.0, 104.0]
        and table["queue"] == [0.0, 0.0]
    )
    lines = latency_text(rows).splitlines()
    assert lines[0].split() == ["ms", "p50", "p90", "p99"] and lines[-1].split()[:3] == [
        "round",
        "trip",
        "54.00",
    ]


def test_a_bar_is_as_high_as_its_request():
    rows = [dict(zip(PARTS, (1.0, 2.0, 3.0, 4.0 + i))) for i in range(5)]
    figure = plot_latency(rows)
    each, middle = figure.axes
    tops = [bar.get_y() + bar.get_height() for bar in each.patches[-5:]]
    assert tops == [10.0, 11.0, 12.0, 13.0, 14.0]
    assert [text.get_text() for text in middle.get_legend().get_texts()] == [
        "model 6.0",
        "prepare 3.0",
        "queue 2.0",
        "wire 1.0",
    ]
    plt.close(figure)


def live(capsys, **parameters):
    """What the notebook prints with these parameters."""
    cells = json.loads((ROOT / "experiments/live.ipynb").read_text(encoding="utf-8"))["cells"]
    names: dict = {}
    plt.close("all")  # what tests before this one have left open
    for cell in cells:
        if cell["cell_type"] == "code":
            exec("".join(cell["source"]), names)
            if "parameters" in cell["metadata"].get("tags", ()):
                assert parameters.keys() <= names.keys()
                names |= parameters
    figures = [plt.figure(number) for number in plt.get_fignums()]
    plt.close("all")
    return names, figures, capsys.readouterr().out


def test_the_notebook_serves_a_run(run, capsys):
    names, figures, told = live(capsys, run=str(run), dataset=DATASET, requests=5, every=3)
    assert len(figures) == 2 and "served here, policy 890b98089d95d9e1" in told and "round trip" in told
    policy, data = Policy.from_pretrained(run), names["data"]
    assert names["moments"].tolist() == list(range(0, len(data), 3)) and len(names["rows"]) == 5
    for moment, chunk in zip(names["moments"], names["chunks"]):
        seen = {key: data[int(moment)][key] for key in ("image", "lang", "state")}
        assert chunk.tobytes() == policy.predict(seen, seed=0).tobytes()
    recorded = figures[0].axes[0].lines[0].get_ydata()
    assert np.allclose(recorded, data.columns["action"][:, 0])


def test_the_notebook_asks_a_server(run, capsys):
    with serve_in_thread(Policy.from_pretrained(run)) as server:
        names, figures, told = live(capsys, server=server.url, run="nowhere", dataset=DATASET, requests=3)
        assert server.url in told and len(figures) == 2 and len(names["rows"]) >= 3
        with pytest.raises(ConfigError, match="dataset"):
            live(capsys, server=server.url, dataset="")
    plt.close("all")


def test_the_notebook_wants_the_actions_of_the_policy(toy):
    policy_class, _ = toy
    with serve_in_thread(policy_class()) as server, pytest.raises((ConfigError, ValueError)):
        live(None, server=server.url, dataset=DATASET)
