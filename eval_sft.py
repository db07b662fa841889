"""Evaluate an adapter: accuracy of the diagnoses overall, by label and by subgroup, with intervals.

python eval_sft.py --adapter outputs/skin --dataset data/skin
python eval_sft.py --adapter outputs/skin --dataset data/skin --split test --baseline
python eval_sft.py --model outputs/skin-merged --dataset data/skin --split all
python eval_sft.py --adapter outputs/skin --dataset data/skin --engine vllm
accelerate launch --num_processes 4 eval_sft.py --config eval.yaml
"""

import argparse
import sys
from pathlib import Path

from common.cli import OneLineParser, announce_loading, positive_int, run

if __name__ == "__main__":
    announce_loading()

from models.without_compiler import bitsandbytes  # noqa: F401

import torch
from accelerate import PartialState
from datasets import disable_progress_bars

from common.console import print_rank0
from common.files import TRAINING_FACTS
from common.hub_client import open_repository
from common.output_folder import own_folder
from common.yaml_files import yaml_to_args
from evaluation.batching import AUTO, batch_size
from evaluation.clusters import cluster_samples, image_keys
from evaluation.engines import add_engine_options, check_engine_options
from evaluation.label_matching import describe_unread_rows
from evaluation.questions import Questions, load_runs
from evaluation.report import format_verdict, write_report
from evaluation.runner import answer_questions, choose_runs, collect_rows, open_journal
from evaluation.summary import SUBGROUP_COLUMNS, summarise
from models.adapters import is_adapter, read_adapter_config
from models.loading import load_config
from publishing.hub import push_adapter
from publishing.metric_notes import trained_note
from publishing.model_card import write_card

LOCK = "evaluation.lock"


def build_parser() -> argparse.ArgumentParser:
    parser = OneLineParser("eval_sft.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", type=Path, help="YAML file of these options; the command line overrides it")
    parser.add_argument("--adapter", help="folder or Hub id of a trained adapter")
    parser.add_argument("--model", help="folder or Hub id of a merged or a base model, in place of --adapter")
    parser.add_argument("--dataset", required=True, help="prepared data set, annotation file or Hub data set id")
    parser.add_argument("--split", default="test", help="split of --dataset, or 'all' (default: test)")
    parser.add_argument("--image-dir", help="image folder, when --dataset is an annotation file")
    parser.add_argument("--out", type=Path, help="folder (default: eval/ in the adapter's folder, else here)")
    parser.add_argument("--push", metavar="REPO_ID", help="upload adapter, card, metrics and plots, private")
    parser.add_argument("--overwrite", action="store_true", help="delete the answers in --out first")
    parser.add_argument(
        "--baseline", action="store_true",
        help="also evaluate the base model alone, and the adapter with the images shuffled among the questions",
    )  # fmt: skip
    parser.add_argument("--labels", type=Path, help="YAML file of synonyms, label: [name, 're:expression']")
    parser.add_argument("--sensitivity-of", nargs="+", default=[], metavar="LABEL", help="default: melanoma")
    parser.add_argument("--subgroups", nargs="+", choices=SUBGROUP_COLUMNS, default=SUBGROUP_COLUMNS, metavar="COLUMN")
    parser.add_argument("--min-group", type=positive_int, default=10, help="smallest subgroup to report (default: 10)")
    parser.add_argument("--no-probabilities", action="store_true", help="do not compute probabilities of the labels")
    parser.add_argument("--base", help="base model, in place of the one in the adapter's configuration")
    parser.add_argument("--quantization", choices=("auto", "nf4", "none"), default="auto", help="default: as trained")
    parser.add_argument("--dtype", choices=("bfloat16", "float16", "float32"), help="default: as in training")
    parser.add_argument("--min-pixels", type=int, help="px^2 (default: as in training)")
    parser.add_argument("--max-pixels", type=int, help="px^2 (default: as in training)")
    parser.add_argument(
        "--batch-size", type=batch_size, default=AUTO, metavar="N",
        help="questions at a time (default: auto, as many of similar length as memory allows; with vLLM 128)",
    )  # fmt: skip
    parser.add_argument("--max-new-tokens", type=positive_int, default=128)
    add_engine_options(parser)
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    return parser


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    """Return the options; the command line overrides those of a `--config` file."""
    words = sys.argv[1:] if argv is None else argv
    config_parser = OneLineParser("eval_sft.py", add_help=False)
    config_parser.add_argument("--config", type=Path)
    config = config_parser.parse_known_args(words)[0].config
    return build_parser().parse_args([*(yaml_to_args(config) if config else []), *words])


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    disable_progress_bars()  # those of datasets
    check_model_options(args)
    out = args.out or (Path(args.adapter) / "eval" if args.adapter and Path(args.adapter).is_dir() else Path("eval"))
    state = PartialState(cpu=not torch.cuda.is_available())  # without it, processes on CPUs would not know each other
    check_engine_options(args, state.num_processes)
    with own_folder(out, "--out", lock=LOCK):
        evaluate(args, out, state)


def evaluate(args: argparse.Namespace, out: Path, state: PartialState) -> None:
    """Answer the questions, with the answers that `out` holds already, and write the results there."""
    runs, label_map, counts = load_runs(args)
    print_rank0(describe_counts(counts, args.split))
    if state.is_main_process and (note := trained_note(counts)):
        print(f"WARNING: {note}", file=sys.stderr, flush=True)
    check_labels(args.sensitivity_of, label_map)
    if state.is_main_process and (unread := describe_unread_rows(runs["adapter"].rows, label_map, quote=True)):
        print(f"WARNING: {unread}", file=sys.stderr, flush=True)  # before hours of answering
    repo_id = open_repository(args.push) if args.push and state.is_main_process else None
    journal = open_journal(args, out, runs, state)
    runs = choose_runs(args, runs, journal)
    answer_questions(args, runs, journal, state)
    if state.is_main_process:
        rows = collect_rows(runs, journal)
        summary = summarise_rows(args, rows, runs["adapter"], label_map, counts)
        write_report(out, summary, rows, label_map, runs["adapter"])
        print(format_verdict(summary, out))
        if args.adapter:
            update_card(args, repo_id)


def summarise_rows(
    args: argparse.Namespace, rows: dict[str, list[dict]], questions: Questions, label_map: dict, counts: dict
) -> dict:
    """Return the content of `metrics.json`."""
    keys = image_keys(questions.images)
    clusters = cluster_samples(rows["adapter"], [keys[row] for row in questions.image_rows], questions.messages)
    options = {"clusters": clusters, "sensitivity_of": args.sensitivity_of, "min_group": args.min_group}
    return {
        "split": args.split,
        "evaluated": counts,
        "max_new_tokens": args.max_new_tokens,
        **({"model": Path(args.model).name} if args.model else {}),
        **summarise(rows, label_map, columns=args.subgroups, **options),
    }


def check_model_options(args: argparse.Namespace) -> None:
    """Raise ValueError unless there is one adapter or model, and for `--push` a run's folder with the card's facts."""
    if (args.adapter is None) == (args.model is None):
        raise ValueError("name what to evaluate: an adapter (--adapter), or a model without one (--model)")
    if args.model:
        if unfit := [f"--{name}" for name in ("base", "push") if getattr(args, name)]:
            raise ValueError(f"{unfit[0]}: goes with --adapter, not with --model")
        if is_adapter(args.model):
            raise ValueError(f"--model: {args.model} is an adapter; write --adapter {args.model}")
        load_config(args.model)
        return
    read_adapter_config(args.adapter)
    if args.push and (args.out or not Path(args.adapter).is_dir()):
        raise ValueError("--push: needs the adapter's folder as --adapter, and no --out")


def describe_counts(counts: dict, split: str) -> str:
    """Return the line that says how many of how many samples are evaluated."""
    rest = "" if counts["samples"] == counts["of"] else " (--split all evaluates all)"
    samples = f"{counts['samples']:,} of {counts['of']:,} samples, split {split}"
    return f"{'evaluating':<26}{samples}{rest}: {counts['questions']:,} questions"


def check_labels(labels: list[str], label_map: dict) -> None:
    if unknown := [label for label in labels if label not in label_map]:
        raise ValueError(f"--sensitivity-of: {unknown[0]!r} is not a label; there are {', '.join(label_map)}")


def update_card(args: argparse.Namespace, repo_id: str | None) -> None:
    """Write the results into the model card of a run's folder, and push both to `repo_id` unless it is None."""
    folder = Path(args.adapter)
    if args.out is None and (folder / TRAINING_FACTS).is_file():
        print(f"{'model card':<26}{write_card(folder)}")
    if repo_id is not None:
        print(f"{'pushed to':<26}{push_adapter(folder, repo_id)}")


if __name__ == "__main__":
    sys.exit(run(main))
