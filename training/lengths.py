"""How many tokens each sample has, counted from texts and image sizes, without decoding a pixel."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from datasets import Dataset, config
from datasets.fingerprint import Hasher
from transformers import ProcessorMixin

from collator import chat_of
from data_prep import fingerprint
from data_prep.sizes import count_image_tokens, fit_options

RULES = 2  # of `chat_of`; a higher number counts again what an earlier version has counted


@dataclass
class SampleLengths:
    """Tokens of each sample of a data set.

    Attributes:
        total: tokens of the rendered chat, images included.
        image: how many of them are image.
    """

    total: list[int]
    image: list[int]


def measure_lengths(dataset: Dataset, processor: ProcessorMixin) -> SampleLengths:
    """Count tokens from the texts and the stored image sizes; the next time, find them in the cache of `datasets`.

    Args:
        dataset: a split in the schema of `data_prep`.
        processor: the model's processor with the pixel limits of the run.
    """
    rules = processor.tokenizer.get_vocab(), processor.chat_template, fit_options(processor.image_processor), RULES
    key = Hasher.hash([fingerprint(dataset), dataset["id"][:], *rules])
    folder = Path(config.HF_DATASETS_CACHE) / "sample_lengths"
    folder.mkdir(parents=True, exist_ok=True)
    counted = dataset.select_columns(["id", "messages", "image_sizes"]).map(
        partial(_count_tokens, processor=processor), batched=True, remove_columns=["id", "messages", "image_sizes"],
        cache_file_name=str(folder / f"{key}.arrow"), new_fingerprint=key,
    )  # fmt: skip
    return SampleLengths(total=counted["total"][:], image=counted["image"][:])


def _count_tokens(batch: dict, processor: ProcessorMixin) -> dict[str, list[int]]:
    image = [_image_tokens(*row, processor) for row in zip(batch["id"], batch["image_sizes"], strict=True)]
    texts = processor.apply_chat_template([chat_of(processor, messages) for messages in batch["messages"]])
    ids = processor.tokenizer(texts)["input_ids"]
    # the text holds one token for each image already
    text = [len(row) - len(sizes) for row, sizes in zip(ids, batch["image_sizes"], strict=True)]
    return {"total": [t + i for t, i in zip(text, image, strict=True)], "image": image}


def _image_tokens(sample_id: str, sizes: list[list[int]], processor: ProcessorMixin) -> int:
    options = fit_options(processor.image_processor)
    try:
        return sum(count_image_tokens(height, width, **options) for width, height in sizes)
    except ValueError as error:
        raise ValueError(f"sample {sample_id!r}: {error}") from error


def find_too_long(lengths: SampleLengths, max_length: int | None) -> list[int]:
    """Return the positions of the samples that are longer than `max_length`."""
    return [n for n, total in enumerate(lengths.total) if max_length is not None and total > max_length]


def select_lengths(lengths: SampleLengths, kept: Sequence[int]) -> SampleLengths:
    return SampleLengths(total=[lengths.total[n] for n in kept], image=[lengths.image[n] for n in kept])


def list_too_long(
    splits: Mapping[str, Dataset], lengths: dict[str, SampleLengths], max_length: int | None
) -> list[dict]:
    """Return the samples over `max_length`: `split`, `id`, `tokens`, `image_tokens` and `images` (their number)."""
    rows = []
    for name, counted in lengths.items():
        if positions := find_too_long(counted, max_length):
            samples = splits[name].select_columns(["id", "image_sizes"]).select(positions)
            for n, sample in zip(positions, samples, strict=True):
                row = {"split": name, "id": sample["id"], "tokens": counted.total[n]}
                rows.append({**row, "image_tokens": counted.image[n], "images": len(sample["image_sizes"])})
    return rows


def describe_too_long(
    rows: list[dict], sizes: dict[str, int], max_length: int, fit: dict[str, int], *, pack_tokens: int | None = None,
    path: Path | None = None,
) -> str:  # fmt: skip
    """Return a message about samples that are too long, with what helps in their case.

    Args:
        rows: see `list_too_long`; not empty.
        sizes: of the splits, samples.
        max_length: tokens.
        fit: see `data_prep.images.fit_options`.
        pack_tokens: see `Settings`.
        path: of the file with the list.
    """
    counts = Counter(row["split"] for row in rows)
    said = " and ".join(f"{counts[name]} of {sizes[name]} {name} samples" for name in counts)
    worst = max(rows, key=lambda row: row["tokens"])
    longest = f"the longest, {worst['id']!r}, has {worst['tokens']}, of which {worst['image_tokens']} are image"
    listed = f", listed in {path}" if path is not None else ""
    raised = "max_length" if pack_tokens is None or worst["tokens"] <= pack_tokens else "max_length and pack_tokens"
    advice = [f"raise {raised} to {worst['tokens']}"]
    if pixels := largest_pixels(rows, max_length, fit):
        advice.append(f"lower max_pixels to {pixels}")
    advice = f"{', '.join([*advice, 'shorten them'])}, or leave them out by too_long: drop"
    return f"max_length: {said} are over {max_length} tokens{listed}; {longest}: {advice}"


def largest_pixels(rows: list[dict], max_length: int, fit: dict[str, int]) -> int | None:
    """Return the `max_pixels` with which all samples fit; None if that cannot make them fit.

    Their text may be too long by itself, or their images would be smaller than `min_pixels`.
    """
    room = [(max_length - row["tokens"] + row["image_tokens"]) // max(row["images"], 1) for row in rows]
    pixels = min(room) * fit["cell"] ** 2
    return pixels if all(row["images"] for row in rows) and pixels >= fit["min_pixels"] else None


def check_pack_limit(max_length: int | None, pack_tokens: int | None, longest: int | None) -> None:
    """Raise ValueError when samples may be longer than a pack; the message has the number that fits.

    Args:
        max_length, pack_tokens: of the run, see `Settings`.
        longest: tokens of the longest sample; None if that is not known.
    """
    if pack_tokens is None or (max_length is not None and max_length <= pack_tokens):
        return
    rule = f"set max_length: {pack_tokens} or less"
    if longest is not None:
        rule = f"the longest sample has {longest}, so set max_length: {longest}"
        if longest > pack_tokens:
            rule += f" and pack_tokens: {longest}, or max_length: {pack_tokens} and too_long: drop"
    raise ValueError(f"max_length: expected at most pack_tokens, found {max_length} and {pack_tokens}; {rule}")
