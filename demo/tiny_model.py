"""Makes a model of two million random weights with a tokenizer: the published classes, in a second."""

import argparse
import copy
import json
import re
from pathlib import Path

from common.cli import announce_loading

if __name__ == "__main__":
    announce_loading()

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    AutoConfig,
    AutoModelForImageTextToText,
    PreTrainedConfig,
    PreTrainedTokenizerBase,
    ProcessorMixin,
    Qwen2Tokenizer,
)
from trl import chat_template_utils

from models.families import FAMILIES

DEFAULT = "qwen2_5_vl"
HEAD_SIZE = 32

# In the order of Qwen2.5's tokenizer_config.json; the ids follow the small vocabulary.
SPECIAL_TOKENS = (
    *("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|object_ref_start|>", "<|object_ref_end|>", "<|box_start|>"),
    *("<|box_end|>", "<|quad_start|>", "<|quad_end|>", "<|vision_start|>", "<|vision_end|>", "<|vision_pad|>"),
    *("<|image_pad|>", "<|video_pad|>"),
)
THINK_TOKENS = ("<think>", "</think>")  # in the families that think; as there, decoded answers keep them
ROLES = ("system", "user", "assistant", "You are a helpful assistant.")


def build_tokenizer(
    texts: list[str], *, vocab_size: int = 512, kind: type[PreTrainedTokenizerBase] = Qwen2Tokenizer
) -> PreTrainedTokenizerBase:
    """Train a byte-level BPE of `vocab_size` tokens on `texts` and add the special tokens after it."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size - len(SPECIAL_TOKENS), initial_alphabet=alphabet, show_progress=False
    )
    bpe.train_from_iterator([*texts, *ROLES], trainer)
    model = json.loads(bpe.to_str())["model"]
    return kind(
        vocab=model["vocab"],
        merges=[tuple(pair) for pair in model["merges"]],
        eos_token="<|im_end|>",
        extra_special_tokens=list(SPECIAL_TOKENS),
        model_max_length=4096,
    )


def build_processor(texts: list[str], *, family: str = DEFAULT) -> ProcessorMixin:
    """Return the family's processor (image sizes, chat template) with a small tokenizer."""
    kind = FAMILIES[family]
    size = dict(zip(("shortest_edge", "longest_edge"), kind.pixel_limits, strict=True))
    tokenizer = build_tokenizer(texts, kind=kind.tokenizer)
    if kind.thinks:
        tokenizer.add_tokens(list(THINK_TOKENS))
    return kind.processor(
        image_processor=kind.image_processor(patch_size=kind.token_side // 2, size=size),
        video_processor=kind.video_processor(),
        tokenizer=tokenizer,
        chat_template=getattr(chat_template_utils, f"{kind.chat_template}_chat_template"),
    )


def build_config(
    tokenizer: PreTrainedTokenizerBase, *, hidden_size: int, num_layers: int, family: str = DEFAULT, tied: bool = False
) -> PreTrainedConfig:
    """Return the family's structure (M-RoPE, window attention or deepstack) with few and narrow layers.

    Args:
        tokenizer: gives the vocabulary and the ids of its tokens.
        hidden_size: of language model and vision tower; a multiple of 64.
        num_layers: of the language model; at least 3 for Qwen3-VL, whose tower adds to the first two, and 2 for the
            hybrid Qwen3.5, in which every second one has full attention.
        family: a key of `FAMILIES`.
        tied: let the LM head share the embeddings' weights, as in small published models.
    """
    kind, heads = FAMILIES[family], hidden_size // HEAD_SIZE
    vision = {"depth": 2, "num_heads": heads, kind.output_key: hidden_size, **kind.tiny_vision(hidden_size)}
    text = {
        "vocab_size": len(tokenizer),
        "hidden_size": hidden_size,
        "intermediate_size": 3 * hidden_size,
        "num_hidden_layers": num_layers,
        "num_attention_heads": heads,
        "num_key_value_heads": heads // 2,
        "max_position_embeddings": 4096,
        "eos_token_id": tokenizer.convert_tokens_to_ids(kind.end_token),
        "bos_token_id": None,
        "pad_token_id": tokenizer.pad_token_id,
        **copy.deepcopy(kind.tiny_text),
    }
    names = ("image", "video", "vision_start", "vision_end")
    tokens = ("<|image_pad|>", "<|video_pad|>", "<|vision_start|>", "<|vision_end|>")
    ids = {f"{n}_token_id": tokenizer.convert_tokens_to_ids(t) for n, t in zip(names, tokens, strict=True)}
    return AutoConfig.for_model(family, text_config=text, vision_config=vision, tie_word_embeddings=tied, **ids)


def save_tiny_model(
    folder: Path,
    texts: list[str],
    *,
    hidden_size: int = 128,
    num_layers: int = 4,
    seed: int = 0,
    family: str = DEFAULT,
    tied: bool = False,
):
    """Write a base model with its processor to `folder`, with the files that a download from the Hub has."""
    torch.manual_seed(seed)
    processor = build_processor(texts, family=family)
    sizes = {"hidden_size": hidden_size, "num_layers": num_layers}
    config = build_config(processor.tokenizer, **sizes, family=family, tied=tied)
    model = AutoModelForImageTextToText.from_config(config)
    # The head stays frozen: with its default scale of 0.02, no adapter could give an answer a high probability.
    torch.nn.init.normal_(model.lm_head.weight, std=0.1)
    model.generation_config.eos_token_id = config.text_config.eos_token_id
    model.generation_config.pad_token_id = config.text_config.pad_token_id
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return model


def training_texts(record: dict) -> list[str]:
    """Return what the tokenizer learns from a LLaVA record: its texts, its label apart and with more weight.

    So each name is one token wherever it stands. Otherwise "Psoriasis", "Psoriasisverdacht" and "Psoriasisherd", or
    whole Chinese sentences, would be a token each, and the model would learn each condition anew in each of them.
    """
    label = record["label"]
    name = re.compile(f"({re.escape(label)})")
    return [part for turn in record["conversations"] for part in name.split(turn["value"]) if part] + 9 * [label]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--annotations", type=Path, required=True, help="the tokenizer learns from its texts")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--family", choices=FAMILIES, default=DEFAULT)
    args = parser.parse_args()
    records = json.loads(args.annotations.read_text(encoding="utf-8"))
    texts = [part for record in records for part in training_texts(record)]
    model = save_tiny_model(args.out, texts, family=args.family)
    print(f"tiny {args.family}: {model.num_parameters() / 1e6:.1f} M random parameters in {args.out}")


if __name__ == "__main__":
    main()
