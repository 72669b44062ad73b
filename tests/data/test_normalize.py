"""A dimension that moves is never a constant."""

import json
import warnings

import numpy as np
import pytest

from vla_bench.data.normalize import (
    MODES,
    Normalizer,
    Statistics,
    compute_statistics,
    line,
    load_statistics,
    save_statistics,
    statistics_hash,
)


@pytest.mark.parametrize("share", [0.001, 0.004, 0.008, 0.009])
@pytest.mark.parametrize(("low", "high"), [(-1, 1), (0, 1), (-3, 0), (5, 6)])
def test_moves_rarer_than_the_quantiles_come_back(share, low, high):
    rng = np.random.default_rng(0)
    rest = 0.0
    x = np.where(rng.random(5000) < share, rng.uniform(low, high, 5000), rest)[:, None]
    scale = Normalizer(compute_statistics(x), "q99")
    y = scale.normalize(x)
    assert scale.statistics.q01 == scale.statistics.q99 == rest
    assert ((y == 0) == (x == rest)).all() and np.abs(y).max() == 1
    assert np.abs(scale.unnormalize(y) - x).max() < 1e-6 * max(abs(low), abs(high))


def test_only_a_constant_is_a_constant():
    x = np.stack([np.full(1000, 0.1), np.where(np.arange(1000) == 3, 1e-3, 0.0)], axis=1)
    assert Normalizer(compute_statistics(x), "q99").constant.tolist() == [True, False]


def test_dimensions_whose_quantiles_differ_keep_their_line():
    x = np.random.default_rng(0).normal(size=(5000, 2))
    scale = Normalizer(compute_statistics(x), "q99")
    q01, q99 = np.quantile(x, [0.01, 0.99], axis=0)
    assert (scale.offset == (q99 + q01) / 2).all() and (scale.scale == (q99 - q01) / 2).all()


def test_statistics_without_extremes_refuse_what_they_cannot_tell():
    x = np.where(np.arange(1000) == 3, 1.0, 0.0)[:, None]
    told = {k: v for k, v in compute_statistics(x).to_dict().items() if k not in ("min", "max")}
    with pytest.raises(ValueError, match="dimension 0 moves .* use mean_std"):
        Normalizer(Statistics.from_dict(told), "q99")


@pytest.mark.parametrize("mode", ["q99", ["min_max", "q99"]])
def test_a_dimension_that_rests_nearly_always_is_named(mode):
    rng = np.random.default_rng(0)
    x = rng.normal(size=(5000, 2))
    x[:, 1] = np.where(rng.random(5000) < 0.008, 1.0, rng.normal(0, 1e-4, 5000))
    with pytest.warns(UserWarning, match="dimension 1 up to .* min_max fits it"):
        Normalizer(compute_statistics(x), mode)


def statistics(**change) -> Statistics:
    """Three dimensions: a plain one, one whose quantiles lie far inside, and a constant."""
    values = {
        "min": [-2.0, -100, 5], "max": [6.0, 300, 5], "mean": [1.0, 2, 5], "std": [0.5, 8, 0],
        "q01": [-1.0, -4, 5], "q99": [3.0, 12, 5],
    }  # fmt: skip
    arrays = {
        name: None if given is None else np.array(given, float) for name, given in (values | change).items()
    }
    return Statistics(**arrays, count=50)


LINES = {
    "min_max": [(2.0, 4.0), (100.0, 200.0), (5.0, 0.0)],
    "binary": [(2.0, 4.0), (100.0, 200.0), (5.0, 0.0)],
    "q99": [(1.0, 2.0), (4.0, 8.0), (5.0, 0.0)],
    "mean_std": [(1.0, 0.5), (2.0, 8.0), (5.0, 0.0)],
    "identity": [(0.0, 1.0)] * 3,
}


def test_the_modes_are_these():
    assert MODES == ("min_max", "q99", "mean_std", "binary", "identity") and set(MODES) == set(LINES)


@pytest.mark.parametrize("mode", MODES)
def test_a_mode_is_this_line_per_dimension(mode):
    assert [line(mode, statistics(), d) for d in range(3)] == LINES[mode]
    x = np.array([[3.0, 20, 5], [-7, 90, 6]])
    expected = np.array([[(v - o) / s if s else 0 for v, (o, s) in zip(row, LINES[mode])] for row in x])
    if mode == "binary":
        expected[:, :2] = np.where(expected[:, :2] > 0, 1, -1)
    scale = Normalizer(statistics(), mode)
    found = scale.normalize(x)
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, expected, rtol=1e-6)
    assert scale.constant.tolist() == [False, False, mode != "identity"]
    back = scale.unnormalize(expected)
    physical = [[v * s + o for v, (o, s) in zip(row, LINES[mode])] for row in expected]
    np.testing.assert_allclose(back, physical, rtol=1e-12)
    assert back.dtype == np.float64


@pytest.mark.parametrize("value, expected", [(-1.0, -1), (0.0, -1), (1e-9, 1), (0.3, 1), (7.0, 1)])
def test_binary_has_two_ends(value, expected):
    scale = Normalizer(statistics(), ["binary", "min_max", "identity"])
    row = [value, value, value]
    assert scale.normalize([2 + 4 * value, 0, 0])[0] == expected
    assert scale.unnormalize(row)[0] == {1: 6.0, -1: -2.0}[expected]
    assert scale.unnormalize(row)[1:].tolist() == [100 + 200 * value, value]


def test_modes_may_differ_by_dimension():
    scale = Normalizer(statistics(), ["mean_std", "q99", "identity"])
    assert scale.modes == ("mean_std", "q99", "identity")
    np.testing.assert_allclose(scale.normalize([2.0, 12, 5]), [2.0, 1.0, 5.0])


@pytest.mark.parametrize("shape", [(), (2,), (4,), (3, 2)])
def test_another_number_of_dimensions_is_refused(shape):
    scale = Normalizer(statistics(), "min_max")
    for call in (scale.normalize, scale.unnormalize):
        with pytest.raises(ValueError, match="the normaliser has 3 dimensions, got an array of shape"):
            call(np.zeros(shape))


def test_modes_that_cannot_be_are_refused():
    for modes, message in (
        (["q99", "q99"], "2 modes for 3 dimensions"),
        ("q98", "unknown normalisation mode 'q98'; did you mean 'q99'"),
        (["q99", "min_max", "meanstd"], "unknown normalisation mode 'meanstd'"),
    ):
        with pytest.raises(ValueError, match=message):
            Normalizer(statistics(), modes)
    without = statistics(min=None, max=None)
    for mode in ("min_max", "binary"):
        with pytest.raises(ValueError, match=f"no extremes, which {mode} needs"):
            Normalizer(without, mode)
    for mode in ("q99", "mean_std", "identity"):
        assert Normalizer(without, mode).modes == (mode,) * 3


def test_a_constant_whose_deviation_is_a_rounding_error_stays_constant():
    odd = statistics(std=[0.5, 8, 1e-17])
    assert Normalizer(odd, "mean_std").constant.tolist() == [False, False, True]
    without = statistics(std=[0.5, 8, 1e-17], min=None, max=None)
    assert Normalizer(without, "mean_std").constant.tolist() == [False, False, False]


@pytest.mark.parametrize("factor, warned", [(99.0, False), (101.0, True)])
@pytest.mark.parametrize("side", ["min", "max"])
def test_moves_of_a_hundred_times_the_usual_range_are_worth_a_word(side, factor, warned):
    """The range is 2 on each side of 1."""
    far = {"max": 3 + 2 * factor, "min": -1 - 2 * factor}[side]
    values = statistics(**{side: [far, {"min": -100, "max": 300}[side], 5]})
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        Normalizer(values, "min_max")
        assert caught == []
        Normalizer(values, "q99")
    told = [str(each.message) for each in caught]
    expected = f"q99 sends dimension 0 up to {factor:.0f} times its usual range, since it rests nearly always: min_max fits it"
    assert told == ([expected] if warned else [])


def test_statistics_are_numpys():
    rng = np.random.default_rng(0)
    parts = [rng.normal(size=(70, 2)).astype(np.float32), rng.normal(size=(31, 2)).astype(np.float32)]
    rows = np.concatenate(parts).astype(np.float64)
    for found in (compute_statistics(parts), compute_statistics(np.concatenate(parts))):
        expected = {
            "min": rows.min(0),
            "max": rows.max(0),
            "mean": rows.mean(0),
            "std": rows.std(0),
            "count": 101,
        }
        expected |= {"q01": np.quantile(rows, 0.01, axis=0), "q99": np.quantile(rows, 0.99, axis=0)}
        for name, value in expected.items():
            np.testing.assert_array_equal(vars(found)[name], value)


@pytest.mark.parametrize(
    "columns, message",
    [
        ([], "columns must all be"),
        (np.zeros(3), "columns must all be"),
        ([np.zeros((2, 3)), np.zeros((2, 4))], r"one D, got \[\[2, 3\], \[2, 4\]\]"),
        ([np.zeros((2, 3)), np.zeros((2, 3, 1))], "columns must all be"),
        (np.zeros((0, 3)), "of no rows"),
        (np.array([[1.0, 2], [3, np.nan], [np.inf, 1]]), "row 1 holds a value that is not finite"),
    ],
)
def test_columns_that_have_no_statistics(columns, message):
    with pytest.raises(ValueError, match=message):
        compute_statistics(columns)


@pytest.mark.parametrize("change", [{}, {"min": None, "max": None}])
def test_statistics_come_back_from_a_file(tmp_path, change):
    given = statistics(**change)
    content = given.to_dict()
    assert ("min" in content) == ("max" in content) == (not change)
    back = Statistics.from_dict(json.loads(json.dumps(content)))
    assert back.to_dict() == content and back.count == 50
    save_statistics(tmp_path / "s.json", {"toy": {"action": given, "state": None, "num_transitions": 50}})
    loaded = load_statistics(tmp_path / "s.json")
    assert loaded["toy"]["action"].to_dict() == content and loaded["toy"]["state"] is None
    assert loaded["toy"]["num_transitions"] == 50
    assert statistics_hash(loaded) == statistics_hash(
        {"toy": {"num_transitions": 50, "state": None, "action": given}}
    )


WRONG = [
    ({"mean": None}, "statistics lack mean"),
    ({"min": None}, "statistics lack min"),
    ({"max": None}, "statistics lack max"),
    ({"count": None}, "statistics lack count"),
    ({"count": 5.0}, "count is 5.0, expected a whole number"),
    ({"q01": [1.0, 2]}, "lengths differ: "),
    ({"std": [0.5, -1, 0]}, r"std\[1\] is negative"),
    ({"min": [7.0, -100, 5]}, r"min\[0\] is greater than max\[0\]"),
    ({"q99": [3.0, -5, 5]}, r"q01\[1\] is greater than q99\[1\]"),
    ({"mean": [1.0, float("nan"), 5]}, "mean must be a list of finite numbers"),
    ({"mean": [[1.0, 2, 5]]}, "mean must be a list of finite numbers"),
    ({"mean": "many"}, "mean must be a list of finite numbers, got many"),
    ({"mean": {"a": 1}}, "mean must be a list of finite numbers"),
]


@pytest.mark.parametrize("change, message", WRONG)
def test_statistics_that_cannot_be_are_refused(tmp_path, change, message):
    content = statistics().to_dict() | change
    with pytest.raises(ValueError, match=message):
        Statistics.from_dict(content)
    content = {name: value for name, value in content.items() if value is not None}
    (tmp_path / "s.json").write_text(json.dumps({"toy": {"action": content}}).replace("NaN", "1e999"))
    with pytest.raises(ValueError, match="s.json"):
        load_statistics(tmp_path / "s.json")


def test_each_number_is_part_of_the_hash():
    content = {"toy": {"action": statistics(), "num_transitions": 50}}
    hashes = {statistics_hash(content), statistics_hash({"yot": content["toy"]})}
    hashes.add(statistics_hash({"toy": {**content["toy"], "num_transitions": 51}}))
    for name in ("min", "max", "mean", "std", "q01", "q99"):
        changed = vars(statistics())[name] + [0, 1e-9, 0]
        hashes.add(statistics_hash({"toy": {**content["toy"], "action": statistics(**{name: changed})}}))
    assert len(hashes) == 9 and {len(each) for each in hashes} == {16}


def test_a_file_that_holds_no_statistics_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="no statistics at .*gone.json"):
        load_statistics(tmp_path / "gone.json")
    (tmp_path / "s.json").write_text('{"toy": 3}')
    with pytest.raises(ValueError, match="s.json holds no statistics: 'toy' is a int, expected the fields"):
        load_statistics(tmp_path / "s.json")
