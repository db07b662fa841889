"""How many tokens each sample has, counted from texts and image sizes, without decoding a pixel."""

from dataclasses import dataclass
from functools import partial
from pathlib import Path

from datasets import Dataset, config
from datasets.fingerprint import Hasher
from transformers import ProcessorMixin

from data_prep import fingerprint
from data_prep.records import to_chat
from data_prep.sizes import count_image_tokens, fit_options

RULES = 2  # of `to_chat`; a higher number counts again what an earlier version has counted


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
    texts = processor.apply_chat_template([to_chat(messages) for messages in batch["messages"]])
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


def check_lengths(lengths: SampleLengths, sample_ids: list[str], max_length: int | None, *, split: str) -> None:
    """Raise ValueError when samples are longer than `max_length`; the message says how many and names the longest."""
    too_long = [n for n in range(len(sample_ids)) if max_length is not None and lengths.total[n] > max_length]
    if not too_long:
        return
    worst = max(too_long, key=lambda n: lengths.total[n])
    raise ValueError(
        f"max_length: {len(too_long)} of {len(sample_ids)} {split} samples are over {max_length} tokens; the longest, "
        f"{sample_ids[worst]!r}, has {lengths.total[worst]}, of which {lengths.image[worst]} are image: raise "
        "max_length or lower max_pixels"
    )
