"""Identical episodes with only the instruction changed: what is changed, what is not, and what is told from noise."""

import json

import numpy as np
import pytest

from vla_bench.benchmarks.point import COLOURS, POINT_INSTRUCTIONS, PointReach
from vla_bench.data.layout import PolicySpec
from vla_bench.evaluation.paired import mcnemar
from vla_bench.evaluation.prompts import (
    ToldOtherwise,
    prompt_arms,
    prompt_robustness,
    repunctuated,
    robustness_rows,
    robustness_text,
)
from vla_bench.evaluation.rollout import EvaluationSettings, evaluate

RED, BLUE = POINT_INSTRUCTIONS.values()
SETTINGS = EvaluationSettings("point", episodes=4, n_action_steps=8, max_steps=16)


class Goer:
    """Goes to the square that it takes from the instruction, and remembers what it was given."""

    def __init__(self, listens, noise=0.0):
        spec = PointReach().spec
        self.listens, self.noise, self.given, self.fingerprint = listens, noise, [], "goer"
        self.spec = PolicySpec(spec.action, spec.state, spec.cameras, spec.image_size, 8, spec.control_rate,
                               {"action": "identity"}, "none", "none")  # fmt: skip

    def predict(self, observation, *, seed):
        self.given.append((observation["lang"], seed, observation["state"].tobytes()))
        image = np.array(observation["image"][0]).astype(int)
        seen = np.argwhere((image == COLOURS.get(self.listens(observation["lang"]), -1)).all(axis=2))
        if not len(seen):
            return np.zeros((8, 2))
        way = seen.mean(axis=0) - observation["state"]
        steps = np.clip((way - 2.0 * np.sign(way) * np.arange(8)[:, None]) / 2.0, -1, 1)
        return -steps if np.random.default_rng(seed).random() < self.noise else steps


def by_word(lang):
    return next((task for task in COLOURS if task.removeprefix("reach-") in lang), None)


def by_heart(lang):
    return {text: task for task, text in POINT_INSTRUCTIONS.items()}.get(lang)


def table(tmp_path, policy, settings=SETTINGS, **how):
    rows = prompt_robustness(policy, settings, tmp_path, show_progress=False, **how)
    return {row["arm"]: row for row in rows}


def test_the_arms_and_what_they_say():
    assert prompt_arms([RED, BLUE]) == {
        "benign": {RED: RED, BLUE: BLUE},
        "punctuation": {RED: "Go to the red square.", BLUE: "Go to the blue square."},
        "paraphrase": {text: f"what you should do now is: {text}" for text in (RED, BLUE)},
        "swapped": {RED: BLUE, BLUE: RED},
        "empty": {RED: "", BLUE: ""},
    }


def test_of_three_tasks_each_gets_the_instruction_of_another():
    swapped = prompt_arms(["a", "b", "c"])["swapped"]
    assert sorted(swapped.values()) == ["a", "b", "c"] and all(
        text != other for text, other in swapped.items()
    )


def test_with_one_instruction_nothing_is_swapped():
    assert "swapped" not in prompt_arms(["open"])


@pytest.mark.parametrize("text", ["open the drawer", "Open the drawer.", "a", "Go."])
def test_punctuation_alone_changes(text):
    changed = repunctuated(text)
    assert changed != text and repunctuated(changed) == text
    assert changed.strip(".").lower() == text.strip(".").lower()


def test_paraphrases_of_ones_own_are_used_and_must_be_complete():
    own = {RED: "move onto red", BLUE: "move onto blue"}
    assert prompt_arms([RED, BLUE], own)["paraphrase"] == own
    with pytest.raises(ValueError, match=f"there is no paraphrase of '{BLUE}'"):
        prompt_arms([RED, BLUE], {RED: "move onto red"})


def test_an_arm_changes_the_instruction_and_nothing_else_of_the_benign_one(tmp_path):
    given = {}
    for arm, told in prompt_arms([RED, BLUE]).items():
        policy = Goer(lambda lang: None)
        evaluate(ToldOtherwise(policy, told), None, SETTINGS, tmp_path / arm, show_progress=False)
        given[arm] = policy.given
    for arm, calls in given.items():
        assert [call[1:] for call in calls] == [call[1:] for call in given["benign"]], arm
        told = prompt_arms([RED, BLUE])[arm]
        assert [call[0] for call in calls] == [told[call[0]] for call in given["benign"]]


def test_the_noise_of_the_benign_arm_is_not_the_official_one(tmp_path):
    official, policy = Goer(lambda lang: None), Goer(lambda lang: None)
    evaluate(official, None, SETTINGS, tmp_path / "a", show_progress=False)
    told = prompt_arms([RED, BLUE])["benign"]
    evaluate(ToldOtherwise(policy, told), None, SETTINGS, tmp_path / "b", show_progress=False)
    assert [(lang, state) for lang, _, state in official.given] == [
        (lang, state) for lang, _, state in policy.given
    ]
    # both tasks of a scene have its seed
    assert not {seed for _, seed, _ in official.given} & {seed for _, seed, _ in policy.given}
    assert len({seed for _, seed, _ in policy.given}) == len({seed for _, seed, _ in official.given})


def test_each_arm_has_a_fingerprint_of_its_own_so_that_none_continues_another(tmp_path):
    arms = prompt_arms([RED, BLUE])
    found = [ToldOtherwise(Goer(by_word), told).fingerprint for told in arms.values()]
    assert len(set(found)) == len(arms) and "goer" not in found
    evaluate(ToldOtherwise(Goer(by_word), arms["empty"]), None, SETTINGS, tmp_path, show_progress=False)
    with pytest.raises(ValueError, match="another evaluation"):
        evaluate(ToldOtherwise(Goer(by_word), arms["swapped"]), None, SETTINGS, tmp_path, show_progress=False)


def test_an_instruction_that_no_task_has_is_refused():
    with pytest.raises(ValueError, match="'fly', which none of its tasks has"):
        ToldOtherwise(Goer(by_word), {RED: BLUE}).predict({"lang": "fly"}, seed=0)


def test_one_that_goes_by_words_loses_by_another_task_and_by_none(tmp_path):
    rows = table(tmp_path, Goer(by_word))
    assert [rows[arm]["successes"] for arm in ("official", "benign", "punctuation", "paraphrase")] == [8] * 4
    assert rows["swapped"]["difference"] < -0.5 and rows["empty"]["difference_high"] < 0


def test_one_that_knows_sentences_by_heart_loses_by_a_full_stop(tmp_path):
    rows = table(tmp_path, Goer(by_heart))
    assert rows["punctuation"]["successes"] == 0 and rows["punctuation"]["flipped"] == 8


def test_one_that_does_not_listen_is_found_by_arms_that_change_nothing(tmp_path):
    rows = table(tmp_path, Goer(lambda lang: "reach-red"))
    assert len({row["successes"] for row in rows.values()}) == 1
    assert [row.get("flipped") for row in rows.values()] == [None, 0, 0, 0, 0, 0]


def test_what_has_been_played_is_not_played_again(tmp_path):
    first = table(tmp_path, Goer(by_word))
    again = Goer(by_word)
    assert table(tmp_path, again) == first and not again.given
    assert sorted(path.name for path in tmp_path.iterdir() if path.is_dir()) == sorted(first)


def episodes(outcomes, **more):
    return [
        {"task": "t", "episode": i, "seed": i, "success": bool(o), "steps": 1, **more}
        for i, o in enumerate(outcomes)
    ]


def test_an_arm_is_measured_against_the_benign_one_and_that_against_the_official_one():
    records = {
        "official": episodes([1] * 10),
        "benign": episodes([1] * 6 + [0] * 4),
        "empty": episodes([0] * 8 + [1] * 2),
        "swapped": episodes([1] * 5 + [0] * 5),
    }
    rows = {row["arm"]: row for row in robustness_rows(records)}
    assert "against" not in rows["official"] and rows["benign"]["against"] == "official"
    assert rows["benign"]["difference"] == pytest.approx(-0.4) and "p_holm" not in rows["benign"]
    assert rows["empty"]["against"] == "benign" and rows["empty"]["difference"] == pytest.approx(-0.4)
    assert rows["empty"]["flipped"] == 8 and rows["empty"]["p"] == mcnemar(2, 6)
    assert rows["empty"]["p_holm"] == min(1.0, 2 * mcnemar(2, 6)) and rows["swapped"]["p_holm"] == 1.0


def test_episodes_without_an_outcome_are_in_no_arm():
    hung = episodes([1, 1, 1], error="it hung")
    rows = robustness_rows({"official": episodes([1, 1, 1]), "benign": hung, "empty": episodes([0, 0, 0])})
    assert [row["episodes"] for row in rows] == [3, 0, 3] and "against" not in rows[2]
    assert robustness_text(rows).splitlines()[1] == "benign    no outcome: the simulator failed"


def test_the_text_holds_what_the_rows_hold(tmp_path):
    rows = prompt_robustness(Goer(by_word), SETTINGS, tmp_path, show_progress=False)
    lines = robustness_text(rows).splitlines()
    assert [line.split()[0] for line in lines] == [row["arm"] for row in rows]
    assert "8/8   100.0% [ 63.1, 100.0]" in lines[0] and "-100.0" in lines[-1] and "8 flipped" in lines[-1]
    assert json.loads(json.dumps(rows)) == rows
