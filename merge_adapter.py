"""Merge a trained adapter into its base model: one 16-bit model that needs no PEFT, checked before it is kept.

python merge_adapter.py --adapter outputs/skin --out outputs/skin-merged
python merge_adapter.py --adapter outputs/skin --out outputs/skin-merged --device cpu
python merge_adapter.py --adapter outputs/skin --out outputs/skin-merged --push you/skin-merged
"""

import argparse
import gc
import re
import sys
from pathlib import Path

from common.cli import OneLineParser, announce, announce_loading, run

if __name__ == "__main__":
    announce_loading()

import torch
from accelerate import PartialState
from safetensors import SafetensorError
from transformers import PreTrainedModel, ProcessorMixin

from common.files import atomic_path, check_parent, share_weights
from common.hub_client import open_repository
from evaluation.merge_checks import TOLERANCE, check_merged_model
from evaluation.merging import check_16_bit, choose_base, merge, read_target_weights
from evaluation.older_readers import OLDEST_READERS, add_older_forms
from models.adapters import MERGED_ADAPTER, check_not_merged, decode_greedily, describe_merge, end_answers
from models.loading import load_model, load_processor, readable_out_of_memory
from publishing.hub import push_merged_model
from publishing.model_card import make_merged_card
from publishing.run_facts import describe_base


def build_parser() -> argparse.ArgumentParser:
    parser = OneLineParser(
        "merge_adapter.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--adapter", required=True, help="folder or Hub id of a trained adapter")
    parser.add_argument("--out", type=Path, required=True, help="folder to make, for the merged model")
    parser.add_argument("--base", help="base model, in place of the one in the adapter's configuration")
    parser.add_argument("--dtype", choices=sorted(TOLERANCE), default="bfloat16", help="of the weights")
    parser.add_argument("--device", choices=("cpu", "cuda"), help="where to merge (default: the GPU if there is one)")
    parser.add_argument("--shard-size", type=shard_size, default="5GB", help="largest weight file (default: 5GB)")
    parser.add_argument("--push", metavar="OWNER/NAME", help="upload the merged model to this repository at the end")
    parser.add_argument("--public", action="store_true", help="make the repository of --push public")
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    return parser


def shard_size(text: str) -> str:
    """Check a file size like "5GB" (the `type` of an option)."""
    if not re.fullmatch(r"[1-9]\d*[KMG]B", text):
        raise argparse.ArgumentTypeError(f"expected a size like 5GB or 500MB, found {text!r}")
    return text


def main(argv: list[str] | None = None) -> None:
    args = build_parser().parse_args(argv)
    check_options(args)
    choose_device(args.device)
    base, revision = choose_base(args.adapter, args.base)
    check_16_bit(base, revision)
    check_not_merged(args.adapter, base)
    targets = read_target_weights(args.adapter)
    processor = load_processor(args.adapter)
    repo_id = open_repository(args.push, private=not args.public) if args.push else None
    with atomic_path(args.out) as unfinished:
        unfinished.mkdir(parents=True)
        with readable_out_of_memory("merging loads the model in 16 bit; --device cpu needs no GPU"):
            model = load_model(base, quantization=None, dtype=args.dtype, revision=revision, keep_dtype=True)
            announce("merging", "seconds to minutes by the model's size")
            expected = merge(model, args.adapter, processor)
        setattr(model.config, MERGED_ADAPTER, describe_merge(args.adapter, base))
        card = make_merged_card(args.out.name, describe_base(base, revision), args.dtype, OLDEST_READERS)
        save(model, processor, unfinished, card=card, shard_size=args.shard_size)
        del model  # the check loads the saved one, and memory may hold one only
        release_memory()
        check_merged_model(unfinished, expected, processor, targets, args.dtype)
    print(f"{'merged':<10} {args.out}")
    if repo_id is not None:
        announce(f"uploading to {repo_id}", "15 GB for 7B: by the connection minutes to hours")
        print(f"{'pushed':<10} {push_merged_model(args.out, repo_id, private=not args.public)}")


def check_options(args: argparse.Namespace) -> None:
    """Raise ValueError for options that do not go together, and for an existing `--out`."""
    if args.public and not args.push:
        raise ValueError("--public has no effect without --push")
    if args.out.exists():
        raise ValueError(f"--out: {args.out} exists; name a folder that does not")
    check_parent("--out", args.out)


def choose_device(name: str | None) -> None:
    """Have models loaded on this device from now on.

    Raises:
        ValueError: "cuda" without a GPU.
    """
    if name == "cuda" and not torch.cuda.is_available():
        raise ValueError("--device: no GPU here that PyTorch can use; --device cpu needs none")
    if name:
        PartialState(cpu=name == "cpu")


def save(model: PreTrainedModel, processor: ProcessorMixin, folder: Path, *, card: str, shard_size: str) -> None:
    announce("writing the merged model; then it is loaded and checked", "minutes for 7B")
    decode_greedily(model)  # the saved generation settings hold for other programs too
    end_answers(model, processor)
    try:
        model.save_pretrained(folder, max_shard_size=shard_size)
    except SafetensorError as error:  # "No space left", in the words of another library
        raise ValueError(f"--out: the weights could not be written to {folder.parent}: {error}") from error
    share_weights(folder, "config.json")
    processor.save_pretrained(folder)
    add_older_forms(folder)
    (folder / "README.md").write_text(card, encoding="utf-8")


def release_memory() -> None:
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


if __name__ == "__main__":
    sys.exit(run(main))
