"""GR00T's clients, byte for byte as Isaac-GR00T writes them, against the worker of all dialects."""

import io
import threading
import time
from dataclasses import replace

import msgpack
import numpy as np
import pytest

from vla_bench.serving.gr00t import Gr00tServer, load_zmq, pack, serve_gr00t_in_thread, unpack
from vla_bench.serving.policy import Policy
from vla_bench.serving.server import ServerSettings

zmq = pytest.importorskip("zmq")


class Serializer:
    """As in Isaac-GR00T N1.6, gr00t/policy/server_client.py: what is on the wire is made by nothing of ours."""

    @staticmethod
    def encode(value):
        if isinstance(value, np.ndarray):
            file = io.BytesIO()
            np.save(file, value, allow_pickle=False)
            return {"__ndarray_class__": True, "as_npy": file.getvalue()}
        return value

    @staticmethod
    def decode(value):
        if "__ModalityConfig_class__" in value:
            return ("ModalityConfig", value["as_json"])
        if "__ndarray_class__" in value:
            return np.load(io.BytesIO(value["as_npy"]), allow_pickle=False)
        return value


class Client:
    """Its `PolicyClient`, with a limit on how long a test may wait."""

    def __init__(self, port, api_token=None):
        self.context, self.api_token = zmq.Context(), api_token
        self.socket = self.context.socket(zmq.REQ)
        self.socket.setsockopt(zmq.RCVTIMEO, 20_000)
        self.socket.connect(f"tcp://localhost:{port}")

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.context.destroy(linger=0)

    def raw(self, frame):
        self.socket.send(frame)
        return self.socket.recv()

    def call(self, endpoint, data=None, requires_input=True):
        request = {"endpoint": endpoint}
        if requires_input:
            request["data"] = data
        if self.api_token:
            request["api_token"] = self.api_token
        frame = msgpack.packb(request, default=Serializer.encode)
        return msgpack.unpackb(self.raw(frame), object_hook=Serializer.decode)

    def get_action(self, observation, options=None):
        return tuple(self.call("get_action", {"observation": observation, "options": options}))


def theirs(observation, camera="top"):
    """One of our observations as a GR00T client sends it."""
    video = {camera: np.asarray(observation["image"][0])[None, None]}
    state = {"state": np.float64(observation["state"])[None, None]}
    return {"video": video, "state": state, "language": {"task": [[observation["lang"]]]}}


def test_the_bytes_of_a_ping():
    assert pack({"status": "ok"}) == b"\x81\xa6status\xa2ok"
    npy = b"\x93NUMPY\x01\x00v\x00{'descr': '<f4', 'fortran_order': False, 'shape': (2,), }"
    npy = npy.ljust(127) + b"\n" + np.float32([1, 2]).tobytes()
    frame = b"\x81\xa1a\x82\xb1__ndarray_class__\xc3\xa6as_npy\xc4" + bytes([len(npy)]) + npy
    assert pack({"a": np.float32([1, 2])}) == frame
    assert (unpack(frame)["a"] == np.float32([1, 2])).all()


def test_the_actions_are_those_of_the_policy(run, llava_observation):
    policy = Policy.from_pretrained(run)
    camera, sent = policy.spec.cameras[0], theirs(llava_observation, policy.spec.cameras[0])
    with serve_gr00t_in_thread(policy) as server, Client(server.port) as client:
        found = {seed: client.get_action(sent, {"seed": seed}) for seed in (3, 4)}
        config = client.call("get_modality_config", requires_input=False)
    for seed, (action, info) in found.items():
        expected = policy.predict(llava_observation, seed=seed)
        assert action["action"].tobytes() == expected[None].tobytes()
        assert info["seed"] == [seed] and info["server_timing"]["infer_ms"] > 0
    assert config["video"] == ("ModalityConfig", {"delta_indices": [0], "modality_keys": [camera]})
    assert config["action"][1]["delta_indices"] == list(range(policy.spec.horizon))


def test_a_batch_of_robots_gets_an_answer_each(toy):
    policy_class, observation = toy
    rows = [theirs(observation(10 * i, lang=lang)) for i, lang in enumerate(("up", "down", "up"))]
    batch = {s: {k: np.concatenate([r[s][k] for r in rows]) for k in rows[0][s]} for s in ("video", "state")}
    batch["language"] = {"task": [r["language"]["task"][0] for r in rows]}
    with serve_gr00t_in_thread(policy_class()) as server, Client(server.port) as client:
        action, _ = client.get_action(batch, {"seed": 5})
    assert action["action"].shape == (3, 4, 2)
    assert action["action"][:, 0].tolist() == [[0.25, 5], [10.25, 5], [20.25, 5]]


def test_sixteen_clients_are_not_mixed_up(toy):
    policy_class, observation = toy
    wrong = []

    def drive(number):
        with Client(server.port) as client:
            for step in range(10):
                action, _ = client.get_action(theirs(observation(number)), {"seed": step})
                if action["action"][0, 0].tolist() != [number + 0.25, step]:
                    wrong.append((number, step))

    with serve_gr00t_in_thread(policy_class()) as server:
        threads = [threading.Thread(target=drive, args=(number,)) for number in range(16)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(30)
        assert len(server.clients) == 16
    assert not wrong


def test_a_ping_is_answered_during_an_inference(toy):
    policy_class, observation = toy
    with serve_gr00t_in_thread(policy_class(seconds=1.0)) as server, Client(server.port) as slow:
        frame = {"endpoint": "get_action", "data": {"observation": theirs(observation()), "options": None}}
        slow.socket.send(msgpack.packb(frame, default=Serializer.encode))
        time.sleep(0.2)
        with Client(server.port) as client:
            begin = time.monotonic()
            assert client.call("ping", requires_input=False)["status"] == "ok"
            assert time.monotonic() - begin < 0.5
        assert slow.socket.recv()


def test_episodes_have_seeds_of_their_own(toy):
    policy_class, observation = toy
    sent, seeds = theirs(observation()), []
    with serve_gr00t_in_thread(policy_class(), seed=100) as server:
        for _ in range(2):  # two clients: the second begins where the first began
            with Client(server.port) as client:
                mine = [client.get_action(sent)[1]["seed"][0] for _ in range(2)]
                assert client.call("reset", {"options": None}) == {}
                seeds.append([*mine, client.get_action(sent)[1]["seed"][0]])
    assert seeds[0] == seeds[1] and len(set(seeds[0])) == 3


def test_the_history_may_be_sent_or_left_to_the_server(toy):
    policy_class, observation = toy

    class Twice(policy_class):
        spec = replace(policy_class.spec, observation_steps=2)

        def predict_batch(self, observations, seeds):
            levels = [[np.asarray(image)[0, 0, 0] for image in each["image"]] for each in observations]
            return [np.tile(np.float64(level), (4, 1)) for level in levels]

    first, second = (theirs(observation(level)) for level in (10, 20))
    join = lambda s, k: np.concatenate([first[s][k], second[s][k]], axis=1)
    both = {"video": {"top": join("video", "top")}, "state": {"state": join("state", "state")}}
    with serve_gr00t_in_thread(Twice()) as server, Client(server.port) as client:
        remembered = [client.get_action(each)[0]["action"][0, 0].tolist() for each in (first, second)]
        client.call("reset", {"options": None})
        sent = client.get_action({**both, "language": first["language"]})[0]["action"][0, 0].tolist()
    assert remembered == [[10, 10], [10, 20]] and sent == [10, 20]


@pytest.mark.parametrize(
    "change, told",
    {
        "camera": ({"video": {"front": np.zeros((1, 1, 16, 24, 3), np.uint8)}}, "video/front"),
        "size": ({"video": {"top": np.zeros((1, 1, 8, 8, 3), np.uint8)}}, "video/top"),
        "state": ({"state": {"state": np.zeros((1, 1, 2))}}, "state/state"),
        "not finite": ({"state": {"state": np.full((1, 1, 1), np.nan)}}, "state/state"),
        "language": ({"language": {"task": [["  "]]}}, "language/task"),
        "none": ({"video": None}, "observation/video"),
        "section": ({"audio": {"a": 1}}, "audio"),
        "old chunk": (
            {"action": {"action": np.zeros((1, 4, 2))}},
            "GR00T's protocol has no field for the chunk",
        ),
    }.values(),
    ids=("camera", "size", "state", "not finite", "language", "none", "section", "old chunk"),
)
def test_an_error_names_the_field(toy, change, told):
    policy_class, observation = toy
    with serve_gr00t_in_thread(policy_class()) as server, Client(server.port) as client:
        data = {"observation": {**theirs(observation()), **change}, "options": None}
        answer = client.call("get_action", data)
        assert answer["code"] == "refused" and told in answer["error"] and "Traceback" not in answer["error"]
        assert client.get_action(theirs(observation()))[0]["action"].shape == (1, 4, 2)  # and goes on
        data = {"observation": theirs(observation()), "options": {"rtc_frozen_steps": 2}}
        said = client.call("get_action", data)["error"]
        assert said.startswith("'rtc_frozen_steps': GR00T's protocol has no field for the chunk")


def test_what_is_no_request_is_answered_with_an_error(toy):
    policy_class, _ = toy
    pickled = msgpack.packb({"endpoint": "get_action", "data": {"observation": {"__ndarray_class__": True,
                            "as_npy": b"\x93NUMPY\x01\x00v\x00{'descr': '|O', 'fortran_order': False, 'shape': (1,), }".ljust(127)
                            + b"\ncos\nsystem\n."}}})  # fmt: skip
    with serve_gr00t_in_thread(policy_class()) as server, Client(server.port) as client:
        for frame in (b"", b"\xc1", b"\xdb\x7f\xff\xff\xff", b"\x91" * 5000, pickled):
            assert msgpack.unpackb(client.raw(frame))["code"] == "malformed"
        for request in ({"endpoint": "kill"}, {"endpoint": 3}, {"data": 3}, {"data": {"options": 3}}):
            assert msgpack.unpackb(client.raw(msgpack.packb(request)))["code"] == "refused"
        assert client.call("ping", requires_input=False)["status"] == "ok"


def test_a_frame_over_the_limit_is_never_read(toy):
    policy_class, _ = toy
    with serve_gr00t_in_thread(policy_class(), frame_bytes=2048) as server:
        with Client(server.port) as client:
            client.socket.setsockopt(zmq.RCVTIMEO, 300)
            with pytest.raises(zmq.Again):
                client.raw(bytes(4096))
        with Client(server.port) as client:
            assert client.call("ping", requires_input=False)["status"] == "ok"


def test_a_key_is_needed_where_there_is_one(toy):
    policy_class, observation = toy
    with serve_gr00t_in_thread(policy_class(), api_key="secret") as server:
        for token in (None, "secre", "secrets", "ключ"):
            with Client(server.port, token) as client:
                answer = client.call("ping", requires_input=False)
                assert answer == {"error": "Unauthorized: Invalid API token", "code": "refused"}
        with Client(server.port, "secret") as client:
            assert client.get_action(theirs(observation()))[0]["action"].shape == (1, 4, 2)


def test_it_listens_on_this_machine_alone_and_on_a_free_port(toy):
    policy_class, _ = toy
    assert ServerSettings(port=5555).host == "127.0.0.1"
    with pytest.raises(ValueError, match="needs a key"):
        Gr00tServer(policy_class(), ServerSettings(host="0.0.0.0"))
    with serve_gr00t_in_thread(policy_class()) as server:
        assert server.socket.getsockopt_string(zmq.LAST_ENDPOINT).startswith("tcp://127.0.0.1:")
        with pytest.raises(OSError, match=str(server.port)):
            with serve_gr00t_in_thread(policy_class(), port=server.port):
                pass


def test_without_zmq_it_says_what_to_install(monkeypatch):
    for name in ("zmq", "zmq.asyncio"):
        monkeypatch.setitem(__import__("sys").modules, name, None)
    with pytest.raises(ImportError, match=r'pip install "vla_bench\[zmq\]"'):
        load_zmq()
