"""Private interfaces of TRL and transformers that `training/compat.py` relies on."""

import inspect

import pytest
from transformers import Trainer
from trl import SFTTrainer

pytestmark = pytest.mark.canary


def test_the_trainer_saves_checkpoints_by_a_method_of_this_name_and_these_arguments():
    for kind in (Trainer, SFTTrainer):
        found = list(inspect.signature(kind._save_checkpoint).parameters)
        assert found == ["self", "model", "trial"], (
            f"{kind.__name__}._save_checkpoint takes {found}; see training/compat.py"
        )
    calls = inspect.getsource(Trainer._maybe_log_save_evaluate)
    assert "self._save_checkpoint(model, trial)" in calls, "transformers saves checkpoints in another way now"


def test_trl_counts_tokens_in_the_attribute_that_a_resumed_run_sets():
    source = inspect.getsource(SFTTrainer)
    assert "self._total_train_tokens = 0" in source and "self._total_train_tokens +=" in source, (
        "TRL counts tokens elsewhere now: set_token_count in training/compat.py has no effect"
    )


def test_the_trainer_clips_by_methods_of_these_names_and_passes_the_norm_on():
    source = inspect.getsource(Trainer._run_epoch)
    assert "grad_norm = self._clip_grad_norm(model)" in source, "transformers clips elsewhere; see training/compat.py"
    assert "self._get_grad_norm(model, grad_norm=grad_norm)" in source, "the norm's path changed; training/compat.py"


def test_the_trainer_leaves_a_model_that_was_wrapped_to_its_wrapper():
    found = list(inspect.signature(Trainer._wrap_model).parameters)
    assert found == ["self", "model", "training", "dataloader"], f"_wrap_model takes {found}; see training/compat.py"
    source = inspect.getsource(Trainer._prepare_for_training)
    assert "use_accelerator_prepare = model is self.model" in source, "sharded models would be refused by accelerate"


def test_trl_averages_the_metrics_of_its_log_in_this_attribute():
    source = inspect.getsource(SFTTrainer.log)
    assert "sum(val) / len(val) for key, val in self._metrics[mode].items()" in source, (
        "TRL keeps its metrics elsewhere: log_batch in training/compat.py has no effect"
    )
    source = inspect.getsource(SFTTrainer.compute_loss)
    for name in ("entropy", "mean_token_accuracy", "num_tokens"):
        assert f'self._metrics[mode]["{name}"]' in source, f"TRL does not log {name} any more; see training/compat.py"
