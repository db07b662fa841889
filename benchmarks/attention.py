"""Time of varlen attention and of SDPA in the vision tower and in the language model, forward and backward.

    python -m benchmarks.attention

A Qwen2.5-VL with random weights (hidden 256, 6 layers, 6 tower blocks of which one attends across all) sees a pack of
six drawn 600 x 450 px photographs with short texts. SDPA computes the tower's windows one by one and masks the pack;
`varlen` computes both as segments of one call. Both run alternately in one process; the outputs are compared too.
"""

import argparse
import os
import platform
import statistics
import time
from datetime import date

import torch
from transformers import Qwen2_5_VLForConditionalGeneration

from benchmarks.gpu_7b import draw_samples
from collator import VisionSFTCollator
from demo.tiny_model import build_config, build_processor
from models.attention import use_varlen


def build(processor) -> torch.nn.Module:
    config = build_config(processor.tokenizer, hidden_size=256, num_layers=6)
    config.vision_config.depth, config.vision_config.fullatt_block_indexes = 6, [5]
    torch.manual_seed(0)
    return Qwen2_5_VLForConditionalGeneration(config)


def timed(function) -> tuple[float, torch.Tensor]:
    """Return the seconds of a forward and backward pass, and the output."""
    start = time.perf_counter()
    output = function()
    output.square().mean().backward()
    return time.perf_counter() - start, output.detach()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7)
    args = parser.parse_args()
    processor = build_processor(["the lesion shows a brown network with regular borders. What is shown?"])
    processor.image_processor.size = {"shortest_edge": 50176, "longest_edge": 602112}
    samples = draw_samples(6, (600, 450))
    batch = VisionSFTCollator(processor, packed=True)([samples[n] for n in range(6)])
    del batch["labels"]
    model = build(processor)
    parts = {
        "tower": lambda: model.model.visual(batch["pixel_values"], batch["image_grid_thw"]).last_hidden_state,
        "whole model, packed": lambda: model(**batch, use_cache=False).logits,
    }
    print(f"{date.today()}, {platform.machine()}, {os.cpu_count()} cores, torch {torch.__version__}")
    print(f"{batch['input_ids'].size(1)} tokens, {len(batch['pixel_values'])} patches")
    for name, part in parts.items():
        times, outputs = {"sdpa": [], "varlen": []}, {}
        for _ in range(args.rounds + 1):
            for kind, durations in times.items():
                model.config._attn_implementation = "sdpa"
                if kind == "varlen":
                    use_varlen(model)
                seconds, outputs[kind] = timed(part)
                durations.append(seconds)
        ratio = statistics.median(a / b for a, b in zip(times["sdpa"][1:], times["varlen"][1:], strict=True))
        varlen, sdpa = (statistics.median(times[kind][1:]) for kind in ("varlen", "sdpa"))
        difference = (outputs["sdpa"] - outputs["varlen"]).abs().max()
        print(f"{name:<20} sdpa {sdpa:6.3f} s, varlen {varlen:6.3f} s: {ratio:.2f} times as fast;", end=" ")
        print(f"largest difference {difference:.1e}")


if __name__ == "__main__":
    main()
