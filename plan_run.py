"""Print memory, steps and time of a training run, in seconds, without a GPU and without the model's weights.

python plan_run.py --config configs/skin.yaml --gpu 24

Accepts every option of train_sft.py (--help-all lists them). Exit code 1 if the run does not fit the memory that
--gpu gives, GB, or would refuse a sample.
"""

import argparse
import sys
from pathlib import Path

from common.cli import OneLineParser, announce_loading, positive_int, positive_number, run

if __name__ == "__main__":
    announce_loading()

from datasets import disable_progress_bars

from common.hub_client import is_reachable
from planning.page import find_data, find_processor, print_plan
from training.config import parse_config


def main(argv: list[str] | None = None) -> int:
    parser = OneLineParser(prog="plan_run.py", description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--gpu", type=positive_number, help="memory of the GPU, GB")
    parser.add_argument("--processes", type=positive_int, help="GPUs that hold the base, with --shard_base true (2)")
    args, recipe = parser.parse_known_args(sys.argv[1:] if argv is None else argv)
    # A plan needs no GPU, so the recipe is read for a CPU, which accepts bf16 but not fp16.
    settings = parse_config([*recipe, "--use_cpu", "true", "--fp16", "false"], prog=parser.prog)
    if args.processes and not settings.training.shard_base:
        raise ValueError("--processes: would have no effect without --shard_base true: each GPU then holds the base")
    disable_progress_bars()
    sources = (settings.data.dataset_path, settings.model.model_name_or_path)
    offline = not all(Path(source).exists() for source in sources) and not is_reachable()
    splits, processor = find_data(settings, offline=offline), find_processor(settings, offline=offline)
    return print_plan(settings, splits, processor, gpu=args.gpu, offline=offline, processes=args.processes or 2)


if __name__ == "__main__":
    sys.exit(run(main))
