"""Say what a training run will take, in seconds, without a GPU and without the model's weights.

python plan_run.py --config configs/skin.yaml --gpu 24

Takes every option of train_sft.py; --gpu is the memory of yours, GB. Exit code 1 when the run does not fit it.
"""

import argparse
import sys
from pathlib import Path

from common.cli import OneLineParser, run

from datasets import disable_progress_bars

from common.hub_client import is_reachable
from planning.page import find_data, find_processor, print_plan
from training.config import parse_config


def main(argv: list[str] | None = None) -> int:
    parser = OneLineParser(prog="plan_run.py", description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--gpu", type=float, help="memory of the GPU, GB")
    args, recipe = parser.parse_known_args(sys.argv[1:] if argv is None else argv)
    # A plan needs no GPU: the recipe is read as one for the CPU, which refuses fp16 and takes bf16.
    settings = parse_config([*recipe, "--use_cpu", "true", "--fp16", "false"])
    disable_progress_bars()
    data_args, training_args, model_args = settings
    on_hub = [name for name in (data_args.dataset_path, model_args.model_name_or_path) if not Path(name).exists()]
    offline = bool(on_hub) and not is_reachable()
    splits = find_data(data_args, training_args.seed, offline=offline)
    processor = find_processor(data_args, model_args, offline=offline)
    return print_plan(*settings, splits, processor, gpu=args.gpu, offline=offline)


if __name__ == "__main__":
    sys.exit(run(main))
