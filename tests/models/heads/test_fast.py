"""FAST against a straightforward codec written here from the paper's equations, and with faults injected.

arXiv 2501.09747, §IV. Nothing of the code under test is shared.
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
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

from vla_bench.data.layout import Layout
from vla_bench.data.normalize import Normalizer, compute_statistics
from vla_bench.data.writer import LeRobotWriter
from vla_bench.models.heads import fast as fast_module
from vla_bench.models.heads.fast import FASTCodec, FASTHead, action_windows, fit_report, main, train_merges
from vla_bench.models.heads.head import HeadSizes
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
    """The hub's files as its own processor writes them: text split at spaces, only seen characters, sizes unknown."""
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


def test_encode_is_the_equation(codec, folder):
    new = motions(200, seed=1)
    assert codec.encode(new) == by_hand_encode(folder, new)


def test_decode_is_the_equation(codec, folder):
    ids = by_hand_encode(folder, motions(200, seed=1))
    before = codec.repaired
    np.testing.assert_allclose(codec.decode(ids), by_hand_decode(folder, ids, T, D), atol=1e-5)
    assert codec.decode(ids).dtype == np.float32
    assert codec.repaired == before


def test_smooth_motion_takes_less_than_half_a_token_per_number(codec):
    assert np.mean([len(row) for row in codec.encode(motions(200, seed=1))]) < T * D / 2


@pytest.fixture
def published(tmp_path) -> tuple[Path, np.ndarray]:
    """A tokenizer as the hub holds it, and new chunks that have tokens in it."""
    published_fit(motions(1500), tmp_path / "hub")
    codec = FASTCodec.from_pretrained(tmp_path / "hub", horizon=T, action_dim=D)
    chunks = [chunk for chunk in motions(100, seed=2) if has_tokens(codec, chunk)]
    assert len(chunks) > 50
    return tmp_path / "hub", np.stack(chunks)


def test_the_published_format_is_read(published):
    hub, chunks = published
    codec, ids = FASTCodec.from_pretrained(hub, horizon=T, action_dim=D), by_hand_encode(hub, chunks)
    assert codec.encode(chunks) == ids
    np.testing.assert_allclose(codec.decode(ids), by_hand_decode(hub, ids, T, D), atol=1e-5)


def test_a_tokenizer_in_a_subfolder_is_read(published):
    """As transformers 5 saves it again."""
    hub, chunks = published
    ids = by_hand_encode(hub, chunks)
    (hub / "bpe_tokenizer").mkdir()
    (hub / "tokenizer.json").rename(hub / "bpe_tokenizer" / "tokenizer.json")
    assert FASTCodec.from_pretrained(hub, horizon=T, action_dim=D).encode(chunks) == ids


def has_tokens(codec: FASTCodec, chunk: np.ndarray) -> bool:
    try:
        codec.encode(chunk[None])
    except ValueError:
        return False
    return True


COARSE = np.linspace(-1, 1, 51).round()[:, None, None] * np.ones((T, D))  # only three levels
STRANGE = np.full((1, T, D), -0.55)


def test_a_coefficient_that_a_published_alphabet_lacks_is_an_error_not_a_shorter_chunk(tmp_path):
    published_fit(COARSE, tmp_path / "hub")
    codec = FASTCodec.from_pretrained(tmp_path / "hub", horizon=T, action_dim=D)
    assert codec.encode(COARSE) == by_hand_encode(tmp_path / "hub", COARSE)
    text = Tokenizer.from_file(str(tmp_path / "hub" / "tokenizer.json")).decode(
        by_hand_encode(tmp_path / "hub", STRANGE)[0]
    )
    assert len(text) < T * D  # what happens without the check
    with pytest.raises(ValueError, match="coefficient -17 has no token.*alphabet"):
        codec.encode(STRANGE)


def test_our_own_alphabet_lacks_no_coefficient():
    codec = FASTCodec.fit(COARSE, vocab_size=600)
    assert np.abs(codec.decode(codec.encode(STRANGE)) - STRANGE).max() < 0.05


def test_transformers_reads_our_tokenizer(codec, folder):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    text = "".join(map(chr, range(300)))
    assert tokenizer(text)["input_ids"] == codec.tokenizer.encode(text).ids


def test_the_saved_numbers_are_the_published_ones(codec, folder):
    numbers = json.loads((folder / "processor_config.json").read_text())
    assert numbers["processor_class"] == "UniversalActionProcessor"
    assert {k: numbers[k] for k in ("scale", "min_token", "vocab_size", "time_horizon", "action_dim")} == {
        "scale": 10.0,
        "min_token": codec.min_token,
        "vocab_size": 600,
        "time_horizon": T,
        "action_dim": D,
    }


def fitted_case(seed: int) -> tuple[FASTCodec, np.ndarray, np.random.Generator]:
    """A codec over its data, of random sizes and scale."""
    rng = np.random.default_rng(seed)
    horizon, dims = int(rng.integers(1, 33)), int(rng.integers(1, 9))
    scale = float(rng.choice([2, 5, 10, 25]))
    data = rng.uniform(-1, 1, (20, horizon, dims)).astype(np.float32)
    return FASTCodec.fit(data, vocab_size=1024, scale=scale), data, rng


@pytest.mark.parametrize("seed", range(12))
def test_the_round_trip_keeps_its_bounds(seed):
    """Rounding moves a coefficient by at most 1/(2γ); the transform is orthonormal, so the same holds for the root
    mean square over time, and by Cauchy-Schwarz √T times that for a single action."""
    codec, data, rng = fitted_case(seed)
    for chunks in (data, rng.uniform(-1, 1, data.shape)):
        codec.clipped = 0
        error = codec.decode(codec.encode(chunks)) - chunks
        if not codec.clipped:
            assert np.sqrt((error**2).mean(1)).max() <= 0.5 / codec.scale + 1e-6
            assert np.abs(error).max() <= sqrt(codec.horizon) * 0.5 / codec.scale + 1e-6
    assert codec.repaired == 0


@pytest.mark.parametrize("seed", range(12))
def test_tokens_are_in_range_and_no_more_than_declared(seed):
    codec, data, rng = fitted_case(seed)
    for chunks in (data, rng.uniform(-1, 1, data.shape)):
        tokens = codec.encode(chunks)
        assert all(0 <= i < codec.num_tokens for row in tokens for i in row)
        assert max(map(len, tokens)) <= codec.max_tokens


@pytest.mark.parametrize("seed", range(12))
def test_nothing_that_was_fitted_on_is_clipped(seed):
    codec, data, _ = fitted_case(seed)
    codec.encode(data)
    assert codec.clipped == 0


@pytest.mark.parametrize("seed", range(12))
def test_a_codec_without_data_encodes_any_sizes(seed):
    fitted, data, _ = fitted_case(seed)
    assert FASTCodec.unfitted(fitted.horizon, fitted.action_dim).encode(data)


def test_coefficients_below_the_fit_are_clipped_as_published_and_counted(codec, folder):
    low, before = np.full((1, T, D), -3.0, np.float32), codec.clipped
    assert codec.encode(low) == by_hand_encode(folder, low)
    assert codec.clipped == before + 1
    np.testing.assert_allclose(codec.decode(codec.encode(low)), codec.min_token / 10 / sqrt(T), atol=1e-5)


def test_coefficients_above_the_fit_keep_their_value(codec):
    high = np.full((1, T, D), 5.0, np.float32)
    np.testing.assert_allclose(codec.decode(codec.encode(high)), high, atol=0.05)


def test_actions_that_were_not_normalised_are_refused(codec):
    with pytest.raises(ValueError, match=r"actions reach 1e\+04.*normalised"):
        codec.encode(np.full((1, T, D), 1e4, np.float32))


LENGTHS = np.random.default_rng(0).integers(0, T + 1, 30)
IS_PAD = np.arange(T) >= LENGTHS[:, None]


def test_nothing_behind_the_first_padding_changes_a_token(codec):
    chunks = motions(30, seed=3)
    other = np.where(IS_PAD[..., None], np.float32(np.nan), chunks)
    assert codec.encode(other, IS_PAD) == codec.encode(chunks, IS_PAD)


def test_the_last_action_before_padding_is_held(codec):
    chunks = motions(30, seed=3)
    for row, length, chunk in zip(codec.encode(chunks, IS_PAD), LENGTHS, chunks):
        assert (row == []) == (length == 0)
        if length:
            held = np.concatenate([chunk[:length], np.repeat(chunk[length - 1 : length], T - length, 0)])
            assert row == codec.encode(held[None])[0]


def test_a_hole_of_padding_cuts_the_chunk_as_well(codec):
    chunks, hole = motions(1, seed=3), np.arange(T)[None] == 4
    assert codec.encode(chunks, hole) == codec.encode(chunks, np.arange(T)[None] >= 4)


def test_the_fit_is_deterministic_also_between_processes(codec, data, tmp_path):
    assert FASTCodec.fit(list(data), vocab_size=600).tokenizer.to_str() == codec.tokenizer.to_str()
    np.save(tmp_path / "data.npy", data)
    code = (
        "import sys, numpy as np; from vla_bench.models.heads.fast import FASTCodec; "
        "FASTCodec.fit(np.load(sys.argv[1]), vocab_size=600).save(sys.argv[2])"
    )
    arguments = [sys.executable, "-c", code, str(tmp_path / "data.npy"), str(tmp_path / "again")]
    subprocess.run(arguments, check=True, env=os.environ | {"PYTHONHASHSEED": "7"})
    assert (tmp_path / "again" / "tokenizer.json").read_text() == codec.tokenizer.to_str(pretty=True)


def test_a_pickled_codec_gives_the_same(codec):
    new, other = motions(20, seed=4), pickle.loads(pickle.dumps(codec))
    assert other.encode(new) == codec.encode(new)
    np.testing.assert_array_equal(other.decode(codec.encode(new)), codec.decode(codec.encode(new)))


@pytest.mark.parametrize("seed", range(5))
def test_whatever_the_model_generates_becomes_a_bounded_chunk_and_is_counted(codec, seed):
    rng = np.random.default_rng(seed)
    generated = [rng.integers(0, codec.num_tokens, rng.integers(0, 80)).tolist() for _ in range(20)]
    before = codec.repaired
    chunks = codec.decode(generated)
    assert chunks.shape == (20, T, D) and np.isfinite(chunks).all()
    assert np.abs(chunks).max() <= sqrt(T) * (codec.largest + codec.min_token) / 10
    texts = [codec.tokenizer.decode(row, skip_special_tokens=False) for row in generated]
    wrong = [len(text) != T * D or "\ufffd" in text or max(map(ord, text)) > codec.largest for text in texts]
    assert codec.repaired == before + sum(wrong) and any(wrong)


def test_a_cut_generation_keeps_its_low_frequencies():
    plain, chunk = FASTCodec.unfitted(T, D), motions(1, seed=5)
    (ids,) = plain.encode(chunk)
    spectrum = np.round(cosines(T) @ chunk[0].astype(float) * 10) / 10
    kept = len(plain.tokenizer.decode(ids[:18], skip_special_tokens=False))
    spectrum.ravel()[kept:] = 0
    np.testing.assert_allclose(plain.decode([ids[:18]])[0], cosines(T).T @ spectrum, atol=1e-5)
    assert plain.repaired == 1


def test_what_a_generation_has_too_much_is_cut():
    plain = FASTCodec.unfitted(T, D)
    (ids,) = plain.encode(motions(1, seed=5))
    np.testing.assert_array_equal(plain.decode([ids + ids[:5]]), plain.decode([ids]))
    assert plain.repaired == 1


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
    with pytest.raises(
        FileNotFoundError, match="no FAST tokenizer at 'nobody/nothing'.*HF_HUB_OFFLINE.*; fit one"
    ):
        FASTCodec.from_pretrained("nobody/nothing", horizon=T, action_dim=D)


def test_only_two_json_files_come_from_the_hub(folder, monkeypatch):
    asked = []

    def download(name, allow_patterns, local_files_only=False):
        asked.append((name, *allow_patterns))
        return str(folder)

    monkeypatch.setattr("vla_bench.models.backbones.hub.snapshot_download", download)
    codec = FASTCodec.from_pretrained("somebody/fast", horizon=T, action_dim=D)
    assert asked == [("somebody/fast", "processor_config.json", "tokenizer.json")]
    assert codec.num_tokens == 600


SIZES = HeadSizes(hidden_size=8, action_dim=D, horizon=T)


def build_head(folder: Path, **own) -> FASTHead:
    return HEADS.build({"type": "FAST", "tokenizer": str(folder), **own}, sizes=SIZES)


@pytest.mark.parametrize(
    "own, vocab_size, expected",
    [
        ({}, 1000, lambda codes: 400 + codes),
        ({"skip": 50}, 1000, lambda codes: 350 + codes),
        ({"first_token_id": 151665}, 153000, lambda codes: 151665 + codes),
        ({"skip": 128, "descending": True}, 257152, lambda codes: 257152 - 1 - 128 - codes),
    ],
    ids=["at the end", "skip", "first", "descending"],
)
def test_the_head_places_its_tokens(folder, own, vocab_size, expected):
    assert build_head(folder, **own).token_ids(vocab_size).equal(expected(torch.arange(600)))


def test_the_head_declares_what_it_is(folder):
    head = build_head(folder, max_tokens=17)
    assert head.reads == "tokens" and head.assets and head.codec.stops and head.codec.max_tokens == 17
    assert not list(head.parameters())


def test_the_head_saves_its_files(folder, codec, tmp_path):
    build_head(folder).save_assets(tmp_path / "assets")
    new = motions(10, seed=6)
    assert FASTHead(SIZES, tokenizer=str(tmp_path / "assets")).codec.encode(new) == codec.encode(new)


def test_the_head_refuses_a_vocabulary_without_room(folder):
    with pytest.raises(ValueError, match="do not fit a vocabulary of 500"):
        build_head(folder).token_ids(500)


def test_a_misspelt_argument_of_the_head_is_named():
    with pytest.raises(ValueError, match="toknizer.*did you mean 'tokenizer'"):
        HEADS.build({"type": "FAST", "toknizer": "x"}, sizes=SIZES)


ARGUMENTS = ["fit", "--dataset", "data", "--horizon", "6", "--out", "out", "--vocab_size", "300"]


@pytest.fixture
def motion(tmp_path, monkeypatch) -> np.ndarray:
    """Episodes [3, 30, 2], written as the dataset `data` of the working folder; its videos cannot be decoded."""
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
    return motion


def test_the_program_fits_without_decoding_a_video(motion, capsys):
    main([*ARGUMENTS, "--scale", "20", "--mode", "min_max"])
    printed = capsys.readouterr().out
    assert "90 windows of 90 frames" in printed and "6 x 2 = 12 numbers" in printed
    assert "(bound 0.0250)" in printed and "(bound 0.0612)" in printed
    codec = FASTCodec.from_pretrained("out", horizon=6, action_dim=2)
    rows = motion.reshape(-1, 2).astype(np.float32)
    normalised = Normalizer(compute_statistics(rows), "min_max").normalize(rows).reshape(3, 30, 2)
    ends = np.concatenate([normalised[:, 27:], np.repeat(normalised[:, 29:], 3, 1)], axis=1)
    for chunks in (normalised[:, :6], ends):  # the last one held behind the end: such windows were fitted on
        assert np.abs(codec.decode(codec.encode(chunks)) - chunks).max() <= sqrt(6) * 0.5 / 20
    assert codec.clipped == 0


def test_the_program_refuses_actions_that_were_not_normalised(motion, capsys):
    with pytest.raises(SystemExit) as stop:
        main([*ARGUMENTS, "--mode", "identity"])
    assert stop.value.code == 2
    assert "error: the coefficients span" in capsys.readouterr().err


def test_the_program_names_a_misspelt_mode(motion, capsys):
    with pytest.raises(SystemExit):
        main([*ARGUMENTS, "--mode", "minmax"])
    assert "did you mean 'min_max'" in capsys.readouterr().err


def test_actions_of_another_shape_are_named():
    codec, chunks = FASTCodec.unfitted(T, D), motions(2)
    with pytest.raises(ValueError, match=r"actions are \[2, 9, 4\], this codec takes \[B, 10, 4\]"):
        codec.encode(chunks[:, :9])
    with pytest.raises(ValueError, match=r"is_pad must be bool \[2, 10\]"):
        codec.encode(chunks, np.zeros((2, 10)))


def test_an_action_that_is_not_finite_is_named():
    codec, chunks = FASTCodec.unfitted(T, D), motions(2)
    chunks[1, 7, 2] = np.inf
    with pytest.raises(ValueError, match="action 7 of sample 1 is not finite"):
        codec.encode(chunks)


# --- bounds and sizes, in numbers -------------------------------------------------------------------------------------


def constant(*values: float, horizon: int = 4) -> list[np.ndarray]:
    """Chunks that hold still: their first coefficient is 10 sqrt(T) times the value, all others are zero."""
    return [np.full((horizon, 1), value) for value in values]


def test_a_codec_may_have_as_many_values_as_its_vocabulary_and_no_more():
    codec = FASTCodec.fit(constant(0.0, 12.75), vocab_size=256)  # coefficients 0 … 255
    assert (codec.min_token, codec.num_tokens, codec.vocab_size) == (0, 256, 256)
    with pytest.raises(ValueError, match="the coefficients span 257 values, vocab_size is 256"):
        FASTCodec.fit(constant(0.0, 12.8), vocab_size=256)


def test_actions_are_refused_as_not_normalised_from_a_million_on():
    """By the largest coefficient that there could be: it would not fit a list of characters at all."""
    with pytest.raises(ValueError, match="the coefficients span"):
        FASTCodec.fit(constant(0.0, 49_999.0))  # times 10, times the root of 4
    for chunks in (constant(0.0, 50_001.0), constant(0.0, -50_001.0), constant(0.0, 25_001.0, horizon=16)):
        with pytest.raises(ValueError, match="actions reach .*; normalise them to about"):
            FASTCodec.fit(chunks)
    with pytest.raises(ValueError, match="the coefficients span"):
        FASTCodec.fit(constant(0.0, 25_001.0))
    with pytest.raises(ValueError, match="actions reach .*; normalise them to about"):
        FASTCodec.fit(constant(0.0, 25_001.0), scale=20.0)


@pytest.mark.parametrize(
    "wrong", [{"vocab_size": 255}, {"scale": 0.0}, {"scale": -1.0}, {"scale": float("nan")}], ids=str
)
def test_a_vocabulary_holds_all_bytes_and_a_scale_is_positive(wrong):
    chunks = constant(0.0, 0.1)
    FASTCodec.fit(chunks, **{"vocab_size": 256, "scale": 0.5} | {name: 256 for name in wrong})
    with pytest.raises(ValueError, match="vocab_size=.* must be at least 256 .*scale=.* positive"):
        FASTCodec.fit(chunks, **{"vocab_size": 256, "scale": 0.5} | wrong)


@pytest.mark.parametrize("shapes", [[], [(0, 3)], [(3, 0)], [(3,)], [(2, 3, 1)]], ids=str)
def test_chunks_that_are_none_are_refused(shapes):
    with pytest.raises(ValueError, match=r"fitting needs chunks \[N, T, D\]"):
        FASTCodec.fit([np.zeros(shape) for shape in shapes])


@pytest.mark.parametrize("place", [1, 2])
@pytest.mark.parametrize("shape", [(3, 2), (5, 2), (4, 1), (4, 3)])
def test_a_chunk_of_another_shape_is_named_wherever_it_stands(place, shape):
    chunks = [np.zeros((4, 2))] * 3
    chunks[place] = np.zeros(shape)
    with pytest.raises(
        ValueError, match=rf"chunk {place} is \[{shape[0]}, {shape[1]}\], the ones before are \[4, 2\]"
    ):
        FASTCodec.fit(chunks)


TOKENIZER = FASTCodec.unfitted(3, 2).tokenizer


@pytest.mark.parametrize(
    "vocab_size, largest, per_number",
    [(256, 2047, 2), (2048, 2047, 2), (2049, 2048, 3), (5000, 4999, 3), (60_000, 0xD7FF, 3)],
)
def test_the_largest_character_and_the_longest_chunk_follow_from_the_vocabulary(
    vocab_size, largest, per_number
):
    codec = FASTCodec(TOKENIZER, horizon=3, action_dim=2, vocab_size=vocab_size)
    assert (codec.largest, codec.max_tokens) == (largest, 3 * 2 * per_number)
    assert (codec.clipped, codec.repaired, codec.num_tokens) == (0, 0, 256)


@pytest.mark.parametrize(
    "wrong", [{"scale": 0.0}, {"scale": -1.0}, {"max_tokens": 0}, {"max_tokens": -1}], ids=str
)
def test_a_scale_and_a_limit_of_tokens_are_positive(wrong):
    assert FASTCodec(TOKENIZER, horizon=3, action_dim=2, scale=0.1, max_tokens=1).max_tokens == 1
    with pytest.raises(ValueError, match="must be positive"):
        FASTCodec(TOKENIZER, horizon=3, action_dim=2, **wrong)


def still(codec: FASTCodec, first: int) -> np.ndarray:
    """Chunks [1, T, D] whose every first coefficient is `first`."""
    return np.full((1, codec.horizon, codec.action_dim), first / codec.scale / sqrt(codec.horizon))


def test_the_largest_coefficient_has_tokens_and_the_next_one_is_refused():
    codec = FASTCodec(TOKENIZER, horizon=3, action_dim=2, min_token=-40)
    assert codec.largest + codec.min_token == 2007
    np.testing.assert_allclose(codec.decode(codec.encode(still(codec, 2007))), still(codec, 2007), rtol=1e-6)
    with pytest.raises(ValueError, match="a coefficient of 2008 is beyond this tokenizer's 2007"):
        codec.encode(still(codec, 2008))


def test_chunks_with_too_low_a_coefficient_are_counted_once_each():
    codec = FASTCodec(TOKENIZER, horizon=3, action_dim=2, min_token=-40)
    codec.encode(np.concatenate([still(codec, -40), still(codec, -41), still(codec, -500), still(codec, 3)]))
    assert codec.clipped == 2  # each is wrong in two numbers
    np.testing.assert_allclose(codec.decode(codec.encode(still(codec, -41))), still(codec, -40), rtol=1e-6)


def test_a_character_that_is_too_large_is_read_as_zero_and_counted():
    codec = FASTCodec(TOKENIZER, horizon=3, action_dim=2, min_token=-40)
    for character, first in ((2047, 2007), (2048, 0)):
        before = codec.repaired
        ids = codec.tokenizer.encode(chr(character) + chr(40) * 5).ids
        spectrum = np.zeros((3, 2))
        spectrum[0, 0] = first / 10
        np.testing.assert_allclose(codec.decode([ids])[0], cosines(3).T @ spectrum, atol=1e-4)
        assert codec.repaired == before + (character == 2048)


@pytest.mark.parametrize("ids, wrong", [([-1], -1), ([0, 256], 256), ([300, 1], 300)])
def test_a_number_that_is_no_token_is_refused(ids, wrong):
    codec = FASTCodec(TOKENIZER, horizon=3, action_dim=2)
    with pytest.raises(ValueError, match=f"{wrong} is no token of this tokenizer, which has 256"):
        codec.decode([ids])
    codec.decode([[0, 255]])


@pytest.mark.parametrize("horizon", [1, 4, 10, 50])
def test_without_data_actions_of_two_still_fit_and_a_little_more_is_cut(horizon):
    codec = FASTCodec.unfitted(horizon, 2, max_tokens=7)
    low = -int(np.ceil(20 * sqrt(horizon)))
    assert (codec.min_token, codec.vocab_size, codec.max_tokens) == (low, max(256, -2 * low), 7)
    edge = np.full((1, horizon, 2), -2.0)
    np.testing.assert_allclose(codec.decode(codec.encode(edge)), edge, atol=0.06)
    assert codec.clipped == 0
    codec.encode(1.2 * edge)
    assert codec.clipped == 1


def published_merges(texts: list[str], vocab_size: int) -> Tokenizer:
    """As the published code trains it, on all bytes."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    options = {
        "vocab_size": vocab_size,
        "min_frequency": 2,
        "max_token_length": 10_000,
        "show_progress": False,
    }
    tokenizer.train_from_iterator(
        texts, trainers.BpeTrainer(**options, initial_alphabet=alphabet, special_tokens=[])
    )
    return tokenizer


TEXTS = {
    "pairs that occur once": ["ab" * 3 + "cd", "xyz", "ab"],
    "words and spaces": [" go  to the\tend", "go to the end ", "don't go to"],
    "one token that could be very long": ["a" * 20_000] * 2,
    "letters beyond a byte": ["éàé" * 4, "\u07ff\u0400" * 3],
}


@pytest.mark.parametrize("name", TEXTS)
@pytest.mark.parametrize("vocab_size", [256, 260, 400])
def test_merges_are_the_published_ones(name, vocab_size, capfd):
    found = train_merges(TEXTS[name], vocab_size)
    assert found.to_str() == published_merges(TEXTS[name], vocab_size).to_str()
    assert 256 <= found.get_vocab_size() <= vocab_size
    for text in TEXTS[name]:
        assert found.decode(found.encode(text).ids) == text
    assert max(map(len, found.get_vocab())) <= 10_000
    assert capfd.readouterr() == ("", "")


# --- files ------------------------------------------------------------------------------------------------------------


def test_saving_makes_the_folder_and_may_be_repeated(codec, tmp_path):
    for _ in range(2):
        codec.save(tmp_path / "a" / "b")
    assert FASTCodec.from_pretrained(tmp_path / "a" / "b").num_tokens == codec.num_tokens


def test_the_saved_tokenizer_leaves_blanks_alone(folder):
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    assert settings == {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False}


def test_padding_and_truncation_of_a_file_are_not_used(codec, folder):
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.enable_padding(length=50)
    tokenizer.enable_truncation(max_length=3)
    tokenizer.save(str(folder / "tokenizer.json"))
    new = motions(5, seed=8)
    assert FASTCodec.from_pretrained(folder).encode(new) == codec.encode(new)


@pytest.mark.parametrize("special", [True, False])
def test_special_tokens_of_a_file_are_neither_added_nor_skipped(codec, folder, special):
    """A file may name a token as special, or frame every text: a coefficient is none the less what it is."""
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    if special:
        tokenizer.add_special_tokens(["b"])
    else:
        ids = [(text, tokenizer.token_to_id(text)) for text in ("a", "b")]
        tokenizer.post_processor = processors.BertProcessing(*ids)
    tokenizer.save(str(folder / "tokenizer.json"))
    loaded, new = FASTCodec.from_pretrained(folder), motions(30, seed=9)
    if not special:
        assert loaded.encode(new) == codec.encode(new)
    np.testing.assert_array_equal(loaded.decode(loaded.encode(new)), codec.decode(codec.encode(new)))
    spoken = [[codec.tokenizer.token_to_id("b")] * 3]
    np.testing.assert_array_equal(loaded.decode(spoken), codec.decode(spoken))


@pytest.mark.parametrize("key", ["scale", "min_token", "vocab_size"])
@pytest.mark.parametrize(
    "value, said", [(True, "True, not a number"), (None, "None, not a number"), ("gone", "there is no")]
)
def test_each_number_of_a_file_has_to_be_one(folder, key, value, said):
    _edit(folder, **{key: value})
    with pytest.raises(ValueError, match=f"processor_config.json: .*{said}"):
        FASTCodec.from_pretrained(folder)


def test_a_misspelt_number_of_a_file_is_named_with_the_nearest(folder):
    _edit(folder, scale="gone", scael=10)
    with pytest.raises(ValueError, match="there is no 'scale'.*did you mean 'scael'"):
        FASTCodec.from_pretrained(folder)


@pytest.mark.parametrize(
    "content", ["7", "[[1", '"text"', "[1]", "[" * 100_000], ids=["number", "cut", "text", "list", "deep"]
)
def test_a_file_that_is_no_object_is_named(folder, content):
    (folder / "processor_config.json").write_text(content)
    with pytest.raises(ValueError, match="processor_config.json is not a JSON object"):
        FASTCodec.from_pretrained(folder)


@pytest.mark.parametrize("key, name, size", [("time_horizon", "horizon", T), ("action_dim", "action_dim", D)])
def test_a_size_is_the_files_or_the_callers(folder, key, name, size):
    assert vars(FASTCodec.from_pretrained(folder))[name] == size
    for other in (size - 1, size + 1):
        with pytest.raises(ValueError, match=f"fitted with {key}={size}, the policy has {other}"):
            FASTCodec.from_pretrained(folder, **{name: other})
    _edit(folder, **{key: "gone"})
    assert vars(FASTCodec.from_pretrained(folder, **{name: size + 1}))[name] == size + 1
    with pytest.raises(ValueError, match=f"holds no {key}; pass it"):
        FASTCodec.from_pretrained(folder)


def test_the_numbers_of_a_file_reach_the_codec(folder):
    _edit(folder, scale=12.5, min_token=-7, vocab_size=700)
    codec = FASTCodec.from_pretrained(folder, max_tokens=9)
    assert (codec.scale, codec.min_token, codec.vocab_size, codec.max_tokens) == (12.5, -7, 700, 9)


def test_the_hubs_own_folder_of_the_tokenizer_comes_first(folder, codec):
    (folder / "bpe_tokenizer").mkdir()
    (folder / "tokenizer.json").rename(folder / "bpe_tokenizer" / "tokenizer.json")
    assert FASTCodec.from_pretrained(folder).num_tokens == codec.num_tokens
    (folder / "tokenizer.json").write_text("another one")
    assert FASTCodec.from_pretrained(folder).num_tokens == codec.num_tokens


# --- the program, option by option ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "limit, frames",
    [(100, range(9)), (9, range(9)), (3, [0, 4, 8]), (2, [0, 8]), (5, [0, 2, 4, 6, 8])],
)
def test_windows_begin_evenly_over_the_frames_and_hold_an_episodes_last_action(limit, frames):
    actions = np.arange(9.0)[:, None] * [1, 10]
    found = action_windows(actions, [0, 4, 9], 3, limit)
    ends = [3 if frame < 4 else 8 for frame in frames]
    rows = [[min(frame + k, end) for k in range(3)] for frame, end in zip(frames, ends, strict=True)]
    np.testing.assert_array_equal(found, actions[np.array(rows)])


def test_the_report_says_what_was_measured():
    codec = FASTCodec.unfitted(4, 3)
    chunks = np.random.default_rng(0).uniform(0, 1, (5, 4, 3)) * np.array([1, 1, 5, 7, 9])[:, None, None]
    counts = [len(ids) for ids in codec.encode(chunks)]
    error = codec.decode(codec.encode(chunks)) - chunks
    rms, largest = np.sqrt((error**2).mean()), np.abs(error).max()
    assert len(set(counts)) > 1
    assert fit_report(codec, chunks).splitlines() == [
        f"256 tokens; a chunk of 4 x 3 = 12 numbers takes {np.mean(counts):.1f} tokens (at most {max(counts)}), "
        f"{12 / np.mean(counts):.1f} times fewer",
        f"round trip in normalised units: rms {rms:.4f} (bound 0.0500), largest {largest:.4f} (bound 0.1000)",
    ]


class Asked(Exception):
    """What the dataset was asked for."""


@pytest.fixture
def asked(monkeypatch):
    """What the program's arguments ask of the dataset, and of the rest."""

    def dataset(*given, **more):
        raise Asked(given, more)

    monkeypatch.setattr(fast_module, "LeRobotDataset", dataset)

    def ask(*words):
        with pytest.raises(Asked) as caught:
            main([*ARGUMENTS, *words])
        return caught.value.args

    return ask


@pytest.mark.parametrize(
    "words, change",
    [
        ([], {}),
        (["--action_key", "action.arm"], {"action_key": "action.arm"}),
        (["--cameras", "top", "left"], {"cameras": ["top", "left"]}),
        (["--follow_links"], {"follow_links": True}),
    ],
)
def test_each_option_reaches_the_dataset(asked, words, change):
    plain = {"horizon": 6, "cameras": None, "action_key": "action", "state_key": None, "follow_links": False}
    assert asked(*words) == (("data",), plain | change)


def test_what_is_not_said_has_these_values(monkeypatch):
    seen = []
    monkeypatch.setattr(fast_module, "_fit", seen.append)
    main(["fit", "--dataset", "d", "--horizon", "3", "--out", "o"])
    assert vars(seen[0]) == {
        "command": "fit", "dataset": "d", "horizon": 3, "out": "o", "action_key": "action", "cameras": None,
        "follow_links": False, "vocab_size": 1024, "scale": 10.0, "mode": ["q99"], "limit": 50_000,
    }  # fmt: skip


@pytest.mark.parametrize("missing", ["fit", "--dataset", "--horizon", "--out"])
def test_what_has_to_be_said_is_named(missing, capsys):
    place = ARGUMENTS.index(missing)
    with pytest.raises(SystemExit):
        main(ARGUMENTS[:place] + ARGUMENTS[place + (1 if missing == "fit" else 2) :])
    assert ("command" if missing == "fit" else missing) in capsys.readouterr().err or missing == "fit"


def test_one_window_is_enough_and_none_is_refused(motion, capsys):
    with pytest.raises(SystemExit):
        main([*ARGUMENTS, "--limit", "0"])
    assert "--limit 0 leaves no window to fit on" in capsys.readouterr().err
    main([*ARGUMENTS, "--limit", "1", "--mode", "min_max"])
    assert "1 windows of 90 frames, actions normalised with min_max" in capsys.readouterr().out


def test_each_number_may_be_normalised_in_its_own_way(motion, capsys):
    main([*ARGUMENTS, "--mode", "min_max", "mean_std"])
    printed = capsys.readouterr().out
    assert "actions normalised with min_max, mean_std" in printed and "wrote out; use it as" in printed
    rows = motion.reshape(-1, 2).astype(np.float32)
    both = Normalizer(compute_statistics(rows), ["min_max", "mean_std"]).normalize(rows).reshape(3, 30, 2)
    codec = FASTCodec.from_pretrained("out")
    assert codec.min_token == min(
        np.rint(
            np.einsum("kt,ntd->nkd", cosines(6), action_windows(both.reshape(-1, 2), [0, 30, 60, 90], 6, 90))
            * 10
        ).min(),
        0,
    )
