"""Ask a trained adapter, or the base model alone, about images.

python predict.py --adapter outputs/skin --image lesion.jpg --question "What condition is shown?"
python predict.py --adapter outputs/skin --image photos/ 'more/*.jpg' --question "What is it?" --out answers.jsonl
python predict.py --adapter outputs/skin --image before.jpg after.jpg --together --question "What has changed?"
python predict.py --adapter outputs/skin outputs/other --questions questions.jsonl --image-dir photos
python predict.py --adapter outputs/skin --dataset data/skin --split test --out answers.jsonl
python predict.py --adapter outputs/skin --print-server vllm
python predict.py --adapter outputs/skin --dataset data/skin --check-server http://127.0.0.1:8000
"""

import argparse
import sys
from pathlib import Path

from common.cli import OneLineParser, announce_loading, positive_int, run

if __name__ == "__main__":
    announce_loading()

from models.without_compiler import bitsandbytes  # noqa: F401

from datasets import disable_progress_bars

from evaluation.engines import add_engine_options, check_engine_options, open_engine
from evaluation.examples import load_examples, printable
from evaluation.label_matching import LABEL_PLACEHOLDER
from evaluation.parity import check_server
from evaluation.prediction import answer_examples, check_out, write_answers
from evaluation.serve_command import SERVERS, serve_command
from models.adapters import is_adapter, read_adapter_config

EXIT_SKIPPED = 3  # some questions were not answered


def build_parser() -> argparse.ArgumentParser:
    parser = OneLineParser("predict.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    source = parser.add_argument_group("questions")
    source.add_argument("--image", nargs="+", default=[], help="files, folders and patterns ('*.jpg')")
    source.add_argument("--question", help="asked about each image")
    source.add_argument("--system", help="system turn, for --image and for --questions without `system`")
    source.add_argument("--together", action="store_true", help="ask once, about all images together")
    source.add_argument(
        "--questions", type=Path, help='JSON Lines: {"image": "a.jpg", "question": "...", "system": "..."}'
    )
    source.add_argument("--dataset", help="prepared data set: asks the last question of each sample")
    source.add_argument("--split", default="test", help="split of --dataset (default: test)")
    source.add_argument("--image-dir", help="image folder, for --questions or when --dataset is an annotation file")
    model = parser.add_argument_group("model")
    model.add_argument("--adapter", nargs="+", default=[], help="folders or Hub ids of adapters, of one base model")
    model.add_argument("--base", help="base model: used alone, or in place of the one in the adapter's configuration")
    model.add_argument(
        "--quantization", choices=("auto", "nf4", "none"), default="auto",
        help="quantization of the base model (default: as in training; none without an adapter)",
    )  # fmt: skip
    model.add_argument(
        "--dtype", choices=("bfloat16", "float16", "float32"),
        help="compute dtype (default: as in training; bfloat16 without an adapter; on a CPU use float32)",
    )  # fmt: skip
    model.add_argument("--min-pixels", type=int, help="smallest image area, px^2 (default: the processor's)")
    model.add_argument("--max-pixels", type=int, help="largest image area, px^2 (default: the processor's)")
    add_engine_options(model)
    answers = parser.add_argument_group("answers")
    answers.add_argument("--out", type=Path, help="JSON Lines file (default: print to the screen)")
    answers.add_argument("--top-k", type=positive_int, help="also report the K likeliest labels, with probabilities")
    answers.add_argument("--labels", nargs="+", help="labels for --top-k (default: those of --dataset)")
    answers.add_argument("--wording", default="{label}", help="of an answer, like 'This is {label}.'")
    answers.add_argument("--batch-size", type=positive_int, help="questions at a time (default: 8; with vLLM 128)")
    answers.add_argument("--max-new-tokens", type=positive_int, default=128)
    server = parser.add_argument_group("servers")
    server.add_argument("--print-server", choices=SERVERS, help="print the command that serves the model, and end")
    server.add_argument("--check-server", metavar="URL", help="ask this server too, and report the equal answers")
    server.add_argument("--sample", type=positive_int, default=60, help="questions of --check-server (default: 60)")
    server.add_argument(
        "--limit", type=share, default=0.95, help="exit code 1 if a smaller share of them is equal (default: 0.95)"
    )
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    return parser


def share(text: str) -> float:
    """Read a number from 0 to 1 (the `type` of an option)."""
    try:
        if 0 <= float(text) <= 1:
            return float(text)
    except ValueError:
        pass
    raise argparse.ArgumentTypeError(f"expected a number from 0 to 1, found {text!r}")


def main(argv: list[str] | None = None) -> int:
    args = build_parser().parse_args(argv)
    disable_progress_bars()  # those of datasets
    check_model_options(args)
    check_engine_options(args)
    if args.print_server:
        print(serve_command(args.adapter, args.base, args))
        return 0
    check_options(args)
    examples, count, labels = load_examples(args)
    for adapter in args.adapter:
        read_adapter_config(adapter)
    total = count * max(1, len(args.adapter))
    stream = total == 1 and args.out is None and not args.top_k and args.engine == "transformers"
    with open_engine(args.adapter, args.base, args) as engine:
        if args.check_server:
            return check_server(engine, args.base, examples, count, args)
        rows = answer_examples(engine, examples, args, labels=labels, stream=stream)
        counts = write_answers(rows, args.out, total=total, stream=stream)
    if counts["cut"]:
        print(
            f"{counts['cut']} of {total - counts['skipped']} answers cut at --max-new-tokens {args.max_new_tokens}",
            file=sys.stderr,
        )
    return EXIT_SKIPPED if counts["skipped"] else 0


def check_model_options(args: argparse.Namespace) -> None:
    """Raise ValueError unless there is a model, and one use of servers."""
    if not args.adapter and args.base is None:
        raise ValueError("name an adapter (--adapter), or a base model to use alone (--base)")
    if args.base and is_adapter(args.base):
        rule = "name its base model" if args.adapter else f"write --adapter {args.base}"
        raise ValueError(f"--base: {args.base} is an adapter; {rule}")
    if args.print_server and (
        unused := [name for name in ("image", "questions", "out", "top_k") if getattr(args, name)]
    ):
        raise ValueError(f"--print-server: answers nothing; --{unused[0].replace('_', '-')} is for another call")
    if args.check_server and args.engine != "transformers":
        raise ValueError("--check-server: compares a server with the model here (--engine transformers)")
    if args.check_server and (args.out or args.top_k or args.print_server):
        other = "--out" if args.out else "--top-k" if args.top_k else "--print-server"
        raise ValueError(f"--check-server: compares answers; {other} is for another call")


def check_options(args: argparse.Namespace) -> None:
    """Raise ValueError for options of the questions and answers that do not go together."""
    sources = [f"--{name}" for name in ("image", "questions", "dataset") if getattr(args, name)]
    if len(sources) != 1:
        given = " and ".join(sources) or "none of them"
        raise ValueError(f"expected one of --image (with --question), --questions and --dataset; found {given}")
    if args.image and not args.question:
        raise ValueError("--image: needs --question")
    if not args.image and (args.question or args.together):
        raise ValueError(f"--{'question' if args.question else 'together'}: goes with --image, not with {sources[0]}")
    if args.dataset and args.system:
        raise ValueError("--system: a data set has its own; it goes with --image and --questions")
    if args.out is not None:
        check_out(args.out, [Path(path) for path in (args.questions, args.dataset) if path])
    if not args.top_k and (args.labels or args.wording != LABEL_PLACEHOLDER):
        raise ValueError(f"--{'labels' if args.labels else 'wording'}: would have no effect without --top-k")
    if args.top_k and not args.labels and not args.dataset:
        raise ValueError("--top-k: needs --labels or --dataset")
    if args.labels and (
        wrong := [label for label in args.labels if not label.strip() or args.labels.count(label) > 1]
    ):
        raise ValueError(f"--labels: expected different names, found {wrong[0]!r} {args.labels.count(wrong[0])} times")
    for name in ("question", "system", "labels", "wording"):
        check_encodable(f"--{name}", getattr(args, name))
    if LABEL_PLACEHOLDER not in args.wording:
        raise ValueError(f"--wording: expected {LABEL_PLACEHOLDER} in place of the label, found {args.wording!r}")


def check_encodable(option: str, value: str | list[str] | None) -> None:
    """Raise ValueError for a text whose bytes are not UTF-8; the tokenizer takes none."""
    for text in [value] if isinstance(value, str) else value or []:
        if text != printable(text):
            raise ValueError(f"{option}: '{printable(text)}' is not UTF-8; set the terminal's encoding to UTF-8")


if __name__ == "__main__":
    sys.exit(run(main))
