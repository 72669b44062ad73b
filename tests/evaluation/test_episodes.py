"""One evaluation, action by action: what the simulator was told, what the policy was shown, and what is kept of it."""

import hashlib
import json
import signal
import subprocess
import sys
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

from vla_bench.benchmarks.benchmark import Benchmark, BenchmarkSpec, Environment, Step
from vla_bench.data.layout import Layout, PolicySpec
from vla_bench.evaluation import rollout as rollout_module
from vla_bench.evaluation.rollout import (
    EvaluationSettings,
    Recording,
    evaluate,
    prediction_seed,
    read_episodes,
    run_episode,
)
from vla_bench.evaluation.workers import LocalWorker

HORIZON, LIMIT, FIRST_SEED = 4, 8, 7
# at which step an episode succeeds: inside the second chunk of three, never, at once, and with the last step allowed
SUCCESS = {("zeta", 7): 5, ("zeta", 8): None, ("alpha", 7): 1, ("alpha", 8): LIMIT}
TASKS = ("zeta", "alpha")  # not in the order of the alphabet
ACTION = Layout(("call", "step", "seen"), "delta", "base", rotation="euler_xyz", gripper="positive_opens")
STATE = Layout(("seed", "steps"), "absolute", "world")


def image_at(camera, seed, steps):
    """Every pixel is another one: by camera, scene, step, row, column and colour."""
    ramp = np.arange(4 * 6 * 3).reshape(4, 6, 3)
    return (100 * camera + 10 * (seed - FIRST_SEED) + steps + 1 + ramp).astype(np.uint8)


@pytest.fixture(autouse=True)
def patience():
    """An evaluation that does not end fails after half a minute; each here takes less than a second."""

    def late(*_):
        raise TimeoutError("this evaluation does not end")

    before = signal.signal(signal.SIGALRM, late)
    signal.alarm(30)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


class TapeEpisode(Environment):
    def __init__(self, tape, task, seed):
        self.tape, self.task, self.seed, self.steps = tape, task, seed, 0
        tape.done.append(("make", task, seed))

    def seen(self):
        images = [Image.fromarray(image_at(camera, self.seed, self.steps)) for camera in range(2)]
        return {
            "image": images,
            "lang": f"do {self.task}",
            "state": np.array([self.seed, self.steps], np.float64),
        }

    def reset(self):
        self.tape.done.append(("reset",))
        return self.seen()

    def step(self, action, *, observe=True):
        self.steps += 1
        self.tape.done.append(("step", *action))
        success = self.steps == SUCCESS.get((self.task, self.seed))
        return Step(self.seen() if observe else None, success, success or self.steps >= self.tape.max_steps)

    def close(self):
        self.tape.done.append(("close",))


class Tape(Benchmark):
    """Succeeds after a known number of steps, shows in every pixel where it stands, and keeps what was done to it."""

    def __init__(self, max_steps=LIMIT):
        self.max_steps, self.done = max_steps, []

    @property
    def spec(self):
        version = {"tape": "1"}
        return BenchmarkSpec(
            "tape", ("left", "right"), (4, 6), ACTION, STATE, 12.5, self.max_steps, "as told", version
        )

    def tasks(self):
        return list(TASKS)

    def instruction(self, task):
        return f"do {task}"

    def make(self, task, seed):
        return TapeEpisode(self, task, seed)

    def steps(self):
        """The actions of each episode, in the order in which they were executed."""
        episodes = []
        for what, *values in self.done:
            if what == "make":
                episodes.append([])
            elif what == "step":
                episodes[-1].append(tuple(values))
        return episodes


class Counting:
    """Action t of its k-th prediction is (k, t, the steps that it was shown)."""

    fingerprint = "counting"

    def __init__(self, spec):
        self.shown, self.seeds = [], []
        self.spec = PolicySpec(spec.action, spec.state, spec.cameras, spec.image_size, HORIZON, spec.control_rate,
                               {"action": "identity"}, "none", "none", spec.name)  # fmt: skip

    def predict(self, observation, *, seed):
        call = len(self.shown)
        self.shown.append(observation)
        self.seeds.append(seed)
        return np.array([[call, step, observation["state"][1]] for step in range(HORIZON)])

    def attention(self, observation):
        call = len(self.shown) - 1
        return SimpleNamespace(
            images=[np.full((2, 3), 10 * call + camera) for camera in range(2)],
            words=[("do", call), ("it", 0.5)],
        )


SETTINGS = EvaluationSettings(benchmark="tape", episodes=2, first_seed=FIRST_SEED, n_action_steps=3)


class Run:
    """An evaluation with a new policy and a new simulator, into a folder."""

    def __init__(self, out, benchmark=None, **changes):
        self.out, self.benchmark = out, benchmark or Tape()
        self.policy, self.kept = Counting(self.benchmark.spec), []
        self.summary = evaluate(
            self.policy,
            self.benchmark,
            replace(SETTINGS, **changes),
            out,
            on_recording=lambda recording, path: self.kept.append((recording, path)),
            show_progress=False,
        )
        self.records = read_episodes(out / "episodes.jsonl")

    def column(self, *names):
        return [tuple(record[name] for name in names) for record in self.records]

    def made(self):
        return [(task, seed) for what, task, seed in (d for d in self.benchmark.done if d[0] == "make")]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return Run(tmp_path_factory.mktemp("tape"), videos_per_task=1, attention=True)


def test_the_actions_executed_are_those_predicted_in_this_order_and_no_others(run):
    """An episode that ends inside a chunk takes nothing of it into the next."""
    assert run.benchmark.steps() == [
        [(0, 0, 0), (0, 1, 0), (0, 2, 0), (1, 0, 3), (1, 1, 3)],
        [(2, 0, 0), (2, 1, 0), (2, 2, 0), (3, 0, 3), (3, 1, 3), (3, 2, 3), (4, 0, 6), (4, 1, 6)],
        [(5, 0, 0)],
        [(6, 0, 0), (6, 1, 0), (6, 2, 0), (7, 0, 3), (7, 1, 3), (7, 2, 3), (8, 0, 6), (8, 1, 6)],
    ]


def test_each_prediction_is_shown_the_scene_as_it_is_now(run):
    now = [(7, 0), (7, 3), (8, 0), (8, 3), (8, 6), (7, 0), (8, 0), (8, 3), (8, 6)]
    assert [tuple(seen["state"]) for seen in run.policy.shown] == now
    for seen, (seed, steps) in zip(run.policy.shown, now, strict=True):
        for camera, image in enumerate(seen["image"]):
            np.testing.assert_array_equal(np.asarray(image), image_at(camera, seed, steps))


def test_each_prediction_is_told_the_task_of_its_episode(run):
    assert [seen["lang"] for seen in run.policy.shown] == ["do zeta"] * 5 + ["do alpha"] * 4


def test_scenes_and_predictions_have_these_seeds(run):
    assert run.made() == [("zeta", 7), ("zeta", 8), ("alpha", 7), ("alpha", 8)]
    per_episode = [(7, 0), (7, 1), (8, 0), (8, 1), (8, 2), (7, 0), (8, 0), (8, 1), (8, 2)]
    assert run.policy.seeds == [prediction_seed(*pair) for pair in per_episode]


@pytest.mark.parametrize("pair, seed", [((0, 0), 2968811710), ((7, 1), 369571992), ((50009, 83), 2138793744)])
def test_a_prediction_has_this_seed_and_no_other(pair, seed):
    assert prediction_seed(*pair) == seed


def test_an_episode_is_reset_once_and_closed_before_the_next(run):
    events = [what for what, *_ in run.benchmark.done if what != "step"]
    assert events == ["make", "reset", "close"] * 4


def test_the_log_says_what_happened(run):
    names = ("task", "episode", "seed", "success", "steps", "predictions")
    assert run.column(*names) == [
        ("zeta", 0, 7, True, 5, 2),
        ("zeta", 1, 8, False, 8, 3),
        ("alpha", 0, 7, True, 1, 1),
        ("alpha", 1, 8, True, 8, 3),
    ]


def test_the_log_holds_a_hash_of_the_actions_executed(run):
    bytes_of = [np.array(actions, "<f8").tobytes() for actions in run.benchmark.steps()]
    assert run.column("actions") == [(hashlib.sha256(each).hexdigest()[:16],) for each in bytes_of]


def test_the_summary_counts_them(run):
    whole, zeta, alpha = run.summary, *(run.summary["per_task"][task] for task in TASKS)
    assert [(s["successes"], s["episodes"], s["success_rate"]) for s in (whole, zeta, alpha)] == [
        (3, 4, 0.75),
        (1, 2, 0.5),
        (2, 2, 1.0),
    ]
    assert (whole["mean_steps"], zeta["mean_steps"], alpha["mean_steps"]) == (14 / 3, 5.0, 4.5)
    assert json.loads((run.out / "summary.json").read_text()) == whole


def test_the_first_episodes_of_each_task_are_recorded(run):
    assert [path.relative_to(run.out).as_posix() for _, path in run.kept] == [
        "videos/zeta_0.npz",
        "videos/alpha_0.npz",
    ]
    assert sorted(path.name for path in (run.out / "videos").iterdir()) == ["alpha_0.npz", "zeta_0.npz"]


@pytest.fixture(params=["handed over", "read back"])
def recorded(run, request):
    """The recording of the first episode."""
    recording, path = run.kept[0]
    return recording if request.param == "handed over" else Recording.load(path)


def test_a_recording_holds_every_frame_of_every_camera(recorded):
    frames = np.array([[image_at(camera, 7, steps) for camera in range(2)] for steps in range(6)])
    np.testing.assert_array_equal(recorded.frames, frames)
    assert recorded.frames.dtype == np.uint8 and recorded.cameras == ["left", "right"]


def test_a_recording_holds_the_states_and_actions_between(run, recorded):
    np.testing.assert_array_equal(recorded.states, [(7, steps) for steps in range(6)])
    np.testing.assert_array_equal(recorded.actions, run.benchmark.steps()[0])


def test_a_recording_says_which_episode_it_is(recorded):
    found = (recorded.task, recorded.lang, recorded.episode, recorded.seed, recorded.success)
    assert found == ("zeta", "do zeta", 0, 7, True)


def test_a_frame_has_the_attention_that_was_in_force(recorded):
    calls = [0, 0, 0, 1, 1, 1]
    np.testing.assert_array_equal(
        recorded.attention, [[np.full((2, 3), 10 * k + c) for c in range(2)] for k in calls]
    )
    np.testing.assert_array_equal(recorded.word_attention, [[k, 0.5] for k in calls])
    assert recorded.words == ["do", "it"]


def test_a_recording_that_hides_a_pickle_is_not_read(run, tmp_path):
    recording, _ = run.kept[0]
    np.savez(tmp_path / "odd.npz", **{**vars(recording), "words": np.array([{"a": 1}], object)})
    with pytest.raises(ValueError, match="allow_pickle=False"):
        Recording.load(tmp_path / "odd.npz")


def test_without_attention_a_recording_has_none(tmp_path):
    recording, _ = Run(tmp_path, videos_per_task=1).kept[0]
    assert recording.attention.size == recording.word_attention.size == 0 and recording.words == []
    assert len(recording.frames) == 6


def test_without_recording_nothing_is_rendered_that_nobody_sees(tmp_path):
    """Frames are asked for before a prediction only."""
    looked = []

    class Watched(Tape):
        def make(self, task, seed):
            episode = super().make(task, seed)
            step = episode.step
            episode.step = lambda action, *, observe=True: (
                looked.append(observe) or step(action, observe=observe)
            )
            return episode

    assert Run(tmp_path, Watched()).benchmark.steps()[0][-1] == (1, 1, 3)
    assert looked[:8] == [False, False, True, False, False, False, False, True]


@pytest.mark.parametrize(
    "changes, steps, predictions",
    [
        ({"n_action_steps": 1}, 8, 8),
        ({"n_action_steps": 4}, 8, 2),
        ({"max_steps": 4}, 4, 2),
        ({"max_steps": 1}, 1, 1),
        ({"n_action_steps": 4, "max_steps": 7}, 7, 2),
    ],
)
def test_the_protocol_decides_how_long_and_how_often(changes, steps, predictions, tmp_path):
    run = Run(tmp_path, **changes)
    assert run.column("steps", "predictions")[1] == (steps, predictions)
    assert len(run.benchmark.steps()[1]) == steps


def test_a_limit_of_its_own_cuts_a_late_success_off(tmp_path):
    assert Run(tmp_path, max_steps=7).column("success") == [(True,), (False,), (True,), (False,)]


def test_the_settings_decide_tasks_scenes_and_count(tmp_path):
    run = Run(tmp_path, tasks=["alpha"], episodes=3, first_seed=6)
    assert run.made() == [("alpha", 6), ("alpha", 7), ("alpha", 8)]
    assert run.column("task", "episode", "seed") == [("alpha", 0, 6), ("alpha", 1, 7), ("alpha", 2, 8)]


def test_tasks_are_run_and_kept_in_the_order_of_the_settings(tmp_path):
    run = Run(tmp_path, tasks=["alpha", "zeta"], episodes=1)
    assert run.made() == [("alpha", 7), ("zeta", 7)] and run.column("task") == [("alpha",), ("zeta",)]


def test_a_smaller_plan_in_the_same_folder_counts_its_own_episodes_only(tmp_path):
    whole = Run(tmp_path)
    part = Run(tmp_path, tasks=["alpha"], episodes=1)
    assert part.made() == [] and (part.summary["episodes"], part.summary["successes"]) == (1, 1)
    assert list(part.summary["per_task"]) == ["alpha"]
    assert sorted(part.column("task", "episode")) == sorted(whole.column("task", "episode"))
    assert part.column("task", "episode")[0] == ("alpha", 0)  # what was asked for stands first


def test_a_larger_plan_in_the_same_folder_runs_what_is_missing(tmp_path):
    Run(tmp_path, tasks=["alpha"], episodes=1)
    more = Run(tmp_path, episodes=2)
    assert more.made() == [("zeta", 7), ("zeta", 8), ("alpha", 8)] and more.summary["episodes"] == 4
    assert more.column("task", "episode") == [("zeta", 0), ("zeta", 1), ("alpha", 0), ("alpha", 1)]
    assert more.summary == Run(tmp_path / "at once").summary


def test_an_episode_whose_recording_is_missing_is_run_again(tmp_path):
    first = Run(tmp_path)
    again = Run(tmp_path, videos_per_task=1)
    assert again.made() == [("zeta", 7), ("alpha", 7)] and len(again.kept) == 2
    assert again.column("task", "episode", "steps") == first.column("task", "episode", "steps")


def test_one_episode_alone_has_the_same_outcome(run):
    """`run_episode` is what a notebook calls: the line of the log, and every frame."""
    tape = Tape()
    settings = replace(SETTINGS, attention=True)
    record, recording = run_episode(Counting(tape.spec), tape, "zeta", 7, settings)
    assert record == run.records[0]
    kept = run.kept[0][0]
    assert all(np.array_equal(vars(recording)[name], value) for name, value in vars(kept).items())
    assert tape.done[-1] == ("close",)


def test_one_episode_alone_may_be_shorter_and_unrecorded():
    tape = Tape()
    record, recording = run_episode(
        Counting(tape.spec), tape, "zeta", 7, replace(SETTINGS, max_steps=4), record=False
    )
    assert (record["steps"], record["success"], recording) == (4, False, None)


# --- the bookkeeping of an evaluation ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "num_envs, episodes, opened",
    [(1, 2, 1), (3, 2, 3), (9, 2, 4), (4, 1, 2)],  # two tasks
)
def test_no_more_simulators_are_opened_than_there_are_episodes(
    num_envs, episodes, opened, tmp_path, monkeypatch
):
    asked = []

    def workers(benchmark, count, seconds):
        asked.append((count, seconds))
        return [LocalWorker(benchmark)]

    monkeypatch.setattr(rollout_module, "open_workers", workers)
    Run(tmp_path, num_envs=num_envs, episodes=episodes, step_timeout_s=7.0)
    Run(tmp_path, num_envs=num_envs, episodes=episodes, step_timeout_s=7.0)  # nothing is left to do
    assert asked == [(opened, 7.0), (1, 7.0)]


def test_progress_tells_episodes_and_successes_also_of_a_continued_evaluation(tmp_path, capsys):
    """The bar begins where the evaluation was left, and counts the successes of its own episodes."""
    Run(tmp_path, tasks=["alpha"])
    capsys.readouterr()
    tape = Tape()
    evaluate(Counting(tape.spec), tape, SETTINGS, tmp_path)
    last = capsys.readouterr().err.replace("\r", "\n").rstrip().splitlines()[-1]
    assert "4/4" in last and "1 successes" in last and "episode" in last


def test_without_progress_nothing_is_shown(tmp_path, capsys):
    Run(tmp_path)
    assert capsys.readouterr() == ("", "")


class Tired(Counting):
    """Fails in its n-th prediction."""

    limit = 2

    def predict(self, observation, *, seed):
        if len(self.shown) == self.limit:
            raise RuntimeError("tired")
        return super().predict(observation, seed=seed)


def test_an_interrupted_evaluation_says_how_far_it_came(tmp_path):
    tape = Tape()
    policy = Counting(tape.spec)

    def predict(observation, *, seed, predict=policy.predict):
        if len(policy.shown) == 6:
            raise KeyboardInterrupt
        return predict(observation, seed=seed)

    policy.predict = predict
    with pytest.raises(
        KeyboardInterrupt, match="^interrupted: 3 of 4 episodes are finished and kept; run it again"
    ):
        evaluate(policy, tape, SETTINGS, tmp_path, show_progress=False)
    assert tape.done[-1] == ("close",) and len(read_episodes(tmp_path / "episodes.jsonl")) == 3


def test_a_simulator_is_closed_when_the_policy_fails(tmp_path):
    for call in (
        lambda policy, tape: run_episode(policy, tape, "zeta", 8, SETTINGS),
        lambda policy, tape: evaluate(policy, tape, SETTINGS, tmp_path, show_progress=False),
    ):
        tape = Tape()
        with pytest.raises(RuntimeError, match="tired"):
            call(Tired(tape.spec), tape)
        assert tape.done[-1] == ("close",)
        assert [what for what, *_ in tape.done].count("make") == [what for what, *_ in tape.done].count(
            "close"
        )


def with_errors(out, *places):
    """An evaluation whose log says that some episodes ended in an error."""
    run = Run(out)
    lines = [json.loads(line) for line in (out / "episodes.jsonl").read_text().splitlines()]
    for place in places:
        lines[place] |= {"error": "the simulator hung", "success": False}
    (out / "episodes.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return run


def test_errors_are_out_of_the_file_before_their_episodes_are_tried_anew(tmp_path):
    """So that an evaluation that is interrupted again leaves no episode twice."""
    whole = with_errors(tmp_path, 0, 2)
    tape = Tape()
    policy = Tired(tape.spec)
    policy.limit = 0
    with pytest.raises(RuntimeError, match="tired"):
        evaluate(policy, tape, SETTINGS, tmp_path, show_progress=False)
    left = read_episodes(tmp_path / "episodes.jsonl")
    assert left == [whole.records[1], whole.records[3]]
    again = Run(tmp_path)
    assert again.made() == [("zeta", 7), ("alpha", 7)] and len(again.records) == 4
    assert not any("error" in record for record in again.records) and again.summary == whole.summary


def test_an_error_that_is_not_asked_for_stays_as_it_is(tmp_path):
    with_errors(tmp_path, 0, 3)
    part = Run(tmp_path, tasks=["alpha"], episodes=1)
    assert part.made() == [] and sorted(part.column("task", "episode")) == [
        ("alpha", 0), ("alpha", 1), ("zeta", 0), ("zeta", 1)
    ]  # fmt: skip
    assert sum("error" in record for record in part.records) == 2


@pytest.mark.parametrize("deep", ["a", "a/b/c"])
def test_the_folder_of_the_results_is_made(tmp_path, deep):
    run = Run(tmp_path / deep, videos_per_task=1)
    assert {path.name for path in run.out.iterdir()} >= {
        "episodes.jsonl", "summary.json", "fingerprint.json", "videos"
    }  # fmt: skip
    assert json.loads((run.out / "fingerprint.json").read_text()) == run.summary["fingerprint"]


def test_the_folder_of_the_results_is_held_while_it_is_written(tmp_path):
    """Another process that evaluates into it is refused; afterwards it may."""
    tape = Tape()
    policy = Counting(tape.spec)
    ask = "import sys; from vla_bench.files import check_not_in_use; check_not_in_use(sys.argv[1])"
    ended = []

    def predict(observation, *, seed, predict=policy.predict):
        if not ended:
            ended.append(
                subprocess.run(
                    [sys.executable, "-c", ask, str(tmp_path / "out")], capture_output=True, text=True
                )
            )
        return predict(observation, seed=seed)

    policy.predict = predict
    evaluate(policy, tape, SETTINGS, tmp_path / "out", show_progress=False)
    assert ended[0].returncode == 1 and "FolderInUseError" in ended[0].stderr
    assert subprocess.run([sys.executable, "-c", ask, str(tmp_path / "out")]).returncode == 0


def test_episodes_without_a_fingerprint_are_not_continued(tmp_path):
    Run(tmp_path)
    (tmp_path / "fingerprint.json").unlink()
    with pytest.raises(ValueError, match="episodes.jsonl has no fingerprint.json beside it"):
        Run(tmp_path)


def test_an_episode_that_stands_twice_is_named_with_both_lines(tmp_path):
    Run(tmp_path)
    path = tmp_path / "episodes.jsonl"
    lines = path.read_text().splitlines(keepends=True)
    path.write_text("".join([*lines, lines[1]]))
    with pytest.raises(ValueError, match="line 5: episode 1 of 'zeta' stands in line 2 already"):
        read_episodes(path)
    with pytest.raises(ValueError, match="line 5"):
        Run(tmp_path)


@pytest.mark.parametrize("mend", [False, True])
def test_half_a_line_is_cut_off_the_file_by_those_only_who_go_on_with_it(tmp_path, mend):
    Run(tmp_path)
    path = tmp_path / "episodes.jsonl"
    whole = path.read_bytes()
    path.write_bytes(whole + b'{"task": "ze')
    if mend:
        assert len(read_episodes(path, mend=True)) == 4 and path.read_bytes() == whole
    else:
        assert len(read_episodes(path)) == 4 and path.read_bytes() == whole + b'{"task": "ze'


def test_one_episode_alone_is_of_the_default_settings_and_fits_them():
    tape = Tape()
    with pytest.raises(ValueError, match="n_action_steps is 6, but the policy's horizon is 4"):
        run_episode(Counting(tape.spec), tape, "zeta", 7)
    with pytest.raises(ValueError, match="max_steps is 9, but tape was built with max_steps=8"):
        run_episode(Counting(tape.spec), tape, "zeta", 7, replace(SETTINGS, max_steps=9))
    assert tape.done == []
    policy = Counting(tape.spec)
    policy.spec = replace(policy.spec, horizon=6)
    policy.predict = lambda observation, *, seed: np.zeros((6, 3))
    record, recording = run_episode(policy, tape, "zeta", 8)
    assert (record["episode"], record["steps"], record["predictions"]) == (0, 8, 2) and len(
        recording.frames
    ) == 9


@pytest.mark.parametrize("count", [1, 2, 3, 5])
def test_any_number_of_simulators_gives_the_same_log(count, tmp_path, run, monkeypatch):
    """Whichever answers first: here always the last one."""
    monkeypatch.setattr(
        rollout_module,
        "open_workers",
        lambda benchmark, _, seconds: [LocalWorker(benchmark) for _ in range(count)],
    )
    monkeypatch.setattr(rollout_module, "ready", lambda workers: workers[-1:])
    other = Run(tmp_path, num_envs=count, videos_per_task=1)
    assert [dict(each, actions="") for each in other.records] == [
        dict(each, actions="") for each in run.records
    ]
    assert other.summary == run.summary and sorted(path.name for _, path in other.kept) == [
        "alpha_0.npz",
        "zeta_0.npz",
    ]
