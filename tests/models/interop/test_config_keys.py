"""Every key of the originals' configurations that changes the arithmetic is read, or refused when it is another."""

from copy import deepcopy
from typing import Any

import pytest
import torch

from vla_bench.config import ConfigError, load_config
from vla_bench.models.interop.checkpoint_formats import (
    CHECKPOINT_FORMATS,
    ConfigKey,
    table_of_keys,
    value_at,
)
from vla_bench.models.interop.convert import (
    check_policy,
    correct,
    original_settings,
    policy_settings,
    silences,
)

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


NOT_TEXT = [(name, key) for name, key in READ if key.ours not in ("vlm.base_vlm", "prompt")]


@pytest.mark.parametrize(("format_name", "key"), NOT_TEXT, ids=ids)
def test_a_key_of_another_kind_is_one_line(format_name, key):
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


@pytest.mark.parametrize("text", ["no_such_key=1", "use_canonical_forward", "=1", "dropout=[1"])
def test_a_correction_that_cannot_be_is_refused(text):
    with pytest.raises(ConfigError, match="--set"):
        correct({}, [text], CHECKPOINT_FORMATS["starvla_pi"])


# ---------------------------------------------------------------- configurations as they are published

DIT = {
    "attention_head_dim": 48,
    "cross_attention_dim": 2048,
    "dropout": 0.2,
    "final_dropout": True,
    "interleave_self_attention": True,
    "norm_type": "ada_norm",
    "num_attention_heads": 32,
    "num_layers": 16,
    "output_dim": 1024,
    "positional_embeddings": None,
}
HEAD = {
    "action_dim": 32,
    "add_pos_embed": True,
    "diffusion_model_cfg": DIT,
    "hidden_size": 1024,
    "max_seq_len": 1024,
    "noise_beta_alpha": 1.5,
    "noise_beta_beta": 1.0,
    "noise_s": 0.999,
    "num_inference_timesteps": 4,
    "num_target_vision_tokens": 32,
    "num_timestep_buckets": 1000,
}
LEROBOT = {
    "n_obs_steps": 1,
    "chunk_size": 50,
    "n_action_steps": 50,
    "max_state_dim": 32,
    "max_action_dim": 32,
    "empty_cameras": 0,
    "tokenizer_max_length": 200,
}
PUBLISHED = {
    "openpi_pi0": LEROBOT
    | {"type": "pi0", "resize_imgs_with_padding": [224, 224], "num_steps": 10, "adapt_to_pi_aloha": False},
    "openpi_pi05": LEROBOT
    | {"type": "pi05", "image_resolution": [224, 224], "num_inference_steps": 10, "dtype": "float32"}
    | {"min_period": 4e-3, "max_period": 4.0, "time_sampling_beta_alpha": 1.5, "time_sampling_beta_beta": 1.0}
    | {"time_sampling_scale": 0.999, "time_sampling_offset": 0.001, "rtc_config": None},
    "openvla": {
        "model_type": "openvla",
        "arch_specifier": "no-align+fused-gelu-mlp",
        "image_resize_strategy": "resize-naive",
        "image_sizes": [224, 224],
        "llm_backbone_id": "llama2-7b-pure",
        "vision_backbone_id": "dinosiglip-vit-so-224px",
        "n_action_bins": 256,
        "pad_to_multiple_of": 64,
        "timm_override_act_layers": [None, None],
        "use_fused_vision_backbone": True,
    },
    "gr00t_n15": {
        "action_dim": 32,
        "action_horizon": 16,
        "model_type": "gr00t_n1_5",
        "backbone_cfg": {"project_to_dim": None, "reproject_vision": False, "select_layer": 12},
        "action_head_cfg": HEAD
        | {"input_embedding_dim": 1536, "max_state_dim": 64, "use_vlln": True, "model_dtype": "float32"}
        | {"vl_self_attention_cfg": {"attention_head_dim": 64, "num_attention_heads": 32, "num_layers": 4}},
    },
    "gr00t_n17": {
        "model_type": "Gr00tN1d7",
        "architectures": ["Gr00tN1d7"],
        "model_name": "nvidia/Cosmos-Reason2-2B",
        "action_horizon": 40,
        "max_action_dim": 132,
        "max_state_dim": 132,
        "hidden_size": 1024,
        "input_embedding_dim": 1536,
        "max_seq_len": 1024,
        "select_layer": 16,
        "state_history_length": 1,
        "state_dropout_prob": 0.2,
        "attend_text_every_n_blocks": 2,
        "use_alternate_vl_dit": True,
        "use_vlln": True,
        "add_pos_embed": True,
        "num_inference_timesteps": 4,
        "formalize_language": True,
        "diffusion_model_cfg": {k: v for k, v in DIT.items() if k != "cross_attention_dim"}
        | {"num_layers": 32},
        "vl_self_attention_cfg": {"attention_head_dim": 64, "num_attention_heads": 32, "num_layers": 4}
        | {"dropout": 0.2, "final_dropout": True, "positional_embeddings": None},
    },
    "starvla_gr00t": {
        "framework": {
            "name": "QwenGR00T",
            "qwenvl": {"base_vlm": "Qwen/Qwen2.5-VL-3B-Instruct", "attn_implementation": "flash_attention_2"},
            "action_model": HEAD | {"action_model_type": "DiT-L", "action_horizon": 8, "state_dim": 7},
        }
    },
}
SAID = {  # what they say in our words, as far as it decides the sizes
    "openpi_pi0": {"action_horizon": 50, "max_action_dim": 32, "action_model.num_inference_timesteps": 10},
    "openpi_pi05": {"action_horizon": 50, "max_state_dim": 32, "action_model.num_inference_timesteps": 10},
    "openvla": {"action_model.num_bins": 256, "action_model.skip": 64},
    "gr00t_n15": {
        "action_horizon": 16,
        "action_model.hidden_size": 1536,
        "action_model.mlp_size": 1024,
        "action_model.num_heads": 32,
        "action_model.num_vl_heads": 32,
        "max_state_dim": 64,
    },
    "gr00t_n17": {
        "action_horizon": 40,
        "max_action_dim": 132,
        "action_model.hidden_size": 1536,
        "action_model.num_layers": 32,
        "action_model.attend_text_every_n_blocks": 2,
        "action_model.state_dropout": 0.2,
        "action_model.vl_dropout": 0.2,
    },
    "starvla_gr00t": {"action_horizon": 8, "action_model.hidden_size": 1536, "action_model.num_heads": 32},
}


@pytest.mark.parametrize("format_name", PUBLISHED)
def test_a_published_configuration_is_read(format_name):
    found = original_settings(CHECKPOINT_FORMATS[format_name], PUBLISHED[format_name])
    assert {name: value_at(found, name) for name in SAID[format_name]} == SAID[format_name]


@pytest.mark.parametrize(("given", "other"), [("openpi_pi0", "openpi_pi05"), ("openpi_pi05", "openpi_pi0")])
def test_the_configuration_of_the_other_pi_is_refused(given, other):
    with pytest.raises(ConfigError, match="type is"):
        original_settings(CHECKPOINT_FORMATS[given], PUBLISHED[other])


def test_the_configuration_of_a_newer_gr00t_is_refused():
    newer = {"model_type": "Gr00tN1d7", "use_alternate_vl_dit": True}
    with pytest.raises(ConfigError, match="model_type is 'Gr00tN1d7'"):
        original_settings(CHECKPOINT_FORMATS["gr00t_n15"], newer)


# ---------------------------------------------------------------- every key that an original reads

DIT_ARGUMENTS = """num_attention_heads attention_head_dim output_dim num_layers dropout attention_bias activation_fn
    num_embeds_ada_norm upcast_attention norm_type norm_elementwise_affine norm_eps max_num_positional_embeddings
    compute_dtype final_dropout positional_embeddings interleave_self_attention cross_attention_dim"""
VL_ARGUMENTS = """num_attention_heads attention_head_dim output_dim num_layers dropout attention_bias activation_fn
    num_embeds_ada_norm upcast_attention max_num_positional_embeddings compute_dtype final_dropout positional_embeddings
    interleave_self_attention"""
FLOW_ARGUMENTS = """add_pos_embed model_dtype input_embedding_dim backbone_embedding_dim hidden_size max_seq_len
    action_dim action_horizon noise_beta_alpha noise_beta_beta noise_s num_timestep_buckets num_inference_timesteps
    max_num_embodiments tune_projector tune_diffusion_model load_pretrained_det_decode_layer_path detection_coeff
    freeze_decode_layer expand_batch use_vlln num_target_vision_tokens max_state_dim"""
LEROBOT_ARGUMENTS = """type n_obs_steps chunk_size n_action_steps normalization_mapping input_features output_features
    max_state_dim max_action_dim empty_cameras adapt_to_pi_aloha use_delta_joint_actions_aloha tokenizer_max_length
    optimizer_lr optimizer_betas optimizer_eps optimizer_weight_decay scheduler_warmup_steps scheduler_decay_steps
    scheduler_decay_lr device use_amp push_to_hub repo_id private tags license"""
PI0_ARGUMENTS = """resize_imgs_with_padding proj_width num_steps use_cache attention_implementation
    freeze_vision_encoder train_expert_only train_state_proj"""
PI05_ARGUMENTS = """paligemma_variant action_expert_variant dtype num_inference_steps time_sampling_beta_alpha
    time_sampling_beta_beta time_sampling_scale time_sampling_offset min_period max_period image_resolution
    gradient_checkpointing compile_model compile_mode optimizer_grad_clip_norm rtc_config"""
OPENPI_ARGUMENTS = (
    "dtype paligemma_variant action_expert_variant action_dim action_horizon max_token_len pi05"
)
N17_ARGUMENTS = """model_type model_dtype model_name backbone_model_type model_revision tune_top_llm_layers
    backbone_embedding_dim tune_llm tune_visual select_layer reproject_vision use_flash_attention load_bf16
    backbone_trainable_params_fp32 image_crop_size image_target_size shortest_image_edge crop_fraction
    random_rotation_angle color_jitter_params use_albumentations_transforms letter_box_transform
    extra_augmentation_config formalize_language apply_sincos_state_encoding use_percentiles use_relative_action
    max_state_dim max_action_dim action_horizon strict_action_padding_mask hidden_size input_embedding_dim
    state_history_length add_pos_embed attn_dropout use_vlln max_seq_len use_alternate_vl_dit attend_text_every_n_blocks
    num_inference_timesteps noise_beta_alpha noise_beta_beta noise_s num_timestep_buckets tune_projector
    tune_diffusion_model tune_vlln state_dropout_prob exclude_state use_mean_std max_num_embodiments rtc_ramp_rate"""
GROOT_ARGUMENTS = """n_obs_steps chunk_size n_action_steps max_state_dim max_action_dim normalization_mapping
    image_size model_version base_model_path n1_7_backbone_model action_decode_transform embodiment_tag tune_llm
    tune_visual tune_projector tune_diffusion_model lora_rank lora_alpha lora_dropout lora_full_model optimizer_lr
    optimizer_betas optimizer_eps optimizer_weight_decay warmup_ratio use_bf16 video_backend balance_dataset_weights
    balance_trajectory_weights dataset_paths output_dir save_steps max_steps batch_size dataloader_num_workers report_to
    resume device use_amp push_to_hub repo_id private tags license input_features output_features type"""
OPENVLA_ARGUMENTS = """model_type arch_specifier auto_map hf_llm_id image_resize_strategy image_sizes llm_backbone_id
    llm_max_length n_action_bins norm_stats output_projector_states pad_to_multiple_of pad_token_id text_config
    timm_model_ids timm_override_act_layers torch_dtype transformers_version use_fused_vision_backbone vision_backbone_id"""
STARVLA_ARGUMENTS = """action_model_type hidden_size add_pos_embed max_seq_len action_dim state_dim
    future_action_window_size action_horizon past_action_window_size repeated_diffusion_steps noise_beta_alpha
    noise_beta_beta noise_s num_timestep_buckets num_inference_timesteps num_target_vision_tokens"""
STARVLA_HEAD = "framework.action_model"
STARVLA_SECTIONS = {STARVLA_HEAD: STARVLA_ARGUMENTS, f"{STARVLA_HEAD}.diffusion_model_cfg": DIT_ARGUMENTS}
READ_BY_THE_ORIGINAL = {  # per format: the section, and every argument that its code reads there
    "openpi_pi0": {"": f"{LEROBOT_ARGUMENTS} {PI0_ARGUMENTS} {OPENPI_ARGUMENTS} discrete_state_input"},
    "openpi_pi05": {"": f"{LEROBOT_ARGUMENTS} {PI05_ARGUMENTS} {OPENPI_ARGUMENTS} discrete_state_input"},
    "openvla": {"": OPENVLA_ARGUMENTS},
    "gr00t_n15": {
        "": "action_dim action_horizon hidden_size compute_dtype model_type architectures torch_dtype",
        "action_head_cfg": FLOW_ARGUMENTS,
        "action_head_cfg.diffusion_model_cfg": DIT_ARGUMENTS,
        "action_head_cfg.vl_self_attention_cfg": VL_ARGUMENTS,
        "backbone_cfg": """tune_llm tune_visual select_layer reproject_vision use_flash_attention load_bf16 eagle_path
            project_to_dim""",
    },
    "gr00t_n17": {
        "": N17_ARGUMENTS,
        "diffusion_model_cfg": DIT_ARGUMENTS,
        "vl_self_attention_cfg": VL_ARGUMENTS,
    },
    "starvla_gr00t": STARVLA_SECTIONS,
    "starvla_pi": STARVLA_SECTIONS,
}
EVERY = [
    (name, f"{place}.{key}".lstrip("."))
    for name, sections in READ_BY_THE_ORIGINAL.items()
    for place, keys in sections.items()
    for key in keys.split()
]


def test_every_format_with_a_closed_configuration_has_its_list_here():
    assert {name for name, chosen in CHECKPOINT_FORMATS.items() if chosen.closed} == set(READ_BY_THE_ORIGINAL)


@pytest.mark.parametrize("format_name", READ_BY_THE_ORIGINAL)
def test_every_key_that_the_original_reads_is_read_refused_or_harmless_for_a_reason(format_name):
    chosen = CHECKPOINT_FORMATS[format_name]
    named = {key.name for key in chosen.keys} | chosen.harmless.keys()
    assert not [name for each, name in EVERY if each == format_name and name not in named]
    assert all(chosen.harmless.values())


@pytest.mark.parametrize("format_name", CHECKPOINT_FORMATS)
def test_the_page_shows_every_key_once(format_name):
    chosen, lines = CHECKPOINT_FORMATS[format_name], table_of_keys(format_name).splitlines()[2:]
    shown = [line.split("`")[1] for line in lines]
    assert sorted(shown) == sorted({key.name for key in chosen.keys} | chosen.harmless.keys())


def test_a_key_that_no_list_has_is_reported():
    (said,) = silences(CHECKPOINT_FORMATS["openpi_pi05"], {"type": "pi05", "twist": 3, "device": "cuda"})
    assert said == "the checkpoint's config.json has keys that this version does not know: twist"


SILENT = [(name, key) for name, key in ALL if key.absent is not None]


def test_silence_means_positions_in_every_transformer_of_the_diffusers_kind():
    found = {(name, key.name) for name, key in SILENT}
    assert {
        (name, f"{place}.positional_embeddings")
        for name, sections in READ_BY_THE_ORIGINAL.items()
        for place, keys in sections.items()
        if "positional_embeddings" in keys.split()
    } <= found


@pytest.mark.parametrize(("format_name", "key"), SILENT, ids=ids)
def test_silence_that_means_another_network_is_not_passed_over(format_name, key):
    chosen, section = CHECKPOINT_FORMATS[format_name], key.name.rpartition(".")[0]
    other = "dropout" if key.name.rpartition(".")[2] != "dropout" else "num_layers"
    others = {k.name: k.default for n, k in SILENT if n == format_name and k.name != key.name}
    theirs = put({}, f"{section}.{other}", 0.2)
    for name, value in others.items():
        theirs = put(theirs, name, value)
    if chosen.original:
        assert any(key.name in said for said in silences(chosen, theirs))
    else:
        with pytest.raises(
            ConfigError, match=rf"{key.name} is missing, where the original takes .*--set {key.name}="
        ):
            silences(chosen, theirs)
    assert not silences(chosen, put(theirs, key.name, key.default))


@pytest.mark.parametrize(("value", "prompt"), [(True, None), (None, None), (False, "{lang}\n")])
def test_a_pi05_without_the_state_in_its_prompt_has_the_prompt_of_pi0(value, prompt):
    chosen = CHECKPOINT_FORMATS["openpi_pi05"]
    assert original_settings(chosen, {"discrete_state_input": value}).get("prompt") == prompt
    assert bool(chosen.unused({"discrete_state_input": value})) == (value is False)


def test_a_pi05_whose_answer_is_none_is_refused():
    with pytest.raises(ConfigError, match="discrete_state_input is 'no', expected true or false"):
        original_settings(CHECKPOINT_FORMATS["openpi_pi05"], {"discrete_state_input": "no"})
