"""A damaged dataset is read right, or refused in one line that names the file; what differs is found by `validate`.

`VLA_BENCH_ALL_DAMAGES=1` tries all cases, otherwise eighty of them, drawn with a seed. `VLA_BENCH_DAMAGE_SEED` draws
other damages of the same kinds.
"""

import hashlib
import json
import os
import random
import shutil
import signal
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from vla_bench.data.edited_dataset import write_edited
from vla_bench.data.episode_plan import open_source, pieces_of
from vla_bench.data.lerobot import LeRobotDataset, validate
from vla_bench.data.validation import write_checksums

LENGTHS = (5, 4, 6)
ALLOWED = (ValueError, OSError)  # what the command line turns into one line
VERSIONS = ("v2.1", "v3.0", "images")
OTHERS = [
    None,
    "false",
    1.5,
    -1,
    True,
    [],
    {},
    "1",
    [None],
    {"a": 1},
    10**12,
    10**400,
    -(10**9),
    1e308,
    float("nan"),
    0,
    "",
    "../x",
]


# Damage without which every other number would be suspected too: only checksums show it.
# What each may change without a word: the letters of an instruction, one pixel, one digit of a measured number.
UNDETECTABLE = {
    "flip": "one bit of a pixel, of a number or of a letter",
    "value": "a measured number that is another finite number",
    "text": "another instruction",
    "swap videos": "a video of the same length with other images",
    "swap images": "other images of the same size",
    "retype": "another instruction or span, all of them well formed",
    "drop key": "a field that has a default, such as the names of spans",
    "rename key": "a field that has a default, such as the names of spans",
    "link": "a file of the same kind in its place",
    "swap tasks": "the instructions of two tasks",
    "swap numbers": "two columns of the same width",
}


def places(value: object, where: tuple = ()) -> list[tuple]:
    """The path to every value in a tree."""
    children = (
        value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    )
    found = [where] if where else []
    for key, child in list(children)[:20]:
        found += places(child, (*where, key))
    return found


def edit_tree(path: Path, rng: random.Random, change) -> None:
    """Changes one value of a JSON file, or of one of its lines: `change(holder, key)`."""
    text = path.read_text(encoding="utf-8")
    lines = (
        [json.loads(line) for line in text.split("\n") if line]
        if path.suffix == ".jsonl"
        else [json.loads(text)]
    )
    tree = rng.choice(lines)
    *above, last = rng.choice(places(tree))
    holder = tree
    for key in above:
        holder = holder[key]
    change(holder, last)
    path.write_text("\n".join(json.dumps(line) for line in lines), encoding="utf-8")


def retype(path, rng):
    edit_tree(path, rng, lambda holder, key: holder.__setitem__(key, rng.choice(OTHERS)))


def drop_key(path, rng):
    edit_tree(path, rng, lambda holder, key: holder.pop(key))


def rename_key(path, rng):
    def change(holder, key):
        if isinstance(holder, dict):
            holder[f"{key}s"] = holder.pop(key)
        else:
            holder.append(holder[key])

    edit_tree(path, rng, change)


def twice_key(path, rng):
    """A key of the top stands twice, with another value."""
    text = path.read_text(encoding="utf-8")
    first = json.loads(text.split("\n")[0] if path.suffix == ".jsonl" else text)
    key = rng.choice(list(first))
    path.write_text(
        text.replace("{", json.dumps({key: rng.choice(OTHERS[:10])})[:-1] + ", ", 1), encoding="utf-8"
    )


def truncate(path, rng):
    content = path.read_bytes()
    path.write_bytes(content[: rng.randrange(len(content))])


def flip(path, rng):
    content = bytearray(path.read_bytes())
    content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
    path.write_bytes(content)


def delete(path, rng):
    path.unlink()


def empty(path, rng):
    path.write_bytes(b"")


def garbage(path, rng):
    path.write_bytes(rng.randbytes(rng.randrange(1, 2000)))


def become_a_folder(path, rng):
    path.unlink()
    path.mkdir()


def pipe(path, rng):
    path.unlink()
    os.mkfifo(path)


def link_out(path, rng):
    """The same file, but outside."""
    outside = root_of(path).parent / f"outside_{path.name}"
    shutil.move(path, outside)
    path.symlink_to(outside)


def link(path, rng):
    """Another file of the same kind."""
    others = sorted(p for p in root_of(path).rglob(f"*{path.suffix}") if p != path)
    if others:
        path.unlink()
        path.symlink_to(rng.choice(others))


def link_nowhere(path, rng):
    path.unlink()
    path.symlink_to(path.name)  # to itself


def lines_of(path, change):
    rows = path.read_text(encoding="utf-8").split("\n")[:-1]
    path.write_text("\n".join(change(rows)) + "\n", encoding="utf-8")


def twice_line(path, rng):
    lines_of(path, lambda rows: [*rows, rng.choice(rows)])


def drop_line(path, rng):
    gone = rng.randrange(2)
    lines_of(path, lambda rows: rows[:gone] + rows[gone + 1 :])


def shuffle_lines(path, rng):
    lines_of(path, lambda rows: rng.sample(rows, len(rows)))


def columns_of(path, change):
    table = pq.read_table(path)
    pq.write_table(change(table), path)


def drop_column(path, rng):
    columns_of(path, lambda t: t.drop_columns([rng.choice(t.column_names)]))


def rename_column(path, rng):
    def change(table):
        name = rng.choice(table.column_names)
        return table.rename_columns([f"{n}s" if n == name else n for n in table.column_names])

    columns_of(path, change)


def twice_column(path, rng):
    def change(table):
        name = rng.choice(table.column_names)
        return table.append_column(name, table[name])

    columns_of(path, change)


def retype_column(path, rng):
    def change(table):
        name = rng.choice(table.column_names)
        values = table[name].to_pylist()
        kind = rng.choice(["text", "null", "float", "nested", "struct", "binary"])
        new = {
            "text": [str(v) for v in values],
            "null": [None] * len(values),
            "float": [float(v) + 0.25 if isinstance(v, (int, float)) else v for v in values],
            "nested": [[v, v] for v in values],
            "struct": [{"x": v} for v in values],
            "binary": [str(v).encode() for v in values],
        }[kind]
        return table.set_column(table.column_names.index(name), name, pa.array(new))

    columns_of(path, change)


def _cell(path, rng, value):
    """One number of one column becomes another."""

    def change(table):
        names = [
            n for n in table.column_names if not n.startswith("stats/") and n != "index" and "tasks" not in n
        ]
        name = rng.choice(names)
        values = table[name].to_pylist()
        row = rng.randrange(len(values))
        old = values[row]
        if isinstance(old, list):
            place = rng.randrange(len(old))
            values[row] = [value(v) if i == place else v for i, v in enumerate(old)]
        elif isinstance(old, (int, float)):
            values[row] = value(old)
        return table.set_column(table.column_names.index(name), name, pa.array(values))

    columns_of(path, change)


def none(path, rng):
    _cell(path, rng, lambda v: None)


def nan(path, rng):
    _cell(path, rng, lambda v: float(rng.choice(["nan", "inf", "-inf"])) if isinstance(v, float) else None)


def value(path, rng):
    _cell(path, rng, lambda v: type(v)(rng.choice([v + 1, v - 1, -v, 10**6, 10**15, -5])))


def drop_row(path, rng):
    def change(table):
        row = rng.randrange(len(table))
        return pa.concat_tables([table.slice(0, row), table.slice(row + 1)])

    columns_of(path, change)


def twice_row(path, rng):
    def change(table):
        row = rng.randrange(len(table))
        return pa.concat_tables([table.slice(0, row + 1), table.slice(row)])

    columns_of(path, change)


def no_rows(path, rng):
    columns_of(path, lambda t: t.slice(0, 0))


def swap_rows(path, rng):
    def change(table):
        order = list(range(len(table)))
        i, j = rng.sample(order, 2) if len(order) > 1 else (0, 0)
        order[i], order[j] = j, i
        return table.take(order)

    columns_of(path, change)


def turn_rows(path, rng):
    columns_of(path, lambda t: t.take(list(range(len(t)))[::-1]))


def other_file(path, rng):
    """Another file of the same folder in its place."""
    others = sorted(p for p in path.parent.iterdir() if p != path and p.suffix == path.suffix)
    if others:
        shutil.copy(rng.choice(others), path)


def shift(path, rng):
    """An episode begins one frame or more off in its video."""

    def change(table):
        name = rng.choice([n for n in table.column_names if n.endswith("_timestamp")])
        values = table[name].to_pylist()
        row = rng.randrange(len(values))
        values[row] = max(0.0, values[row] + rng.choice([-2, -1, 1, 2, 50]) / 10)
        return table.set_column(table.column_names.index(name), name, pa.array(values))

    columns_of(path, change)


def root_of(path: Path) -> Path:
    return next(p for p in path.parents if p.name == "ds")


ANY = [truncate, flip, delete, empty, garbage, become_a_folder, pipe, link_out, link, link_nowhere]
TREE = [retype, retype, retype, drop_key, rename_key, twice_key]
LINES = [twice_line, drop_line, shuffle_lines]
TABLE = [
    drop_column,
    rename_column,
    twice_column,
    retype_column,
    none,
    nan,
    value,
    drop_row,
    twice_row,
    no_rows,
    swap_rows,
    turn_rows,
    other_file,
]
KINDS = {  # pattern of a file to the damages that it is given, and how often
    "meta/info.json": [(ANY, 2), (TREE, 9)],
    "meta/modality.json": [(ANY, 1), (TREE, 5)],
    "meta/episodes.jsonl": [(ANY, 2), (TREE, 4), (LINES, 3)],
    "meta/tasks.jsonl": [(ANY, 2), (TREE, 4), (LINES, 3)],
    "meta/tasks.parquet": [(ANY, 2), (TABLE, 3)],
    "meta/episodes/*/*.parquet": [(ANY, 2), (TABLE, 8), ([shift], 16)],
    "data/*/*.parquet": [(ANY, 3), (TABLE, 8)],
    "videos/*/*/*.mp4": [(ANY, 4), ([other_file], 4)],
}


def cases() -> list[tuple[str, str, str, int]]:
    """Version, pattern, damage, seed."""
    found = []
    for version in VERSIONS:
        for pattern, damages in KINDS.items():
            if (
                ("jsonl" in pattern) == (version == "v3.0")
                and "meta/" in pattern
                and pattern[5:] not in ("info.json", "modality.json")
            ):
                continue
            if version == "images" and not pattern.startswith(("data", "meta/info")):
                continue
            for functions, times in damages:
                found += [
                    (version, pattern, f.__name__, len(found) + i) for i in range(times) for f in functions
                ]
    return list(dict.fromkeys(found))


ALL = cases()
CHOSEN = ALL if os.environ.get("VLA_BENCH_ALL_DAMAGES") else random.Random(9).sample(ALL, 80)


def fingerprint(root: Path) -> str:
    """A digest of every sample."""
    dataset, found = LeRobotDataset(root, horizon=2), hashlib.sha256()
    for i in range(len(dataset)):
        sample = dataset[i]
        found.update(sample["lang"].encode())
        for key in ("action", "action_is_pad", "state"):
            found.update(sample[key].tobytes())
        for image in sample["image"]:
            found.update(image.tobytes())
    return found.hexdigest()


@pytest.fixture(scope="module")
def sound(make, tmp_path_factory):
    """An undamaged dataset of each version, and the digest of its samples."""
    top = make.TOP
    features = {
        "action": make.vector(3, ["x", "y", "z"]),
        "observation.state": make.vector(3),
        top: make.camera([32, 32, 3]),
    }
    modality = {
        "state": {"s": {"start": 0, "end": 3}},
        "action": {"arm": {"start": 0, "end": 2}, "hand": {"start": 2, "end": 3}},
    }
    modality["video"] = {"top": {"original_key": top}}
    extra = {"action": make.counting(3), "observation.state": make.counting(3)}
    shared = {"lengths": LENGTHS, "fps": 10, "tasks": ("do it", "undo it")}
    totals = {"total_episodes": 3, "total_frames": 15, "total_tasks": 2}
    found = {}
    for version in VERSIONS:
        root = tmp_path_factory.mktemp("sound") / "ds"
        if version == "v2.1":
            make.v21(root, features=features, extra=extra, modality=modality, info=totals, **shared)
        elif version == "v3.0":
            make.v30(root, features=features, extra=extra, info=totals, **shared)
            (root / "meta/modality.json").write_text(json.dumps(modality))
        else:
            stored = {**features, top: make.camera([32, 32, 3], dtype="image")}
            images = {**extra, top: lambda i: make.png(make.level(i, 32, 32))}
            make.v21(root, features=stored, extra=images, info=totals, **shared)
        assert validate(root) == []
        found[version] = root, fingerprint(root)
    return found


def stop(*_):
    raise TimeoutError("hangs")


def damaged(sound, tmp_path, case, checksums: bool) -> Path:
    version, pattern, name, seed = case
    root = tmp_path / "ds"
    shutil.copytree(sound[version][0], root)
    if checksums:
        write_checksums(root)
    rng = random.Random(seed + 10_000 * int(os.environ.get("VLA_BENCH_DAMAGE_SEED", "0")))
    globals()[name](rng.choice(sorted(root.glob(pattern))), rng)
    return root


def test_there_are_at_least_nine_hundred_cases():
    assert len(ALL) >= 900


@pytest.mark.parametrize("case", CHOSEN, ids=lambda c: "-".join(map(str, c)))
def test_a_damaged_dataset_is_read_right_or_named(sound, tmp_path, case):
    root = damaged(sound, tmp_path, case, checksums=False)
    signal.signal(signal.SIGALRM, stop)
    signal.alarm(30)
    try:
        try:
            found, error = fingerprint(root), ""
        except ALLOWED as refused:
            found, error = "refused", str(refused)
        lines = validate(root) or validate(root, every_frame=True)
    finally:
        signal.alarm(0)
    if error:
        assert str(root) in error and "\n" not in error and len(error) < 2500, error
        assert lines, f"refused, and validate finds nothing: {error}"
    assert all("\n" not in line and str(root) in line for line in lines), lines
    if found not in ("refused", sound[case[0]][1]) and not lines:
        assert case[2].replace("_", " ") in UNDETECTABLE, "other samples, and validate finds nothing"


@pytest.mark.parametrize("case", CHOSEN[::3], ids=lambda c: "-".join(map(str, c)))
def test_with_checksums_every_damage_is_found(sound, tmp_path, case):
    root = damaged(sound, tmp_path, case, checksums=True)
    before, after = (
        {p.relative_to(r): p.read_bytes() for p in sorted(r.rglob("*")) if p.is_file()}
        for r in (sound[case[0]][0], root)
    )
    after.pop(Path("manifest.json"))
    signal.signal(signal.SIGALRM, stop)
    signal.alarm(30)
    try:
        lines = validate(root)
    finally:
        signal.alarm(0)
    assert bool(lines) or before == after


@pytest.mark.parametrize("case", CHOSEN[::2], ids=lambda c: "-".join(map(str, c)))
def test_a_damaged_dataset_is_edited_right_or_named(sound, tmp_path, case):
    """What an edit of it would be is found by `validate` as in the damaged one, or nothing is written."""
    root, target = damaged(sound, tmp_path, case, checksums=False), tmp_path / "new"
    signal.signal(signal.SIGALRM, stop)
    signal.alarm(30)
    try:
        write_edited(pieces_of(open_source(root)), target, "3.0" if case[0] == "v2.1" else "2.1")
        error = ""
    except ALLOWED as refused:
        error = str(refused)
    finally:
        signal.alarm(0)
    assert not error or (str(root) in error and "\n" not in error and not target.exists()), error
    if not error and not validate(root):
        assert validate(target) == []
