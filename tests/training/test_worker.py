"""What a worker sends: the same tensors, small ones within the message."""

import multiprocessing
import pickle
import socket
import sys
import time
from multiprocessing import resource_sharer

import pytest
import torch
from torch.utils.data import DataLoader

from vla_bench.training.worker import INLINE, from_bytes, reduce_small, start_worker

TENSORS = {
    "long": torch.arange(12).reshape(3, 4),
    "bool": torch.tensor([True, False]),
    "scalar": torch.tensor(-1.5, dtype=torch.float64),
    "transposed": torch.rand(5, 7).T,
    "a part": torch.rand(9, 9)[2:4, ::3],
    "half": torch.rand(3).half(),
    "largest": torch.rand(INLINE // 4),
    "larger": torch.rand(INLINE // 4 + 1),
    "empty": torch.zeros(0, 3),
    "bfloat16": torch.rand(3).bfloat16(),
}


class Made:
    """A batch of every kind of tensor."""

    def __call__(self, samples: list[int]) -> dict:
        return {
            **TENSORS,
            "samples": torch.tensor(samples),
            "nested": {"lang": ["go"], "mask": torch.ones(2)},
        }


def test_a_batch_arrives_as_it_was_made():
    loader = DataLoader(range(6), 3, collate_fn=Made(), num_workers=2, worker_init_fn=start_worker)
    for number, batch in enumerate(loader):
        assert batch["samples"].tolist() == list(range(3 * number, 3 * number + 3))
        assert batch["nested"]["lang"] == ["go"] and batch["nested"]["mask"].equal(torch.ones(2))
        for name, tensor in TENSORS.items():
            found = batch[name]
            assert found.equal(tensor) and found.dtype == tensor.dtype and found.shape == tensor.shape, name
        batch["long"].add_(1)  # it belongs to the receiver


@pytest.mark.parametrize("name", TENSORS)
def test_small_plain_tensors_alone_are_sent_as_bytes(name):
    make, _ = reduce_small(TENSORS[name])
    assert (make is from_bytes) == (name not in ("larger", "empty", "bfloat16"))


def test_a_tensor_that_learns_is_left_to_pytorch():
    assert (
        reduce_small(torch.ones(2, requires_grad=True).sum().detach().requires_grad_())[0] is not from_bytes
    )
    assert reduce_small(torch.nn.Parameter(torch.ones(2)))[0] is not from_bytes


def test_other_processes_pickle_as_before():
    assert pickle.loads(pickle.dumps(TENSORS["long"])).equal(TENSORS["long"])
    assert "vla_bench" not in str(pickle.dumps(TENSORS["long"]))


def _left_alone(said: str, ready) -> None:
    """A worker whose receiver goes away in the middle of the handshake for a descriptor."""
    sys.stderr = open(said, "w", buffering=1)  # closed by the end of the process
    if ready:
        start_worker(0)
    resource_sharer.DupFd(0)  # starts the thread that answers
    with socket.socket(socket.AF_UNIX) as receiver:
        receiver.connect(resource_sharer._resource_sharer._address)
    time.sleep(0.3)
    sys.excepthook(ValueError, ValueError("its own"), None)


@pytest.mark.skipif(sys.platform == "win32", reason="descriptors are handed over elsewhere")
@pytest.mark.parametrize("ready", [True, False])
def test_a_receiver_that_is_killed_is_no_error_of_the_worker(tmp_path, ready):
    child = multiprocessing.get_context("fork").Process(target=_left_alone, args=(f"{tmp_path}/said", ready))
    child.start()
    child.join(30)
    said = (tmp_path / "said").read_text()
    assert ("Traceback" not in said) == ready  # without the rule, Python's own thread would tell
    assert said.endswith("ValueError: its own\n")
