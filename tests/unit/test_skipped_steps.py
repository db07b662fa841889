"""float16: steps that the scaler skips are counted, and a run that only skips ends."""

from types import SimpleNamespace

import pytest
import torch

from training.trainer import FiniteCallback


@pytest.fixture
def step():
    """Take a step whose gradient has a value; the run has `steps` of them."""
    scaler = SimpleNamespace(is_enabled=lambda: True)
    trainer = SimpleNamespace(step_ids=[], accelerator=SimpleNamespace(scaler=scaler), is_deepspeed_enabled=False)
    callback, model = FiniteCallback(trainer), torch.nn.Linear(1, 1)
    state = SimpleNamespace(global_step=0, max_steps=1000, is_world_process_zero=True)

    def take(gradient, *, limit=20, steps=1000):
        state.max_steps = steps
        for parameter in model.parameters():
            parameter.grad = torch.full_like(parameter, gradient)
        trainer.grad_norm, trainer.max_skipped_steps = abs(gradient), limit
        callback.on_pre_optimizer_step(SimpleNamespace(fp16=True), state, None, model=model)
        state.global_step += 1

    take.end = lambda: callback.on_train_end(None, state, None)
    return take


@pytest.mark.parametrize(("limit", "bad"), [(20, float("inf")), (3, float("nan")), (1, float("-inf"))])
def test_so_many_skipped_steps_in_a_row_end_the_run(step, limit, bad):
    step(1.0, limit=limit)
    for _ in range(limit - 1):
        step(bad, limit=limit)
    message = rf"step {limit + 1}: {limit} steps in a row .* float16 and were skipped \(max_skipped_steps: {limit}\)"
    with pytest.raises(ValueError, match=message):
        step(bad, limit=limit)


def test_a_step_between_starts_the_count_again(step, capsys):
    for _ in range(5):
        for _ in range(19):
            step(float("inf"))
        step(1.0)
    step.end()
    assert capsys.readouterr().out == "float16: 95 steps overflowed and were skipped\n"


def test_a_short_run_that_took_no_step_is_no_success(step):
    for _ in range(4):
        step(float("inf"), steps=5)
    with pytest.raises(ValueError, match="step 5: 5 steps in a row had gradients that are not finite"):
        step(float("inf"), steps=5)


def test_a_run_without_skipped_steps_says_nothing(step, capsys):
    step(1.0)
    step.end()
    assert capsys.readouterr().out == ""
