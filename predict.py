"""Ask a trained adapter (or the base model alone) about images.

python predict.py --adapter outputs/skin --image lesion.jpg --question "What condition is shown?"
python predict.py --adapter outputs/skin --image photos/ --question "What condition is shown?" --out answers.jsonl
python predict.py --adapter outputs/skin --dataset data/skin --split test --out answers.jsonl
"""

import argparse
import json
import sys
from pathlib import Path

from cli import OneLineParser, positive_int, run

from datasets import disable_progress_bars
from PIL import Image
from tqdm import tqdm
from transformers import ProcessorMixin

from answering import answer, load_answering_model, read_adapter_config
from data_prep import load_splits
from data_prep.images import probe_image
from data_prep.records import IMAGE_MARKER, FieldError, normalise_messages
from modeling import load_processor


def build_parser() -> argparse.ArgumentParser:
    parser = OneLineParser(
        prog="predict.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    source = parser.add_argument_group("what to ask")
    source.add_argument("--image", type=Path, action="append", default=[], help="a file, or one folder; repeatable")
    source.add_argument("--question", help="one question about the images together, or about each image of a folder")
    source.add_argument("--dataset", help="prepared data set: asks each sample's last question instead")
    source.add_argument("--split", default="test", help="of --dataset (default: test)")
    source.add_argument("--image-dir", help="image folder, when --dataset is an annotation file")
    model = parser.add_argument_group("whom to ask")
    model.add_argument("--adapter", help="folder or Hub id of a trained adapter")
    model.add_argument("--base", help="a base model: asked alone, or in place of the one the adapter names")
    model.add_argument(
        "--quantization", choices=("auto", "nf4", "none"), default="auto",
        help="of the base model (default: as in training; none without an adapter)",
    )  # fmt: skip
    model.add_argument(
        "--dtype", choices=("bfloat16", "float16", "float32"),
        help="of the arithmetic (default: as in training; bfloat16 without an adapter; a CPU takes float32)",
    )  # fmt: skip
    model.add_argument(
        "--min-pixels", type=int, help="smallest image area, px^2 (default: the adapter's or base's own)"
    )
    model.add_argument(
        "--max-pixels", type=int, help="largest image area, px^2 (default: the adapter's or base's own)"
    )
    answers = parser.add_argument_group("answers")
    answers.add_argument("--out", type=Path, help="JSON Lines file (default: print to the screen)")
    answers.add_argument("--batch-size", type=positive_int, default=8)
    answers.add_argument("--max-new-tokens", type=positive_int, default=128)
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    return parser


def main(argv: list[str] | None = None) -> None:
    args = build_parser().parse_args(argv)
    disable_progress_bars()  # of datasets' own bookkeeping
    examples = load_examples(args)
    if args.adapter:
        read_adapter_config(args.adapter)
    processor = load_processor(args.adapter or args.base, min_pixels=args.min_pixels, max_pixels=args.max_pixels)
    model = load_answering_model(args.adapter, base=args.base, quantization=args.quantization, dtype=args.dtype)
    rows = answer_all(model, processor, examples, batch_size=args.batch_size, max_new_tokens=args.max_new_tokens)
    write_answers(rows, args.out, total=len(examples))


def load_examples(args: argparse.Namespace) -> list[dict]:
    """Return samples whose messages end with the user's turn; `reference` is the known answer, if there is one."""
    if args.adapter is None and args.base is None:
        raise ValueError("name an adapter (--adapter), or a base model to ask alone (--base)")
    if (args.dataset is None) == (not args.image):
        raise ValueError("name either images (--image, with --question) or a prepared data set (--dataset)")
    if args.dataset is not None and args.question:
        raise ValueError("--question: a prepared data set brings its own questions")
    if args.out is not None and args.out.is_dir():
        raise ValueError(f"--out: {args.out} is a folder, expected a file")
    if args.dataset is not None:
        return examples_of_split(args.dataset, args.split, args.image_dir)
    if not args.question:
        raise ValueError("--question: what should be asked about the images?")
    return examples_of_images(args.image, args.question)


def examples_of_split(dataset: str, split: str, image_dir: str | None) -> list[dict]:
    splits = load_splits(dataset, image_dir)
    if split not in splits:
        raise ValueError(f"--split: {dataset} has no split {split!r}, only {sorted(splits)}")
    examples = []
    for sample in splits[split]:
        *messages, answer = sample["messages"]
        facts = {key: sample[key] for key in ("id", "label", "group", "skin_type")}
        examples.append({**facts, "images": sample["images"], "messages": messages, "reference": answer["content"]})
    if not examples:
        raise ValueError(f"--split: split {split!r} of {dataset} is empty")
    return examples


def examples_of_images(paths: list[Path], question: str) -> list[dict]:
    """One example of all the files named, or one for each image of a folder, in the order of the names."""
    for path in paths:
        if not path.exists():
            raise FileNotFoundError(f"--image: no file or folder {path}")
    folders = [path for path in paths if path.is_dir()]
    if not folders:
        return [_question_about(paths, question)]
    if len(paths) > 1:
        raise ValueError(f"--image: {folders[0]} is a folder; name one folder, or files")
    suffixes = {suffix for suffix, kind in Image.registered_extensions().items() if kind in Image.OPEN}
    found = sorted(path for path in folders[0].iterdir() if path.suffix.lower() in suffixes)
    if not found:
        raise ValueError(f"--image: no file in {folders[0]} is named like an image")
    return [_question_about([path], question) for path in found]


def _question_about(paths: list[Path], question: str) -> dict:
    turns = [{"role": "user", "content": question}, {"role": "assistant", "content": "?"}]
    for path in paths:
        if isinstance(reason := probe_image(path), str):
            raise ValueError(f"--image: {path}: {reason}")
    try:
        messages = normalise_messages(turns, list(paths), field="--question", names=["--question", "answer"])[:-1]
    except FieldError as error:
        raise ValueError(str(error)) from error
    return {"id": ", ".join(path.name for path in paths), "images": [str(p) for p in paths], "messages": messages}


def answer_all(model, processor: ProcessorMixin, examples: list[dict], *, batch_size: int, max_new_tokens: int):
    """Yield each example's row with its `prediction`, in order; greedy decoding, so the same every time."""
    for start in range(0, len(examples), batch_size):
        batch = examples[start : start + batch_size]
        for example, prediction in zip(batch, answer(model, processor, batch, max_new_tokens), strict=True):
            question = example["messages"][-1]["content"].replace(IMAGE_MARKER, "").strip()
            facts = {key: value for key, value in example.items() if key not in ("images", "messages")}
            yield {**facts, "question": question, "prediction": prediction}


def write_answers(rows, out: Path | None, *, total: int) -> None:
    """Print the answers, or write them to a file as they come, with a progress bar."""
    if out is None:
        for row in rows:
            print(row["prediction"] if total == 1 else f"{row['id']}: {row['prediction']}")
        return
    out.parent.mkdir(parents=True, exist_ok=True)
    unfinished = out.with_name(out.name + ".unfinished")
    with unfinished.open("w", encoding="utf-8") as file:
        for row in tqdm(rows, total=total, unit="answer"):
            file.write(json.dumps(row, ensure_ascii=False) + "\n")
    unfinished.replace(out)
    print(f"{total} answers in {out}")


if __name__ == "__main__":
    sys.exit(run(main))
