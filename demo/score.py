"""The demo's verdict: held-out accuracy beside two controls, so that a good number cannot come from nothing."""

import argparse
import json
import random
from pathlib import Path

from datasets import DatasetDict, disable_progress_bars, load_from_disk


def shuffle_images(dataset: Path, out: Path, *, seed: int = 0) -> None:
    """Copy a data set's test split with the images dealt anew among the questions."""
    test = load_from_disk(str(dataset))["test"]
    order = list(range(len(test)))
    random.Random(seed).shuffle(order)
    dealt = test.select(order).flatten_indices()
    for column in ("images", "image_sizes"):
        test = test.remove_columns(column).add_column(column, dealt.data[column], feature=dealt.features[column])
    DatasetDict({"test": test}).save_to_disk(str(out))


def accuracy(predictions: Path) -> float:
    """Return the share of answers that name the sample's label and no other."""
    rows = [json.loads(line) for line in predictions.read_text(encoding="utf-8").splitlines()]
    labels = {row["label"] for row in rows}
    right = [[label for label in labels if label in row["prediction"]] == [row["label"]] for row in rows]
    return sum(right) / len(right)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    shuffle = commands.add_parser("shuffle")
    shuffle.add_argument("--dataset", type=Path, required=True)
    shuffle.add_argument("--out", type=Path, required=True)
    report = commands.add_parser("report")
    report.add_argument("--predictions", type=Path, required=True)
    report.add_argument("--shuffled", type=Path, required=True)
    report.add_argument("--plot", type=Path, required=True)
    args = parser.parse_args()
    disable_progress_bars()
    if args.command == "shuffle":
        shuffle_images(args.dataset, args.out)
        return
    rows = [json.loads(line) for line in args.predictions.read_text(encoding="utf-8").splitlines()]
    print(f"\nheld-out accuracy      {accuracy(args.predictions):.3f}   on {len(rows)} questions never trained on")
    print(f"  images shuffled      {accuracy(args.shuffled):.3f}   the same adapter and questions, other images")
    print(f"  chance               {1 / len({row['label'] for row in rows}):.3f}")
    print(f"curves                 {args.plot}")


if __name__ == "__main__":
    main()
