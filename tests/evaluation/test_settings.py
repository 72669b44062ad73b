"""The section `evaluation` of a configuration, in every spelling that is in use."""

import pytest

from vla_bench.config import ConfigError, load_config
from vla_bench.evaluation.rollout import EvaluationSettings

SPELLINGS = ["n_action_steps", "replan_steps", "execute_steps"]


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_a_file_may_use_any_spelling(spelling):
    config = load_config({"evaluation": {spelling: 3}})
    assert config.section("evaluation").into(EvaluationSettings).n_action_steps == 3


@pytest.mark.parametrize("spelling", SPELLINGS)
@pytest.mark.parametrize("in_file", SPELLINGS)
def test_the_command_line_may_use_any_spelling(in_file, spelling):
    config = load_config({"evaluation": {in_file: 3}}, f"--evaluation.{spelling} 5")
    assert config.section("evaluation").into(EvaluationSettings).n_action_steps == 5
    config.require_read()


@pytest.mark.parametrize("other", SPELLINGS[1:])
def test_two_spellings_in_a_file_are_refused(other):
    with pytest.raises(ConfigError, match="same key with two values"):
        load_config({"evaluation": {"n_action_steps": 3, other: 5}})


@pytest.mark.parametrize("other", SPELLINGS[1:])
def test_two_spellings_on_the_command_line_are_refused(other):
    with pytest.raises(
        ConfigError, match=f"'evaluation.n_action_steps' and 'evaluation.{other}' are the same"
    ):
        load_config({}, f"--evaluation.n_action_steps 3 --evaluation.{other} 3")


@pytest.mark.parametrize("name", ["episodes", "num_envs", "n_action_steps", "max_steps"])
def test_a_count_below_one_is_refused(name):
    with pytest.raises(ValueError, match=f"evaluation.{name} must be at least 1, got 0"):
        EvaluationSettings(**{name: 0})
