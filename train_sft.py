"""Fine-tune a Qwen vision-language model on questions and answers about images, by QLoRA.

accelerate launch train_sft.py --config configs/skin.yaml --output_dir outputs/skin
"""

import sys

from common.cli import announce_loading, run

if __name__ == "__main__":
    announce_loading()

from datasets import disable_progress_bars
from transformers import set_seed

from common.console import print_rank0
from common.output_folder import own_folder
from models.families import family_of
from models.linear_attention import check_kernels
from models.loading import load_config
from planning.smoke_test import dry_run
from publishing.hub import BackgroundPush
from publishing.run_facts import describe_base
from training.build import build_model, build_trainer, decide
from training.choices import keep_choices
from training.config import parse_config
from training.config_checks import check_base, check_device
from training.data import load_data, open_processor
from training.distributed import barrier_and_shutdown, check_distributed
from training.memory_probe import out_of_memory_advice
from training.publish import claim_repository, push_checkpoints, push_final
from training.resume import check_resumable, check_same_everywhere, choose_start, describe_identity, describe_resuming
from training.run_record import describe_run, finish_card, report_unsaved, tracked_facts, write_run_record
from training.settings import Settings
from training.signals import StopCallback, end_early
from training.trackers import TrackCallback, start_trackers, track_facts
from training.trainer import SafeSFTTrainer

LOCK = "training.lock"


def main(argv: list[str] | None = None) -> int | None:
    settings = parse_config(sys.argv[1:] if argv is None else argv)
    check_distributed(settings)
    disable_progress_bars()  # of datasets' own bookkeeping; decoding images has a bar of its own
    if settings.training.dry_run:
        return dry_run(settings)
    with own_folder(settings.output_dir, "output_dir", lock=LOCK):
        return train(settings)


def train(settings: Settings) -> int | None:
    # Checkpoint and repository: what can be refused within a second
    check_device(settings.training)
    checkpoint = choose_start(settings)
    settings = keep_choices(settings, checkpoint)
    config = load_config(settings.model.model_name_or_path, revision=settings.model.model_revision)
    check_base(settings, config)
    family = family_of(config)
    check_kernels(family, packed=settings.training.packing)
    repo_id = claim_repository(settings)

    # Data
    processor = open_processor(settings)
    base = describe_base(settings.model.model_name_or_path, settings.model.model_revision)
    data = load_data(settings, processor, list_in=settings.output_dir)
    identity = describe_identity(settings, base, data.splits["train"])
    check_same_everywhere(identity)
    check_resumable(checkpoint, identity, allow_change=settings.training.allow_config_change)
    trackers = start_trackers(settings, resumed=checkpoint is not None)

    # Model
    set_seed(settings.training.seed)  # LoRA starts from random numbers
    with out_of_memory_advice(settings, config, loading=True):
        model = build_model(settings, checkpoint)
    settings, recompute = decide(model, processor, data, settings)
    identity = describe_identity(settings, base, data.splits["train"])
    write_run_record(settings, model, base, data.facts)
    track_facts(trackers, tracked_facts(settings, base, data.facts))

    # Trainer
    trainer = build_trainer(model, processor, data, settings, identity=identity, recompute=recompute)
    stop = StopCallback()
    trainer.add_callback(stop)
    trainer.add_callback(TrackCallback(trackers))
    background = push_checkpoints(trainer, repo_id)
    print_rank0(*describe_run(trainer, data, settings), *describe_resuming(trainer, checkpoint))

    # Train
    with out_of_memory_advice(settings, config, recompute=trainer.speed.recomputed == 1):
        trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
    if stop.signal is not None and trainer.state.global_step < trainer.state.max_steps:
        barrier_and_shutdown()
        return end_early(stop, trainer.state.global_step, settings, unsaved=trainer.unsaved)
    return save_and_publish(trainer, background, settings)


def save_and_publish(trainer: SafeSFTTrainer, background: BackgroundPush | None, settings: Settings) -> int:
    trainer.save_final()
    barrier_and_shutdown()
    finish_card(trainer)
    print_rank0(f"adapter, processor, model card, metrics.jsonl and training_metrics.png are in {settings.output_dir}")
    push_final(background, settings)
    return report_unsaved(trainer)


if __name__ == "__main__":
    sys.exit(run(main))
