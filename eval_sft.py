"""Find out whether an adapter helps, for whom, and how sure that is.

python eval_sft.py --adapter outputs/skin --dataset data/skin
python eval_sft.py --adapter outputs/skin --dataset data/skin --split test --baseline
accelerate launch --num_processes 4 eval_sft.py --config eval.yaml
"""

import argparse
import json
import sys
from pathlib import Path

from common.cli import OneLineParser, positive_int, run

from accelerate import PartialState
from datasets import disable_progress_bars

from common.files import TRAINING_FACTS
from common.hub_client import open_repository
from common.yaml_files import yaml_to_args
from evaluation.questions import load_runs
from evaluation.report import write_evaluation
from evaluation.runner import ask_all, open_journal
from evaluation.summary import COLUMNS, evaluate
from models.adapters import read_adapter_config
from publishing.hub import push_adapter
from publishing.model_card import RUNS, write_card


def build_parser() -> argparse.ArgumentParser:
    parser = OneLineParser(
        prog="eval_sft.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--config", type=Path, help="YAML file of these options; those given here win")
    parser.add_argument("--adapter", required=True, help="folder or Hub id of a trained adapter")
    parser.add_argument("--dataset", required=True, help="prepared data set, annotation file or Hub data set id")
    parser.add_argument("--split", default="test", help="of --dataset (default: test)")
    parser.add_argument("--image-dir", help="image folder, when --dataset is an annotation file")
    parser.add_argument("--out", type=Path, help="folder (default: eval/ in the adapter's folder, else here)")
    parser.add_argument("--push", metavar="REPO_ID", help="put figures, plots and card there, private")
    parser.add_argument("--overwrite", action="store_true", help="drop the answers that --out holds")
    parser.add_argument(
        "--baseline", action="store_true",
        help="also ask the base model alone, and the adapter with the images dealt anew among the questions",
    )  # fmt: skip
    parser.add_argument("--labels", type=Path, help="YAML, label: [synonym, 're:expression']; default: the labels")
    parser.add_argument("--sensitivity-of", nargs="+", default=[], metavar="LABEL", help="default: melanoma, if there")
    parser.add_argument("--subgroups", nargs="+", choices=COLUMNS, default=list(COLUMNS), help="default: all")
    parser.add_argument("--min-group", type=positive_int, default=10, help="smallest subgroup told (default: 10)")
    parser.add_argument("--no-probabilities", action="store_true", help="do not score the labels' answers")
    parser.add_argument("--base", help="base model, in place of the one the adapter names")
    parser.add_argument("--quantization", choices=("auto", "nf4", "none"), default="auto", help="default: as trained")
    parser.add_argument("--dtype", choices=("bfloat16", "float16", "float32"), help="default: as in training")
    parser.add_argument("--min-pixels", type=int, help="px^2 (default: as in training)")
    parser.add_argument("--max-pixels", type=int, help="px^2 (default: as in training)")
    parser.add_argument("--batch-size", type=positive_int, default=8)
    parser.add_argument("--max-new-tokens", type=positive_int, default=128)
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    return parser


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    """Return the options; those of a `--config` file come first, so that the command line's win."""
    words = sys.argv[1:] if argv is None else argv
    only = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    only.add_argument("--config", type=Path)
    config = only.parse_known_args(words)[0].config
    return build_parser().parse_args([*(yaml_to_args(config) if config else []), *words])


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    disable_progress_bars()  # of datasets' own bookkeeping
    read_adapter_config(args.adapter)
    if args.push and (args.out or not Path(args.adapter).is_dir()):
        raise ValueError("--push: goes with an adapter's folder and without --out, as the card is made from both")
    out = args.out or (Path(args.adapter) / "eval" if Path(args.adapter).is_dir() else Path("eval"))
    state = PartialState()
    runs, label_map = load_runs(args)
    if unknown := [label for label in args.sensitivity_of if label not in label_map]:
        raise ValueError(f"--sensitivity-of: {unknown[0]!r} is not a label; there are {', '.join(label_map)}")
    repo_id = open_repository(args.push) if args.push and state.is_main_process else None
    journal = open_journal(args, out, runs, state)
    ask_all(args, runs, journal, state)
    if state.is_main_process:
        found = journal.finish({name: len(questions.rows) for name, questions in runs.items()})
        options = {"columns": args.subgroups, "chosen": args.sensitivity_of, "smallest": args.min_group}
        summary = {"split": args.split, **evaluate(found, label_map, **options)}
        (out / "metrics.json").write_text(json.dumps(summary, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
        images = runs["adapter"].images
        write_evaluation(out, summary, found, label_map, lambda index: images[index]["images"])
        print(verdict(summary, out))
        finish_card(args, repo_id)


def finish_card(args: argparse.Namespace, repo_id: str | None) -> None:
    """Write the figures into the model card of a run's folder, and push both if asked."""
    folder = Path(args.adapter)
    if args.out is None and (folder / TRAINING_FACTS).is_file():
        print(f"{'model card':<26}{write_card(folder)}")
    if repo_id is not None:
        print(f"{'pushed to':<26}{push_adapter(folder, repo_id)}")


def verdict(summary: dict, out: Path) -> str:
    """Return the lines that answer, in a few numbers, whether the adapter helps."""
    lines = [""]
    for name, found in summary["runs"].items():
        share = found.get("diagnosis", {}).get("accuracy")
        told = f"accuracy {interval_text(share)}" if share else f"chrF {found['text']['chrf']:.1f}"
        lines.append(f"{RUNS[name]:<26}{told}")
    if "shuffled_same_label" in summary:
        lines.append(f"{'  looking alone would get':<35}{summary['shuffled_same_label']:.3f}")
    lines.append(f"{summary['diagnosed']} of {summary['samples']} questions ask for the label")
    lines.append(f"{'report':<26}{out / 'report.html'}")
    return "\n".join(lines)


def interval_text(figure: dict) -> str:
    spread = "" if figure["low"] is None else f"   95 % interval {figure['low']:.3f} to {figure['high']:.3f}"
    return f"{figure['value']:.3f}{spread}"


if __name__ == "__main__":
    sys.exit(run(main))
