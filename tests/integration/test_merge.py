"""Merging: one 16-bit model with the adapter's answers, and no output when a check fails."""

import json
import os
import resource
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

from common.cli import run

import pytest
import torch
from huggingface_hub import HfApi
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForImageTextToText, AutoProcessor

import merge_adapter
from demo.tiny_model import save_tiny_model
from evaluation import merge_checks
from evaluation.generation import encode_prompts, generate
from helpers.hub_server import HubServer
from helpers.runs import TEXTS
from models.loading import load_model, load_processor
from models.lora import build_lora_config
from publishing.hub import MERGED_FILES
from publishing.model_card import make_merged_card

BIN = Path(sys.executable).parent
FIRST_QUERY = "model.language_model.layers.0.self_attn.q_proj.weight"


@pytest.fixture(scope="module")
def merged(adapter, tmp_path_factory):
    out = tmp_path_factory.mktemp("merged") / "deep" / "model"
    merge(adapter, out)
    return out


@pytest.fixture
def damaged(adapter, tmp_path):
    """A copy of the adapter, and a function that changes its tensors."""
    folder = tmp_path / "damaged"
    shutil.copytree(adapter, folder, ignore=shutil.ignore_patterns("checkpoint-*"))

    def change(edit):
        change_file(folder / "adapter_model.safetensors", edit)
        return folder

    return change


def change_file(path, edit):
    tensors = load_file(path)
    edit(tensors)
    save_file(tensors, path, metadata={"format": "pt"})


def merge(adapter, out, *options):
    merge_adapter.main([str(word) for word in ("--adapter", adapter, "--out", out, *options)])


def refused(capsys, adapter, out, *options):
    """Run the command, see that it fails with one line and leaves no folder, and return the line."""
    assert run(lambda: merge(adapter, out, *options)) == 1
    *_, error = capsys.readouterr().err.strip().splitlines()
    assert error.startswith("error: ")
    assert not out.exists() and not out.with_name(out.name + ".unfinished").exists()
    return error


def weights_of(folder, dtype=torch.bfloat16):
    return AutoModelForImageTextToText.from_pretrained(folder, dtype=dtype).state_dict()


def prompts_of(splits, count):
    rows = splits["train"].select(range(count))
    return [{"id": row["id"], "images": row["images"], "messages": row["messages"][:-1]} for row in rows]


def smallest_lead(model, processor, example):
    """Return by how much the likeliest token was ahead of the second, where an answer was least sure, in logits."""
    inputs = encode_prompts(model, processor, [example])
    made = model.generate(**inputs, max_new_tokens=16, output_scores=True, return_dict_in_generate=True)
    first, second = torch.cat(made.scores).float().topk(2).values.unbind(-1)
    return (first - second).min()


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_the_merged_model_in_plain_transformers_answers_like_the_adapter(
    adapter, tiny_base, merged, demo_splits, dtype, tmp_path
):
    if dtype == "float16":
        merged = tmp_path / "half"
        merge(adapter, merged, "--dtype", "float16")
    model = AutoModelForImageTextToText.from_pretrained(merged)
    processor = AutoProcessor.from_pretrained(merged)
    assert model.dtype == getattr(torch, dtype)
    assert not model.generation_config.do_sample
    base = load_model(str(tiny_base), quantization=None, dtype=dtype, keep_dtype=True)
    adapted = PeftModel.from_pretrained(base, adapter).eval()
    theirs = load_processor(str(adapter))
    examples = [e for e in prompts_of(demo_splits, 8) if smallest_lead(adapted, theirs, e) > 0.1]
    assert len(examples) >= 4  # the others are ties, which rounding may break either way
    answers = generate(adapted, theirs, examples, 16)[0]
    assert generate(model, processor, examples, 16)[0] == answers
    assert len(set(answers)) > 1
    with adapted.disable_adapter():
        assert generate(adapted, theirs, examples, 16)[0] != answers


def test_exactly_the_targets_change_and_the_vision_tower_is_bit_identical(tiny_base, merged):
    before, after = weights_of(tiny_base), weights_of(merged)
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert set(before) == set(after)
    parts = [f"self_attn.{name}_proj" for name in "qkvo"] + [f"mlp.{name}_proj" for name in ("gate", "up", "down")]
    assert changed == {f"model.language_model.layers.{n}.{part}.weight" for n in range(2) for part in parts}
    tower = [name for name in before if name.startswith("model.visual.")]
    assert len(tower) > 20 and not changed & set(tower)


def test_the_merged_model_has_the_adapters_pixel_limits_and_chat_template(adapter, merged):
    ours, theirs = AutoProcessor.from_pretrained(adapter), AutoProcessor.from_pretrained(merged)
    assert dict(theirs.image_processor.size) == {"shortest_edge": 12544, "longest_edge": 12544}
    assert theirs.chat_template == ours.chat_template and "<|im_start|>" in theirs.chat_template


def test_card_and_configuration_contain_no_path(tiny_base, adapter, merged):
    card = (merged / "README.md").read_text()
    assert f"Base model: {tiny_base.name}. Merged from a LoRA adapter" in card
    assert "Not a medical device; not for diagnosis" in card
    texts = [path.read_text() for path in merged.iterdir() if path.suffix != ".safetensors"]
    assert not any(str(folder) in text for text in texts for folder in (tiny_base.parent, adapter.parent))
    assert "license: unknown" in card and "base_model" not in card  # the Hub takes its own ids there, and no others
    base = {"name": "Qwen/Qwen2.5-VL-7B-Instruct", "on_hub": True, "licence": {"license": "apache-2.0"}}
    card = make_merged_card("x", base, "bfloat16", {"transformers": "4.57", "vLLM": "0.32"})
    assert "base_model: Qwen/Qwen2.5-VL-7B-Instruct\n" in card and "license: apache-2.0\n" in card


def test_the_results_of_the_checks_are_printed(adapter, tmp_path, capsys):
    (tmp_path / "model.unfinished").mkdir()  # of a run that was killed
    (tmp_path / "model.unfinished" / "half.safetensors").touch()
    merge(adapter, tmp_path / "model")
    weights, logits, done = capsys.readouterr().out.splitlines()
    assert weights == "weights    14 merged, 43 bit-identical to the base's; vision tower bit-identical"
    assert logits.startswith("logits     0.") and "from the adapter's; the adapter changed the base's by 1" in logits
    assert done == f"merged     {tmp_path / 'model'}"
    assert not (tmp_path / "model" / "half.safetensors").exists()
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_a_full_disk_is_said_in_a_line_and_leaves_no_folder(adapter, tmp_path, capsys):
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))
    try:
        code = run(lambda: merge_adapter.main(["--adapter", str(adapter), "--out", str(tmp_path / "merged")]))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    error = capsys.readouterr().err.splitlines()[-1]
    assert code == 1 and error.startswith(f"error: --out: the weights could not be written to {tmp_path}: ")
    assert "File too large" in error and not list(tmp_path.iterdir())


def test_shards_have_at_most_the_requested_size(adapter, merged, tmp_path):
    merge(adapter, tmp_path / "model", "--shard-size", "300KB")
    shards = sorted((tmp_path / "model").glob("model-*.safetensors"))
    assert len(shards) >= 3 and all(path.stat().st_size < 310_000 for path in shards)
    one, several = weights_of(merged), weights_of(tmp_path / "model")
    assert all(torch.equal(one[name], several[name]) for name in one)


@pytest.mark.parametrize(
    ("flags", "merged_weights", "tower"),
    [
        ({"use_rslora": True}, 14, "bit-identical"),
        ({"use_dora": True}, 14, "bit-identical"),
        ({"target_modules": ["q_proj"], "train_vision": True, "train_merger": True}, 14, "adapted"),
    ],
)
def test_rslora_dora_and_vision_adapters_are_merged(tiny_base, tmp_path, capsys, flags, merged_weights, tower):
    torch.manual_seed(0)
    base = load_model(str(tiny_base), quantization=None, dtype="float32")
    model = get_peft_model(base, build_lora_config(base, r=4, lora_alpha=8, lora_dropout=0.0, **flags))
    for name, weight in model.named_parameters():
        if ".lora_B." in name:
            torch.nn.init.normal_(weight, std=0.05)
    model.save_pretrained(tmp_path / "adapter")
    load_processor(str(tiny_base), max_pixels=12544).save_pretrained(tmp_path / "adapter")
    merge(tmp_path / "adapter", tmp_path / "model")
    assert capsys.readouterr().out.startswith(f"weights    {merged_weights} merged, ")
    before, after = weights_of(tiny_base), weights_of(tmp_path / "model")
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert len(changed) == merged_weights
    assert any(name.startswith("model.visual.") for name in changed) == (tower == "adapted")


def test_the_error_names_a_target_that_was_not_merged(damaged, tmp_path, capsys):
    """PEFT passes over tensors that the configuration does not ask for; the file says that they are there."""
    folder = damaged(lambda tensors: None)
    config = json.loads((folder / "adapter_config.json").read_text())
    config["target_modules"] = config["target_modules"].replace("q_proj|", "")
    (folder / "adapter_config.json").write_text(json.dumps(config))
    error = refused(capsys, folder, tmp_path / "model")
    first = f"base_model.model.{FIRST_QUERY.removesuffix('weight')}lora_A.weight"
    assert f"4 of its 28 tensors have no place there, the first is {first}" in error


def test_the_error_names_a_target_without_an_update(damaged, tmp_path, capsys):
    def forget(tensors):
        tensors[f"base_model.model.{FIRST_QUERY.removesuffix('weight')}lora_B.weight"].zero_()

    error = refused(capsys, damaged(forget), tmp_path / "model")
    assert f"1 merged weights are wrong; the first, {FIRST_QUERY}, is a target" in error


def damage_after_saving(monkeypatch, edit):
    """Let the real save run, and then change the file that it wrote."""
    save = merge_adapter.save

    def save_and_damage(model, processor, folder, **options):
        save(model, processor, folder, **options)
        change_file(folder / "model.safetensors", edit)

    monkeypatch.setattr(merge_adapter, "save", save_and_damage)


@pytest.mark.parametrize(
    ("stored", "name"),
    [
        ("model.embed_tokens.weight", "model.language_model.embed_tokens.weight"),
        ("visual.blocks.1.attn.qkv.bias", "model.visual.blocks.1.attn.qkv.bias"),
    ],
)
def test_the_error_names_a_changed_weight_that_is_no_target(adapter, tmp_path, capsys, monkeypatch, stored, name):
    damage_after_saving(monkeypatch, lambda tensors: tensors[stored].view(-1)[-1:].add_(0.125))
    error = refused(capsys, adapter, tmp_path / "model")
    fault = "differs from the base's and is not a target of the adapter"
    assert error == f"error: 1 merged weights are wrong; the first, {name}, {fault}"


def test_the_error_names_a_weight_that_was_not_saved(adapter, tmp_path, capsys, monkeypatch):
    damage_after_saving(monkeypatch, lambda tensors: tensors.pop("visual.merger.mlp.0.weight"))
    error = refused(capsys, adapter, tmp_path / "model")
    problem = "its weights do not fit its config.json: 1 are missing, the first is model.visual.merger.mlp.0.weight"
    assert problem in error


@pytest.mark.parametrize(
    ("factor", "message"),
    [
        (-1, "from the adapter's; rounding explains at most 10%"),
        (float("nan"), "logits are not finite in torch.bfloat16"),
    ],
)
def test_other_logits_are_refused(adapter, tmp_path, capsys, monkeypatch, factor, message):
    damage_after_saving(monkeypatch, lambda tensors: tensors["model.layers.1.mlp.down_proj.weight"].mul_(factor))
    assert message in refused(capsys, adapter, tmp_path / "model")


def test_a_lost_chat_template_or_pixel_limit_is_refused(adapter, tmp_path, capsys, monkeypatch):
    save = merge_adapter.save

    def save_other_processor(model, processor, folder, **options):
        save(model, load_processor(str(adapter), max_pixels=99999), folder, **options)

    monkeypatch.setattr(merge_adapter, "save", save_other_processor)
    error = refused(capsys, adapter, tmp_path / "model")
    assert "pixel limits {'longest_edge': 99999, 'shortest_edge': 12544}" in error


def test_another_first_token_is_refused_even_with_similar_logits():
    ours = torch.zeros(2, 1000)
    ours[:, 0], ours[:, 1] = 3.0, 2.0
    theirs = ours.clone()
    theirs[-1, 1] = 3.001
    expected = merge_checks.Expected({}, [ours], effect=9.0)
    with pytest.raises(ValueError, match="drawn sample 0: the merged model starts its answer with another token"):
        merge_checks.check_logits(expected, [theirs], tolerance=0.5)
    ours[:, 1] = 2.99  # as good as a tie
    assert merge_checks.check_logits(expected, [theirs], tolerance=0.5) < 0.5
    weak = merge_checks.Expected({}, [ours], effect=1e-9)
    with pytest.raises(ValueError, match=r"logits are .*, the base's 0\.00%: the adapter"):
        merge_checks.check_logits(weak, [theirs], tolerance=0.5)


def test_a_model_that_finds_all_tokens_equally_likely_is_refused(tiny_base):
    model = load_model(str(tiny_base), quantization=None, dtype="float32").eval()
    model.get_output_embeddings().weight.data.zero_()
    with pytest.raises(ValueError, match="all tokens equally likely"):
        merge_checks.sample_logits(model, load_processor(str(tiny_base)))


def test_an_untrained_or_broken_adapter_is_refused(damaged, tmp_path, capsys):
    def untrain(tensors):
        for name, tensor in tensors.items():
            tensor.mul_(".lora_A." in name)

    assert "every lora_B is zero; this adapter was never trained" in refused(capsys, damaged(untrain), tmp_path / "m")
    folder = damaged(lambda tensors: next(iter(tensors.values())).fill_(float("inf")))
    assert "1 tensors hold NaN or infinity, the first is base_model." in refused(capsys, folder, tmp_path / "m")
    (folder / "adapter_model.safetensors").write_bytes(b"")
    assert "unreadable weights in adapter_model.safetensors: Error while" in refused(capsys, folder, tmp_path / "m")
    (folder / "adapter_model.safetensors").unlink()
    assert f"--adapter: {folder} has no adapter_model.safetensors" in refused(capsys, folder, tmp_path / "m")
    save_file({}, folder / "adapter_model.safetensors")
    (folder / "adapter_config.json").write_text(json.dumps({"peft_type": "IA3", "base_model_name_or_path": "x"}))
    assert f"{folder}: expected a LoRA adapter, found IA3" in refused(capsys, folder, tmp_path / "m")


def test_an_adapter_of_another_base_is_refused(adapter, damaged, tmp_path, capsys):
    save_tiny_model(tmp_path / "wide", TEXTS, hidden_size=128, num_layers=2)
    error = refused(capsys, adapter, tmp_path / "model", "--base", tmp_path / "wide")
    assert "does not fit the base model wide: 28 of its 28 tensors have another shape" in error

    def deepen(tensors):
        name = f"base_model.model.{FIRST_QUERY.removesuffix('weight')}lora_B.weight"
        tensors[name.replace("layers.0", "layers.7")] = tensors[name].clone()

    error = refused(capsys, damaged(deepen), tmp_path / "model")
    assert "1 of its 29 tensors have no place there" in error and "layers.7" in error


def test_the_base_is_loaded_at_the_revision_of_the_training(adapter, tiny_base):
    assert merge_adapter.choose_base(str(adapter), None) == (str(tiny_base), "main")
    assert merge_adapter.choose_base(str(adapter), "other/base") == ("other/base", None)


def test_a_user_error_is_one_line(adapter, tmp_path, capsys):
    def error_of(*options):
        assert run(lambda: merge_adapter.main([str(option) for option in options])) == 1
        return capsys.readouterr().err.strip()

    out = tmp_path / "model"
    assert error_of("--adapter", "/nowhere", "--out", out).startswith("error: --adapter: no adapter in '/nowhere'")
    rule = "exists; name a folder that does not"
    assert error_of("--adapter", adapter, "--out", tmp_path) == f"error: --out: {tmp_path} {rule}"
    assert error_of("--adapter", adapter, "--out", out, "--public") == "error: --public has no effect without --push"
    assert "'/nowhere'" in error_of("--adapter", adapter, "--out", out, "--base", "/nowhere").splitlines()[-1]
    with pytest.raises(SystemExit):
        merge(adapter, out, "--shard-size", "big")
    assert "--shard-size: expected a size like 5GB or 500MB, found 'big'" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


@pytest.fixture
def hub():
    server = HubServer().start()
    yield server
    server.stop()


def push_in_a_process(hub, home, *words):
    """Run a command that talks to the loopback Hub: huggingface_hub reads the address when it is imported."""
    environment = {**os.environ, **hub.environment(home), "PATH": f"{BIN}:{os.environ['PATH']}"}
    return subprocess.run([str(word) for word in words], env=environment, capture_output=True, text=True, timeout=120)


def test_a_push_is_private_and_uploads_the_listed_files_only(adapter, fork_server, tmp_path, hub):
    out = tmp_path / "model"
    options = ["--adapter", adapter, "--out", out, "--push", "tester/skin", "--shard-size", "500KB"]
    [code], [output] = fork_server.run("merge_adapter", options, env=hub.environment(tmp_path / "home"))
    assert code == 0, output
    assert f"pushed     {hub.url}/tester/skin/commit/" in output
    assert hub.repos["tester/skin"]["private"]
    files = {path.name: path.read_bytes() for path in out.iterdir()}
    assert hub.files("tester/skin") == files
    assert {"model-00001-of-00002.safetensors", "model.safetensors.index.json", "README.md"} < set(files)
    assert [name for name in MERGED_FILES if "*" in name] == ["model-*.safetensors"]


@pytest.mark.slow
def test_after_a_failed_push_the_printed_command_pushes_the_model(adapter, tmp_path, capsys, monkeypatch, hub):
    def fail(self, **options):
        raise ConnectionError("the line\nwent dead")

    monkeypatch.setattr(merge_adapter, "open_repository", lambda repo_id, private: repo_id)
    monkeypatch.setattr(HfApi, "upload_folder", fail)
    out = tmp_path / "my model"
    assert run(lambda: merge(adapter, out, "--push", "tester/skin")) == 1
    error, safe, later = capsys.readouterr().err.strip().splitlines()[-1].split("; ")
    assert error == "error: not pushed to tester/skin: the line went dead"
    assert safe == f"the merged model is in {out}"
    command = later.removeprefix("to push it later: ")
    done = push_in_a_process(hub, tmp_path / "home", *shlex.split(command))
    assert done.returncode == 0, done.stderr
    assert hub.repos["tester/skin"]["private"]
    assert hub.files("tester/skin") == {path.name: path.read_bytes() for path in out.iterdir()}


def test_the_repository_is_checked_before_the_merge(adapter, tmp_path, capsys):
    assert "tester/skin" in refused(capsys, adapter, tmp_path / "model", "--push", "tester/skin")
