"""The bins against OpenVLA's own formula (arXiv 2406.09246, §3.2), and with faults injected."""

import pickle

import numpy as np
import pytest

from vla_bench.models.heads.bins import BinsCodec, BinsHead
from vla_bench.models.heads.head import HeadSizes
from vla_bench.registry import HEADS

T, D = 10, 4
ONE = HeadSizes(hidden_size=8, action_dim=1, horizon=1)
EDGES = np.linspace(-1, 1, 256)
CENTRES = (EDGES[:-1] + EDGES[1:]) / 2


def chunks(count: int, horizon: int = T, dims: int = D, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).uniform(-1, 1, (count, horizon, dims)).astype(np.float32)


@pytest.fixture
def openvla() -> tuple[BinsHead, np.ndarray, list[int], np.ndarray]:
    """A head, actions on and around every edge, their codes, and OpenVLA's ids: V - digitize(clip(a))."""
    head = BinsHead(ONE)
    around = np.concatenate([EDGES, np.nextafter(EDGES, -2), np.nextafter(EDGES, 2)])
    actions = np.concatenate([around, np.random.default_rng(0).uniform(-1.3, 1.3, 2000)])
    codes = [row[0] for row in head.codec.encode(actions[:, None, None])]
    return head, actions, codes, 32000 - np.digitize(np.clip(actions, -1, 1), EDGES)


def test_ids_are_openvlas_for_its_vocabulary(openvla):
    head, _, codes, theirs = openvla
    assert (head.token_ids(32000).numpy()[codes] == theirs).all() and {31744, 31999} <= set(theirs)


def test_ids_come_back_as_openvlas_centres(openvla):
    """centres[clip(V - id - 1, 0, 254)]"""
    head, actions, codes, theirs = openvla
    back = head.codec.decode([[code] for code in codes])[:, 0, 0]
    np.testing.assert_allclose(back, CENTRES[np.clip(32000 - theirs - 1, 0, 254)], atol=1e-7)
    assert np.abs(back - np.clip(actions, -1, 1)).max() <= 1 / 255 + 1e-7


def test_rows_that_belong_to_no_token_are_skipped():
    """The published checkpoint's embedding has 64 rows more than its tokenizer has tokens."""
    padded = BinsHead(ONE, skip=64).token_ids(32064)
    assert padded.equal(BinsHead(ONE).token_ids(32000))


def test_the_head_is_known_by_openvlas_name():
    assert HEADS.get("OpenVLAHead") is BinsHead


def test_the_head_declares_the_range_that_it_clips_to():
    assert BinsHead(ONE).input_range == (-1.0, 1.0)


@pytest.fixture(params=range(8))
def case(request) -> tuple[BinsCodec, np.ndarray, np.random.Generator]:
    """A codec of random sizes, and chunks."""
    rng = np.random.default_rng(request.param)
    horizon, dims, bins = int(rng.integers(1, 20)), int(rng.integers(1, 9)), int(rng.integers(2, 400))
    codec = BinsCodec(horizon=horizon, action_dim=dims, num_bins=bins)
    return codec, rng.uniform(-1, 1, (7, horizon, dims)).astype(np.float32), rng


def test_every_chunk_has_one_code_per_number(case):
    codec, actions, _ = case
    assert all(
        len(row) == codec.max_tokens == codec.horizon * codec.action_dim for row in codec.encode(actions)
    )


def test_the_round_trip_is_off_by_half_a_bin_at_most(case):
    codec, actions, _ = case
    assert np.abs(codec.decode(codec.encode(actions)) - actions).max() <= 1 / (codec.num_tokens - 1) + 1e-6
    assert codec.repaired == 0


def test_codes_are_time_major(case):
    codec, actions, rng = case
    b, t, d = 3, int(rng.integers(codec.horizon)), int(rng.integers(codec.action_dim))
    same = codec.encode(np.full_like(actions, actions[b, t, d]))[0][0]
    assert codec.encode(actions)[b][t * codec.action_dim + d] == same


def test_nothing_behind_the_first_padding_has_a_code():
    lengths = np.random.default_rng(0).integers(0, T + 1, 30)
    is_pad, actions = np.arange(T) >= lengths[:, None], chunks(30, seed=3)
    other = np.where(is_pad[..., None], np.float32(np.nan), actions)
    codec = BinsCodec(horizon=T, action_dim=D)
    expected = [row[: n * D] for row, n in zip(codec.encode(actions), lengths)]
    assert codec.encode(other, is_pad) == expected


def test_a_pickled_codec_gives_the_same():
    codec, new = BinsCodec(horizon=T, action_dim=D), chunks(20, seed=4)
    other = pickle.loads(pickle.dumps(codec))
    assert other.encode(new) == codec.encode(new)
    np.testing.assert_array_equal(other.decode(codec.encode(new)), codec.decode(codec.encode(new)))


def test_codes_of_another_number_hold_the_last_action_and_are_counted():
    codec = BinsCodec(horizon=4, action_dim=3)
    (codes,) = codec.encode(chunks(1, 4, 3))
    whole = codec.decode([codes])[0]
    cut, long, none = codec.decode([codes[:8], codes + [1], []])
    np.testing.assert_array_equal(cut, whole[[0, 1, 1, 1]])
    np.testing.assert_array_equal(long, whole)
    assert not none.any() and codec.repaired == 3


@pytest.mark.parametrize("code", [-1, 256])
def test_a_number_that_is_no_code_is_refused(code):
    with pytest.raises(ValueError, match="no code of 256 bins"):
        BinsCodec(horizon=4, action_dim=3).decode([[code]])


def test_actions_of_another_shape_are_named():
    codec, actions = BinsCodec(horizon=T, action_dim=D), chunks(2)
    with pytest.raises(ValueError, match=r"actions are \[2, 9, 4\], this codec takes \[B, 10, 4\]"):
        codec.encode(actions[:, :9])
    with pytest.raises(ValueError, match=r"is_pad must be bool \[2, 10\]"):
        codec.encode(actions, np.zeros((2, 10)))


def test_an_action_that_is_not_finite_is_named():
    codec, actions = BinsCodec(horizon=T, action_dim=D), chunks(2)
    actions[1, 7, 2] = np.inf
    with pytest.raises(ValueError, match="action 7 of sample 1 is not finite"):
        codec.encode(actions)
