"""The token codecs against straightforward ones written here from the papers' equations, and with faults injected.

FAST: arXiv 2501.09747, §IV; bins: OpenVLA, arXiv 2406.09246, §3.2. Nothing of the code under test is shared.
"""

import json
import os
import pickle
import subprocess
import sys
from math import cos, pi, sqrt
from pathlib import Path

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from vla_bench.data.layout import Layout
from vla_bench.data.normalize import Normalizer, compute_statistics
from vla_bench.data.writer import LeRobotWriter
from vla_bench.models.heads.bins import BinsCodec, BinsHead
from vla_bench.models.heads.fast import FASTCodec, FASTHead, main
from vla_bench.registry import HEADS

T, D = 10, 4


def motions(count: int, horizon: int = T, dims: int = D, seed: int = 0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    time = np.linspace(0, 1, horizon)[None, :, None]
    start, slope, bend = rng.normal(size=(3, count, 1, dims))
    noise = 0.02 * rng.normal(size=(count, horizon, dims))
    return np.tanh(0.5 * start + 0.6 * slope * time + 0.3 * bend * np.sin(5 * time) + noise).astype(
        np.float32
    )


def cosines(horizon: int) -> np.ndarray:
    """The orthonormal DCT-II matrix [frequency, time], entry by entry."""
    size = lambda k: sqrt((1 if k == 0 else 2) / horizon)
    return np.array(
        [
            [size(k) * cos(pi * (2 * t + 1) * k / (2 * horizon)) for t in range(horizon)]
            for k in range(horizon)
        ]
    )


def by_hand_encode(folder: Path, chunks: np.ndarray) -> list[list[int]]:
    numbers = json.loads((folder / "processor_config.json").read_text())
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    ids = []
    for chunk in chunks:
        text = ""
        for row in cosines(len(chunk)) @ chunk.astype(float):
            for value in row:
                text += chr(max(int(round(value * numbers["scale"])) - numbers["min_token"], 0))
        ids.append(tokenizer.encode(text).ids)
    return ids


def by_hand_decode(folder: Path, ids: list[list[int]], horizon: int, dims: int) -> np.ndarray:
    numbers = json.loads((folder / "processor_config.json").read_text())
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    chunks = []
    for row in ids:
        values = [
            (ord(c) + numbers["min_token"]) / numbers["scale"]
            for c in tokenizer.decode(row, skip_special_tokens=False)
        ]
        chunks.append(cosines(horizon).T @ np.array(values).reshape(horizon, dims))
    return np.stack(chunks)


def published_fit(chunks: np.ndarray, folder: Path, *, horizon=None, dims=None) -> None:
    """The hub's files as its own processor writes them: split into words, only seen characters, sizes unknown."""
    found = np.round(np.einsum("kt,ntd->nkd", cosines(chunks.shape[1]), chunks.astype(float)) * 10).astype(
        int
    )
    low, high = int(found.min()), int(found.max())
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=600,
        min_frequency=2,
        initial_alphabet=[chr(i) for i in range(high - low + 1)],
        max_token_length=10000,
        special_tokens=[],
        show_progress=False,
    )
    texts = ["".join(chr(c - low) for c in chunk.ravel()) for chunk in found]
    tokenizer.train_from_iterator(texts, trainer)
    folder.mkdir(exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    numbers = {"scale": 10, "min_token": low, "vocab_size": 600, "time_horizon": horizon, "action_dim": dims}
    extra = {"processor_class": "UniversalActionProcessor"}
    (folder / "processor_config.json").write_text(json.dumps(numbers | extra))


@pytest.fixture(scope="module")
def data() -> np.ndarray:
    return motions(600)


@pytest.fixture(scope="module")
def codec(data) -> FASTCodec:
    return FASTCodec.fit(data, vocab_size=600)


@pytest.fixture
def folder(codec, tmp_path) -> Path:
    codec.save(tmp_path / "fast")
    return tmp_path / "fast"


# FAST


def test_fast_says_what_the_equations_say(codec, folder):
    new = motions(200, seed=1)
    ids = by_hand_encode(folder, new)
    assert codec.encode(new) == ids
    np.testing.assert_allclose(codec.decode(ids), by_hand_decode(folder, ids, T, D), atol=1e-5)
    assert codec.decode(ids).dtype == np.float32
    assert np.mean([len(row) for row in ids]) < T * D / 2  # it compresses
    assert codec.repaired == 0


def test_fast_reads_the_published_layout(tmp_path):
    data, new = motions(1500), motions(100, seed=2)
    published_fit(data, tmp_path / "hub")
    codec = FASTCodec.from_pretrained(tmp_path / "hub", horizon=T, action_dim=D)
    sayable = [chunk for chunk in new if _is_sayable(codec, chunk)]
    assert len(sayable) > 50
    ids = by_hand_encode(tmp_path / "hub", np.stack(sayable))
    assert codec.encode(np.stack(sayable)) == ids
    np.testing.assert_allclose(codec.decode(ids), by_hand_decode(tmp_path / "hub", ids, T, D), atol=1e-5)
    nested = tmp_path / "hub" / "bpe_tokenizer"  # as transformers 5 saves it again
    nested.mkdir()
    (tmp_path / "hub" / "tokenizer.json").rename(nested / "tokenizer.json")
    again = FASTCodec.from_pretrained(tmp_path / "hub", horizon=T, action_dim=D)
    assert again.encode(np.stack(sayable)) == ids


def _is_sayable(codec: FASTCodec, chunk: np.ndarray) -> bool:
    try:
        codec.encode(chunk[None])
    except ValueError:
        return False
    return True


def test_a_coefficient_that_a_published_alphabet_lacks_is_an_error_not_a_shorter_chunk(tmp_path):
    coarse = np.linspace(-1, 1, 51).round()[:, None, None] * np.ones((T, D))  # only three levels
    published_fit(coarse, tmp_path / "hub")
    codec = FASTCodec.from_pretrained(tmp_path / "hub", horizon=T, action_dim=D)
    assert codec.encode(coarse) == by_hand_encode(tmp_path / "hub", coarse)
    strange = np.full((1, T, D), -0.55)
    text = Tokenizer.from_file(str(tmp_path / "hub" / "tokenizer.json")).decode(
        by_hand_encode(tmp_path / "hub", strange)[0]
    )
    assert len(text) < T * D  # what happens without the check
    with pytest.raises(ValueError, match="coefficient -17 has no token.*alphabet"):
        codec.encode(strange)
    ours = FASTCodec.fit(coarse, vocab_size=600)
    assert np.abs(ours.decode(ours.encode(strange)) - strange).max() < 0.05


def test_transformers_reads_what_we_write(codec, folder):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    text = "".join(map(chr, range(300)))
    assert tokenizer(text)["input_ids"] == codec.tokenizer.encode(text).ids
    numbers = json.loads((folder / "processor_config.json").read_text())
    assert numbers["processor_class"] == "UniversalActionProcessor"
    assert {k: numbers[k] for k in ("scale", "min_token", "vocab_size", "time_horizon", "action_dim")} == {
        "scale": 10.0,
        "min_token": codec.min_token,
        "vocab_size": 600,
        "time_horizon": T,
        "action_dim": D,
    }


@pytest.mark.parametrize("seed", range(12))
def test_fast_round_trip_over_shapes_and_scales(seed):
    """Rounding moves a coefficient by at most 1/(2γ); the transform is orthonormal, so the same holds for the root
    mean square over time, and by Cauchy-Schwarz √T times that for a single action."""
    rng = np.random.default_rng(seed)
    horizon, dims = int(rng.integers(1, 33)), int(rng.integers(1, 9))
    scale = float(rng.choice([2, 5, 10, 25]))
    data = rng.uniform(-1, 1, (20, horizon, dims)).astype(np.float32)
    codec = FASTCodec.fit(data, vocab_size=1024, scale=scale)
    for chunks in (data, rng.uniform(-1, 1, data.shape)):
        codec.clipped = 0
        tokens = codec.encode(chunks)
        error = codec.decode(tokens) - chunks
        assert all(0 <= i < codec.num_tokens for row in tokens for i in row)
        assert max(map(len, tokens)) <= codec.max_tokens
        if not codec.clipped:
            assert np.sqrt((error**2).mean(1)).max() <= 0.5 / scale + 1e-6
            assert np.abs(error).max() <= sqrt(horizon) * 0.5 / scale + 1e-6
    assert codec.repaired == 0
    codec.clipped = 0
    codec.encode(data)
    assert codec.clipped == 0
    assert FASTCodec.unfitted(horizon, dims).encode(data)  # no data, the same interface


def test_coefficients_outside_the_fit(codec, folder):
    """Below `min_token` they are clipped as in the published code, and counted; above they keep their value."""
    low, high = np.full((1, T, D), -3.0, np.float32), np.full((1, T, D), 5.0, np.float32)
    before = codec.clipped
    assert codec.encode(low) == by_hand_encode(folder, low)
    assert codec.clipped == before + 1
    np.testing.assert_allclose(codec.decode(codec.encode(low)), codec.min_token / 10 / sqrt(T), atol=1e-5)
    np.testing.assert_allclose(codec.decode(codec.encode(high)), high, atol=0.05)
    with pytest.raises(ValueError, match=r"actions reach 1e\+04.*normalised"):
        codec.encode(np.full((1, T, D), 1e4, np.float32))


def test_nothing_behind_the_first_padding_changes_a_token(codec):
    chunks = motions(30, seed=3)
    lengths = np.random.default_rng(0).integers(0, T + 1, 30)
    is_pad = np.arange(T) >= lengths[:, None]
    tokens = codec.encode(chunks, is_pad)
    other = np.where(is_pad[..., None], np.float32(np.nan), chunks)
    assert codec.encode(other, is_pad) == tokens
    for row, length, chunk in zip(tokens, lengths, chunks):
        assert (row == []) == (length == 0)
        if length:
            held = np.concatenate([chunk[:length], np.repeat(chunk[length - 1 : length], T - length, 0)])
            assert row == codec.encode(held[None])[0]
    hole = np.arange(T)[None] == 4  # a hole instead of a suffix: cut at the first padding all the same
    assert codec.encode(chunks[:1], hole) == codec.encode(chunks[:1], np.arange(T)[None] >= 4)
    bins = BinsCodec(horizon=T, action_dim=D)
    assert bins.encode(other, is_pad) == [row[: n * D] for row, n in zip(bins.encode(chunks), lengths)]


def test_fast_fit_is_deterministic_also_between_processes(codec, data, tmp_path):
    assert FASTCodec.fit(list(data), vocab_size=600).tokenizer.to_str() == codec.tokenizer.to_str()
    np.save(tmp_path / "data.npy", data)
    code = (
        "import sys, numpy as np; from vla_bench.models.heads.fast import FASTCodec; "
        "FASTCodec.fit(np.load(sys.argv[1]), vocab_size=600).save(sys.argv[2])"
    )
    arguments = [sys.executable, "-c", code, str(tmp_path / "data.npy"), str(tmp_path / "again")]
    subprocess.run(arguments, check=True, env=os.environ | {"PYTHONHASHSEED": "7"})
    assert (tmp_path / "again" / "tokenizer.json").read_text() == codec.tokenizer.to_str(pretty=True)


def test_pickled_codecs_say_the_same(codec):
    new = motions(20, seed=4)
    for one in (codec, BinsCodec(horizon=T, action_dim=D)):
        other = pickle.loads(pickle.dumps(one))
        assert other.encode(new) == one.encode(new)
        np.testing.assert_array_equal(other.decode(one.encode(new)), one.decode(one.encode(new)))


@pytest.mark.parametrize("seed", range(5))
def test_whatever_the_model_says_becomes_a_bounded_chunk_and_is_counted(codec, seed):
    rng = np.random.default_rng(seed)
    said = [rng.integers(0, codec.num_tokens, rng.integers(0, 80)).tolist() for _ in range(20)]
    before = codec.repaired
    chunks = codec.decode(said)
    assert chunks.shape == (20, T, D) and np.isfinite(chunks).all()
    assert np.abs(chunks).max() <= sqrt(T) * (codec.largest + codec.min_token) / 10
    texts = [codec.tokenizer.decode(row, skip_special_tokens=False) for row in said]
    wrong = [len(text) != T * D or "\ufffd" in text or max(map(ord, text)) > codec.largest for text in texts]
    assert codec.repaired == before + sum(wrong) and any(wrong)


def test_a_cut_generation_keeps_its_low_frequencies(codec):
    plain = FASTCodec.unfitted(T, D)
    chunk = motions(1, seed=5)
    (ids,) = plain.encode(chunk)
    spectrum = np.round(cosines(T) @ chunk[0].astype(float) * 10) / 10
    said = plain.tokenizer.decode(ids[:18], skip_special_tokens=False)
    spectrum.ravel()[len(said) :] = 0
    np.testing.assert_allclose(plain.decode([ids[:18]])[0], cosines(T).T @ spectrum, atol=1e-5)
    np.testing.assert_array_equal(plain.decode([ids + ids[:5]]), plain.decode([ids]))
    assert plain.repaired == 2


FIT_FAULTS = {
    "normalise the actions": lambda x: dict(chunks=x * 60),
    "normalise them": lambda x: dict(chunks=x * 1e12),
    "action 3 of sample 2 is not finite": lambda x: dict(chunks=_spoilt(x)),
    r"chunk 1 is \[9, 4\], the ones before are \[10, 4\]": lambda x: dict(chunks=[x[0], x[1, :9]]),
    r"fitting needs chunks \[N, T, D\]": lambda x: dict(chunks=x[0]),
    "at least 256": lambda x: dict(chunks=x, vocab_size=200),
    "scale=0": lambda x: dict(chunks=x, scale=0),
}


def _spoilt(chunks: np.ndarray) -> np.ndarray:
    chunks = chunks.copy()
    chunks[2, 3, 1] = np.nan
    return chunks


@pytest.mark.parametrize("message", FIT_FAULTS)
def test_fit_refuses_what_it_cannot_fit(data, message):
    with pytest.raises(ValueError, match=message):
        FASTCodec.fit(**FIT_FAULTS[message](data))


def _edit(folder: Path, **changes: object) -> None:
    path = folder / "processor_config.json"
    content = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({k: v for k, v in content.items() if v != "gone"}))


FILE_FAULTS = {
    "tokenizer.json holds no tokenizer": lambda f: (f / "tokenizer.json").write_text(
        '{"version": "1.0", "mod'
    ),
    "not byte-level": lambda f: Tokenizer(models.BPE()).save(str(f / "tokenizer.json")),
    "lacks tokenizer.json.*fit one with": lambda f: (f / "tokenizer.json").unlink(),
    "lacks processor_config.json": lambda f: (f / "processor_config.json").unlink(),
    "processor_config.json is not a JSON object": lambda f: (f / "processor_config.json").write_text("[[1"),
    "processor_config.json: there is no 'min_token'": lambda f: _edit(f, min_token="gone"),
    "scale is '10', not a number": lambda f: _edit(f, scale="10"),
    "time_horizon=8, the policy has 10": lambda f: _edit(f, time_horizon=8),
    "action_dim=7, the policy has 4": lambda f: _edit(f, action_dim=7),
}


@pytest.mark.parametrize("message", FILE_FAULTS)
def test_broken_files_are_named(folder, message):
    FILE_FAULTS[message](folder)
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        FASTCodec.from_pretrained(folder, horizon=T, action_dim=D)


def test_a_folder_that_is_not_there(tmp_path):
    for source in (tmp_path / "nowhere", "nowhere", "a/b/c"):
        with pytest.raises(FileNotFoundError, match="neither a folder nor a name on the hub; fit one"):
            FASTCodec.from_pretrained(source, horizon=T, action_dim=D)
    with pytest.raises(FileNotFoundError, match="the hub gave no processor_config.json"):  # offline
        FASTCodec.from_pretrained("nobody/nothing", horizon=T, action_dim=D)


def test_only_two_json_files_come_from_the_hub(folder, monkeypatch):
    import huggingface_hub

    asked = []
    fetch = lambda name, file: asked.append((name, file)) or str(folder / file)
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", fetch)
    codec = FASTCodec.from_pretrained("somebody/fast", horizon=T, action_dim=D)
    assert asked == [("somebody/fast", "processor_config.json"), ("somebody/fast", "tokenizer.json")]
    assert codec.num_tokens == 600


SIZES = {"input_size": 8, "action_dim": D, "horizon": T, "state_dim": 0}


def test_fast_head_places_its_tokens_and_carries_its_files(folder, codec, tmp_path):
    build = lambda **own: HEADS.build({"type": "FAST", "tokenizer": str(folder), **own}, **SIZES)
    codes = torch.arange(600)
    assert build().token_ids(1000).equal(400 + codes)
    assert build(skip=50).token_ids(1000).equal(350 + codes)
    assert build(first_token_id=151665).token_ids(153000).equal(151665 + codes)
    assert build(skip=128, descending=True).token_ids(257152).equal(257152 - 1 - 128 - codes)
    head = build(max_tokens=17)
    assert head.reads == "tokens" and head.assets and head.codec.stops and head.codec.max_tokens == 17
    assert not list(head.parameters())
    head.save_assets(tmp_path / "assets")
    new = motions(10, seed=6)
    again = FASTHead(**SIZES, tokenizer=str(tmp_path / "assets"))
    assert again.codec.encode(new) == codec.encode(new)
    with pytest.raises(ValueError, match="do not fit a vocabulary of 500"):
        head.token_ids(500)
    with pytest.raises(ValueError, match="toknizer.*did you mean 'tokenizer'"):
        HEADS.build({"type": "FAST", "toknizer": "x"}, **SIZES)


def test_the_program_fits_without_decoding_a_picture(tmp_path, monkeypatch, capsys):
    motion = motions(3, horizon=30, dims=2, seed=7) * [[[30, 5]]] + 100  # far from normalised
    layout = Layout(names=("x", "y"), frame="base", kind="absolute", units="mm")
    with LeRobotWriter(
        tmp_path / "data", fps=10, cameras={"top": (16, 16)}, state=None, action=layout
    ) as writer:
        for episode in motion:
            writer.add_episode(
                images={"top": np.zeros((30, 16, 16, 3), np.uint8)}, state=None, action=episode, task="go"
            )
    for video in (tmp_path / "data").rglob("*.mp4"):
        video.write_bytes(b"no video")
    monkeypatch.chdir(tmp_path)
    words = ["fit", "--dataset", "data", "--horizon", "6", "--out", "out", "--vocab_size", "300"]
    main([*words, "--scale", "20", "--mode", "min_max"])
    printed = capsys.readouterr().out
    assert "90 windows of 90 frames" in printed and "6 x 2 = 12 numbers" in printed
    assert "(bound 0.0250)" in printed and "(bound 0.0612)" in printed
    codec = FASTCodec.from_pretrained(tmp_path / "out", horizon=6, action_dim=2)
    rows = motion.reshape(-1, 2).astype(np.float32)
    normalised = Normalizer(compute_statistics(rows), "min_max").normalize(rows).reshape(3, 30, 2)
    ends = np.concatenate([normalised[:, 27:], np.repeat(normalised[:, 29:], 3, 1)], axis=1)
    for chunks in (normalised[:, :6], ends):  # the last one held behind the end: such windows were fitted on
        assert np.abs(codec.decode(codec.encode(chunks)) - chunks).max() <= sqrt(6) * 0.5 / 20
    assert codec.clipped == 0
    with pytest.raises(SystemExit) as stop:
        main([*words, "--mode", "identity"])
    assert stop.value.code == 2
    assert "error: the coefficients span" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main([*words, "--mode", "minmax"])
    assert "did you mean 'min_max'" in capsys.readouterr().err


# bins


def test_bins_are_openvlas_for_its_vocabulary():
    """`ActionTokenizer`: id = V - digitize(clip(a)), and back through centres[clip(V - id - 1, 0, 254)]."""
    edges = np.linspace(-1, 1, 256)
    centres = (edges[:-1] + edges[1:]) / 2
    head = BinsHead(input_size=8, action_dim=1, horizon=1, state_dim=0)
    ids = head.token_ids(32000).numpy()
    around = np.concatenate([edges, np.nextafter(edges, -2), np.nextafter(edges, 2)])
    actions = np.concatenate([around, np.random.default_rng(0).uniform(-1.3, 1.3, 2000)])
    codes = [row[0] for row in head.codec.encode(actions[:, None, None])]
    theirs = 32000 - np.digitize(np.clip(actions, -1, 1), edges)
    assert (ids[codes] == theirs).all() and {31744, 31999} <= set(theirs)
    back = head.codec.decode([[code] for code in codes])[:, 0, 0]
    np.testing.assert_allclose(back, centres[np.clip(32000 - theirs - 1, 0, 254)], atol=1e-7)
    assert np.abs(back - np.clip(actions, -1, 1)).max() <= 1 / 255 + 1e-7
    padded = BinsHead(input_size=8, action_dim=1, horizon=1, state_dim=0, skip=64).token_ids(32064)
    assert (padded.numpy() == ids).all()  # the published checkpoint's embedding has 64 rows more
    assert HEADS.get("OpenVLAHead") is BinsHead


@pytest.mark.parametrize("seed", range(8))
def test_bins_over_shapes(seed):
    rng = np.random.default_rng(seed)
    horizon, dims, bins = int(rng.integers(1, 20)), int(rng.integers(1, 9)), int(rng.integers(2, 400))
    codec = BinsCodec(horizon=horizon, action_dim=dims, num_bins=bins)
    chunks = rng.uniform(-1, 1, (7, horizon, dims)).astype(np.float32)
    codes = codec.encode(chunks)
    assert all(len(row) == codec.max_tokens == horizon * dims for row in codes)
    assert np.abs(codec.decode(codes) - chunks).max() <= 1 / (bins - 1) + 1e-6
    b, t, d = 3, int(rng.integers(horizon)), int(rng.integers(dims))  # time-major
    assert codes[b][t * dims + d] == codec.encode(np.full_like(chunks, chunks[b, t, d]))[0][0]
    assert codec.repaired == 0


def test_bins_of_another_number_hold_the_last_action_and_are_counted():
    codec = BinsCodec(horizon=4, action_dim=3)
    (codes,) = codec.encode(motions(1, 4, 3))
    whole = codec.decode([codes])[0]
    cut, long, none = codec.decode([codes[:8], codes + [1], []])
    np.testing.assert_array_equal(cut, whole[[0, 1, 1, 1]])
    np.testing.assert_array_equal(long, whole)
    assert not none.any() and codec.repaired == 3
    for strange in ([-1], [256]):
        with pytest.raises(ValueError, match="no code of 256 bins"):
            codec.decode([strange])


@pytest.mark.parametrize(
    "make", [lambda: FASTCodec.unfitted(T, D), lambda: BinsCodec(horizon=T, action_dim=D)]
)
def test_wrong_actions_teach(make):
    codec, chunks = make(), motions(2)
    with pytest.raises(ValueError, match=r"actions are \[2, 9, 4\], this codec takes \[B, 10, 4\]"):
        codec.encode(chunks[:, :9])
    with pytest.raises(ValueError, match=r"is_pad must be bool \[2, 10\]"):
        codec.encode(chunks, np.zeros((2, 10)))
    chunks[1, 7, 2] = np.inf
    with pytest.raises(ValueError, match="action 7 of sample 1 is not finite"):
        codec.encode(chunks)
