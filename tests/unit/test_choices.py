"""What `auto` becomes: by tokens, device and memory, once for a run and all its restarts."""

import json
from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch
from peft import get_peft_model

import train_sft
from collator import VisionSFTCollator
from helpers.runs import train_args
from models.compilation import tokens_to_repay
from models.families import FAMILIES, published_config
from models.flops import language_weights
from models.loading import load_model
from models.lora import build_lora_config
from planning import page
from planning.shapes import build_without_weights, count_weights
from training import build, choices, packing
from training.config import parse_config
from training.lengths import SampleLengths
from training.memory_probe import forward_and_backward, recomputing
from training.packing import possible_packs

CUDA = torch.device("cuda")


def on_gpu(*options, **changes):
    """Return the settings of skin.yaml as a GPU would see them."""
    settings = parse_config(["--use_cpu", "true", *options])
    values = {name: getattr(settings.training, name) for name in settings.training.to_dict()}
    values |= {"device": CUDA, "deepspeed_plugin": None, "world_size": 1}
    return settings._replace(training=SimpleNamespace(**(values | changes)))


def lengths_of(*totals):
    return SampleLengths(total=list(totals), image=[0] * len(totals))


def test_compiling_pays_from_a_million_tokens_on_in_a_7b_model_and_later_in_smaller_ones():
    weights = {name: count_weights(published_config(f"Qwen2.5-VL-{name}")).language for name in ("3B", "7B", "72B")}
    millions = {name: round(tokens_to_repay(count) / 1e6, 2) for name, count in weights.items()}
    assert millions == {"3B": 2.22, "7B": 0.94, "72B": 0.09}


@pytest.mark.parametrize("name", [max(family.shapes) for family in FAMILIES.values()])
def test_a_model_has_as_many_language_weights_as_its_plan_counts(name):
    config = published_config(name)
    assert language_weights(build_without_weights(config, torch.bfloat16)) == count_weights(config).language


def test_weights_in_nf4_and_with_lora_count_as_often(tiny_base):
    model = load_model(str(tiny_base), quantization="nf4", dtype=torch.float32)
    plain = load_model(str(tiny_base), quantization=None, dtype=torch.float32).requires_grad_(False)
    expected = language_weights(plain)
    adapted = get_peft_model(model, build_lora_config(model, r=4, lora_alpha=8))
    assert language_weights(adapted) == expected > 0


def test_the_tokens_of_a_run_are_those_of_all_its_epochs_or_steps_on_one_gpu():
    three = lengths_of(100, 200, 600)
    assert choices.tokens_a_gpu(three, on_gpu(world_size=2)) == 3 * 900 / 2
    assert choices.tokens_a_gpu(three, on_gpu("--max_steps", "10", "--pack_tokens", "1024")) == 10 * 4 * 1024
    padded = on_gpu("--max_steps", "10", "--packing", "false", "--per_device_train_batch_size", "2")
    assert choices.tokens_a_gpu(three, padded) == 10 * 4 * 2 * 300


@pytest.fixture(scope="module")
def seven_billion():
    return build_without_weights(published_config("Qwen2.5-VL-7B"), torch.bfloat16)


@pytest.mark.parametrize(
    ("settings", "samples", "found", "reason"),
    [
        (on_gpu(), 3200, True, "1.0 million tokens on each GPU, and it pays from 0.9 million on"),
        (on_gpu(), 2500, False, "0.8 million tokens on each GPU, and it pays from 0.9 million on"),
        (on_gpu(world_size=2), 3200, False, "0.5 million tokens on each GPU"),
        (on_gpu("--shard_base", world_size=2), 6400, True, "1.0 million tokens on each GPU, and it pays from"),
        (on_gpu(device=torch.device("cpu")), 6400, False, "there is no GPU"),
        (on_gpu("--gradient_checkpointing", "selective"), 1, True, "selective needs it"),
        (on_gpu("--gradient_checkpointing", "selective", device=torch.device("cpu")), 1, True, "selective needs it"),
        (on_gpu("--lora_target_experts", "--lora_dropout", "0"), 6400, False, "not with lora_target_experts: true"),
    ],
)
def test_layers_are_compiled_where_it_pays(seven_billion, monkeypatch, settings, samples, found, reason):
    monkeypatch.setattr(choices, "check_compiler", lambda: None)
    chosen, said = choices.repays_compiling(seven_billion, lengths_of(*[100] * samples), settings)
    assert chosen is found and reason in said


def test_without_a_compiler_a_long_run_is_not_compiled(seven_billion, monkeypatch):
    def missing():
        raise ValueError("compile_layers: this machine cannot; install gcc, or set it to false (no cc)")

    monkeypatch.setattr(choices, "check_compiler", missing)
    found = choices.repays_compiling(seven_billion, lengths_of(*[100] * 7000), on_gpu())
    assert found == (False, "this machine cannot; install gcc, or set it to false (no cc)")


PACKED = {"packing": "true", "attn_implementation": "varlen", "per_device_train_batch_size": 1, "max_length": 4096}


def test_a_run_says_what_auto_became_and_keeps_it_when_it_resumes(tiny_base, demo_data, tmp_path, monkeypatch, capsys):
    options = {**PACKED, "gradient_accumulation_steps": 2, "eval_strategy": "no", "save_steps": 1}
    words = train_args(tiny_base, demo_data, tmp_path, **options)
    # As a GPU would choose
    monkeypatch.setattr(choices, "PACK_SIZES", (256, 512))
    monkeypatch.setattr(packing, "PACK_SIZES", (256, 512))
    words[words.index("--max_length") + 1] = "256"
    monkeypatch.setattr(build, "choose_packs", lambda *args: (args[3].with_packs(512), args[4]))
    train_sft.main([*words, "--max_steps", "2"])
    assert "compiling off: there is no GPU" in capsys.readouterr().out.splitlines()
    became = {"compile_layers": False, "pack_tokens": 512, "gradient_accumulation_steps": 1}
    before = json.loads((tmp_path / "checkpoint-2" / "COMPLETE.json").read_text())["run"]["settings"]
    facts = json.loads((tmp_path / "facts.json").read_text())["settings"]
    assert [{name: found[name] for name in became} for found in (before, facts)] == [became] * 2
    for name in ("repays_compiling", "largest_fits"):
        monkeypatch.setattr(choices, name, lambda *args: pytest.fail("it was decided before"))
    monkeypatch.setattr(build, "choose_packs", choices.choose_packs)
    train_sft.main([*words, "--allow_config_change", "true"])
    out = capsys.readouterr().out
    assert "packs of 512 tokens" in out and "changed: settings.max_steps was 2 and is 4 now" in out
    assert "compile_layers was" not in out and "pack_tokens was" not in out and "accumulation_steps was" not in out


def test_a_changed_recipe_is_still_noticed_behind_auto(tiny_base, demo_data, tmp_path):
    folder = tmp_path / "checkpoint-2"
    folder.mkdir()
    before = {"settings": {"pack_tokens": 8192, "gradient_accumulation_steps": 2, "compile_layers": True}}
    (folder / "COMPLETE.json").write_text(json.dumps({"run": before}))
    kept = choices.keep_choices(on_gpu("--gradient_accumulation_steps", "8"), folder)
    assert kept.training.compile_layers is True
    assert (kept.pack_tokens, kept.training.gradient_accumulation_steps) == (8192, 4)  # it was 2
    kept = choices.keep_choices(on_gpu("--pack_tokens", "4096", "--compile_layers", "false"), folder)
    assert (kept.pack_tokens, kept.training.compile_layers) == (4096, False)
    before["settings"]["pack_tokens"] = 1536  # what auto never takes
    (folder / "COMPLETE.json").write_text(json.dumps({"run": before}))
    assert choices.keep_choices(on_gpu(), folder).pack_tokens == "auto"
    assert choices.keep_choices(on_gpu("--packing", "false"), folder).data.pack_tokens == 1536


def test_packs_of_any_size_leave_the_tokens_of_a_step_as_the_recipe_says():
    assert [possible_packs(n) for n in (1, 2, 3, 4)] == [{4096: 1}, {4096: 2, 8192: 1}, {4096: 3}, {4096: 4, 8192: 2}]
    assert possible_packs(4, longest=5000) == {8192: 2} and possible_packs(3, longest=5000) == {}
    settings = on_gpu().with_packs(8192)
    assert (settings.pack_tokens, settings.training.gradient_accumulation_steps) == (8192, 2)


def data_of(*totals):
    return SimpleNamespace(lengths={"train": lengths_of(*totals)})


@pytest.mark.parametrize(
    ("settings", "longest", "room", "found"),
    [
        (on_gpu(), 400, 9000, (8192, 2)),
        (on_gpu(), 400, 5000, (4096, 4)),
        (on_gpu(), 5000, 1, (8192, 2)),  # no other holds the longest sample
        (on_gpu("--gradient_accumulation_steps", "3"), 400, 9000, (4096, 3)),
        (on_gpu(device=torch.device("cpu")), 400, 9000, (4096, 4)),
        (on_gpu("--pack_tokens", "1024"), 400, 9000, (1024, 4)),
    ],
)
def test_the_largest_pack_that_fits_is_taken_and_a_cpu_takes_the_smallest(monkeypatch, settings, longest, room, found):
    tried = []

    def fits(model, processor, data, candidate):
        tried.append(candidate.pack_tokens)
        return candidate.pack_tokens <= room, f"the largest batch needs {candidate.pack_tokens}"

    monkeypatch.setattr(choices, "largest_fits", fits)
    monkeypatch.setattr(choices, "recomputing", lambda model, recompute: nullcontext())
    chosen, recompute = choices.choose_packs(None, None, data_of(100, longest), settings, "selective")
    assert recompute == "selective"
    assert (chosen.pack_tokens, chosen.training.gradient_accumulation_steps) == found
    assert settings.pack_tokens in ("auto", 1024)  # nothing is changed in place
    assert set(tried) <= {8192}  # the smallest needs no trial: there is no other choice


@pytest.mark.parametrize(
    ("room", "found", "trials"),
    [
        (80, (8192, False), 1),
        (40, (4096, False), 2),  # faster than larger packs that are recomputed
        (20, (8192, True), 3),
        (10, (4096, True), 3),  # what is left needs no trial
    ],
)
def test_packs_without_recomputation_come_before_larger_ones_with_it(monkeypatch, room, found, trials):
    modes, tried = [], []
    needs = {(8192, False): 70, (4096, False): 35, (8192, True): 13}

    def fits(model, processor, data, candidate):
        tried.append((candidate.pack_tokens, modes[-1]))
        return needs[tried[-1]] <= room, "the largest batch needs so much"

    monkeypatch.setattr(choices, "largest_fits", fits)
    monkeypatch.setattr(choices, "recomputing", lambda model, recompute: nullcontext(modes.append(recompute)))
    chosen, recompute = choices.choose_packs(None, None, data_of(400), on_gpu(), "auto")
    assert (chosen.pack_tokens, recompute) == found and len(tried) == trials
    plans = {
        (True, mode): PlanOf({size: need for (size, kind), need in needs.items() if kind == mode})
        for mode in (False, True)
    }
    assert page.plan_packs(plans, on_gpu(), 400, room / 0.9) == found[0]


class PlanOf(dict):
    """The memory of a plan, GB."""

    def total(self, tokens):
        return 1e9 * self.get(tokens, 9)


@pytest.mark.parametrize(("recompute", "runs"), [(True, 2), (False, 1), ("selective", 1)])
def test_a_trial_recomputes_as_training_will_and_leaves_no_trace(tiny_base, processor, demo_splits, recompute, runs):
    model = load_model(str(tiny_base), quantization=None, dtype=torch.float32, attn_implementation="varlen")
    model, seen = get_peft_model(model, build_lora_config(model, r=4, lora_alpha=8)), []
    layer = model.get_base_model().model.language_model.layers[0]
    layer.mlp.register_forward_pre_hook(lambda *_: seen.append(1))
    batch = VisionSFTCollator(processor, packed=True)(list(demo_splits["test"]))
    with recomputing(model, recompute):
        forward_and_backward(model, batch, None)
    assert len(seen) == runs
    forward_and_backward(model, batch, None)
    assert len(seen) == runs + 1
    blocks = model.get_base_model().model.visual.blocks
    assert not blocks[0]._forward_pre_hooks and not layer.gradient_checkpointing


@pytest.mark.parametrize(
    ("free", "used", "expected", "trials"),
    [
        (80, {4: 40}, 4, [4]),  # ample: one trial of what will run
        (80, {4: 75, 0: 66}, 1, [4, 0]),  # other programs' memory: as without the trial
        (20, {0: 11}, 1, [0]),
        (20, {0: 19}, -1, [0]),  # of what is free, a tenth stays free
        (20, {0: None}, -1, [0]),
    ],
)
def test_layers_keep_their_wide_products_as_memory_has_room(monkeypatch, free, used, expected, trials):
    kept, tried = [0], []

    def try_step(model, batch, **options):
        tried.append(kept[-1])
        return used[kept[-1]], free

    monkeypatch.setattr(choices, "language_layers", lambda model: [None] * 4)
    monkeypatch.setattr(choices, "wide_bytes", lambda model, tokens, itemsize: 2 * itemsize)
    monkeypatch.setattr(choices, "keep_wide_products", lambda model, count: kept.append(count))
    monkeypatch.setattr(choices, "try_step", try_step)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (free, free))
    batch = {"input_ids": torch.zeros(1, 8)}
    assert choices.layers_with_room(None, batch, dtype=torch.bfloat16, optim="adamw_torch") == expected
    assert tried == trials


@pytest.mark.parametrize(("choice", "line"), [("auto", "checkpointing on: there is no room"), ("selective", "0 of 4")])
def test_auto_recomputes_everything_where_selective_recomputation_does_not_fit(monkeypatch, capsys, choice, line):
    done = []
    monkeypatch.setattr(choices, "language_layers", lambda model: [None] * 4)
    monkeypatch.setattr(choices, "collate_largest", lambda *args: None)
    monkeypatch.setattr(choices, "layers_with_room", lambda *args, **options: -1)
    monkeypatch.setattr(choices, "recompute_everything", lambda model: done.append("everything"))
    monkeypatch.setattr(choices, "keep_wide_products", lambda model, count: done.append(count))
    monkeypatch.setattr(choices, "wide_share", lambda model: 0.5)
    share = choices.keep_what_fits(None, None, None, on_gpu(gradient_checkpointing=choice))
    assert (share, done) == ((1.0, ["everything"]) if choice == "auto" else (0.5, [0]))
    assert line in capsys.readouterr().out
