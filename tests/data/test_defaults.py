"""What every function and setting of the data takes where nothing is given, and which values stay as they were made."""

import inspect
from dataclasses import FrozenInstanceError, fields
from importlib import import_module

import pytest

DEFAULTS = {
    "action_modes.Encoding": {"rotation": ""},
    "action_modes.make_encoding": {"mode": "absolute", "rotation": ""},
    "action_modes.encoded_layout": {"what": "action"},
    "columns.flat_names": {"depth": 0},
    "conversation_files.ConversationSource": {"percent": 100},
    "conversation_files.register_conversations": {"data_path": ""},
    "conversation_files.find_source": {"key": "datasets.vlm_data"},
    "conversation_files.parse_dataset_use": {"data_dict": {}, "key": "datasets.vlm_data"},
    "conversations.fit_pixels": {"least": None, "most": None},
    "conversations.ConversationSettings": {
        "eval_dataset": None,
        "dataset_py": "vlm_datasets",
        "dataformat": "llava_json",
        "model_max_length": 2048,
        "over_long": "drop",
        "data_flatten": False,
        "min_pixels": None,
        "max_pixels": None,
        "per_device_batch_size": 4,
    },
    "conversations.ConversationDataset": {"min_pixels": None, "max_pixels": None},
    "conversations.open_conversations": {"held_out": False},
    "conversations.conversation_problems": {"images": 1000},
    "conversations.main": {"argv": None, "made_up": False},
    "detectors.Finding": {"episodes": ()},
    "detectors.some": {"most": 5},
    "detectors.frozen_dimensions": {"seconds": 1.0},
    "detectors.clipped_dimensions": {"share": 0.01},
    "detectors.repeated_frames": {"share": 0.05, "seconds": 1.0},
    "detectors.idle_frames": {"relative": False, "seconds": 1.0},
    "detectors.idle_stretches": {"share": 0.05},
    "detectors.outlier_episodes": {"ranges": 1.0},
    "detectors.outlier_lengths": {"times": 6.0},
    "detectors.action_kind": {"action_mode": "absolute"},
    "detectors.instruction_findings": {"told": None},
    "detectors.image_findings": {"share": 0.2},
    "doctor.open_recording": {"action_key": "action", "state_key": "observation.state"},
    "doctor.examine": {
        "action_mode": "absolute",
        "videos": False,
        "action_key": "action",
        "state_key": "observation.state",
    },
    "doctor.sampled_images": {"episodes": 8, "length": 30},
    "doctor.contact_sheet": {"episodes": 4},
    "doctor.instruction_table": {"most": 10},
    "doctor.write_card": {"videos": False, "action_key": "action", "state_key": "observation.state"},
    "doctor.main": {"argv": None},
    "images.read_image": {"first_row": 0},
    "layout.Layout": {
        "kind": "absolute",
        "frame": "unknown",
        "units": "unknown",
        "rotation": "none",
        "gripper": "none",
    },
    "layout.layout_differences": {"what": "action"},
    "layout.PolicySpec": {
        "benchmark": "",
        "encoding": None,
        "image_transforms": (),
        "observation_steps": 1,
        "observation_stride": 1,
        "prompt": "{lang}",
        "widths": (),
    },
    "layout.spec_from_dict": {"where": "policy.json"},
    "lerobot.LeRobotDataset": {
        "horizon": 1,
        "cameras": None,
        "action_key": "action",
        "state_key": "observation.state",
        "normalizers": None,
        "episodes": None,
        "name": None,
        "follow_links": False,
    },
    "lerobot.main": {"argv": None, "made_up": False},
    "lerobot_files.Episode": {"rows": None},
    "lerobot_files.read_files": {"follow_links": False},
    "mixture.MixtureEntry": {
        "weight": None,
        "name": None,
        "robot": None,
        "cameras": None,
        "prompt": "{lang}",
        "action_key": "action",
        "state_key": "observation.state",
        "action_mode": "absolute",
    },
    "mixture.Mixture": {"weights": None, "widths": None},
    "order.MixtureOrder": {"shares": None},
    "parts.Part": {
        "unit": "unknown",
        "frame": "unknown",
        "rotation": "none",
        "gripper": "none",
        "reference": "absolute",
    },
    "paths.Folder": {"follow_links": False},
    "sample.check_sample": {"training": False},
    "viewed.ViewedDataset": {"future": ()},
    "transforms.Resize": {"method": "stretch", "filter": "bicubic"},
    "transforms.Crop": {"fraction": 0.9, "filter": "bicubic"},
    "transforms.ColorJitter": {"brightness": 0.0, "contrast": 0.0, "saturation": 0.0, "hue": 0.0},
    "transforms.ImageTransforms": {"steps": ()},
    "transforms.transform_sample": {"rng": None},
    "validation.validate": {
        "cameras": None,
        "action_key": "action",
        "state_key": "auto",
        "follow_links": False,
        "every_frame": False,
    },
    "video.open_video": {"crf": 18, "gop": 2},
    "video.write_video": {"crf": 18, "gop": 2},
    "video.VideoReader.read": {"lookahead": 8},
    "video.VideoReader.locate": {"counted": None},
    "video.VideoReader.read_at": {"counted": None},
    "view.ModelView": {"encoding": None, "history": (0,), "prompt": "{lang}", "widths": None},
    "view.spec_view": {"where": "policy.json"},
    "view.robot_dims": {"steps": 1},
    "windows.history_offsets": {"stride": 1},
    "windows.History": {"stride": 1},
    "writer.LeRobotWriter": {
        "version": "v3.0",
        "robot_type": "unknown",
        "benchmark": "",
        "episodes_per_file": 50,
        "crf": 18,
    },
}
FROZEN = [
    "action_modes.Encoding",
    "columns.Spans",
    "conversation_files.ConversationSource",
    "detectors.Finding",
    "doctor.Recording",
    "layout.Layout",
    "layout.PolicySpec",
    "lerobot_files.Episode",
    "mixture.MixtureEntry",
    "normalize.Statistics",
    "order.MixtureOrder",
    "parts.Part",
    "robots.Robot",
    "table.Table",
    "table.EpisodeSubset",
    "transforms.Resize",
    "transforms.Crop",
    "transforms.RandomShift",
    "transforms.ColorJitter",
    "transforms.ImageTransforms",
    "view.Widths",
    "view.ModelView",
]


def named(name: str) -> object:
    """The function or class that is meant by "module.name"."""
    module, *names = name.split(".")
    found = import_module(f"vla_bench.data.{module}")
    for each in names:
        found = vars(found)[each]
    return found


@pytest.mark.parametrize("name", DEFAULTS)
def test_what_is_left_out_means_this(name):
    parameters = inspect.signature(named(name)).parameters
    assert {key: parameters[key].default for key in DEFAULTS[name]} == DEFAULTS[name]


@pytest.mark.parametrize("name", FROZEN)
def test_a_value_is_not_changed_after_it_was_made(name):
    """Values are shared between views, members and processes: a changed one would change them all."""
    cls = named(name)
    one = object.__new__(cls)
    for field in fields(cls):
        with pytest.raises(FrozenInstanceError):
            setattr(one, field.name, None)
