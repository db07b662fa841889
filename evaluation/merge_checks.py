"""Whether a merged model is base and adapter together: weights, processor and logits, compared."""

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

# How far logits may lie from the adapter's, as a share of their spread. Adapter and merged model are one function that
# is rounded in other places, and bfloat16 keeps 8 bits of a number, float16 11. Correct merges of models with random
# weights, 2 to 36 layers deep, differ by 0.7 to 2.2 % and by 0.1 to 0.2 %.
TOLERANCE = {"bfloat16": 0.1, "float16": 0.02}


@dataclass(frozen=True)
class Expected:
    """What the merged model is compared with.

    Attributes:
        digests: of the base's weights, by name.
        logits: of base and adapter together, one (T, V) for each of `draw_samples`, float32.
        effect: how far the adapter moved the base's logits, a share of their spread.
    """

    digests: dict[str, bytes]
    logits: list[torch.Tensor]
    effect: float


def digest_weights(model: PreTrainedModel) -> dict[str, bytes]:
    """Return a 128-bit hash of each weight's bytes: what is bit-identical can be told without a second model."""
    return {
        name: xxhash.xxh3_128_digest(weight.flatten().view(torch.uint8).cpu().numpy())
        for name, weight in model.state_dict().items()
    }


@torch.inference_mode()
def sample_logits(model: PreTrainedModel | PeftModel, processor: ProcessorMixin) -> list[torch.Tensor]:
    """Return the logits of each drawn sample's prompt, (T, V) in float32 on the CPU.

    Raises:
        ValueError: not finite.
    """
    prompts = [encode_prompts(model, processor, [sample]) for sample in draw_samples()]
    logits = [model(**prompt).logits[0].float().cpu() for prompt in prompts]
    if not all(rows.isfinite().all() for rows in logits):
        raise ValueError(f"--dtype: the model's logits are not finite in {model.dtype}; float16 ends at 65,504")
    return logits


def draw_samples() -> list[dict]:
    """Return three small questions about drawn spots, the last about two images."""
    dark, red = _draw_spot("peachpuff", "sienna"), _draw_spot("tan", "firebrick")
    cases = [("What condition is shown?", [dark]), ("Is the skin light or dark?", [red]), ("Compare.", [dark, red])]
    return [{"id": question, "images": images, "messages": _ask(question, images)} for question, images in cases]


def _ask(question: str, images: list) -> list[dict]:
    return [{"role": "user", "content": IMAGE_MARKER * len(images) + question}]


def _draw_spot(skin: str, spot: str) -> Image.Image:
    image = Image.new("RGB", (224, 224), skin)
    ImageDraw.Draw(image).ellipse((60, 70, 150, 140), fill=spot)
    return image


def distance(logits: list[torch.Tensor], others: list[torch.Tensor]) -> float:
    """Return the root mean square of the differences over that of the logits around their mean."""
    return (_sum_of_squares(a - b for a, b in zip(logits, others, strict=True)) / _sum_of_squares(logits)) ** 0.5


def _sum_of_squares(rows) -> float:
    """Sum over tensors (T, V) whose every row is centred first: a constant added to all logits changes no answer."""
    return sum((row - row.mean(-1, keepdim=True)).square().sum().item() for row in rows)


def check(folder: Path, expected: Expected, processor: ProcessorMixin, targeted: set[str], dtype: str) -> None:
    """Load what was saved, and compare it with the base, the adapter and the processor.

    Raises:
        ValueError: something differs that should not, or does not differ that should.
    """
    model = load_model(str(folder), quantization=None, dtype=dtype, keep_dtype=True)
    check_weights(expected.digests, digest_weights(model), targeted)
    check_processor(processor, AutoProcessor.from_pretrained(folder))
    found = check_logits(expected, sample_logits(model, load_processor(str(folder))), TOLERANCE[dtype])
    tower = "adapted" if any(name.startswith(family_of(model).vision) for name in targeted) else "bit-identical"
    untouched = len(expected.digests) - len(targeted)
    print(f"{'weights':<10} {len(targeted)} merged, {untouched} bit-identical to the base's; vision tower {tower}")
    print(f"{'logits':<10} {found:.2%} from the adapter's; the adapter moved the base's by {expected.effect:.2%}")


def check_weights(before: dict[str, bytes], after: dict[str, bytes], targeted: set[str]) -> None:
    """Raise ValueError unless all targeted weights differ from the base's, and no others do."""
    changed = {name for name in before | after if before.get(name) != after.get(name)}
    if wrong := sorted(changed ^ targeted):
        fault = "differs from the base's, and is no target of the adapter"
        if wrong[0] in targeted:
            fault = "is a target of the adapter, and is still the base's (its update is zero, or lost in rounding)"
        raise ValueError(f"{len(wrong)} merged weights are wrong; the first, {wrong[0]}, {fault}")


def check_processor(before: ProcessorMixin, after: ProcessorMixin) -> None:
    """Raise ValueError unless the chat template and the pixel limits came through."""
    if after.chat_template != before.chat_template:
        raise ValueError("the saved processor has another chat template than the adapter's")
    found, rule = (dict(processor.image_processor.size) for processor in (after, before))
    if found != rule:
        raise ValueError(f"the saved processor has the pixel limits {found}, the adapter's has {rule}")


def check_logits(expected: Expected, logits: list[torch.Tensor], tolerance: float) -> float:
    """Return how far the logits are from the adapter's, a share of their spread.

    Raises:
        ValueError: further than `tolerance`, or than the base's own; or another first token of an answer, and not
            because two were as likely.
    """
    found = distance(expected.logits, logits)
    far = f"the merged model's logits are {found:.2%} from the adapter's"
    if found > tolerance:
        raise ValueError(f"{far}; rounding explains {tolerance:.0%}")
    if found >= expected.effect:
        raise ValueError(f"{far}, the base's {expected.effect:.2%}: the adapter does nothing that 16 bit can hold")
    for number, (ours, theirs) in enumerate(zip(expected.logits, logits, strict=True)):
        lead = ours[-1].max() - ours[-1][theirs[-1].argmax()]
        if lead > 2 * tolerance * ours[-1].std():
            raise ValueError(f"drawn sample {number}: the merged model begins its answer with another token")
    return found
