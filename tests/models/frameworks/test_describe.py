"""Each framework as a program."""

import json
from importlib import import_module

import pytest

PROGRAMS = {
    "OFT": ("oft", {"type": "MLP", "hidden_size": 32, "num_queries": 2}),
    "GR00T": ("gr00t", {"type": "FlowMatching", "hidden_size": 32, "num_layers": 3, "num_heads": 4}),
    "PI": ("pi", {"type": "LayerwiseFlowMatching", "num_heads": 4}),
    "LlavaVLA": ("llava", {"type": "Transformer", "hidden_size": 32}),
    "PI0": ("pi0", {"type": "ActionExpert", "hidden_size": 24, "intermediate_size": 48, "num_heads": 4}),
    "PI05": ("pi05", {"type": "ActionExpert", "hidden_size": 24, "intermediate_size": 48, "num_heads": 4}),
}


@pytest.fixture(params=PROGRAMS)
def program(request, tmp_path):
    """A framework's name, its `main`, and a function that writes its configuration for a backbone."""
    module, head = PROGRAMS[request.param]
    file = tmp_path / "config.yaml"

    def write(base) -> str:
        section = {"name": "OFT", "vlm": {"base_vlm": str(base)}, "action_horizon": 4, "action_model": head}
        file.write_text(json.dumps({"framework": section}))
        return str(file)

    return request.param, import_module(f"vla_bench.models.frameworks.{module}").main, write


def test_it_prints_the_model_a_loss_and_a_prediction(toy, program, capsys):
    name, main, write = program
    main(["--config_yaml", write(toy.home / "paligemma")])
    printed = capsys.readouterr().out
    assert f"{name}: 4 actions of 7 numbers" in printed
    assert "loss" in printed and "prediction [1, 4, 7]" in printed


def test_a_backbone_that_is_not_there_is_one_line(program, tmp_path, capsys):
    _, main, write = program
    with pytest.raises(SystemExit) as stop:
        main(["--config_yaml", write(tmp_path / "nowhere")])
    assert stop.value.code == 2
    assert "python -m vla_bench.models.backbones.tiny" in capsys.readouterr().err
