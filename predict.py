"""Ask a trained adapter (or the base model alone) about images.

python predict.py --adapter outputs/skin --image lesion.jpg --question "What condition is shown?"
python predict.py --adapter outputs/skin --image photos/ 'more/*.jpg' --question "What is it?" --out answers.jsonl
python predict.py --adapter outputs/skin --image before.jpg after.jpg --together --question "What has changed?"
python predict.py --adapter outputs/skin outputs/other --questions questions.jsonl --image-dir photos
python predict.py --adapter outputs/skin --dataset data/skin --split test --out answers.jsonl
"""

import argparse
import json
import sys
from collections.abc import Iterable
from functools import partial
from pathlib import Path

from common.cli import OneLineParser, positive_int, run

from datasets import disable_progress_bars
from tqdm import tqdm
from transformers import TextStreamer

from common.files import atomic_path
from data_prep.images import fit_options, fit_size
from data_prep.records import IMAGE_MARKER
from evaluation.examples import batches, decode, load_examples
from evaluation.generation import answer, score_answers
from evaluation.label_matching import PLACE
from models.adapters import load_adapters, read_adapter_config
from models.loading import load_processor

SOME_SKIPPED = 3  # exit code


def build_parser() -> argparse.ArgumentParser:
    parser = OneLineParser(
        prog="predict.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    source = parser.add_argument_group("what to ask")
    source.add_argument("--image", nargs="+", default=[], help="files, folders and patterns ('*.jpg'), each alone")
    source.add_argument("--question", help="about each image")
    source.add_argument("--together", action="store_true", help="one question about all the images together")
    source.add_argument("--questions", type=Path, help='JSON Lines: {"image": "a.jpg", "question": "..."}')
    source.add_argument("--dataset", help="prepared data set: asks each sample's last question instead")
    source.add_argument("--split", default="test", help="of --dataset (default: test)")
    source.add_argument("--image-dir", help="image folder of --questions, or of an annotation file as --dataset")
    model = parser.add_argument_group("whom to ask")
    model.add_argument("--adapter", nargs="+", default=[], help="folders or Hub ids of adapters, on one base")
    model.add_argument("--base", help="a base model: asked alone, or in place of the one the adapter names")
    model.add_argument(
        "--quantization", choices=("auto", "nf4", "none"), default="auto",
        help="of the base model (default: as in training; none without an adapter)",
    )  # fmt: skip
    model.add_argument(
        "--dtype", choices=("bfloat16", "float16", "float32"),
        help="of the arithmetic (default: as in training; bfloat16 without an adapter; a CPU takes float32)",
    )  # fmt: skip
    model.add_argument("--min-pixels", type=int, help="smallest image area, px^2 (default: the adapter's or base's)")
    model.add_argument("--max-pixels", type=int, help="largest image area, px^2 (default: the adapter's or base's)")
    answers = parser.add_argument_group("answers")
    answers.add_argument("--out", type=Path, help="JSON Lines file (default: print to the screen)")
    answers.add_argument("--top-k", type=positive_int, help="also the K likeliest of --labels, with probabilities")
    answers.add_argument("--labels", nargs="+", help="labels to choose from (default: those of --dataset)")
    answers.add_argument("--wording", default="{label}", help="answer that names a label, as 'This is {label}.'")
    answers.add_argument("--batch-size", type=positive_int, default=8)
    answers.add_argument("--max-new-tokens", type=positive_int, default=128)
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    return parser


def main(argv: list[str] | None = None) -> int:
    args = build_parser().parse_args(argv)
    disable_progress_bars()  # of datasets' own bookkeeping
    check_options(args)
    examples, total, labels = load_examples(args)
    for adapter in args.adapter:
        read_adapter_config(adapter)
    model, adapters = load_adapters(args.adapter, base=args.base, quantization=args.quantization, dtype=args.dtype)
    pixels = {"min_pixels": args.min_pixels, "max_pixels": args.max_pixels}
    processors = {name: load_processor(path, **pixels) for name, path in (adapters or {None: args.base}).items()}
    stream = total == 1 and len(processors) == 1 and args.out is None and not args.top_k
    rows = answer_all(model, processors, adapters, examples, args, labels=labels, stream=stream)
    skipped = write_answers(rows, args.out, total=total * len(processors), stream=stream)
    return SOME_SKIPPED if skipped else 0


def check_options(args: argparse.Namespace) -> None:
    """Raise ValueError for options that do not go together."""
    if not args.adapter and args.base is None:
        raise ValueError("name an adapter (--adapter), or a base model to ask alone (--base)")
    given = [name for name in ("image", "questions", "dataset") if getattr(args, name)]
    if len(given) != 1:
        found = " and ".join(f"--{name}" for name in given) or "none of them"
        raise ValueError(f"name one of --image (with --question), --questions and --dataset; found {found}")
    if args.image and not args.question:
        raise ValueError("--question: what should be asked about the images?")
    if not args.image and (args.question or args.together):
        raise ValueError(f"--{'question' if args.question else 'together'}: goes with --image, not with --{given[0]}")
    if args.out is not None and args.out.is_dir():
        raise ValueError(f"--out: {args.out} is a folder, expected a file")
    if args.top_k and not args.labels and not args.dataset:
        raise ValueError("--top-k: name the labels to choose from (--labels)")
    if PLACE not in args.wording:
        raise ValueError(f"--wording: expected {PLACE} where the label stands, found {args.wording!r}")


def answer_all(model, processors: dict, adapters: dict, examples: Iterable[dict], args, *, labels, stream: bool):
    """Yield a row for each example and adapter, in order, with its `prediction`, or the `error` that kept it out."""
    for batch in batches(examples, args.batch_size):
        for name, processor in processors.items():
            if len(adapters) > 1:
                model.set_adapter(name)
            fit = partial(fit_size, **fit_options(processor.image_processor))
            decoded = [decode(example, fit=fit) for example in batch]
            good = [example for example in decoded if "error" not in example]
            found = iter(answer_batch(model, processor, good, args, labels=labels, stream=stream) if good else [])
            for example in decoded:
                about = {"adapter": adapters[name]} if len(adapters) > 1 else {}
                row = {key: value for key, value in example.items() if key not in ("images", "messages")}
                yield {**row, **about, **({} if "error" in example else next(found))}


def answer_batch(model, processor, examples: list[dict], args, *, labels: list[str], stream: bool) -> list[dict]:
    """Return each example's question and answer, and with `--top-k` the likeliest labels with their probabilities."""
    streamer = TextStreamer(processor.tokenizer, skip_prompt=True, skip_special_tokens=True) if stream else None
    texts = answer(model, processor, examples, args.max_new_tokens, streamer=streamer)
    rows = [
        {"question": example["messages"][-1]["content"].replace(IMAGE_MARKER, "").strip(), "prediction": text}
        for example, text in zip(examples, texts, strict=True)
    ]
    if args.top_k:
        wordings = [args.wording.replace(PLACE, label) for label in labels]
        shares = score_answers(model, processor, examples, [wordings] * len(examples)).softmax(-1)
        for row, own in zip(rows, shares.tolist(), strict=True):
            ranked = sorted(zip(own, labels, strict=True), reverse=True)[: args.top_k]
            row["likeliest"] = {label: round(share, 4) for share, label in ranked}
    return rows


def write_answers(rows: Iterable[dict], out: Path | None, *, total: int, stream: bool) -> int:
    """Print the answers, or write them to a file with a progress bar; return how many images were skipped."""
    skipped = 0
    if out is None:
        for row in rows:
            skipped += tell(row, stream=stream, alone=total == 1)
        return skipped
    out.parent.mkdir(parents=True, exist_ok=True)
    with atomic_path(out) as unfinished, unfinished.open("w", encoding="utf-8") as file:
        for row in tqdm(rows, total=total, unit="answer"):
            file.write(json.dumps(row, ensure_ascii=False) + "\n")
            if "error" in row:
                skipped += 1
                tqdm.write(f"skipped {row['id']}: {row['error']}", file=sys.stderr)
    print(f"{total - skipped} answers in {out}" + (f", {skipped} skipped" if skipped else ""))
    return skipped


def tell(row: dict, *, stream: bool, alone: bool) -> bool:
    """Print one answer, unless it was streamed already; return whether there is none."""
    if "error" in row:
        print(f"skipped {row['id']}: {row['error']}", file=sys.stderr)
        return True
    name = "" if alone else f"{row['id']} [{row['adapter']}]: " if "adapter" in row else f"{row['id']}: "
    if not stream:
        print(name + row["prediction"])
    for label, share in row.get("likeliest", {}).items():
        print(f"  {share:.3f}  {label}")
    return False


if __name__ == "__main__":
    sys.exit(run(main))
