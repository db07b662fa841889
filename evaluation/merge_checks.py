"""Checks that a merged model equals base model and adapter: weights, processor and logits."""

from dataclasses import dataclass
from pathlib import Path

import torch
import xxhash
from peft import PeftModel
from PIL import Image, ImageDraw
from transformers import AutoProcessor, PreTrainedModel, ProcessorMixin

from data_prep.records import IMAGE_MARKER
from evaluation.generation import encode_prompts
from models.families import family_of
from models.loading import load_model, load_processor

# Largest `logit_distance` between merged model and adapter, which round in different places. Correct merges of models
# with random weights, 2 to 36 layers deep, differ by 0.7 to 2.2 % in bfloat16 and by 0.1 to 0.2 % in float16.
TOLERANCE = {"bfloat16": 0.1, "float16": 0.02}


@dataclass(frozen=True)
class Expected:
    """What the merged model must match.

    Attributes:
        hashes: of the base model's weights, by name.
        logits: of the base model with the adapter, shape (T, V) for each of `draw_samples`, float32.
        effect: `logit_distance` between the base model with and without the adapter.
    """

    hashes: dict[str, bytes]
    logits: list[torch.Tensor]
    effect: float


def hash_weights(model: PreTrainedModel) -> dict[str, bytes]:
    """Return a 128-bit hash of each weight's bytes, to compare models of which one fits into memory."""
    return {
        name: xxhash.xxh3_128_digest(weight.flatten().view(torch.uint8).cpu().numpy())
        for name, weight in model.state_dict().items()
    }


@torch.inference_mode()
def sample_logits(model: PreTrainedModel | PeftModel, processor: ProcessorMixin) -> list[torch.Tensor]:
    """Return the logits of the prompt of each of `draw_samples`, shape (T, V), float32, on the CPU.

    Raises:
        ValueError: logits that are not finite, or all equal.
    """
    prompts = [encode_prompts(model, processor, [sample]) for sample in draw_samples()]
    logits = [model(**prompt).logits[0].float().cpu() for prompt in prompts]
    if not all(rows.isfinite().all() for rows in logits):
        raise ValueError(f"--dtype: the model's logits are not finite in {model.dtype}; the largest float16 is 65,504")
    if _sum_of_squares(logits) == 0:
        raise ValueError("the model finds all tokens equally likely: weights of it or of the adapter are damaged")
    return logits


def draw_samples() -> list[dict]:
    """Return three questions about drawn images, the last about two of them."""
    dark, red = _draw_spot("peachpuff", "sienna"), _draw_spot("tan", "firebrick")
    cases = [("What condition is shown?", [dark]), ("Is the skin light or dark?", [red]), ("Compare.", [dark, red])]
    return [
        {"id": text, "images": images, "messages": [{"role": "user", "content": IMAGE_MARKER * len(images) + text}]}
        for text, images in cases
    ]


def _draw_spot(skin: str, spot: str) -> Image.Image:
    image = Image.new("RGB", (224, 224), skin)
    ImageDraw.Draw(image).ellipse((60, 70, 150, 140), fill=spot)
    return image


def logit_distance(logits: list[torch.Tensor], others: list[torch.Tensor]) -> float:
    """Return the root mean square of the differences, relative to that of the centred logits."""
    return (_sum_of_squares(a - b for a, b in zip(logits, others, strict=True)) / _sum_of_squares(logits)) ** 0.5


def _sum_of_squares(rows) -> float:
    """Sum over tensors (T, V) after centring each row; a constant added to all logits changes no probability."""
    return sum((row - row.mean(-1, keepdim=True)).square().sum().item() for row in rows)


def check_merged_model(
    folder: Path, expected: Expected, processor: ProcessorMixin, targets: set[str], dtype: str
) -> None:
    """Load the saved model and compare it with base model, adapter and processor; print the results.

    Raises:
        ValueError: a check failed; the message says which.
    """
    model = load_model(str(folder), quantization=None, dtype=dtype, keep_dtype=True)
    check_weights(expected.hashes, hash_weights(model), targets)
    check_processor(processor, AutoProcessor.from_pretrained(folder))
    distance = check_logits(expected, sample_logits(model, load_processor(str(folder))), TOLERANCE[dtype])
    tower = "adapted" if any(name.startswith(family_of(model).vision) for name in targets) else "bit-identical"
    untouched = len(expected.hashes) - len(targets)
    print(f"{'weights':<10} {len(targets)} merged, {untouched} bit-identical to the base's; vision tower {tower}")
    print(f"{'logits':<10} {distance:.2%} from the adapter's; the adapter changed the base's by {expected.effect:.2%}")


def check_weights(before: dict[str, bytes], after: dict[str, bytes], targets: set[str]) -> None:
    """Raise ValueError unless the targets differ from the base model's weights and all others are equal."""
    changed = {name for name in before | after if before.get(name) != after.get(name)}
    if wrong := sorted(changed ^ targets):
        fault = "differs from the base's and is not a target of the adapter"
        if wrong[0] in targets:
            fault = "is a target of the adapter and equals the base's (its update is zero, or lost in rounding)"
        raise ValueError(f"{len(wrong)} merged weights are wrong; the first, {wrong[0]}, {fault}")


def check_processor(before: ProcessorMixin, after: ProcessorMixin) -> None:
    """Raise ValueError unless the saved chat template and pixel limits equal the adapter's."""
    if after.chat_template != before.chat_template:
        raise ValueError("the saved processor has another chat template than the adapter's")
    saved, original = (dict(processor.image_processor.size) for processor in (after, before))
    if saved != original:
        raise ValueError(f"the saved processor has the pixel limits {saved}, the adapter's has {original}")


def check_logits(expected: Expected, logits: list[torch.Tensor], tolerance: float) -> float:
    """Return the `logit_distance` to the adapter's logits.

    Raises:
        ValueError: a distance above `tolerance`, or above the base model's; or another first token of an answer,
            unless the two tokens are about equally likely.
    """
    distance = logit_distance(expected.logits, logits)
    problem = f"the merged model's logits are {distance:.2%} from the adapter's"
    if distance > tolerance:
        raise ValueError(f"{problem}; rounding explains at most {tolerance:.0%}")
    if distance >= expected.effect:
        raise ValueError(f"{problem}, the base's {expected.effect:.2%}: the adapter's effect is lost in 16 bit")
    for number, (ours, theirs) in enumerate(zip(expected.logits, logits, strict=True)):
        margin = ours[-1].max() - ours[-1][theirs[-1].argmax()]
        if margin > 2 * tolerance * ours[-1].std():
            raise ValueError(f"drawn sample {number}: the merged model starts its answer with another token")
    return distance
