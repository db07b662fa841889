"""A training step walks over the modules no more often than it must, and is still the same step."""

from functools import partial

import pytest
import torch

from helpers.runs import PACKED, train_args
from models.tower import PatchProduct
from training import build
from training.build import build_model, build_trainer
from training.config import parse_config
from training.data import load_data, open_processor
from training.trainer import FewerWalksCallback, SafeSFTTrainer


def make_trainer(base, data, out, **settings):
    settings = parse_config(train_args(base, data, out, save_steps=100, **settings))
    processor = open_processor(settings)
    torch.manual_seed(0)
    model, data = build_model(settings), load_data(settings, processor)
    return build_trainer(model, processor, data, settings, identity={}, recompute=False)


def test_a_step_sets_no_mode_twice_and_learns_the_same(tiny_base, demo_data, tmp_path, monkeypatch):
    walks, plain = [], torch.nn.Dropout.train

    def train(module, mode=True):
        walks.append(mode)
        return plain(module, mode)

    monkeypatch.setattr(torch.nn.Dropout, "train", train)
    results = []
    for name in ("ours", "stock"):
        trainer = make_trainer(tiny_base, demo_data, tmp_path / name, max_steps=4, eval_steps=2, lora_dropout=0.1)
        dropouts = sum(isinstance(module, torch.nn.Dropout) for module in trainer.model.modules())
        if name == "stock":
            trainer.remove_callback(FewerWalksCallback)
        walks.clear()
        trainer.train()
        results.append((walks.count(True) / dropouts, trainer.model.state_dict(), trainer.state.log_history))
        assert "train" not in vars(trainer.model) and "zero_grad" not in vars(trainer.model)
    (ours, weights, log), (stock, expected, log_of_stock) = results
    assert ours < stock and stock >= 4
    assert all(torch.equal(weights[key], value) for key, value in expected.items())
    norms = [[row["grad_norm"] for row in rows if "grad_norm" in row] for rows in (log, log_of_stock)]
    assert norms[0] == norms[1] and len(norms[0]) == 4


def test_evaluation_ends_in_training_mode_and_a_frozen_tower_is_sped_up(tiny_base, demo_data, tmp_path):
    trainer = make_trainer(tiny_base, demo_data, tmp_path, max_steps=4, eval_steps=2)
    modes, patches = [], trainer.model.get_base_model().model.visual.patch_embed.proj
    layer = trainer.model.get_base_model().model.language_model.layers[0]
    layer.register_forward_pre_hook(lambda module, inputs: modes.append(module.mlp.training))
    trainer.train()
    assert isinstance(patches, PatchProduct)
    assert modes.count(True) == 4 and modes.count(False) >= 2 and modes[-1] is False


@pytest.mark.parametrize("accumulate", [1, 3])
def test_the_loss_of_packs_from_their_answers_alone_is_trls(tiny_base, demo_data, tmp_path, monkeypatch, accumulate):
    logs, options = [], PACKED | {"gradient_accumulation_steps": accumulate}
    for plain in (True, False):
        trainer = make_trainer(tiny_base, demo_data, tmp_path / str(plain), max_steps=4, eval_steps=2, **options)
        if not plain:
            monkeypatch.setattr(SafeSFTTrainer, "has_plain_loss", False)
        trainer.train()
        logs.append([row for row in trainer.state.log_history if "train_runtime" not in row])
    found, expected = logs
    assert [row.keys() for row in found] == [row.keys() for row in expected] and len(found) == 6
    for key in ("loss", "eval_loss", "grad_norm", "entropy", "eval_entropy", "mean_token_accuracy", "num_tokens"):
        values = [[row[key] for row in rows if key in row] for rows in logs]
        assert values[0] == pytest.approx(values[1], rel=1e-4) and len(values[0]) in (2, 4, 6), key


def test_the_metrics_of_packs_wait_for_the_log(tiny_base, demo_data, tmp_path, monkeypatch):
    options = PACKED | {"logging_steps": 2, "max_steps": 4, "eval_steps": 4}
    trainer = make_trainer(tiny_base, demo_data, tmp_path, **options)
    reads, tolist = [], torch.Tensor.tolist
    monkeypatch.setattr(torch.Tensor, "tolist", lambda x: reads.append(x.shape) or tolist(x))
    trainer.train()
    assert [tuple(shape) for shape in reads if shape[1:] == (4,)][:2] == [(2, 4), (2, 4)]
    assert not any(trainer.sums.values())


@pytest.mark.parametrize("setting", [{"label_smoothing_factor": 0.1}, {"loss_type": "dft"}])
def test_another_loss_of_packs_is_left_to_trl(tiny_base, demo_data, tmp_path, setting):
    trainer = make_trainer(tiny_base, demo_data, tmp_path, max_steps=1, eval_steps=10, **PACKED, **setting)
    assert not trainer.has_plain_loss
    assert trainer.train().training_loss > 0


def draw_and_load(load, draws, *args, **options):
    torch.rand(draws)
    return load(*args, **options)


def test_lora_starts_from_the_seed_whatever_loading_draws(tiny_base, demo_data, tmp_path, monkeypatch):
    plain, adapters = build.load_model, []
    for draws in (0, 3):
        monkeypatch.setattr(build, "load_model", partial(draw_and_load, plain, draws))
        model = build_model(parse_config(train_args(tiny_base, demo_data, tmp_path, seed=5)))
        adapters.append([p for p in model.parameters() if p.requires_grad])
    assert all(torch.equal(a, b) for a, b in zip(*adapters, strict=True))
    assert any(a.any() for a in adapters[0])


@pytest.mark.parametrize("pack_tokens", [110, 256])
def test_no_mask_is_built_for_packs_of_one_sample_or_several(tiny_base, demo_data, tmp_path, pack_tokens):
    options = PACKED | {"pack_tokens": pack_tokens, "max_length": pack_tokens, "max_steps": 2, "eval_steps": 2}
    trainer = make_trainer(tiny_base, demo_data, tmp_path, **options)
    layer, masks = trainer.model.get_base_model().model.language_model.layers[0], []
    layer.register_forward_pre_hook(
        lambda module, args, kw: masks.append(kw["attention_mask"].shape), with_kwargs=True
    )
    trainer.train()
    assert len(masks) > 2 and set(masks) == {(1, 1, 1, 1)}
