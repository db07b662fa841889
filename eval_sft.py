"""Find out whether an adapter helps, for whom, and how sure that is.

python eval_sft.py --adapter outputs/skin --dataset data/skin
python eval_sft.py --adapter outputs/skin --dataset data/skin --split test --baseline
accelerate launch --num_processes 4 eval_sft.py --config eval.yaml
"""

import argparse
import hashlib
import json
import random
import sys
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path

from cli import OneLineParser, positive_int, read_yaml, run, words_of

from accelerate import PartialState
from datasets import Dataset, disable_progress_bars
from tqdm import tqdm

from answering import answer, load_answering_model, loading_settings, read_adapter_config, score_answers
from card import FACTS as FACTS_FILE
from card import RUNS, WEIGHTS, adapter_digest, write_card
from data_prep import load_splits
from data_prep.records import IMAGE_MARKER
from evaluation import COLUMNS, Journal, evaluate
from evaluation_report import write_evaluation
from hub import open_repository, push_adapter
from labels import PLACE, answer_templates, asks_for_label, build_label_map
from modeling import load_processor

FACTS = ("id", "label", "group", "skin_type", "age", "sex", "site", "source")


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
    return build_parser().parse_args([*(words_of(config) if config else []), *words])


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
    if args.out is None and (folder / FACTS_FILE).is_file():
        print(f"{'model card':<26}{write_card(folder)}")
    if repo_id is not None:
        print(f"{'pushed to':<26}{push_adapter(folder, repo_id)}")


@dataclass
class Questions:
    """What one run asks: facts and messages of each sample, and where its images come from.

    Attributes:
        rows: `FACTS`, `question` and `reference` of each sample.
        messages: each sample's turns up to the question.
        images: data set with the `images` of each sample, read when needed.
        order: which row of `images` belongs to which sample.
        candidates: for each sample the answers to score, by label; none for samples that do not ask for the label.
        adapter: whether the adapter is on.
        generate: whether answers are written, besides scored.
    """

    rows: list[dict]
    messages: list[list[dict]]
    images: Dataset
    order: list[int]
    candidates: list[dict[str, str]] = field(default_factory=list)
    adapter: bool = True
    generate: bool = True

    def example(self, index: int) -> dict:
        images = self.images[self.order[index]]["images"]
        return {"id": self.rows[index]["id"], "images": images, "messages": self.messages[index]}


def load_runs(args: argparse.Namespace) -> tuple[dict[str, Questions], dict]:
    """Return what is asked of whom, and the label map.

    The runs are "adapter", "validation" (scored alone, for the temperature), and the two of `--baseline`.
    """
    splits = load_splits(args.dataset, args.image_dir)
    if args.split not in splits:
        raise ValueError(f"--split: {args.dataset} has no split {args.split!r}, only {sorted(splits)}")
    asked = read_questions(splits[args.split])
    if not asked.rows:
        raise ValueError(f"--split: split {args.split!r} of {args.dataset} is empty")
    runs = {"adapter": asked}
    names = {label for split in splits.values() for label in split["label"] if label is not None}
    label_map = build_label_map(names, read_synonyms(args.labels)) if names else {}
    if names and not args.no_probabilities:
        templates = set_candidates(asked, label_map)
        if "validation" in splits and args.split != "validation" and len(label_map) > 1:
            runs["validation"] = read_questions(splits["validation"], generate=False)
            set_candidates(runs["validation"], label_map, templates)
    if args.baseline:
        plain = {"rows": asked.rows, "messages": asked.messages, "images": asked.images}
        runs["base"] = Questions(**plain, order=asked.order, candidates=asked.candidates, adapter=False)
        runs["shuffled"] = Questions(**plain, order=deal_images(asked))
    return runs, label_map


def read_synonyms(path: Path | None) -> dict | None:
    return None if path is None else read_yaml(path, "--labels")


def read_questions(split: Dataset, *, generate: bool = True) -> Questions:
    """Return each sample's last question and the answer that the data give."""
    rows, messages = [], []
    for sample in split.remove_columns("images"):
        *turns, reference = sample["messages"]
        question = turns[-1]["content"].replace(IMAGE_MARKER, "").strip()
        facts = {key: sample[key] for key in FACTS}
        rows.append({**facts, "question": question, "reference": reference["content"]})
        messages.append(turns)
    images = split.select_columns(["images", "image_sizes"])
    return Questions(rows, messages, images, order=list(range(len(rows))), generate=generate)


def set_candidates(asked: Questions, label_map: dict, templates: dict[str, str] | None = None) -> dict[str, str]:
    """Give each sample that asks for its label the answers that would name each label; return their wordings."""
    diagnosed = [asks_for_label(row, label_map) for row in asked.rows]
    templates = templates or answer_templates(
        [row for row, asks in zip(asked.rows, diagnosed, strict=True) if asks], label_map
    )
    for row, asks in zip(asked.rows, diagnosed, strict=True):
        template = templates.get(row["question"], templates[""])
        asked.candidates.append({label: template.replace(PLACE, label) for label in label_map} if asks else {})
    return templates


def deal_images(asked: Questions, *, seed: int = 0) -> list[int]:
    """Return an order in which no sample keeps its images, and each gets as many as it had."""
    alike = {}
    for index, sizes in enumerate(asked.images["image_sizes"]):
        alike.setdefault(len(sizes), []).append(index)
    order = list(asked.order)
    for indices in alike.values():
        dealt = random.Random(seed).sample(indices, len(indices))
        for giver, taker in zip(dealt, [*dealt[1:], dealt[0]], strict=True):
            order[taker] = giver
    return order


def open_journal(args: argparse.Namespace, out: Path, runs: dict, state: PartialState) -> Journal:
    """Open the answers so far, once it is sure that they were made with the same settings on the same questions."""
    if args.overwrite and state.is_main_process:
        Journal.clear(out)
    state.wait_for_everyone()
    asked = runs["adapter"]
    content = json.dumps([asked.rows, asked.messages, asked.candidates, asked.images["image_sizes"][:]])
    names = ("split", "batch_size", "max_new_tokens", "min_pixels", "max_pixels", "no_probabilities")
    folder = Path(args.adapter)
    settings = {
        **{name: getattr(args, name) for name in names},
        **loading_settings(args.adapter, base=args.base, quantization=args.quantization, dtype=args.dtype),
        "base": args.base and Path(args.base).name,
        "questions": hashlib.sha256(content.encode()).hexdigest(),
        "adapter": adapter_digest(folder) if (folder / WEIGHTS).is_file() else args.adapter,
    }
    if state.is_main_process:
        journal = Journal(out, settings, 0)
    state.wait_for_everyone()
    return journal if state.is_main_process else Journal(out, settings, state.process_index)


def ask_all(args: argparse.Namespace, runs: dict[str, Questions], journal: Journal, state: PartialState) -> None:
    """Answer every batch that the journal lacks, this process its share of them."""
    batches = [
        (name, range(start, min(start + args.batch_size, len(questions.rows))))
        for name, questions in runs.items()
        for start in range(0, len(questions.rows), args.batch_size)
    ]
    missing = [(name, indices) for name, indices in batches if not journal.has(name, indices)]
    if missing:
        processor = load_processor(args.adapter, min_pixels=args.min_pixels, max_pixels=args.max_pixels)
        model = load_answering_model(args.adapter, base=args.base, quantization=args.quantization, dtype=args.dtype)
        own = missing[state.process_index :: state.num_processes]
        shown = {"total": len(own), "unit": "batch", "disable": not state.is_main_process}
        for rows in tqdm(_answers(model, processor, runs, own, args.max_new_tokens), **shown):
            journal.add(rows)
    state.wait_for_everyone()


def _answers(model, processor, runs: dict[str, Questions], batches: list, max_new_tokens: int) -> Iterator[list[dict]]:
    """Yield the rows of each batch: what is known of the sample, the answer, the scores of its label's answers."""
    for name, indices in batches:
        asked = runs[name]
        examples = [asked.example(index) for index in indices]
        rows = [{"run": name, "index": index, **asked.rows[index]} for index in indices]
        for row in rows:
            if (giver := asked.order[row["index"]]) != row["index"]:
                row["image_of"] = asked.rows[giver]["id"]
        with nullcontext() if asked.adapter else model.disable_adapter():
            if asked.generate:
                for row, text in zip(rows, answer(model, processor, examples, max_new_tokens), strict=True):
                    row["prediction"] = text
            if asked.candidates:
                _score(model, processor, examples, [asked.candidates[index] for index in indices], rows)
        yield rows


def _score(model, processor, examples: list[dict], candidates: list[dict[str, str]], rows: list[dict]) -> None:
    """Add `scores`, the log-likelihood of each label's answer, to the rows of samples that have such answers."""
    chosen = [n for n, own in enumerate(candidates) if len(own) > 1]
    if chosen:
        answers = [list(candidates[n].values()) for n in chosen]
        logs = score_answers(model, processor, [examples[n] for n in chosen], answers)
        for n, own in zip(chosen, logs.tolist(), strict=True):
            rows[n]["scores"] = dict(zip(candidates[n], own, strict=True))


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
