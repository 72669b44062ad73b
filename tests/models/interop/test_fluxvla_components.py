"""The head, the projector and the configurations of FluxVLA's guide, as a user has them: registered, trained, used."""

from collections.abc import Callable
from functools import partial

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from torch import nn
from torch.distributed.fsdp.wrap import lambda_auto_wrap_policy, transformer_auto_wrap_policy

from vla_bench.models.backbones.eagle import compose_eagle
from vla_bench.models.backbones.tiny_composed import write_tiny_component
from vla_bench.models.features import Features
from vla_bench.models.frameworks.build import build_framework
from vla_bench.models.frameworks.framework import Framework
from vla_bench.models.heads.head import HeadSizes
from vla_bench.models.interop.fluxvla import from_fluxvla, remarks
from vla_bench.models.interop.fluxvla_components import fluxvla_head, fluxvla_projector
from vla_bench.registry import FRAMEWORKS, HEADS, PROJECTORS, RegistryError


class MyActionHead(nn.Module):  # the guide's, word for word but for its comments
    def __init__(
        self,
        hidden_size: int = 1024,
        state_dim: int = 64,
        action_dim: int = 32,
        input_embedding_dim: int = 1536,
        traj_length: int = 10,
        ori_action_dim: int | None = None,
    ):
        super().__init__()
        self.hidden_size = hidden_size
        self.state_dim = state_dim
        self.action_dim = action_dim
        self.traj_length = traj_length
        self.ori_action_dim = ori_action_dim or action_dim
        self.state_encoder = nn.Sequential(
            nn.Linear(state_dim, hidden_size), nn.ReLU(), nn.Linear(hidden_size, hidden_size)
        )
        self.action_decoder = nn.Sequential(
            nn.Linear(input_embedding_dim + hidden_size, hidden_size),
            nn.ReLU(),
            nn.Linear(hidden_size, hidden_size),
            nn.ReLU(),
            nn.Linear(hidden_size, traj_length * action_dim),
        )

    def forward(self, input_features, states, attention_mask, actions, action_masks, **kwargs) -> dict:
        B = input_features.shape[0]
        state_emb = self.state_encoder(states)
        seq_lengths = attention_mask.sum(dim=1).long() - 1
        pooled = input_features[range(B), seq_lengths]
        combined = torch.cat([pooled, state_emb], dim=-1)
        pred_flat = self.action_decoder(combined)
        pred_actions = pred_flat.view(B, self.traj_length, self.action_dim)
        loss = nn.functional.mse_loss(pred_actions[action_masks.bool()], actions[action_masks.bool()])
        return {"pred_actions": pred_actions, "loss": loss}

    def predict_action(self, input_features, states, attention_mask, **kwargs) -> torch.Tensor:
        B = input_features.shape[0]
        state_emb = self.state_encoder(states)
        seq_lengths = attention_mask.sum(dim=1).long() - 1
        pooled = input_features[range(B), seq_lengths]
        combined = torch.cat([pooled, state_emb], dim=-1)
        pred_flat = self.action_decoder(combined)
        return pred_flat.view(B, self.traj_length, self.action_dim)

    def get_fsdp_wrapping_policy(self) -> Callable:
        return None


class MyProjector(nn.Module):  # the guide's
    def __init__(self, in_dim: int, out_dim: int):
        super().__init__()
        self.projector = nn.Sequential(nn.Linear(in_dim, out_dim), nn.GELU(), nn.Linear(out_dim, out_dim))

    def forward(self, input_features: torch.Tensor) -> torch.Tensor:
        return self.projector(input_features)


HEAD = dict(
    type="MyActionHead",
    hidden_size=16,
    state_dim=6,
    action_dim=8,
    input_embedding_dim=1536,
    traj_length=4,
    ori_action_dim=3,
)


@pytest.fixture(scope="module", autouse=True)
def registered():
    """The guide's classes under the names that its configurations use, for this module alone."""
    HEADS.register("MyActionHead")(fluxvla_head(MyActionHead))
    PROJECTORS.register("MyProjector")(fluxvla_projector(MyProjector))
    yield
    del HEADS.classes["MyActionHead"], PROJECTORS.classes["MyProjector"]


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A tiny Eagle and the tiny components of OpenVLA."""
    home = tmp_path_factory.mktemp("guide")
    for part in ("siglip", "qwen3", "dinov2_with_registers", "llama"):
        write_tiny_component(part, home / part, image_size=32, hidden_size=32, num_layers=2)
    eagle = compose_eagle(home / "siglip", home / "qwen3", projector="Linear")
    eagle.model.save_pretrained(home / "eagle")
    eagle.save_config(home / "eagle")
    return home


@pytest.fixture(scope="module")
def guide(folders) -> dict[str, dict]:
    """The two configurations of the guide that use a class of its reader, with paths of tiny models."""
    eagle = dict(type="EagleBackbone", vlm_path=str(folders / "eagle"))
    vision = dict(
        type="DinoSigLIPViTBackbone",
        vision_backbone_id="dinosiglip-vit-so-224px",
        dino_config=dict(model_id=str(folders / "dinov2_with_registers"), image_size=32, patch_size=14),
        siglip_config=dict(model_id=str(folders / "siglip"), image_size=32, patch_size=14),
    )
    llm = dict(
        type="LLaMa2LLMBackbone", llm_backbone_id="llama2-7b-pure_causal", llm_path=str(folders / "llama")
    )
    composed = {"vision_backbone": vision, "llm_backbone": llm}
    projector = dict(type="MyProjector", in_dim=2176, out_dim=4096)
    return {
        "head": dict(type="LlavaVLA", vlm_backbone=eagle, vla_head=HEAD, freeze_vlm_backbone=False),
        "projector": dict(type="LlavaVLA", **composed, projector=projector, vla_head=HEAD),
    }


def samples() -> list[dict]:
    chunk = np.linspace(-1, 1, 12, dtype=np.float32).reshape(4, 3)
    example = {"image": [Image.new("RGB", (32, 32), "teal")], "lang": "pick up the cup", "dataset": "demo"}
    example |= {"state": np.zeros(6, np.float32), "action": chunk, "action_is_pad": np.zeros(4, bool)}
    return [example, example | {"lang": "push", "action": -chunk}]


@pytest.mark.parametrize("name", ["head", "projector"])
def test_a_configuration_of_the_guide_learns_predicts_and_is_loaded_again(guide, name, tmp_path):
    framework = build_framework(from_fluxvla(guide[name]), action_dim=3, state_dim=6, load_weights=False)
    rates = torch.optim.AdamW([p for p in framework.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    for _ in range(30):
        loss = framework(samples()[:1])["action_loss"]
        rates.zero_grad()
        loss.backward()
        rates.step()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]
    actions = framework.predict_action(samples())["normalized_actions"]
    assert actions.shape == (2, 4, 3)
    framework.save_pretrained(tmp_path / "checkpoint")
    again = Framework.from_pretrained(tmp_path / "checkpoint")
    assert (again.predict_action(samples())["normalized_actions"] == actions).all()
    assert type(again.action_model.head) is MyActionHead


def test_the_sizes_come_from_the_neighbours_and_the_rest_from_the_configuration(guide):
    section = from_fluxvla(guide["head"])
    assert section["action_model"] == {"type": "MyActionHead", "hidden_size": 16, "ori_action_dim": 3}
    assert (section["action_horizon"], section["max_action_dim"], section["max_state_dim"]) == (4, 8, 6)
    head = build_framework(section, action_dim=3, state_dim=6, load_weights=False).action_model.head
    assert (head.traj_length, head.action_dim, head.state_dim, head.ori_action_dim) == (4, 8, 6, 3)
    assert head.action_decoder[0].in_features == 32 + 16  # the backbone's width, not the 1536 of the guide


def test_what_a_user_head_does_not_say_is_its_own_default(guide):
    model = guide["head"] | {"vla_head": dict(type="MyActionHead", hidden_size=16)}
    section = from_fluxvla(model)
    assert (section["action_horizon"], section["max_action_dim"], section["max_state_dim"]) == (10, 32, 64)


def test_the_left_out_width_is_a_remark(guide):
    assert [
        r for r in remarks(guide["head"]) if r.startswith("vla_head.input_embedding_dim = 1536 is left out")
    ]


def test_the_adapter_computes_what_the_head_computes():
    torch.manual_seed(0)
    adapted = fluxvla_head(MyActionHead)(HeadSizes(5, 8, 4, state_dim=6), hidden_size=16)
    hidden, state, actions = torch.randn(2, 7, 5), torch.randn(2, 6), torch.randn(2, 4, 8)
    mask = torch.tensor([[1, 1, 1, 1, 1, 0, 0], [1, 1, 1, 1, 1, 1, 1]]).bool()
    is_pad = torch.tensor([[False, False, True, True], [False] * 4])
    features = Features(hidden, mask, state=state)
    theirs = adapted.head(hidden, state, mask, actions, ~is_pad)
    assert torch.equal(adapted.loss(features, actions, is_pad)["action_loss"], theirs["loss"])
    assert torch.equal(adapted.sample(features), theirs["pred_actions"])


@pytest.mark.parametrize(
    "mask", [[0, 0, 1, 1, 1], [1, 0, 1, 0, 1]], ids=["left padding", "a masked camera in the middle"]
)
def test_a_head_that_counts_tokens_finds_the_last_one_wherever_the_padding_is(mask):
    torch.manual_seed(0)
    adapted = fluxvla_head(MyActionHead)(HeadSizes(5, 8, 4, state_dim=6), hidden_size=16)
    hidden, state, seen = torch.randn(1, 5, 5), torch.randn(1, 6), torch.tensor([mask]).bool()
    valid = hidden[:, seen[0]]
    alone = Features(valid, torch.ones(valid.shape[:2]).bool(), state=state)
    assert torch.allclose(adapted.sample(Features(hidden, seen, state=state)), adapted.sample(alone))


def test_a_projector_is_called_with_the_patches_alone():
    adapted = fluxvla_projector(MyProjector)(vision_size=3, text_size=5)
    patches = torch.randn(2, 6, 3)
    assert torch.equal(adapted(patches, (2, 3)), adapted.projector(patches))
    assert adapted.token_grid((2, 3)) == (2, 3)
    with pytest.raises(ValueError, match="6 patches do not fill a grid of 2 x 2"):
        adapted(patches, (2, 2))


def head_with(**methods) -> type:
    return type("Changed", (MyActionHead,), methods)


@pytest.mark.parametrize(
    ("methods", "message"),
    [
        ({"predict_action": None}, "Changed has no method predict_action"),
        ({"predict_action": lambda self, features: 0}, "Changed.predict_action.* cannot be called with"),
        ({"forward": lambda self, input_features: 0}, "Changed.forward.* cannot be called with"),
    ],
)
def test_a_head_that_is_not_as_the_guide_says_is_refused_at_once(methods, message):
    with pytest.raises(RegistryError, match=message):
        fluxvla_head(head_with(**methods))


@pytest.mark.parametrize(
    ("returned", "message"),
    [
        (
            {"action_loss": torch.tensor(0.0)},
            r"Changed.forward returned \['action_loss'\]; expected .*'loss'",
        ),
        (torch.tensor(0.0), "Changed.forward returned a Tensor"),
    ],
)
def test_a_forward_without_a_loss_is_refused(returned, message):
    cls = head_with(
        forward=lambda self, input_features, states, attention_mask, actions, action_masks: returned
    )
    adapted = fluxvla_head(cls)(HeadSizes(5, 8, 4, state_dim=6), hidden_size=16)
    features = Features(torch.randn(1, 2, 5), torch.ones(1, 2).bool(), state=torch.randn(1, 6))
    with pytest.raises(ValueError, match=message):
        adapted.loss(features, torch.zeros(1, 4, 8), torch.zeros(1, 4).bool())


def test_every_scalar_of_forward_is_logged():
    def forward(self, input_features, states, attention_mask, actions, action_masks):
        return {"loss": actions.sum(), "l1": actions.abs().sum(), "pred_actions": actions, "name": "x"}

    adapted = fluxvla_head(head_with(forward=forward))(HeadSizes(5, 8, 4, state_dim=6), hidden_size=16)
    features = Features(torch.randn(1, 2, 5), torch.ones(1, 2).bool(), state=torch.randn(1, 6))
    losses = adapted.loss(features, -torch.ones(1, 4, 8), torch.zeros(1, 4).bool())
    assert losses == {"action_loss": torch.tensor(-32.0), "l1": torch.tensor(32.0)}


def test_a_chunk_of_another_length_is_refused():
    cls = head_with(predict_action=lambda self, input_features, states, attention_mask: torch.zeros(1, 3, 8))
    adapted = fluxvla_head(cls)(HeadSizes(5, 8, 4, state_dim=6), hidden_size=16)
    features = Features(torch.randn(1, 2, 5), torch.ones(1, 2).bool(), state=torch.randn(1, 6))
    with pytest.raises(ValueError, match=r"Changed.predict_action is \[1, 3, 8\], expected \[1, 4, 8\]"):
        adapted.sample(features)


def test_a_batch_of_nothing_but_padding_has_no_loss():
    adapted = fluxvla_head(MyActionHead)(HeadSizes(5, 8, 4, state_dim=6), hidden_size=16)
    features = Features(torch.randn(1, 2, 5), torch.ones(1, 2).bool(), state=torch.randn(1, 6))
    with pytest.raises(ValueError, match="every action of the batch is padding"):
        adapted.loss(features, torch.zeros(1, 4, 8), torch.ones(1, 4).bool())


def test_a_head_that_takes_a_state_says_so_when_there_is_none():
    with pytest.raises(ValueError, match="MyActionHead takes a state_dim, and the dataset has no state"):
        fluxvla_head(MyActionHead)(HeadSizes(5, 8, 4), hidden_size=16)


@pytest.mark.parametrize(
    ("policy", "classes"),
    [
        (None, set()),
        (partial(transformer_auto_wrap_policy, transformer_layer_cls={nn.Linear}), {nn.Linear}),
    ],
)
def test_a_wrapping_policy_becomes_the_classes_that_it_names(policy, classes):
    cls = head_with(get_fsdp_wrapping_policy=lambda self: policy)
    assert fluxvla_head(cls)(HeadSizes(5, 8, 4, state_dim=6), hidden_size=16).layer_classes() == classes


def test_a_wrapping_policy_without_classes_is_refused_when_it_is_needed():
    policy = partial(lambda_auto_wrap_policy, lambda_fn=bool)
    cls = head_with(get_fsdp_wrapping_policy=lambda self: policy)
    adapted = fluxvla_head(cls)(HeadSizes(5, 8, 4, state_dim=6), hidden_size=16)
    with pytest.raises(ValueError, match="Changed.get_fsdp_wrapping_policy .* names no classes"):
        adapted.layer_classes()


# ---------------------------------------------------------------- what the guide calls things, and what they are here


@pytest.mark.parametrize("registry", [HEADS, PROJECTORS, FRAMEWORKS], ids=lambda registry: registry.kind)
def test_register_module_says_what_it_is_called_here(registry):
    with pytest.raises(RegistryError, match=r"register_module .* register.*Name.*fluxvla_head"):
        registry.register_module()


@pytest.mark.parametrize(
    ("registry", "cls", "adapter"),
    [(HEADS, MyActionHead, "fluxvla_head"), (PROJECTORS, MyProjector, "fluxvla_projector")],
)
def test_a_class_of_the_guide_without_the_adapter_is_told_of_it(registry, cls, adapter):
    with pytest.raises(RegistryError, match=adapter):
        registry.register("Plain")(cls)


def test_a_native_head_that_keeps_the_guides_method_is_told_its_name():
    cls = type(
        "Kept", (HEADS.get("Transformer"),), {"reads": "last", "get_fsdp_wrapping_policy": lambda self: None}
    )
    with pytest.raises(RegistryError, match="Kept defines get_fsdp_wrapping_policy.*layer_classes"):
        HEADS.register("Kept")(cls)


@pytest.mark.parametrize(
    ("name", "here"),
    [("VLAS", "FRAMEWORKS"), ("VLM_BACKBONES", "BACKBONES"), ("build_head_from_cfg", "HEADS.build")],
)
def test_a_name_of_the_guide_in_the_registry_says_what_it_is_called_here(name, here):
    with pytest.raises(ImportError, match=f"{name} .* {here}"):
        exec(f"from vla_bench.registry import {name}")


def test_a_policy_and_a_head_say_what_their_blocks_are_asked_for_with(guide):
    framework = build_framework(from_fluxvla(guide["head"]), action_dim=3, state_dim=6, load_weights=False)
    for asked, here in ((framework, "fsdp_classes"), (framework.action_model, "layer_classes")):
        with pytest.raises(AttributeError, match=f"FluxVLA's; here it is {here}"):
            asked.get_fsdp_wrapping_policy()


# ---------------------------------------------------------------- types are taken at their word


def test_a_backbone_of_another_type_than_its_folder_is_refused(guide, folders, vlms):
    backbone = dict(type="EagleBackbone", vlm_path=str(vlms["paligemma"]))
    with pytest.raises(RegistryError, match="vlm_backbone.type is 'EagleBackbone', .* is a PaliGemma"):
        from_fluxvla(guide["head"] | {"vlm_backbone": backbone})


def test_a_published_backbone_of_another_type_is_refused(guide):
    backbone = dict(type="QWen2_5VL", vlm_backbone_id="paligemma_3b_pt_224")
    with pytest.raises(RegistryError, match="vlm_backbone.type is 'QWen2_5VL', .* is a PaliGemma"):
        from_fluxvla(guide["head"] | {"vlm_backbone": backbone})


def test_an_own_framework_and_its_parameter_are_known(guide):
    llava = FRAMEWORKS.get("LlavaVLA")

    class MyVLA(llava):
        def __init__(self, vlm, head, prepare, my_custom_param: int = 256):
            super().__init__(vlm, head, prepare)
            self.my_custom_param = my_custom_param

    FRAMEWORKS.register("MyVLA")(MyVLA)
    try:
        section = from_fluxvla(guide["head"] | {"type": "MyVLA", "my_custom_param": 8})
        assert build_framework(section, action_dim=3, state_dim=6, load_weights=False).my_custom_param == 8
        with pytest.raises(RegistryError, match="takes no 'my_custm_param'; did you mean 'my_custom_param'"):
            from_fluxvla(guide["head"] | {"type": "MyVLA", "my_custm_param": 8})
    finally:
        del FRAMEWORKS.classes["MyVLA"]


def test_a_misspelt_parameter_of_a_user_head_is_refused_with_the_nearest(guide):
    with pytest.raises(RegistryError, match="takes no 'hiden_size'; did you mean 'hidden_size'"):
        from_fluxvla(guide["head"] | {"vla_head": dict(type="MyActionHead", hiden_size=16)})


def test_a_mapping_reaches_into_the_adapted_head(guide, tmp_path):
    plain = MyActionHead(16, 6, 8, 32, 4)
    save_file({f"action_head.{n}": t for n, t in plain.state_dict().items()}, tmp_path / "head.safetensors")
    model = guide["head"] | {
        "pretrained_name_or_path": str(tmp_path / "head.safetensors"),
        "name_mapping": {"vla_head": "action_head"},
    }
    framework = build_framework(from_fluxvla(model), action_dim=3, state_dim=6)
    found = framework.action_model.head.state_dict()
    assert all(torch.equal(found[name], value) for name, value in plain.state_dict().items())
