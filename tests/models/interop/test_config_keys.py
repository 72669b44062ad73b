"""Every key of the originals' configurations that changes the arithmetic is read, or refused when it is another."""

from copy import deepcopy
from typing import Any

import pytest
import torch

from vla_bench.config import ConfigError, load_config
from vla_bench.models.interop.checkpoint_formats import CHECKPOINT_FORMATS, ConfigKey, value_at
from vla_bench.models.interop.convert import check_policy, correct, original_settings, policy_settings

ALL = [(name, key) for name, chosen in CHECKPOINT_FORMATS.items() for key in chosen.keys]
READ = [(name, key) for name, key in ALL if key.ours and not key.ours.startswith("policy.")]
ONLY = [(name, key) for name, key in ALL if not key.ours]
MIXING = "action_model.interleave_self_attention"
OTHERS = {  # another value than the one in `base`, where adding one makes none
    "base_vlm": "another",
    "CoT_prompt": "Do {instruction}",
    "action_model_type": "DiT-L",
    "interleave_self_attention": False,
    "use_canonical_forward": False,
    "layerwise_attention_layout": "legacy_all_cross",
}
TENSORS = {  # of a QwenPI
    "action_model.model.transformer_blocks.0.attn1.to_q.weight": torch.empty(64, 64),
    "action_model.state_encoder.layer1.weight": torch.empty(1, 1),
    "action_model.future_tokens.weight": torch.empty(1, 1),
}


def ids(pair: Any) -> str:
    return pair.name if isinstance(pair, ConfigKey) else str(pair)


def put(config: dict, name: str, value: Any) -> dict:
    """The configuration with a value at a dotted name."""
    config = section = deepcopy(config)
    *place, last = name.split(".")
    for part in place:
        section = section.setdefault(part, {})
    section[last] = value
    return config


def base(format_name: str, key: ConfigKey) -> dict:
    """As little as a configuration may say; the length of a chunk by the key in question where it is one."""
    if not CHECKPOINT_FORMATS[format_name].original:
        return {}
    config = put({}, "framework.qwenvl.base_vlm", "Qwen/Qwen2.5-VL-3B-Instruct")
    length = "future_action_window_size" if key.name.endswith("window_size") else "action_horizon"
    return put(config, f"framework.action_model.{length}", 4)


def section(format_name: str, config: dict) -> dict:
    chosen = CHECKPOINT_FORMATS[format_name]
    original_settings(chosen, config)  # as `convert` does before it reads any weight
    if chosen.complete:
        config, _ = chosen.complete(config, TENSORS)
    return original_settings(chosen, config)


def another(key: ConfigKey, before: dict) -> Any:
    last = key.name.rpartition(".")[2]
    return OTHERS[last] if last in OTHERS else (value_at(before, key.name) or 2) + 3


def test_every_format_lists_its_keys_with_a_source():
    assert all(chosen.keys for chosen in CHECKPOINT_FORMATS.values())
    assert all(key.source for _, key in ALL)
    for name, chosen in CHECKPOINT_FORMATS.items():
        names = [key.name for key in chosen.keys]
        assert len(set(names)) == len(names), name


@pytest.mark.parametrize(("format_name", "key"), READ, ids=ids)
def test_a_key_that_is_read_changes_our_section(format_name, key):
    before = base(format_name, key)
    after = put(before, key.name, another(key, before))
    assert value_at(section(format_name, before), key.ours) != value_at(section(format_name, after), key.ours)


@pytest.mark.parametrize(("format_name", "key"), ONLY, ids=ids)
def test_a_key_that_is_not_read_is_refused_with_another_value(format_name, key):
    value = {bool: not key.default, str: "other", list: [1, 1]}.get(type(key.default), 7)
    with pytest.raises(ConfigError, match=rf"{key.name} is .* only built with"):
        original_settings(CHECKPOINT_FORMATS[format_name], put(base(format_name, key), key.name, value))


@pytest.mark.parametrize("silent", [False, True])
@pytest.mark.parametrize(("format_name", "key"), ONLY, ids=ids)
def test_a_key_that_is_not_read_may_have_the_original_s_default(format_name, key, silent):
    before = base(format_name, key)
    after = put(before, key.name, None if silent else key.default)
    assert section(format_name, after) == section(format_name, before)


@pytest.mark.parametrize(("format_name", "key"), [(n, k) for n, k in READ if "vlm" not in k.ours], ids=ids)
def test_a_key_of_another_kind_is_one_line(format_name, key):
    if key.name.endswith("CoT_prompt"):
        pytest.skip("any text is a prompt")
    before = base(format_name, key)
    with pytest.raises(ValueError, match=key.name.rpartition(".")[2]) as error:
        section(format_name, put(before, key.name, {"a": "mapping"}))
    assert "\n" not in str(error.value)


# ---------------------------------------------------------------- keys of the section policy


def policy(published, **change):
    return policy_settings(load_config({"policy": published.policy_section(**change)}))


STARVLA = [name for name, chosen in CHECKPOINT_FORMATS.items() if chosen.original]


@pytest.mark.parametrize("format_name", STARVLA)
def test_the_state_is_read_where_the_run_was_given_one(format_name):
    chosen, key = CHECKPOINT_FORMATS[format_name], CHECKPOINT_FORMATS[format_name].keys[0]
    given = put(base(format_name, key), "datasets.vla_data.include_state", True)
    without = put(given, "datasets.vla_data.include_state", False)
    differs = chosen.unused(given) != chosen.unused(without)
    assert differs or format_name == "starvla_fast"  # QwenFast reads no state in either


def test_another_image_size_than_that_of_the_run_is_refused(published):
    with pytest.raises(ConfigError, match=r"image_size is \[32, 32\], the run was made with \[64, 64\]"):
        check_policy({"datasets": {"vla_data": {"obs_image_size": [64, 64]}}}, policy(published))


@pytest.mark.parametrize(
    ("theirs", "ours"), [("MEAN_STD", "mean_std"), ("QUANTILES", "q99"), ("MIN_MAX", "min_max")]
)
def test_lerobot_s_normalisation_has_to_be_ours(published, theirs, ours):
    settings = policy(published)
    settings.normalization["state"] = ours
    check_policy({"normalization_mapping": {"STATE": theirs}}, settings)
    with pytest.raises(ConfigError, match=rf"policy.normalization.state is '{ours}', .* says IDENTITY"):
        check_policy({"normalization_mapping": {"STATE": "IDENTITY"}}, settings)


# ---------------------------------------------------------------- corrections


@pytest.mark.parametrize(("format_name", "key"), ALL, ids=ids)
def test_every_key_can_be_corrected(format_name, key):
    found = correct({}, [f"{key.name}=[1, 2]"], CHECKPOINT_FORMATS[format_name])
    assert value_at(found, key.name) == [1, 2]


@pytest.mark.parametrize("text", ["no_such_key=1", "use_canonical_forward", "=1"])
def test_a_correction_that_cannot_be_is_refused(text):
    with pytest.raises(ConfigError, match="--set"):
        correct({}, [text], CHECKPOINT_FORMATS["starvla_pi"])
