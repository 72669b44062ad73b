"""Two policies on the same episodes, live: which pairs are played, when it ends, and what is refused."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from vla_bench.benchmarks.point import COLOURS, POINT_INSTRUCTIONS, PointReach
from vla_bench.data.layout import PolicySpec
from vla_bench.evaluation.compare import (
    compare,
    compare_played,
    compare_runs,
    main,
    pair_order,
    plot_course,
    read_comparison,
    state_of,
    state_text,
    worth,
)
from vla_bench.evaluation.paired import mcnemar
from vla_bench.evaluation.report import load_evaluations
from vla_bench.evaluation.rollout import EvaluationSettings, evaluate
from vla_bench.evaluation.sequential import SequentialPlan, decide
from vla_bench.evaluation.workers import WorkerError

RUN = Path(__file__).parents[1] / "fixtures" / "version_0_1" / "runs" / "llava"
SETTINGS = EvaluationSettings("point", episodes=30, n_action_steps=8, max_steps=16)


class Finder:
    """Finds the square that is named, unless its seed says that it gets lost."""

    def __init__(self, lost, salt=0):
        spec = PointReach().spec
        self.lost, self.salt, self.calls, self.fingerprint = lost, salt, 0, f"finder-{lost}-{salt}"
        self.spec = PolicySpec(spec.action, spec.state, spec.cameras, spec.image_size, 8, spec.control_rate,
                               {"action": "identity"}, "none", "none")  # fmt: skip

    def predict(self, observation, *, seed):
        self.calls += 1
        image = np.array(observation["image"][0]).astype(int)
        wanted = next(c for task, c in COLOURS.items() if POINT_INSTRUCTIONS[task] == observation["lang"])
        way = np.argwhere((image == wanted).all(axis=2)).mean(axis=0) - observation["state"]
        steps = np.clip((way - 2.0 * np.sign(way) * np.arange(8)[:, None]) / 2.0, -1, 1)
        return -steps if np.random.default_rng([seed, self.salt]).random() < self.lost else steps


def run(out, a=0.2, b=0.8, settings=SETTINGS, **how):
    policies = (Finder(a), Finder(b, salt=1))
    return compare(policies, (settings, settings), out, show_progress=False, **how), policies


def test_a_clear_difference_ends_it_early_and_in_favour_of_the_better(tmp_path):
    (state, policies) = run(tmp_path / "ab")
    assert state["decision"] == "a" and state["pairs"] < 40 and state["max_pairs"] == 60
    turned, _ = run(tmp_path / "ba", 0.8, 0.2)
    assert turned["decision"] == "b"


def test_both_play_the_same_scenes(tmp_path):
    run(tmp_path)
    keys = [
        [
            (r["task"], r["episode"], r["seed"])
            for r in map(json.loads, (tmp_path / side / "episodes.jsonl").open())
        ]
        for side in "ab"
    ]
    order = [(e.task, e.episode, e.seed) for e in pair_order(["reach-red", "reach-blue"], SETTINGS)]
    assert keys[0] == keys[1] == order[: len(keys[0])]


def test_each_side_is_what_an_evaluation_of_its_own_gives(tmp_path):
    state, _ = run(tmp_path / "pair", settings=replace(SETTINGS, episodes=3), stop_early=False)
    for side, policy in zip("ab", (Finder(0.2), Finder(0.8, salt=1))):
        alone = evaluate(policy, None, replace(SETTINGS, episodes=3), tmp_path / side, show_progress=False)
        together = load_evaluations(tmp_path / "pair" / side)[side]
        assert alone["successes"] == together["successes"] and alone["fingerprint"] == together["fingerprint"]
        key = lambda record: (record["task"], record["episode"])
        other = load_evaluations(tmp_path / side)[side]["records"]
        assert sorted(together["records"], key=key) == sorted(other, key=key)
    assert state["pairs"] == 6


def test_the_state_is_that_of_the_test_on_its_records(tmp_path):
    state, _ = run(tmp_path)
    logs = [
        {(r["task"], r["episode"]): r for r in map(json.loads, (tmp_path / side / "episodes.jsonl").open())}
        for side in "ab"
    ]
    order = [(e.task, e.episode) for e in pair_order(["reach-red", "reach-blue"], SETTINGS)]
    signs = [int(logs[0][key]["success"]) - int(logs[1][key]["success"]) for key in order if key in logs[0]]
    rounds = [sum(signs[i : i + 2]) for i in range(0, len(signs), 2)]  # of two tasks, with a seed in common
    decision, test = decide(SequentialPlan(60), rounds, 2)
    assert (state["decision"], state["pairs"]) == (decision, test.pairs)
    assert state["counts"]["only_a"] == signs[: test.pairs].count(1)
    assert state["counts"]["only_b"] == signs[: test.pairs].count(-1)
    assert state["difference"] == pytest.approx(state["rate_a"] - state["rate_b"])
    assert state["p_fixed"] == mcnemar(state["counts"]["only_a"], state["counts"]["only_b"])
    assert state["interval"][0] < state["difference"] < state["interval"][1]
    assert state["anytime_interval"][0] < state["interval"][0]


@pytest.mark.parametrize("kept", [(0, 0), (5, 5), (6, 5), (3, 9)], ids=str)
def test_one_that_was_cut_off_goes_on_to_the_same_result(tmp_path, kept):
    whole, _ = run(tmp_path / "whole")
    shutil.copytree(tmp_path / "whole", tmp_path / "cut")
    for side, lines in zip("ab", kept):
        log = tmp_path / "cut" / side / "episodes.jsonl"
        log.write_text(
            "".join(log.read_text().splitlines(keepends=True)[:lines]) + ('{"task": "rea' if lines else "")
        )
    again, policies = run(tmp_path / "cut")
    assert again == whole and json.loads((tmp_path / "cut/comparison.json").read_text()) == whole
    fresh, all_calls = run(tmp_path / "fresh")
    assert fresh == whole and (policies[0].calls < all_calls[0].calls) == (kept[0] > 0)


def test_a_comparison_that_is_decided_plays_nothing_more(tmp_path):
    first, _ = run(tmp_path)
    again, policies = run(tmp_path)
    assert again == first and [policy.calls for policy in policies] == [0, 0]


def test_four_simulators_decide_as_one(tmp_path):
    one, _ = run(tmp_path / "one")
    four, _ = run(tmp_path / "four", settings=replace(SETTINGS, num_envs=2))
    assert one == four


def test_all_pairs_are_played_where_that_is_asked_for_and_the_decision_is_the_same(tmp_path):
    early, _ = run(tmp_path / "early")
    full, _ = run(tmp_path / "full", stop_early=False)
    assert len((tmp_path / "full/a/episodes.jsonl").read_text().splitlines()) == 60
    assert (early["decision"], early["pairs"]) == (full["decision"], full["pairs"])


@pytest.mark.parametrize(
    "change, named",
    [
        ({"n_action_steps": 4}, "protocol.n_action_steps is 8 of A and 4 of B"),
        ({"max_steps": 8}, "protocol.max_steps is 16 of A and 8 of B"),
        ({"first_seed": 7}, "protocol.first_seed is 50000 of A and 7 of B"),
        ({"episodes": 29}, "evaluation.episodes is 30 of A and 29 of B"),
        ({"tasks": ["reach-red"]}, "evaluation.tasks is .* of A and .'reach-red'. of B"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_unlike_protocols_are_refused_before_anything_is_played(tmp_path, change, named):
    policies = (Finder(0.2), Finder(0.8))
    with pytest.raises(ValueError, match=named):
        compare(policies, (SETTINGS, replace(SETTINGS, **change)), tmp_path / "out", show_progress=False)
    assert not (tmp_path / "out").exists() and policies[0].calls == 0


def test_a_key_that_may_differ_is_remembered(tmp_path):
    short = replace(SETTINGS, episodes=2)
    both = (short, replace(short, n_action_steps=4))
    key = ["protocol.n_action_steps"]
    state = compare((Finder(0.2), Finder(0.8)), both, tmp_path, allowed=key, show_progress=False)
    assert state["allowed"] == key == json.loads((tmp_path / "comparison.json").read_text())["allowed"]


@pytest.mark.parametrize(
    "change, named",
    [
        ({"alpha": 0.1}, "plan.alpha is 0.1 now and was 0.05"),
        ({"order_seed": 3}, "order_seed is 3 now and was 0"),
        ({"settings": replace(SETTINGS, episodes=40)}, "episodes is 40 now and was 30"),
        ({"a": 0.3}, "a.fingerprint.policy is 'finder-0.3-0' now and was 'finder-0.2-0'"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_a_plan_that_was_changed_after_a_look_is_no_plan(tmp_path, change, named):
    run(tmp_path)
    with pytest.raises(ValueError, match=f"comparison.json declares another comparison: .*{named}"):
        run(tmp_path, **change)


def test_the_plan_is_on_disk_before_the_first_episode(tmp_path):
    class Broken(Finder):
        def predict(self, observation, *, seed):
            raise RuntimeError("no policy")

    with pytest.raises(RuntimeError, match="no policy"):
        compare((Broken(0.1), Finder(0.1)), (SETTINGS, SETTINGS), tmp_path, show_progress=False)
    found = json.loads((tmp_path / "comparison.json").read_text())
    assert found["plan"]["max_pairs"] == 60 and "decision" not in found


def record(success, **more):
    return {"task": "push", "episode": 0, "success": success, "steps": 1, **more}


def test_a_pair_without_an_outcome_is_for_nobody_but_is_counted(tmp_path):
    hung = record(True, error="it hung")
    assert [
        worth((record(True), hung)),
        worth((hung, record(False))),
        worth((record(True), record(False))),
    ] == [0, 0, 1]
    state = state_of(SequentialPlan(10), [(record(True), record(False)), (hung, record(False))])
    assert (state["pairs"], state["errors"], state["counts"]["only_a"]) == (2, 1, 1)
    assert "1 more without an outcome" in state_text({**state, "max_pairs": 10}, ("x", "y"))
    nothing = state_of(SequentialPlan(10), [(hung, hung)])
    assert "difference" not in nothing and state_text(nothing, ("x", "y")).startswith(
        "no pair has an outcome"
    )


def test_tasks_are_shuffled_within_rounds_by_the_seed_of_the_plan():
    tasks = [f"task {i}" for i in range(20)]
    settings = replace(SETTINGS, tasks=[], episodes=3)
    order = pair_order(tasks, settings)
    assert [spec.episode for spec in order] == [0] * 20 + [1] * 20 + [2] * 20
    rounds = [[spec.task for spec in order[i : i + 20]] for i in (0, 20, 40)]
    assert all(sorted(each) == sorted(tasks) for each in rounds)
    assert rounds[0] != tasks and rounds[0] != rounds[1]
    assert pair_order(tasks, settings, seed=1) != order


def test_two_runs_by_the_program(tmp_path, capsys):
    words = ["evaluation.episodes=6", "evaluation.n_action_steps=2", "evaluation.max_steps=3"]
    main([str(RUN), str(RUN), "--out", str(tmp_path / "out"), *words])
    printed = capsys.readouterr().out
    state = json.loads((tmp_path / "out/comparison.json").read_text())
    assert state["counts"]["only_a"] == state["counts"]["only_b"] == 0 and state["says"] in printed
    assert "llava step_000003" in printed and "at any moment" in printed


def test_two_checkpoints_of_one_run(tmp_path, capsys):
    run = shutil.copytree(RUN, tmp_path / "llava")
    shutil.copytree(run / "checkpoints/step_000003", run / "checkpoints/step_000001")
    words = ["evaluation.episodes=1", "evaluation.n_action_steps=2", "evaluation.max_steps=2"]
    main([str(run), str(run), "--checkpoint_b", "1", *words])
    printed = capsys.readouterr().out
    assert "llava step_000003" in printed and "llava step_000001" in printed
    assert (run / "comparisons/llava_step_000001/comparison.json").is_file()


def test_results_go_to_the_first_run(tmp_path):
    for name in ("one", "two"):
        shutil.copytree(RUN, tmp_path / name)
    words = ["evaluation.episodes=1", "evaluation.n_action_steps=2", "evaluation.max_steps=2"]
    results, state = compare_runs(tmp_path / "one", tmp_path / "two", words, show_progress=False)
    assert results == tmp_path / "one/comparisons/two_step_000003" and (results / "comparison.json").is_file()
    assert (state["a"]["name"], state["b"]["name"]) == ("one step_000003", "two step_000003")


@pytest.fixture
def played(tmp_path):
    """Two finished evaluations of the same protocol."""
    for name, policy in {"good": Finder(0.1), "poor": Finder(0.9)}.items():
        evaluate(
            policy, None, replace(SETTINGS, episodes=6), tmp_path / name / "eval/point", show_progress=False
        )
    return tmp_path


def test_what_was_played_is_compared_without_playing(played, capsys):
    rows = compare_played(played / "good", played / "poor")["point"]
    assert [row["task"] for row in rows] == ["reach-red", "reach-blue", "all"] and rows[-1][
        "difference"
    ] > 0.3
    main([str(played / "good"), str(played / "poor"), "--played"])
    assert f"{100 * rows[-1]['difference']:+.1f} points" in capsys.readouterr().out


def test_unlike_or_unfinished_evaluations_are_not_compared(played):
    evaluate(
        Finder(0.5), None, replace(SETTINGS, max_steps=8), played / "short/eval/point", show_progress=False
    )
    with pytest.raises(ValueError, match="protocol.max_steps is 16 of .* and 8 of"):
        compare_played(played / "good", played / "short")
    (played / "poor/eval/point/summary.json").unlink()
    with pytest.raises(ValueError, match="of .*poor is not finished"):
        compare_played(played / "good", played / "poor")


def test_evaluations_of_other_benchmarks_have_nothing_in_common(played):
    for name in ("good", "poor"):
        shutil.copytree(played / name / "eval/point", played / name / f"eval/only_{name}")
    assert list(compare_played(played / "good", played / "poor")) == ["point"]
    for name in ("good", "poor"):
        shutil.rmtree(played / name / "eval/point")
        shutil.copytree(played / name / f"eval/only_{name}", played / name / f"eval/also_{name}")
    with pytest.raises(ValueError, match="no episode in common"):
        compare_played(played / "good", played / "poor")


def test_a_simulator_that_never_works_ends_it(tmp_path, monkeypatch):
    def broken(self, task, seed):
        raise ImportError("no simulator here")

    monkeypatch.setattr(PointReach, "make", broken)
    with pytest.raises(WorkerError, match="no simulator here"):
        run(tmp_path)


def test_a_comparison_is_read_back_from_its_files(tmp_path):
    state, _ = run(tmp_path)
    again, pairs = read_comparison(tmp_path)
    assert again == state and len(pairs) == state["pairs"]
    assert [(a["task"], a["episode"]) for a, _ in pairs] == [(b["task"], b["episode"]) for _, b in pairs]
    assert sum(map(worth, pairs)) == state["counts"]["only_a"] - state["counts"]["only_b"]


def test_one_that_has_not_ended_is_not_read_as_if_it_had(tmp_path):
    run(tmp_path)
    path = tmp_path / "comparison.json"
    content = json.loads(path.read_text())
    path.write_text(json.dumps({key: content[key] for key in content if key != "pairs"}))
    with pytest.raises(ValueError, match="has not ended; compare again"):
        read_comparison(tmp_path)


def test_the_picture_of_a_course_ends_at_the_bound(tmp_path):
    run(tmp_path)
    ax = plot_course(*read_comparison(tmp_path))
    lead, above, below = (line.get_ydata() for line in ax.lines[:3])
    assert lead[-1] >= above[-1] == -below[-1] > 0 and len(lead) == len(above)
    assert ax.get_title() == "A is better"


def test_the_notebook_of_a_comparison_runs_on_its_own(server):
    done = server({"notebook": str(Path(__file__).parents[2] / "experiments/compare.ipynb")})
    assert done["returncode"] == 0, done["output"][-4000:]
