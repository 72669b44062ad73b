"""Several datasets as one: which sample comes from where, at which width, and what cannot stand side by side."""

from dataclasses import dataclass, replace

import pytest
import yaml

from vla_bench.data import mixture
from vla_bench.data.mixture import Mixture, MixtureEntry, common_widths, read_mixture, register_mixture
from vla_bench.data.view import ModelView, Widths


@dataclass(frozen=True)
class Toy:
    """A dataset whose samples are their places."""

    name: str
    length: int
    dims: tuple[int, int]
    cameras: tuple[str, ...] = ("front",)
    horizon: int = 4
    view: ModelView = ModelView()

    def __len__(self):
        return self.length

    def __getitem__(self, row):
        return self.name, row

    def with_view(self, view):
        return replace(self, view=view)


ONE = Toy("one", 3, (7, 2), ("a", "b"))
TWO = Toy("two", 5, (4, 9), ("a",), view=ModelView(history=(-2, -1, 0), prompt="two: {lang}"))
THREE = Toy("three", 2, (5, 3))


def test_rows_are_counted_through_all_datasets():
    found = Mixture([ONE, TWO, THREE])
    assert len(found) == 10 and found.starts.tolist() == [0, 3, 8, 10]
    assert [found[row] for row in range(10)] == [
        *(("one", i) for i in range(3)), *(("two", i) for i in range(5)), *(("three", i) for i in range(2))
    ]  # fmt: skip
    for row in (-1, 10):
        with pytest.raises(IndexError, match=f"sample {row} is outside the mixture's 0..9"):
            found[row]


def test_every_dataset_is_seen_at_the_widths_of_the_widest():
    assert common_widths([ONE, TWO, THREE]) == Widths(7, 9, 3) == Mixture([ONE, TWO, THREE]).widths
    found = Mixture([ONE, TWO])
    assert [each.view.widths for each in found.datasets] == [Widths(7, 9, 3)] * 2
    assert (found.datasets[1].view.prompt, found.datasets[1].view.history) == ("two: {lang}", (-2, -1, 0))
    given = Widths(20, 20, 20)
    assert (
        Mixture([ONE], widths=given).widths == given == Mixture([ONE], widths=given).datasets[0].view.widths
    )


def test_the_order_has_the_rows_the_seed_and_the_weights():
    order = Mixture([ONE, TWO], [3, 1]).order(6)
    assert (order.rows, order.seed, order.shares) == ((3, 5), 6, (3, 1))
    assert Mixture([ONE, TWO]).order(0).shares is None


REFUSED = [
    ([], "at least one dataset"),
    ([ONE, TWO, replace(THREE, name="one")], "two datasets of the mixture are named 'one'"),
    ([ONE, replace(TWO, horizon=5)], "two gives chunks of 5 actions, one of 4; a mixture has one horizon"),
    ([ONE, replace(TWO, dims=(4, 0))], "one has a state and two has none"),
    ([replace(ONE, dims=(7, 0)), TWO], "two has a state and one has none"),
]


@pytest.mark.parametrize("datasets, message", REFUSED)
def test_datasets_that_cannot_stand_side_by_side_are_refused(datasets, message):
    with pytest.raises(ValueError, match=message):
        Mixture(datasets)


def test_datasets_without_any_state_fit():
    assert Mixture([replace(ONE, dims=(7, 0)), replace(TWO, dims=(4, 0))]).widths == Widths(7, 0, 3)


FULL = {
    "dataset": "data/a", "weight": 2, "name": "mine", "robot": "aloha", "cameras": ["left", "right"],
    "prompt": "go: {lang}", "action_key": "act", "state_key": "obs", "action_mode": {"arm": "delta"},
    "normalization": {"action": "q99"},
}  # fmt: skip


def test_every_key_of_an_entry_reaches_it():
    (entry,) = read_mixture([FULL], "key")
    assert vars(entry) == FULL | {"cameras": ("left", "right")}
    (least,) = read_mixture([{"dataset": "data/a"}], "key")
    assert least == MixtureEntry("data/a")
    for key in ("weight", "name", "robot", "cameras", "state_key"):
        (entry,) = read_mixture([{"dataset": "data/a", key: None}], "key")
        assert vars(entry)[key] is None


WRONG = [
    ({"weight": 0}, "key[1]: weight is 0, expected a positive number"),
    ({"weight": -1.0}, "key[1]: weight is -1.0"),
    ({"weight": float("inf")}, "weight"),
    ({"weight": "much"}, "'weight'"),
    ({"prompt": "go"}, "key[1]: prompt 'go' must hold {lang}"),
    ({"datset": "b"}, "key[1]: unknown entry 'datset'; did you mean 'dataset'"),
    ({"cameras": "left"}, "'cameras'"),
    ({"robot": 3}, "'robot'"),
    ({"action_mode": 3}, "'action_mode'"),
    ({"normalization": "q99"}, "'normalization'"),
    ({"dataset": None}, "'dataset'"),
]


@pytest.mark.parametrize("change, message", WRONG, ids=lambda value: str(value)[:30])
def test_an_entry_that_cannot_be_is_named_by_its_place(change, message):
    with pytest.raises(ValueError) as error:
        read_mixture([{"dataset": "a", "weight": 1}, {"dataset": "b", "weight": 1, **change}], "key")
    assert message in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize(
    "value, message",
    [([], "key is \\[\\], expected a list"), (3, "key is 3"), ({}, "key is {}"), (["a"], r"key\[0\] is 'a', expected an object")],
)  # fmt: skip
def test_what_is_no_list_of_entries_is_refused(value, message):
    with pytest.raises(ValueError, match=message):
        read_mixture(value, "key")


def test_weights_are_for_all_or_for_none():
    with pytest.raises(ValueError, match="key: b has no weight and others have one"):
        read_mixture([{"dataset": "a", "weight": 1}, {"dataset": "b"}], "key")
    assert [
        e.weight for e in read_mixture([{"dataset": "a", "weight": 1}, {"dataset": "b", "weight": 2}], "key")
    ] == [1, 2]


def test_a_mixture_by_its_name_or_in_a_file(monkeypatch, tmp_path):
    monkeypatch.setattr(mixture, "MIXTURES", {})
    register_mixture("ours", ({"dataset": "a"}, {"dataset": "b"}))
    assert read_mixture("ours", "key") == (MixtureEntry("a"), MixtureEntry("b"))
    with pytest.raises(ValueError, match="there is a mixture 'ours' already"):
        register_mixture("ours", [{"dataset": "c"}])
    with pytest.raises(ValueError, match=r"mixture 'bad'\[0\]: unknown entry"):
        register_mixture("bad", [{"datset": "c"}])
    with pytest.raises(ValueError, match="key: no mixture 'orus'; did you mean 'ours'"):
        read_mixture("orus", "key")
    for name in ("m.yaml", "m.yml"):
        (tmp_path / name).write_text(yaml.safe_dump([FULL]))
        assert read_mixture(str(tmp_path / name), "key") == read_mixture([FULL], "key")
    (tmp_path / "m.yaml").write_text("- {dataset: a, wieght: 1}")
    with pytest.raises(ValueError, match=r"m.yaml\[0\]: unknown entry 'wieght'"):
        read_mixture(str(tmp_path / "m.yaml"), "key")
    for content in (b"a: [", b"\xff\xfe\x00"):
        (tmp_path / "m.yaml").write_bytes(content)
        with pytest.raises(ValueError, match="m.yaml is not YAML: ") as error:
            read_mixture(str(tmp_path / "m.yaml"), "key")
        assert "\n" not in str(error.value)
    with pytest.raises(FileNotFoundError, match="key: .*gone.yaml is missing"):
        read_mixture(str(tmp_path / "gone.yaml"), "key")
