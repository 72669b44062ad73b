"""FluxVLA's configurations: read without executing them, translated, built, and equal to the public network."""

import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from vla_bench.config import ConfigError, load_config
from vla_bench.models.backbones.eagle import compose_eagle
from vla_bench.models.backbones.tiny import write_tiny
from vla_bench.models.backbones.tiny_composed import write_tiny_component
from vla_bench.models.frameworks.build import build_framework
from vla_bench.models.frameworks.framework import Framework
from vla_bench.models.interop.fluxvla import from_fluxvla, main, read_fluxvla_config, remarks

# ---------------------------------------------------------------- configurations as FluxVLA's repository has them

BASE = """
num_views = 2
seed = 7
train_dataloader = dict(
    per_device_batch_size=8,
    dataset=dict(
        type='DistributedRepeatingDataset',
        name_mappings={'observation.state': ['proprio'], 'action': ['action']},
        datasets=dict(
            type='ParquetDataset',
            data_root_path=['datasets/one', 'datasets/two'],
            transforms=[
                dict(type='ResizeImages', height=224, width=224),
                dict(type='NormalizeImages', means=[[123.5, 117.0, 104.0], [123.5, 117.0, 104.0]]),
            ])))
"""

GR00T = '''"""GR00T N1.5 on Aloha, all parameters."""
_base_ = ['./base.py']

model = dict(
    type='LlavaVLA',
    vlm_backbone=dict(type='EagleBackbone', vlm_path='EAGLE'),
    vla_head=dict(
        type='FlowMatchingHead',
        state_dim=64,
        hidden_size=16,
        input_embedding_dim=24,
        num_layers=1,
        num_heads=4,
        num_inference_timesteps=4,
        num_target_vision_tokens=2,
        num_steps=2 * 2,
        traj_length=10,
        max_seq_len=8,
        diffusion_model_cfg=dict(num_layers=2, num_attention_heads=2, dropout=0.0),
        vl_self_attention_cfg=dict(num_layers=1, num_attention_heads=2),
        action_dim=32,
        ori_action_dim=14),
    freeze_vlm_backbone=False,
    freeze_projector=False)

inference_model = dict(
    type='LlavaVLA',
    vlm_backbone=dict(type='EagleInferenceBackbone', vlm_path='EAGLE'),
    vla_head=dict(
        type='FlowMatchingInferenceHead',
        state_dim=64,
        hidden_size=16,
        input_embedding_dim=24,
        num_inference_timesteps=4,
        num_target_vision_tokens=2,
        num_steps=4,
        max_seq_len=8,
        diffusion_model_cfg=dict(num_layers=2, num_attention_heads=2, dropout=0.0),
        vl_self_attention_cfg=dict(num_layers=1, num_attention_heads=2),
        action_dim=32,
        ori_action_dim=14),
    freeze_vlm_backbone=False,
    freeze_projector=False)

runner = dict(
    type='FSDPTrainRunner',
    max_epochs=18,
    learning_rate=1.5e-5,
    betas=(0.9, 0.95),
    metric=dict(type='VLAMetric', active_trackers=('jsonl', 'wandb'), run_dir='work_dirs'),
    sharding_strategy='full-shard',
    warmup_ratio=-0.0 + 3 / 100)
'''

PI0 = """
_base_ = './base.py'
width = 16
model = dict(
    type='PI0FlowMatching',
    vlm_backbone=dict(
        type='PaliGemma',
        vlm_backbone_id='paligemma_3b_pt_224',
        vlm_path='PALIGEMMA',
        vlm_config=dict(text_config=dict(num_hidden_layers=2, hidden_size=32))),
    proj_width=width,
    n_action_steps=4,
    state_proj=dict(type='LinearProjector', in_dim=14, out_dim=width),
    action_in_proj=dict(type='LinearProjector', in_dim=14, out_dim=width),
    action_out_proj=dict(type='LinearProjector', in_dim=width, out_dim=14),
    llm_expert=dict(
        type='GemmaLLMBackbone',
        llm_backbone_id='gemma-2b_causal',
        llm_max_length=256,
        llm_config=dict(intermediate_size=24, num_attention_heads=4)),
    freeze_vlm_backbone=True)
"""

PI05 = """
_base_ = './pi0.py'
model = dict(type='PI05FlowMatching', state_proj=None, max_state_dim=14, max_action_dim=14)
"""

OPENVLA = """
model = dict(
    type='OpenVLA',
    arch_specifier='no-align+fused-gelu-mlp',
    vision_backbone=dict(
        type='DinoSigLIPViTBackbone',
        vision_backbone_id='dinosiglip-vit-so-224px',
        dino_config=dict(model_id='DINOV2', image_size=32, patch_size=16),
        siglip_config=dict(model_id='SIGLIP', image_size=32, patch_size=16)),
    llm_backbone=dict(
        type='LLaMa2LLMBackbone',
        llm_backbone_id='llama2-7b-pure_causal',
        llm_path='LLAMA',
        llm_max_length=2048),
    projector=dict(type='FusedMLPProjector', fused_vision_dim=2176, llm_dim=4096),
    vla_head=dict(type='OpenVLAHead', norm_stats=None, vocab_size=400),
    freeze_vision_backbone=False,
    freeze_llm_backbone=False,
    freeze_projector=False)
"""

LLAVA = """
_base_ = ['./gr00t.py']
model = dict(
    vla_head=dict(
        _delete_=True,
        type='LlavaActionHead',
        state_dim=14,
        action_dim=14,
        traj_length=4,
        hidden_size=16,
        num_layers=1,
        num_heads=4))
inference_model = None
"""

PUBLISHED_PI0 = """
model = dict(
    type='PI0FlowMatching',
    llm_backbone=dict(
        type='ConditionGemmaModel',
        adarms_cond_dim=None,
        attention_bias=False,
        attention_dropout=0.0,
        bos_token_id=2,
        head_dim=256,
        hidden_act='gelu_pytorch_tanh',
        hidden_size=2048,
        intermediate_size=16384,
        num_attention_heads=8,
        num_hidden_layers=18,
        num_key_value_heads=1,
        rms_norm_eps=1e-06,
        rope_theta=10000.0,
        vocab_size=257152),
    vision_backbone=dict(
        type='SigLIPViTBackbone',
        vision_backbone_id='siglip_224',
        vision_config=dict(hidden_size=1152, image_size=224, num_hidden_layers=27, patch_size=14)),
    projector=dict(type='LinearProjector', in_dim=1152, out_dim=2048),
    proj_width=1024,
    n_action_steps=50,
    state_proj=dict(type='LinearProjector', in_dim=8, out_dim=1024),
    action_in_proj=dict(type='LinearProjector', in_dim=8, out_dim=1024),
    action_out_proj=dict(type='LinearProjector', in_dim=1024, out_dim=8),
    max_action_dim=8,
    llm_expert=dict(
        type='ConditionGemmaModel',
        hidden_size=1024,
        intermediate_size=4096,
        num_attention_heads=8,
        num_hidden_layers=18,
        use_adarms=False,
        vocab_size=257152),
    freeze_llm_backbone=False,
    freeze_vision_backbone=False,
    pretrained_name_or_path='./checkpoints/pi0_base/model.safetensors',
    name_mapping={
        'llm_backbone': 'paligemma_with_expert.paligemma.model.language_model',
        'vision_backbone.vision': 'paligemma_with_expert.paligemma.model.vision_tower',
        'projector.projector': 'paligemma_with_expert.paligemma.model.multi_modal_projector.linear',
        'llm_expert': 'paligemma_with_expert.gemma_expert.model',
        'action_time_mlp_in.projector': 'action_time_mlp_in',
        'action_time_mlp_out.projector': 'action_time_mlp_out',
        'state_proj.projector': 'state_proj',
        'action_in_proj.projector': 'action_in_proj',
        'action_out_proj.projector': 'action_out_proj',
        'llm_backbone.embed_tokens': 'paligemma_with_expert.paligemma.lm_head',
    },
    ori_action_dim=7)

inference_model = model.copy()
"""

FILES = {
    "published_pi0": PUBLISHED_PI0,
    "base": BASE,
    "gr00t": GR00T,
    "pi0": PI0,
    "pi05": PI05,
    "openvla": OPENVLA,
    "llava": LLAVA,
}
EXPECTED = {  # framework, head, length of a chunk
    "gr00t": ("LlavaVLA", "FlowMatching", 4),
    "pi0": ("PI0", None, 4),
    "pi05": ("PI05", None, 4),
    "openvla": ("OpenVLA", "Bins", 1),
    "llava": ("LlavaVLA", "Transformer", 4),
}


@pytest.fixture(scope="module")
def home(tmp_path_factory) -> Path:
    """Every configuration above, with the paths of tiny models."""
    home = tmp_path_factory.mktemp("fluxvla")
    for part in ("siglip", "qwen3", "dinov2_with_registers", "llama"):
        write_tiny_component(part, home / part, image_size=32, hidden_size=32, num_layers=2)
    eagle = compose_eagle(home / "siglip", home / "qwen3", projector="Linear")
    eagle.model.save_pretrained(home / "eagle")
    eagle.save_config(home / "eagle")
    tiny = {
        "image_size": 32,
        "hidden_size": 32,
        "num_layers": 2,
        "vision_hidden_size": 32,
        "vision_layers": 1,
    }
    write_tiny("paligemma", home / "paligemma", **tiny)
    folders = {"EAGLE": "eagle", "PALIGEMMA": "paligemma", "DINOV2": "dinov2_with_registers"}
    for name, text in FILES.items():
        for word, folder in (folders | {"SIGLIP": "siglip", "LLAMA": "llama"}).items():
            text = text.replace(f"'{word}'", repr(str(home / folder)))
        (home / f"{name}.py").write_text(text)
    return home


@pytest.fixture
def section(home, tmp_path):
    """`section(name)`: the section `framework` of the YAML that the program writes for a configuration."""

    def translated(name: str) -> dict:
        main([str(home / f"{name}.py"), "--out", str(tmp_path / f"{name}.yaml")])
        return load_config(tmp_path / f"{name}.yaml").section("framework").to_dict()

    return translated


@pytest.mark.parametrize("name", EXPECTED)
def test_a_configuration_becomes_a_framework_section(section, name):
    found = section(name)
    assert (found["name"], found["action_model"].get("type"), found["action_horizon"]) == EXPECTED[name]


@pytest.mark.parametrize("name", EXPECTED)
def test_the_yaml_has_the_section_of_the_dictionary(home, section, name):
    config = read_fluxvla_config(home / f"{name}.py")
    assert section(name) == from_fluxvla(config["model"], config.get("inference_model"))


@pytest.mark.parametrize("name", EXPECTED)
def test_the_section_builds_a_framework(section, name):
    found = section(name)
    framework = build_framework(found, action_dim=14, state_dim=14, load_weights=False)
    assert framework.config["name"] == found["name"] and framework.horizon == found["action_horizon"]


def test_the_inference_head_is_kept(section):
    assert section("gr00t")["inference_model"]["action_model"]["type"] == "FlowMatchingInference"


def test_what_was_left_out_is_printed(section, capsys):
    section("gr00t")
    printed = capsys.readouterr().out.splitlines()
    assert (
        "vla_head.traj_length = 10 is left out: FluxVLA's head ignores it; the length of a chunk is num_steps"
        in printed
    )
    assert "num_views, seed, train_dataloader, runner: not of the model, so left out" in printed


def test_what_was_left_out_is_at_the_top_of_the_yaml(section, tmp_path, capsys):
    section("gr00t")
    printed = capsys.readouterr().out.splitlines()[:-1]
    lines = (tmp_path / "gr00t.yaml").read_text().splitlines()
    comments = [line.removeprefix("# ") for line in lines if line.startswith("#")]
    assert comments[0] == "Translated from FluxVLA's gr00t.py." and comments[1:-1] == printed


# ---------------------------------------------------------------- files that are not executed

PROGRAMS = {
    "__import__('os').system('touch exploded')": "a call",
    "dict(type=__import__('os').system('touch exploded'))": "a call",
    "[open('exploded', 'w') for _ in range(1)]": "an expression of kind ListComp",
    "f\"{__import__('os').system('touch exploded')}\"": "a call",
    "(lambda: open('exploded', 'w'))()": "a call",
    "().__class__.__base__.__subclasses__()": "a call",
    "exec": "a name that no line above assigns",
    "9 ** 9 ** 9": "arithmetic of this kind",
    "dict(open('exploded', 'w'))": "a call",
}
STATEMENTS = {
    "import os": "Import",
    "from os import system as dict": "ImportFrom",
    "with open('exploded', 'w'): pass": "With",
    "def dict(**given): open('exploded', 'w')": "FunctionDef",
    "open('exploded', 'w')": "Expr",
    "x: open('exploded', 'w') = 1": "AnnAssign",
    "a, b = 1, 2": "Assign",
    "for name in (1, 2): pass": "For",
}


@pytest.fixture
def refused(tmp_path, monkeypatch, capsys):
    """`refused(text)`: the one line with which a file of this text is refused; nothing was executed."""
    monkeypatch.chdir(tmp_path)

    def run(text: str) -> str:
        (tmp_path / "config.py").write_text(text)
        with pytest.raises(SystemExit) as stopped:
            main(["config.py", "--out", "config.yaml"])
        assert stopped.value.code == 2
        assert os.listdir(tmp_path) == ["config.py"]
        (line,) = capsys.readouterr().err.splitlines()
        return line

    return run


@pytest.mark.parametrize("expression", PROGRAMS)
def test_an_expression_that_is_a_program_is_refused(refused, expression):
    line = refused(f"# a comment\nmodel = {expression}\n")
    assert line.startswith(f"error: config.py, line 2: {PROGRAMS[expression]}")


@pytest.mark.parametrize("statement", STATEMENTS)
def test_a_statement_that_is_a_program_is_refused(refused, statement):
    line = refused(f"seed = 7\n{statement}\nmodel = dict(type='OpenVLA')\n")
    assert line.startswith(f"error: config.py, line 2: a statement of kind {STATEMENTS[statement]}: ")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "config.py assigns no dict to 'model'"),
        ("modle = dict(type='OpenVLA')", "did you mean 'modle'?"),
        ("model = 'OpenVLA'", "config.py assigns no dict to 'model'"),
        ("model = dict(vla_head=dict(type='OpenVLAHead'))", "model has no 'type'"),
        ("model = dict(type='OpenVla')", "did you mean 'OpenVLA'?"),
        ("model = dict(type=['OpenVLA'])", "model has no 'type'"),
        (
            "model = dict(type='OpenVLA', vla_head='OpenVLAHead')",
            "vla_head is 'OpenVLAHead', expected a dict",
        ),
        (
            "model = dict(type='OpenVLA', vla_head=dict(type='OpenVLAHead', vocab=3))",
            "did you mean 'vocab_size'?",
        ),
        ("model = dict(", "config.py, line 1: not Python: '(' was never closed"),
        ("model = dict(a=1, a=2)", "config.py, line 1: a dict with two values for 'a'"),
        ("x = " + "[" * 300, "not Python"),
        ("x = " + "1 + " * 20_000 + "1", "config.py"),
        ("x = '\\0'\n\0", "config.py: not Python"),
        ("_base_ = 'none.py'", "no configuration at none.py"),
        ("_base_ = 'config.py'", "config.py is among its own bases"),
        ("_base_ = [1]", "_base_ is [1], expected a file or a list of files"),
    ],
)
def test_a_faulty_configuration_is_one_line(refused, text, message):
    line = refused(text)
    assert line.startswith("error: ") and message in line


def test_a_missing_file_is_one_line_with_the_nearest_name(home, tmp_path, capsys):
    with pytest.raises(SystemExit):
        main([str(home / "grOOt.py"), "--out", str(tmp_path / "x.yaml")])
    (line,) = capsys.readouterr().err.splitlines()
    assert "no configuration at" in line and "did you mean 'gr00t.py'?" in line


def test_a_yaml_is_never_written_over(home, tmp_path, capsys):
    (tmp_path / "mine.yaml").write_text("a: 1\n")
    with pytest.raises(SystemExit):
        main([str(home / "gr00t.py"), "--out", str(tmp_path / "mine.yaml")])
    assert "mine.yaml exists and is never written over" in capsys.readouterr().err
    assert (tmp_path / "mine.yaml").read_text() == "a: 1\n"


def test_two_bases_may_not_assign_the_same_name(tmp_path):
    for name in ("a", "b"):
        (tmp_path / f"{name}.py").write_text("seed = 1")
    (tmp_path / "config.py").write_text("_base_ = ['a.py', 'b.py']")
    with pytest.raises(ConfigError, match="two of its bases assign 'seed'"):
        read_fluxvla_config(tmp_path / "config.py")


def test_the_program_explains_itself(capsys):
    with pytest.raises(SystemExit) as stopped:
        main(["--help"])
    assert stopped.value.code == 0
    assert (
        "python -m vla_bench.models.interop.fluxvla" in (shown := capsys.readouterr().out)
        and "--out" in shown
    )


# ---------------------------------------------------------------- what a translated configuration computes


@pytest.fixture(scope="module")
def gr00t(published, tmp_path_factory):
    """A public GR00T checkpoint, FluxVLA's model for it, and what of it is ours: folder, model, Eagle, head."""
    folder = tmp_path_factory.mktemp("gr00t")
    eagle, head = published.gr00t_checkpoint(folder)
    sizes = published.SIZES
    flow = {"type": "FlowMatchingHead", "state_dim": published.S, "action_dim": published.D}
    flow |= {"num_steps": published.T, "traj_length": 99, "hidden_size": sizes.inner}
    flow |= {"input_embedding_dim": sizes.width, "max_seq_len": sizes.rows}
    flow |= {"num_target_vision_tokens": sizes.future}
    flow |= {"diffusion_model_cfg": {"num_layers": 2, "num_attention_heads": sizes.heads, "dropout": 0.2}}
    flow |= {"vl_self_attention_cfg": {"num_layers": 2, "num_attention_heads": 2}}
    model = {
        "type": "LlavaVLA",
        "vlm_backbone": {"type": "EagleBackbone", "vlm_path": f"{folder}/eagle"},
        "vla_head": flow,
        "pretrained_name_or_path": f"{folder}/model.safetensors",
        "name_mapping": {"vlm_backbone.vlm": "backbone.eagle_model", "vla_head": "action_head"},
    }
    return folder, model, eagle, head


def test_a_key_that_fluxvla_ignores_is_a_remark(gr00t):
    assert any("traj_length = 99 is left out" in line for line in remarks(gr00t[1]))


def test_its_own_mapping_loads_every_weight(gr00t, published, capsys):
    framework = build_framework(from_fluxvla(gr00t[1]), action_dim=published.D, state_dim=published.S)
    count = len(framework.state_dict())
    assert f"loaded {count} of the model's {count} tensors" in capsys.readouterr().out


def test_gr00t_of_fluxvla_computes_the_same_after_saving(gr00t, published, tmp_path):
    folder, model, eagle, head = gr00t
    framework = build_framework(from_fluxvla(model), action_dim=published.D, state_dim=published.S).eval()
    framework.save_pretrained(tmp_path / "saved")
    framework = Framework.from_pretrained(tmp_path / "saved")  # the mapping is data, so it is saved
    batch = framework.prepare([published.example()])
    with torch.no_grad():
        found = framework.actions(batch, None, published.noise())
    assert (found - published.gr00t_actions(eagle, head, batch)).abs().max() < 1e-5


def test_a_mapping_survives_the_yaml(gr00t, tmp_path):
    _, model, _, _ = gr00t
    (tmp_path / "config.py").write_text(f"model = {model!r}\n")
    main([str(tmp_path / "config.py"), "--out", str(tmp_path / "config.yaml")])
    assert load_config(tmp_path / "config.yaml").section("framework").to_dict() == from_fluxvla(model)


# ---------------------------------------------------------------- π0 as FluxVLA's repository writes it


def test_the_three_components_of_paligemma_are_one_backbone(section):
    found = section("published_pi0")
    assert found["vlm"] == {"base_vlm": "google/paligemma-3b-pt-224"}
    assert (found["action_horizon"], found["max_action_dim"], found["max_state_dim"]) == (50, 8, 8)
    sizes = {key: found["action_model"][key] for key in ("hidden_size", "intermediate_size", "num_heads")}
    assert sizes == {"hidden_size": 1024, "intermediate_size": 4096, "num_heads": 8}


def test_the_mapping_of_published_pi0_loads_openpi_weights(section, published, vlms, tmp_path, capsys):
    """The same keys at the sizes of a tiny PaliGemma."""
    weights = published.drawn(published.openpi_shapes(vlms["paligemma"], pi05=False))
    embedding = weights.pop(f"{published.PALIGEMMA}.model.language_model.embed_tokens.weight")
    weights[f"{published.PALIGEMMA}.lm_head.weight"] = (
        embedding  # one of two tied names, as in the public file
    )
    del weights[f"{published.EXPERT}.lm_head.weight"]
    save_file(weights, tmp_path / "model.safetensors")
    found = section("published_pi0")
    found |= {"pretrained_name_or_path": str(tmp_path / "model.safetensors"), "strict_mapping": True}
    found.pop("inference_model")
    found["vlm"]["base_vlm"] = str(vlms["paligemma"])
    found["action_model"] |= {"hidden_size": 16, "intermediate_size": 24, "num_heads": 4}
    framework = build_framework(found, action_dim=7, state_dim=8)
    count = len(framework.state_dict())
    assert f"loaded {count} of the model's {count} tensors" in capsys.readouterr().out
    assert torch.equal(framework.vlm.model.get_input_embeddings().weight, embedding)
