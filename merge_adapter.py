"""Merge a trained adapter into its base: one 16-bit model that needs no PEFT, checked before it gets its name.

python merge_adapter.py --adapter outputs/skin --out outputs/skin-merged
python merge_adapter.py --adapter outputs/skin --out outputs/skin-merged --push you/skin-merged
"""

import argparse
import gc
import re
import shlex
import sys
from pathlib import Path

from common.cli import OneLineParser, run

import torch
from huggingface_hub import HfApi, ModelCardData
from peft import PeftModel, load_peft_weights
from safetensors import SafetensorError
from transformers import PreTrainedModel, ProcessorMixin

from common.files import atomic_path
from common.hub_client import open_repository, readable_errors, with_retries
from evaluation.merge_checks import TOLERANCE, Expected, check, digest_weights, distance, sample_logits
from models.adapters import decode_greedily, read_adapter_config, read_run_facts
from models.loading import load_model, load_processor
from publishing.hub import OF_PROCESSOR
from publishing.run_facts import describe_base

UPLOADED = [
    "config.json",
    "generation_config.json",
    "model.safetensors",
    "model-*.safetensors",
    "model.safetensors.index.json",
    *OF_PROCESSOR,
    "README.md",
]
CARD = """---
{metadata}
---

# {name}

Base model: {base}. Merged from a LoRA adapter that was trained on questions and answers about skin images, in {dtype}.
The processor carries the chat template and the pixel limits of the training. Decoding is greedy unless told otherwise.

Not a medical device; not for diagnosis. The licence of the base model applies.
"""


def build_parser() -> argparse.ArgumentParser:
    parser = OneLineParser(
        prog="merge_adapter.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--adapter", required=True, help="folder or Hub id of a trained adapter")
    parser.add_argument("--out", type=Path, required=True, help="folder to make, for the merged model")
    parser.add_argument("--base", help="a base model in place of the one that the adapter names")
    parser.add_argument(
        "--dtype", choices=sorted(TOLERANCE), default="bfloat16", help="of the weights (default: bfloat16)"
    )
    parser.add_argument("--shard-size", type=shard_size, default="5GB", help="largest file of weights (default: 5GB)")
    parser.add_argument("--push", metavar="OWNER/NAME", help="upload the merged model to this repository at the end")
    parser.add_argument("--public", action="store_true", help="let everybody see a repository that --push makes")
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    return parser


def shard_size(text: str) -> str:
    """Check the size of a file, as in "5GB" (the `type` of an option)."""
    if not re.fullmatch(r"[1-9]\d*[KMG]B", text):
        raise argparse.ArgumentTypeError(f"expected a size like 5GB or 500MB, found {text!r}")
    return text


def main(argv: list[str] | None = None) -> None:
    args = build_parser().parse_args(argv)
    check_options(args)
    base, revision = choose_base(args.adapter, args.base)
    targeted = read_targeted_weights(args.adapter)
    processor = load_processor(args.adapter)
    repo_id = open_repository(args.push, private=not args.public) if args.push else None
    with atomic_path(args.out) as unfinished:
        unfinished.mkdir(parents=True)
        model = load_model(base, quantization=None, dtype=args.dtype, revision=revision, keep_dtype=True)
        expected = merge(model, args.adapter, processor, targeted)
        card = make_card(args.out.name, describe_base(base, revision), args.dtype)
        save(model, processor, unfinished, card=card, shard_size=args.shard_size)
        del model  # the saved one is loaded now, and memory is for one
        release_memory()
        check(unfinished, expected, processor, targeted, args.dtype)
    print(f"{'merged':<10} {args.out}")
    if repo_id is not None:
        print(f"{'pushed':<10} {push(args.out, repo_id, private=not args.public)}")


def check_options(args: argparse.Namespace) -> None:
    """Refuse what can be seen to be wrong before anything is loaded."""
    if args.public and not args.push:
        raise ValueError("--public has no effect without --push")
    if args.out.exists():
        raise ValueError(f"--out: {args.out} exists; name a folder that does not")


def choose_base(adapter: str, base: str | None) -> tuple[str, str | None]:
    """Return the base model and its revision: those of the adapter's training, or another base as it is now."""
    config = read_adapter_config(adapter)
    if config.peft_type != "LORA":
        raise ValueError(f"--adapter: {adapter}: expected a LoRA adapter, found {config.peft_type.value}")
    if base:
        return base, None
    return config.base_model_name_or_path, read_run_facts(adapter).get("revision")


def read_targeted_weights(adapter: str) -> set[str]:
    """Return the names of the base's weights that the adapter's tensors change.

    They are read off the file and not off PEFT's model, so that a tensor which PEFT passes over is noticed.

    Raises:
        ValueError: missing, unreadable, not finite, or never trained.
    """
    try:
        tensors = load_peft_weights(adapter, device="cpu")
    except (SafetensorError, OSError, ValueError) as error:
        raise ValueError(f"--adapter: {adapter}: missing or unreadable weights: {_first_line(error)}") from error
    if broken := [name for name, tensor in tensors.items() if not tensor.isfinite().all()]:
        raise ValueError(f"--adapter: {adapter}: {len(broken)} tensors hold NaN or infinity, the first is {broken[0]}")
    if not any(tensor.any() for name, tensor in tensors.items() if ".lora_B." in name):
        raise ValueError(f"--adapter: {adapter}: every lora_B is zero; this adapter was never trained")
    return {_weight_of(name) for name in tensors}


def _first_line(error: Exception) -> str:
    return str(error).strip().partition("\n")[0]


def _weight_of(tensor: str) -> str:
    """Return the base's weight that one of the adapter's tensors acts on; its own name if it replaces that weight."""
    module, lora, kind = tensor.removeprefix("base_model.model.").partition(".lora_")
    if not lora:
        return module
    return f"{module}.bias" if kind == "B.bias" else f"{module}.weight"


def merge(model: PreTrainedModel, adapter: str, processor: ProcessorMixin, targeted: set[str]) -> Expected:
    """Merge the adapter into `model` in place, and return what must be true of the result."""
    digests = digest_weights(model)
    if unknown := sorted(targeted - set(digests)):
        raise ValueError(f"--adapter: {adapter} adapts {len(unknown)} weights that are not in the base: {unknown[0]}")
    try:
        adapted = PeftModel.from_pretrained(model, adapter).eval()
    except RuntimeError as error:
        reason = str(error).strip().splitlines()[-1].strip()
        raise ValueError(f"--adapter: {adapter} has other shapes than the base: {reason}") from error
    logits = sample_logits(adapted, processor)
    with adapted.disable_adapter():
        effect = distance(logits, sample_logits(adapted, processor))
    adapted.merge_and_unload()
    return Expected(digests, logits, effect)


def save(model: PreTrainedModel, processor: ProcessorMixin, folder: Path, *, card: str, shard_size: str) -> None:
    """Write model, processor and card."""
    decode_greedily(model)  # as predict.py does, also where others serve the model
    model.save_pretrained(folder, max_shard_size=shard_size)
    processor.save_pretrained(folder)
    (folder / "README.md").write_text(card, encoding="utf-8")


def make_card(name: str, base: dict, dtype: str) -> str:
    """Return the model card.

    Args:
        name: of the merged model.
        base: what `describe_base` says.
        dtype: of the weights.
    """
    metadata = ModelCardData(
        base_model=base["name"] if base["on_hub"] else None,
        library_name="transformers",
        pipeline_tag="image-text-to-text",
        tags=["medical", "dermatology", "not-for-diagnosis"],
        **{"license": "unknown", **base["licence"]},
    )
    return CARD.format(metadata=metadata.to_yaml(), name=name, base=base["name"], dtype=dtype)


def release_memory() -> None:
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def push(folder: Path, repo_id: str, *, private: bool) -> str:
    """Upload the merged model and return the commit's address.

    Raises:
        ValueError: the upload failed; the message says where the model is and how to upload it later.
    """
    later = shlex.join(["hf", "upload", repo_id, str(folder), ".", *(["--private"] if private else [])])
    safe = f"; the merged model is safe in {folder}; to push it later: {later}"
    with readable_errors(f"not pushed to {repo_id}", safe):
        options = {"allow_patterns": UPLOADED, "commit_message": "Upload merged model"}
        commit = with_retries(lambda: HfApi().upload_folder(repo_id=repo_id, folder_path=folder, **options))
    return commit.commit_url


if __name__ == "__main__":
    sys.exit(run(main))
