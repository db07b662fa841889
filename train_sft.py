"""Fine-tune Qwen2.5-VL, or another model of its family, on questions and answers about images, by QLoRA.

accelerate launch train_sft.py --config configs/skin.yaml --output_dir outputs/skin
"""

import sys
from pathlib import Path

from common.cli import run

from datasets import disable_progress_bars
from transformers import set_seed

from common.console import print_rank0
from models.loading import check_family, compile_layers
from planning.smoke_test import dry_run
from publishing.hub import push_adapter
from publishing.run_facts import describe_base, describe_data
from training.build import build_model, build_trainer, decide_checkpointing
from training.config import parse_config
from training.data import check_data, draw_by_weight, load_data, open_processor
from training.distributed import check_processes, leave_together
from training.publish import claim_repository, push_every_save, push_options
from training.resume import check_same_everywhere, check_start, choose_start, describe_for_resuming, describe_resuming
from training.run_record import describe_run, finish_card, prepare_output, start_tracking, write_facts, write_run_facts
from training.signals import StopCallback, end_early
from training.trackers import TrackCallback


def main(argv: list[str] | None = None) -> int | None:
    data_args, training_args, model_args = parse_config(sys.argv[1:] if argv is None else argv)
    check_processes(training_args, model_args)
    disable_progress_bars()  # of datasets' own bookkeeping; decoding images has a bar of its own
    if training_args.dry_run:
        return dry_run(data_args, training_args, model_args)
    prepare_output(training_args)
    checkpoint = choose_start(training_args)
    check_family(model_args.model_name_or_path, revision=model_args.model_revision)
    repo_id = claim_repository(training_args)
    processor = open_processor(data_args, model_args)
    base = describe_base(model_args.model_name_or_path, model_args.model_revision)
    splits = load_data(data_args, training_args)
    data_facts = describe_data(splits, data_args.dataset_path)
    splits["train"] = draw_by_weight(splits["train"], training_args.seed)
    lengths = check_data(splits, processor, training_args)
    shared = describe_for_resuming(data_args, training_args, model_args, base, splits["train"])
    check_same_everywhere(shared)
    check_start(checkpoint, shared, training_args)
    pack_tokens = data_args.pack_tokens = data_args.pack_tokens if training_args.packing else None
    training_args.packing = False  # TRL's own, which takes no images
    trackers = start_tracking(data_args, training_args, model_args, base, data_facts, goes_on=checkpoint is not None)
    set_seed(training_args.seed)  # LoRA starts from random numbers
    model = build_model(data_args, model_args)
    write_run_facts(model_args, base, Path(training_args.output_dir))
    write_facts(data_args, training_args, model_args, model, base, data_facts)
    decide_checkpointing(model, processor, splits["train"], training_args, lengths["train"], pack_tokens)
    if training_args.compile_layers:
        print_rank0("the layers are compiled during the first steps, which then take two or three minutes")
        compile_layers(model)
    trainer = build_trainer(model, processor, splits, training_args, lengths, pack_tokens=pack_tokens, run=shared)
    stop = StopCallback()
    trainer.add_callback(stop)
    trainer.add_callback(TrackCallback(trackers))
    background = push_every_save(trainer, repo_id)
    print_rank0(*describe_run(trainer, lengths["train"]), *describe_resuming(trainer, checkpoint, shared))
    trainer.train(resume_from_checkpoint=checkpoint)
    if stop.signal is not None and trainer.state.global_step < trainer.state.max_steps:
        leave_together()
        return end_early(stop, trainer.state.global_step)
    trainer.save_model()
    leave_together()
    finish_card(trainer)
    print_rank0(
        f"adapter, processor, model card, metrics.jsonl and training_metrics.png are in {training_args.output_dir}"
    )
    if background is not None:
        background.wait()
        print_rank0(
            f"pushed to {push_adapter(Path(training_args.output_dir), repo_id, **push_options(training_args))}"
        )
    return None


if __name__ == "__main__":
    sys.exit(run(main))
