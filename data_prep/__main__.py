"""Prepare a data set for training: convert, check, inspect, push."""

import argparse
import signal
import sys
from collections import Counter
from dataclasses import fields
from pathlib import Path
from tempfile import TemporaryDirectory

from common.cli import OneLineParser, announce, expand_home, positive_int, run

from datasets import DatasetDict, disable_progress_bars

from common.files import suggest_file
from common.yaml_files import load_yaml, read_yaml
from data_prep.balance import MODES
from data_prep.boxes import CONVENTIONS, MAX_PIXELS, MIN_PIXELS
from data_prep.check import ERRORS, KINDS, Finding, count_findings, has_errors
from data_prep.convert import STRATA, prepare
from data_prep.folders import FINDINGS, REJECTED
from data_prep.labels import check_names
from data_prep.mapping import shipped
from data_prep.output import claim, resolve_out, save
from data_prep.publish import publish
from data_prep.reading import describe, shorten, suggest
from data_prep.records import FORMATS
from data_prep.report import write_report
from data_prep.sources import Source, is_hub

EXAMPLES = {
    "convert": "example: python -m data_prep convert --annotations a.json --images images --out data/skin",
    "check": "example: python -m data_prep check --annotations HAM10000_metadata.csv --mapping ham10000 --images HAM",
    "inspect": "example: python -m data_prep inspect data/skin",
    "push": "example: python -m data_prep push data/skin you/skin",
}
MAX_PRINTED = 10  # findings of one kind
# Findings that `convert` shows: what they are about makes splits or figures wrong, and the user has to decide
SHOWN = ("ungrouped", "other label", "unread label")
LONGEST = 60  # characters of a label
MAX_SHOWN = 3


def build_parser() -> argparse.ArgumentParser:
    parser = OneLineParser(prog="python -m data_prep", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True, metavar="convert | check | inspect | push")
    command = commands.add_parser("convert", help="sources -> a checked data set folder", epilog=EXAMPLES["convert"])
    command.add_argument("--out", type=Path, required=True, help="folder to write the data set to")
    command.add_argument("--overwrite", action="store_true", help="replace the data set in --out")
    command.add_argument(
        "--on-error", choices=("fail", "drop"), default="fail",
        help="fail: list all errors and stop (default); drop: skip those records, and list them in rejected.jsonl",
    )  # fmt: skip
    command.add_argument("--folds", type=positive_int, default=0, help="parts for cross-validation; test is separate")
    command.add_argument(
        "--balance", choices=tuple(MODES), default="none",
        help="sample rare labels more often in training: full makes labels equally frequent, sqrt is half as strong",
    )  # fmt: skip
    command.set_defaults(function=convert)
    _add_common_options(command)
    command = commands.add_parser("check", help="only the checks; exit code 1 if one fails", epilog=EXAMPLES["check"])
    command.set_defaults(function=check)
    _add_common_options(command)
    command = commands.add_parser("inspect", help="a page about a data set folder", epilog=EXAMPLES["inspect"])
    command.add_argument("folder", type=Path, help="output of convert")
    command.add_argument("--max-pixels", type=positive_int, help="image limit, px^2 (default: the suggested one)")
    command.add_argument(
        "--min-pixels", type=positive_int, default=MIN_PIXELS,
        help="smallest area of an image in training, px^2 (default: %(default)s)",
    )  # fmt: skip
    command.set_defaults(function=inspect)
    command = commands.add_parser("push", help="a data set folder -> the Hub, private", epilog=EXAMPLES["push"])
    command.add_argument("folder", type=Path, help="output of convert")
    command.add_argument("repo_id", help='"name" or "owner/name"')
    command.add_argument("--public", action="store_true", help="make a new repository public")
    command.set_defaults(function=push)
    for command in commands.choices.values():
        command.add_argument("--debug", action="store_true", help="show the traceback of an error")
    return parser


def _add_common_options(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--annotations", type=Path, help="JSON or JSON Lines file, table, folder of class folders, or Hub data set id"
    )
    command.add_argument("--images", type=Path, help="folder that image paths are relative to")
    command.add_argument(
        "--mapping", "--recipe", help=f"what a table's columns are: a YAML file, or one of {', '.join(shipped())}"
    )
    keys = "data, images, mapping, format, name, weight"
    command.add_argument("--sources", type=Path, help=f"YAML list of several: {keys}")
    command.add_argument("--format", choices=FORMATS, help="recognised for each record when not given")
    command.add_argument(
        "--split", type=float, nargs=3, default=(0.8, 0.1, 0.1), metavar=("TRAIN", "VALIDATION", "TEST"),
        help="shares of the three splits (default: 0.8 0.1 0.1)",
    )  # fmt: skip
    command.add_argument("--seed", type=int, default=42, help="of the split (default: 42)")
    command.add_argument("--group-by", metavar="KEY", help="key or column of undivided groups, as patient_id")
    command.add_argument(
        "--stratify-by", choices=STRATA, default="label",
        help="attribute with the same shares in each split (default: label)",
    )  # fmt: skip
    command.add_argument(
        "--labels", type=Path, help="YAML file, label: [name, 're:expression'], of the words that answers use for it"
    )
    command.add_argument("--fetch-links", type=Path, metavar="FOLDER", help="accept links, and download into FOLDER")
    command.add_argument(
        "--follow-links", action="store_true",
        help="read files that links in the image folder lead to, outside of it (Hugging Face's cache, DVC)",
    )  # fmt: skip
    command.add_argument(
        "--scale-boxes", choices=CONVENTIONS,
        help="write coordinates ('bbox_2d': [...]) as the model has them: resized: px of the resized image, for "
        "Qwen2.5-VL; relative: thousandths of its sides, for Qwen2-VL and Qwen3-VL",
    )  # fmt: skip
    command.add_argument(
        "--min-pixels", type=positive_int, default=MIN_PIXELS,
        help="smallest area of an image in training, px^2; for coordinates (default: %(default)s)",
    )  # fmt: skip
    command.add_argument(
        "--max-pixels", type=positive_int, default=MAX_PIXELS,
        help="largest area of an image in training, px^2; for coordinates (default: %(default)s)",
    )  # fmt: skip
    command.add_argument("--workers", type=positive_int, help="processes that decode images (default: all cores)")


def _common(args: argparse.Namespace) -> dict:
    names = ("seed", "group_by", "stratify_by", "follow_links", "scale_boxes", "min_pixels", "max_pixels")
    options = {name: getattr(args, name) for name in names}
    options["labels"] = args.labels and _read_labels(args.labels)
    return {**options, "split": tuple(args.split), "num_workers": args.workers, "links_dir": args.fetch_links}


def _read_labels(path: Path) -> dict:
    labels = read_yaml(path, "--labels")
    try:
        check_names(labels)
    except ValueError as error:
        raise ValueError(f"--labels: {path}: {str(error).removeprefix('labels: ')}") from error
    return labels


def read_sources(args: argparse.Namespace) -> list[Source]:
    """Return the one source that the options name, or those of the `--sources` file, relative to its folder."""
    if (args.annotations is None) == (args.sources is None):
        raise ValueError("name either one source (--annotations) or a list of them (--sources)")
    given = {name: getattr(args, name) for name in ("images", "mapping", "format")}
    if args.sources is None:
        return [Source(args.annotations, **given)]
    if unused := [name for name, value in given.items() if value is not None]:
        raise ValueError(f"--{unused[0]}: has no effect beside --sources; write `{unused[0]}` into {args.sources}")
    if not args.sources.is_file():
        raise FileNotFoundError(f"--sources: no file {args.sources}{suggest_file(args.sources)}")
    try:
        rows = load_yaml(args.sources)
    except ValueError as error:
        raise ValueError(f"--sources: {error}") from error
    if not isinstance(rows, list) or not rows:
        raise ValueError(f"--sources: {args.sources}: expected a list of sources, each with `data`")
    for number, row in enumerate(rows):
        _check_source(row, f"--sources: {args.sources}, source {number}")
    return [_make_source(row, args.sources.parent) for row in rows]


def _make_source(row: dict, folder: Path) -> Source:
    paths = {key: _from(folder, row[key]) for key in ("data", "images") if key in row}
    settings = {"mapping" if key == "recipe" else key: value for key, value in {**row, **paths}.items()}
    if (mapping := settings.get("mapping")) and (folder / mapping).is_file():
        settings["mapping"] = str(folder / mapping)
    return Source(**settings)


def _check_source(row: dict, where: str) -> None:
    """Raise ValueError for an unknown key, a wrong value or no data; `recipe` is an alias of `mapping`."""
    if not isinstance(row, dict):
        raise ValueError(f"{where}: expected keys and their values, found {describe(row)}")
    where += f" (name {row['name']!r:.60})" if "name" in row else ""
    if {"mapping", "recipe"} <= set(row):
        raise ValueError(f"{where}: mapping: given twice, also under its alias recipe")
    keys = [field.name for field in fields(Source)]
    for key, value in row.items():
        if key not in (*keys, "recipe"):
            also = suggest(str(key), keys) or f"; there are {', '.join(sorted(keys))}"
            raise ValueError(f"{where}: unknown key {key!r}{also}")
        if not isinstance(value, int | float if key == "weight" else str) or isinstance(value, bool):
            expected = "a number" if key == "weight" else "a text"
            raise ValueError(f"{where}: {key}: expected {expected}, found {value!r:.60}")
    if "data" not in row:
        raise ValueError(f"{where}: lacks `data`, a file, a folder or a Hub data set id")
    if row.get("format", FORMATS[0]) not in FORMATS:
        raise ValueError(f"{where}: format: expected one of {', '.join(FORMATS)}, found {row['format']!r}")


def _from(folder: Path, name: str) -> Path:
    """Return a path of a sources file, relative to its folder; a Hub data set id stays as it is."""
    name = expand_home(name)
    hub = Source(Path(name))
    return hub.data if is_hub(hub) and not (folder / name).exists() else folder / name


def convert(args: argparse.Namespace) -> None:
    args.out = resolve_out(args.out)
    with claim(args.out, overwrite=args.overwrite, links_dir=args.fetch_links) as work:
        prepared = prepare(
            read_sources(args), **_common(args), folds=args.folds, on_error=args.on_error, balance=args.balance,
            clean_dir=work, hub_dir=work,
        )  # fmt: skip
        save(prepared, args.out)
    print(_summary(prepared.splits))
    print_counts(prepared.findings)
    for kind in SHOWN:
        matches = [finding for finding in prepared.findings if finding.kind == kind]
        for number, finding in enumerate(matches[:MAX_SHOWN], 1):
            print(f"WARNING    {finding}" + (f" ({number} of {len(matches)} such)" if len(matches) > 1 else ""))
    if args.balance != "none":
        effective = sorted(prepared.effective.items(), key=str)
        counts = ", ".join(f"{_shown(label)} {count:.0f}" for label, count in effective)
        print(f"an epoch draws, balanced by {args.balance}: {counts}")
    if args.scale_boxes == "resized":
        limits = f"min_pixels {args.min_pixels}, max_pixels {args.max_pixels}"
        print(f"coordinates are right in training with {limits} alone")
    if prepared.errors:
        print(f"rejected {len(prepared.errors)} records, each with its reason in {args.out / REJECTED}")
    print(f"written to {args.out}")


def check(args: argparse.Namespace) -> int:
    """Print the findings; return 1 if there are errors, so that a pipeline stops."""
    with TemporaryDirectory() as folder:
        prepared = prepare(read_sources(args), **_common(args), on_error="drop", hub_dir=Path(folder))
    for kind in count_findings(prepared.findings):
        matches = [finding for finding in prepared.findings if finding.kind == kind]
        print(f"\n{KINDS[kind]}: {len(matches)}")
        for finding in matches[:MAX_PRINTED]:
            print(f"  {finding}")
        if len(matches) > MAX_PRINTED:
            print(f"  ... and {len(matches) - MAX_PRINTED} more")
    print()
    print(_summary(prepared.splits))
    print_counts(prepared.findings)
    return 1 if has_errors(prepared.findings) else 0


def push(args: argparse.Namespace) -> None:
    _check_prepared(args.folder)
    print(f"pushed to {publish(args.folder, args.repo_id, private=not args.public)}")


def _check_prepared(folder: Path) -> None:
    if not folder.exists():
        raise FileNotFoundError(f"no folder {folder}{suggest_file(folder)}")
    if not (folder / FINDINGS).is_file():
        raise ValueError(f"{folder} is not a data set that `python -m data_prep convert` wrote")


def inspect(args: argparse.Namespace) -> None:
    _check_prepared(args.folder)
    announce("drawing the report", "about 5 s, longer for thousands of images")
    print(f"{write_report(args.folder, min_pixels=args.min_pixels, max_pixels=args.max_pixels)}: open it in a browser")


def print_counts(findings: list[Finding]) -> None:
    for kind, count in count_findings(findings).items():
        print(f"{'error' if kind in ERRORS else 'found':<11}{count:>7} {KINDS[kind]}")


def _summary(splits: DatasetDict) -> str:
    """Return one line a split: samples, images and the labels' counts."""
    lines = []
    for name, dataset in splits.items():
        images = sum(len(sizes) for sizes in dataset["image_sizes"])
        labels = Counter(label for label in dataset["label"] if label is not None)
        shares = ", ".join(f"{_shown(label)} {count}" for label, count in sorted(labels.items()))
        lines.append(f"{name:<11}{len(dataset):>7} samples {images:>7} images" + (f"   {shares}" if shares else ""))
    return "\n".join(lines)


def _shown(label: str | None) -> str:
    return shorten(" ".join(str(label).split()), LONGEST)


def main(argv: list[str] | None = None) -> int | None:
    disable_progress_bars()  # of `datasets`; decoding has its own bar
    args = build_parser().parse_args(argv)
    return args.function(args)


def _exit_on_sigterm(*_) -> None:
    sys.exit(128 + signal.SIGTERM)  # so that temporary folders are deleted


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, _exit_on_sigterm)
    sys.exit(run(main))
