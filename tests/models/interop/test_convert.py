"""The conversion of a checkpoint to a run folder: all or nothing, with every fault on one line."""

import hashlib
import json
import shutil

import numpy as np
import pytest
from omegaconf import OmegaConf
from safetensors.torch import load_file, save_file

from vla_bench.config import ConfigError
from vla_bench.data.normalize import Normalizer, load_statistics, save_statistics
from vla_bench.files import read_manifest
from vla_bench.models.interop.checkpoint_formats import CHECKPOINT_FORMATS
from vla_bench.models.interop.convert import PolicySettings, convert, converted_spec, main
from vla_bench.serving.policy import Policy
from vla_bench.serving.policy import main as serve

EXPERT = "paligemma_with_expert.gemma_expert"


@pytest.fixture(scope="module")
def oft(published, vlms, tmp_path_factory):
    """A StarVLA run of a QwenOFT, and our configuration for it."""
    home = tmp_path_factory.mktemp("oft")
    _, weights = published.hf_weights(vlms["qwen2_5_vl"])
    run = published.starvla_run(
        home / "theirs",
        weights,
        published.residual_head_weights(),
        {"action_horizon": 2},
        include_state=False,
    )
    framework = {"vlm": {"base_vlm": str(vlms["qwen2_5_vl"])}}
    return run, {"framework": framework, "policy": published.policy_section(False)}


def test_the_run_records_where_it_comes_from(oft, tmp_path):
    report = convert("starvla_oft", *oft, tmp_path / "run")
    record = json.loads((tmp_path / "run/conversion.json").read_text())
    assert record["format"] == "starvla_oft" and record["source"] == str(oft[0])
    assert record["report"] == str(report)


def test_a_run_is_never_written_over(oft, tmp_path):
    (tmp_path / "run").mkdir()
    with pytest.raises(FileExistsError, match="never written over"):
        convert("starvla_oft", *oft, tmp_path / "run")


def test_the_older_name_of_the_option_still_works(oft, tmp_path, capsys):
    run, config = oft
    OmegaConf.save(OmegaConf.create(config), tmp_path / "ours.yaml")
    for option in ("--format", "--layout"):
        words = [option, "starvla_oft", str(run), "--config", str(tmp_path / "ours.yaml")]
        main([*words, "--out", str(tmp_path / option)])
    assert capsys.readouterr().out.count("wrote ") == 2


# ---------------------------------------------------------------- statistics


@pytest.fixture
def rare(tmp_path):
    """Statistics without extremes, of a number that is 1 in five of a thousand frames and 0 otherwise."""
    event = np.zeros(1000)
    event[:5] = 1
    q01, q99 = np.quantile(event, [0.01, 0.99])
    values = {"mean": event.mean(), "std": event.std(), "q01": q01, "q99": q99}
    path = tmp_path / "norm_stats.json"
    path.write_text(json.dumps({"norm_stats": {"actions": {key: [value] for key, value in values.items()}}}))
    return path


def settings(mode: str) -> PolicySettings:
    return PolicySettings({"names": ["a"]}, ["front"], [32, 32], 10, {"action": mode})


def test_a_rare_event_survives_statistics_without_extremes(rare, tmp_path):
    _, content = converted_spec(settings("mean_std"), 4, rare)
    save_statistics(tmp_path / "saved.json", content)
    normalizer = Normalizer(load_statistics(tmp_path / "saved.json")["openpi"]["action"], "mean_std")
    assert normalizer.unnormalize(normalizer.normalize(np.array([1.0]))) == pytest.approx(1)


@pytest.mark.parametrize("mode", ["min_max", "binary"])
def test_a_mode_that_needs_extremes_is_refused_without_them(rare, mode):
    message = f"norm_stats.json: openpi.action: .* no extremes, which {mode} needs"
    with pytest.raises(ValueError, match=message):
        converted_spec(settings(mode), 4, rare)


# ---------------------------------------------------------------- the program


def stopped(capsys, words) -> str:
    """The last line that the program printed before it stopped with status 2."""
    with pytest.raises(SystemExit) as stop:
        main([str(word) for word in words])
    assert stop.value.code == 2
    return capsys.readouterr().err


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "framework is missing"),
        ("[1]", "config.yaml holds a list"),
        ("a: [1", "config.yaml is not YAML"),
        ("framework: {qwenvl: {base_vlm: x}}", "framework.action_model is missing"),
        ("framework: {qwenvl: {base_vlm: x}, action_model: {}}", "framework.action_model has no length"),
        (
            "framework: {qwenvl: {base_vlm: x}, action_model: {action_horizon: 4}}\ndatasets: null",
            "is damaged",
        ),
    ],
)
def test_a_broken_starvla_configuration_is_one_line(vlms, published, tmp_path, capsys, text, message):
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "checkpoints/steps_1_pytorch_model.pt").touch()
    (tmp_path / "config.yaml").write_text(text)
    head = {"hidden_size": published.SIZES.width, "num_heads": published.SIZES.heads, "num_layers": 1}
    framework = {"vlm": {"base_vlm": str(vlms["qwen2_5_vl"])}, "action_model": head}
    ours = {"framework": framework, "policy": published.policy_section(False)}
    OmegaConf.save(OmegaConf.create(ours), tmp_path / "ours.yaml")
    words = ["--format", "starvla_gr00t", tmp_path, "--config", tmp_path / "ours.yaml"]
    error = stopped(capsys, [*words, "--out", tmp_path / "run"]).splitlines()[-1]
    assert error.startswith("error: ") and message in error
    assert not (tmp_path / "run").exists()


def test_the_program_lists_the_formats(capsys):
    main(["--list"])
    listed = capsys.readouterr().out
    assert all(name in listed for name in CHECKPOINT_FORMATS)


def test_a_missing_configuration_is_one_line(capsys):
    error = stopped(capsys, ["--format", "openpi_pi0", "x", "--config", "no.yaml", "--out", "y"])
    assert error.startswith("error: ") and error.count("\n") == 1


# ---------------------------------------------------------------- what the tensors show, and what nothing shows


@pytest.fixture(scope="module", params=["openpi_pi0", "openpi_pi05"])
def openpi(request, published, vlms, tmp_path_factory):
    """Weights of a π0 or a π0.5 with their statistics, and a configuration without any size: (format, folder, config)."""
    home = tmp_path_factory.mktemp(request.param)
    weights = published.drawn(published.openpi_shapes(vlms["paligemma"], request.param == "openpi_pi05"))
    embedding = weights[f"{published.PALIGEMMA}.model.language_model.embed_tokens.weight"]
    weights[f"{published.PALIGEMMA}.lm_head.weight"] = embedding.clone()
    save_file(weights, home / "model.safetensors")
    statistics = {"actions": published.column(published.D), "state": published.column(published.S)}
    (home / "norm_stats.json").write_text(json.dumps({"norm_stats": statistics}))
    framework = {"vlm": {"base_vlm": str(vlms["paligemma"])}, "action_horizon": published.T}
    return request.param, home, {"framework": framework, "policy": published.policy_section()}


def converted_section(run) -> dict:
    return OmegaConf.to_container(OmegaConf.load(run / "config.yaml"))["framework"]


def test_the_sizes_of_openpi_are_those_of_its_tensors(openpi, tmp_path):
    format_name, source, config = openpi
    assert convert(format_name, source, config, tmp_path / "run").complete
    found = converted_section(tmp_path / "run")
    head = found["action_model"]
    assert (found["max_action_dim"], found.get("max_state_dim")) == (
        8,
        8 if format_name == "openpi_pi0" else None,
    )
    assert (head["hidden_size"], head["intermediate_size"]) == (16, 24)
    shapes = {name: t.shape for name, t in load_file(source / "model.safetensors").items()}
    rows = [shapes[f"{EXPERT}.model.layers.0.self_attn.{n}_proj.weight"][0] for n in "qk"]
    assert head["num_heads"] * rows[1] == rows[0]


@pytest.mark.parametrize("key", ["chunk_size", "action_horizon"])
def test_the_horizon_is_read_from_the_configuration_beside_the_weights(openpi, tmp_path, key):
    format_name, source, config = openpi
    framework = {"vlm": config["framework"]["vlm"]}
    (source / "config.json").write_text(json.dumps({key: 7, "num_inference_steps": 3}))
    try:
        report = convert(format_name, source, {**config, "framework": framework}, tmp_path / "run")
    finally:
        (source / "config.json").unlink()
    found = converted_section(tmp_path / "run")
    assert (found["action_horizon"], found["action_model"]["num_inference_timesteps"]) == (7, 3)
    assert "action_horizon 7, from the checkpoint's config.json" in report.assumed


def test_the_horizon_is_listed_as_taken_on_trust(openpi, tmp_path, published):
    format_name, source, config = openpi
    report = convert(format_name, source, config, tmp_path / "run")
    assert f"taken on trust: action_horizon {published.T}, from your configuration" in str(report)
    assert any(sentence.startswith("action_model.num_heads") for sentence in report.assumed)


def test_the_prompt_of_a_pi05_is_taken_on_trust(openpi, tmp_path):
    format_name, source, config = openpi
    report = convert(format_name, source, config, tmp_path / "run")
    assert any("discrete_state_input" in said for said in report.assumed) == (format_name == "openpi_pi05")


@pytest.mark.parametrize("openpi", ["openpi_pi05"], indirect=True)
def test_a_pi05_without_a_state_is_converted_without_one(openpi, published, tmp_path):
    format_name, source, config = openpi
    (source / "config.json").write_text(json.dumps({"discrete_state_input": False}))
    try:
        with pytest.raises(
            ConfigError, match="policy.state: this run was trained without a state .* leave it out"
        ):
            convert(format_name, source, config, tmp_path / "run")
        config = {**config, "policy": published.policy_section(False)}
        report = convert(format_name, source, config, tmp_path / "run")
    finally:
        (source / "config.json").unlink()
    assert not any("discrete_state_input" in said for said in report.assumed)
    policy = Policy.from_pretrained(tmp_path / "run")
    assert policy.spec.state is None and policy.framework.prepare.prompt == "{lang}\n"
    batch = policy.framework.prepare([published.example(state=False)])
    pieces = policy.framework.vlm.prepare.processor.tokenizer.convert_ids_to_tokens(
        batch["inputs"]["input_ids"][0]
    )
    assert pieces[-1] in ("\n", "<0x0A>", "Ċ"), pieces[-3:]


def test_weights_of_the_other_pi_are_recognised(openpi, tmp_path):
    format_name, source, config = openpi
    other = {"openpi_pi0": "openpi_pi05", "openpi_pi05": "openpi_pi0"}[format_name]
    with pytest.raises(ConfigError, match=f"use --format {format_name}$"):
        convert(other, source, config, tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("name", ["QwenGR00T", "QwenPI", "QwenFast", "QwenPI_v3"])
def test_a_run_of_another_framework_is_recognised(oft, tmp_path, name):
    source, config = oft
    theirs = OmegaConf.load(source / "config.yaml")
    shutil.copytree(source, tmp_path / "theirs")
    theirs.framework.name = name
    OmegaConf.save(theirs, tmp_path / "theirs/config.yaml")
    with pytest.raises(ConfigError, match=f"a run of StarVLA's {name}, not of QwenOFT"):
        convert("starvla_oft", tmp_path / "theirs", config, tmp_path / "run")


def test_a_processor_for_another_image_size_is_named(openpi, vlms, tmp_path):
    format_name, source, config = openpi
    shutil.copytree(vlms["paligemma"], tmp_path / "vlm")
    for path in (tmp_path / "vlm").glob("*processor_config.json"):
        text = path.read_text()
        path.write_text(text.replace('"height": 32', '"height": 64').replace('"width": 32', '"width": 64'))
    config = {**config, "framework": {**config["framework"], "vlm": {"base_vlm": str(tmp_path / "vlm")}}}
    with pytest.raises(ConfigError, match=r"makes images of 64 pixels, its vision encoder reads 32"):
        convert(format_name, source, config, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_correction_is_given_on_the_command_line(oft, tmp_path, capsys):
    source, config = oft
    OmegaConf.save(OmegaConf.create(config), tmp_path / "ours.yaml")
    words = ["--format", "starvla_oft", str(source), "--config", str(tmp_path / "ours.yaml")]
    main([*words, "--out", str(tmp_path / "run"), "--set", "action_horizon=3"])
    assert "action_horizon 3, from the checkpoint's config.yaml" in capsys.readouterr().out
    assert json.loads((tmp_path / "run/conversion.json").read_text())["corrections"] == ["action_horizon=3"]


# ---------------------------------------------------------------- the manifest, and sources that are damaged


@pytest.fixture(scope="module")
def written(oft, tmp_path_factory):
    """A run that was converted."""
    run = tmp_path_factory.mktemp("written") / "run"
    convert("starvla_oft", *oft, run)
    return run


STEP = "checkpoints/step_000000"


def test_every_file_of_the_checkpoint_is_in_its_manifest(written):
    folder, listed = written / STEP, read_manifest(written / STEP)
    files = {p.relative_to(folder).as_posix(): p for p in folder.rglob("*") if p.is_file()}
    assert listed.keys() == files.keys() - {"manifest.json"} and "policy.json" in listed
    for name, entry in listed.items():
        assert entry["size"] == files[name].stat().st_size
        assert entry["sha256"] == hashlib.sha256(files[name].read_bytes()).hexdigest()


def test_a_converted_policy_is_verified(written, capsys):
    serve([str(written), "--verify"])
    assert "fingerprint" in capsys.readouterr().out


@pytest.mark.parametrize("name", ["model.safetensors", "policy.json", "framework.json", "vlm/config.json"])
def test_a_flipped_bit_of_a_converted_policy_is_noticed(written, tmp_path, capsys, name):
    run = shutil.copytree(written, tmp_path / "run")
    content = bytearray((run / STEP / name).read_bytes())
    content[-2] ^= 1
    (run / STEP / name).write_bytes(content)
    with pytest.raises(SystemExit):
        serve([str(run), "--verify"])
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and f"{name} has other content than when it was saved" in error


def rewritten(change):
    """A damage that changes some of the tensors."""

    def damage(folder):
        weights = load_file(folder / "model.safetensors")
        change(weights)
        save_file(weights, folder / "model.safetensors")

    return damage


def in_shards(gone: bool = False, untold: bool = False):
    def damage(folder):
        weights = sorted(load_file(folder / "model.safetensors").items())
        halves = [dict(weights[::2]), dict(weights[1::2])]
        names = [f"model-{i}-of-2.safetensors" for i in (1, 2)]
        for name, half in zip(names, halves):
            save_file(half, folder / name)
        listed = {key: name for name, half in zip(names, halves) for key in half}
        (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": listed}))
        (folder / "model.safetensors").unlink()
        if gone:
            (folder / names[1]).unlink()
        if untold:
            (folder / "model.safetensors.index.json").write_text("{}")

    return damage


def text_in(name: str, text: str):
    return lambda folder: (folder / name).write_text(text)


def cut(part: float):
    def damage(folder):
        content = (folder / "model.safetensors").read_bytes()
        (folder / "model.safetensors").write_bytes(content[: int(part * len(content))])

    return damage


def first(weights, value):
    next(iter(weights.values())).view(-1)[-1] = value


DAMAGES = {  # what was done, and what the one line says
    "cut in its tensors": (cut(0.7), "model.safetensors is damaged: it "),
    "cut in its header": (cut(0.001), "model.safetensors is damaged: it "),
    "empty": (cut(0), "model.safetensors is damaged: it is empty"),
    "a text": (text_in("model.safetensors", "<html>not found</html>"), "model.safetensors is damaged: it "),
    "a pointer": (
        text_in("model.safetensors", "version https://git-lfs.github.com/spec/v1\n"),
        "is a git-lfs pointer",
    ),
    "NaN": (rewritten(lambda weights: first(weights, float("nan"))), "hold NaN or infinity"),
    "infinity": (rewritten(lambda weights: first(weights, float("-inf"))), "hold NaN or infinity"),
    "a missing shard": (in_shards(gone=True), "not there: model-2-of-2.safetensors"),
    "an index that says nothing": (in_shards(untold=True), "has no weight_map"),
    "a configuration that is no JSON": (text_in("config.json", "{'type': 'pi0'"), "config.json is not JSON"),
    "a configuration that is a list": (text_in("config.json", "[1]"), "config.json holds a list"),
    "an empty configuration": (text_in("config.json", ""), "config.json is not JSON"),
    "statistics that are no JSON": (text_in("norm_stats.json", "{"), "norm_stats.json is not JSON"),
    "no weights at all": (lambda folder: (folder / "model.safetensors").unlink(), "holds no weights"),
}


@pytest.mark.parametrize("name", DAMAGES)
def test_a_damaged_source_is_one_line_and_leaves_no_folder(openpi, tmp_path, capsys, name):
    format_name, source, config = openpi
    damage, said = DAMAGES[name]
    damaged = shutil.copytree(source, tmp_path / "theirs")
    damage(damaged)
    OmegaConf.save(OmegaConf.create(config), tmp_path / "ours.yaml")
    words = ["--format", format_name, damaged, "--config", tmp_path / "ours.yaml"]
    error = stopped(capsys, [*words, "--out", tmp_path / "out/run"])
    assert error.startswith("error: ") and error.count("\n") == 1 and said in error, error
    assert str(tmp_path) in error  # it names the file
    assert not list((tmp_path / "out").rglob("*") if (tmp_path / "out").exists() else [])


def test_whole_shards_are_converted(openpi, tmp_path):
    format_name, source, config = openpi
    folder = shutil.copytree(source, tmp_path / "theirs")
    in_shards()(folder)
    assert convert(format_name, folder, config, tmp_path / "run").complete


def test_an_error_while_the_run_is_written_leaves_no_folder(oft, tmp_path, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("vla_bench.models.interop.convert.write_manifest", full)
    with pytest.raises(OSError):
        convert("starvla_oft", *oft, tmp_path / "out/run")
    assert not list((tmp_path / "out").iterdir())
