"""Shards: parts of an evaluation that are put together as if one process had played them."""

import json
import shutil

import pytest

from vla_bench.evaluation.merge import merge_shards
from vla_bench.evaluation.shards import Shard


@pytest.fixture
def play(run_evaluation, tmp_path):
    def play(count, **settings):
        out = tmp_path / f"in_{count}"
        for index in range(count, 0, -1):  # the order of the machines does not matter
            run_evaluation(out, shard=Shard(index, count), **settings)
        return out

    return play


@pytest.mark.parametrize("count", [1, 2, 3, 5])
def test_any_number_of_shards_gives_the_files_of_one_process(count, play, run_evaluation, files, tmp_path):
    whole = run_evaluation(tmp_path / "whole", videos_per_task=2)
    out = play(count, videos_per_task=2, num_envs=1 + count % 2)
    assert merge_shards(out) == whole
    shutil.rmtree(out / "shards")
    assert files(out) == files(tmp_path / "whole")


def test_more_shards_than_episodes_are_refused_before_the_first(play, tmp_path):
    with pytest.raises(ValueError, match="shard 7/7: the evaluation has 2 episodes"):
        play(7, episodes=1)
    assert not (tmp_path / "in_7").exists()


def test_a_shard_that_stopped_is_named_and_can_go_on(play, tmp_path, run_evaluation):
    out = play(3)
    log = out / "shards" / "2_of_3" / "episodes.jsonl"
    lines = log.read_text().splitlines(keepends=True)
    log.write_text("".join(lines[:-2]))
    with pytest.raises(ValueError, match="2 of shard 2/3 are missing, .*run evaluate --shard 2/3 again"):
        merge_shards(out)
    assert not (out / "summary.json").exists() and not (out / "episodes.jsonl").exists()
    run_evaluation(out, shard=Shard(2, 3))
    assert merge_shards(out)["episodes"] == 12


def test_more_episodes_are_dealt_anew_and_none_counts_twice(play, run_evaluation, files, tmp_path):
    play(2, episodes=4)
    out = play(2, episodes=7)
    run_evaluation(tmp_path / "whole", episodes=7)
    merge_shards(out)
    shutil.rmtree(out / "shards")
    assert files(out) == files(tmp_path / "whole")


def test_an_error_in_one_shard_gives_way_to_the_outcome_in_another(play):
    out = play(2)
    first, second = (out / "shards" / f"{index}_of_2" / "episodes.jsonl" for index in (1, 2))
    record = json.loads(first.read_text().splitlines()[0])
    failed = {**record, "success": False, "error": "was killed by signal 9"}
    before = merge_shards(out)
    shutil.rmtree(out / "videos", ignore_errors=True)
    for name in ("episodes.jsonl", "summary.json", "fingerprint.json"):
        (out / name).unlink()
    with second.open("a") as file:
        file.write(json.dumps(failed) + "\n")
    assert merge_shards(out) == before


def test_shards_of_another_policy_are_not_mixed_in(play, run_evaluation, state_policy):
    from vla_bench.benchmarks.point import PointReach

    out = play(2)
    shutil.rmtree(out / "shards" / "2_of_2")
    other = state_policy(PointReach())
    other.fingerprint = "another"
    run_evaluation(out, shard=Shard(2, 2), policy=other)
    with pytest.raises(ValueError, match="policy is 'another' now and was 'state-policy'"):
        merge_shards(out)


def test_a_merged_evaluation_is_not_overwritten_by_other_outcomes(play):
    out = play(2)
    merge_shards(out)
    log = out / "episodes.jsonl"
    lines = log.read_text().splitlines()
    changed = json.loads(lines[0])
    changed["success"] = not changed["success"]
    log.write_text("\n".join([json.dumps(changed), *lines[1:]]) + "\n")
    before = log.read_bytes()
    with pytest.raises(ValueError, match="has another outcome in"):
        merge_shards(out)
    assert log.read_bytes() == before


def test_the_rates_of_a_part_are_nobodys_to_find(play):
    assert not list(play(2).rglob("summary.json"))
