"""Pushes a prepared data set to the Hugging Face Hub: private, without file names, with a card."""

from collections import Counter
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc
from datasets import Dataset, DatasetDict
from datasets.fingerprint import Hasher
from huggingface_hub import DatasetCard, DatasetCardData

from common.hub_client import open_repository

from .check import Finding, read_findings
from .convert import FEATURES
from .folders import FINDINGS
from .mapping import load_mapping, shipped
from .storage import load_folder, make_images, replace_images

CARD = """---
{metadata}
---

# {name}

Questions and answers about skin images, prepared for fine-tuning a vision-language model. `messages` is a chat whose
`<image>` markers stand for `images`, in order; samples with one `group` are in one split; `weight` is the
sampling weight in training.

| split | samples | images |
|---|---|---|
{splits}

Labels: {labels}.

Checks: {findings}.

Not a medical device; not for diagnosis. Licence and consent of the images are those of their sources: {sources}.
"""


def publish(folder: Path, repo_id: str, *, private: bool = True) -> str:
    """Push a prepared data set and its card, and return its address.

    Args:
        folder: what `python -m data_prep convert` wrote.
        repo_id: "name" or "owner/name".
        private: whether a repository that is made now is private.

    Source of the token: HF_TOKEN in the environment, or `hf auth login`.
    """
    splits, findings = load_folder(folder), read_findings(folder / FINDINGS)
    repo_id = open_repository(repo_id, private=private, repo_type="dataset")
    groups = sorted({group for split in splits.values() for group in split["group"] if group is not None})
    numbers = {group: f"group-{number:05d}" for number, group in enumerate(groups)}
    sources = {source: f"source-{number}" for number, source in enumerate(_private_sources(splits), start=1)}
    splits = DatasetDict({name: _without_names(split, name, numbers, sources) for name, split in splits.items()})
    commit = splits.push_to_hub(repo_id, private=private)
    DatasetCard(make_card(repo_id, findings, splits)).push_to_hub(commit.repo_url.repo_id)
    return str(commit.repo_url)


def _private_sources(splits: DatasetDict) -> list[str]:
    """Return the sources whose name may be a file's: all but those of shipped mappings."""
    public = {load_mapping(name).source for name in shipped()}
    return sorted({source for split in splits.values() for source in split["source"]} - {None, *public})


def _without_names(split: Dataset, name: str, numbers: dict[str, str], sources: dict[str, str]) -> Dataset:
    """Replace ids, groups and sources, which are often file names or patients, by numbers, and drop the image names.

    Images in files keep their paths, named after their content: the push embeds them.
    """
    info, key = split.info.copy(), Hasher.hash([name, split["id"][:], numbers, sources])
    info.features["images"] = FEATURES["images"]
    table = replace_images(split.with_format("arrow")[:], _drop_names)
    columns = {"id": [f"{name}-{index:06d}" for index in range(len(split))], "group": map(numbers.get, split["group"])}
    columns["source"] = [sources.get(source, source) for source in split["source"]]
    for column, values in columns.items():
        table = table.set_column(table.column_names.index(column), column, pa.array(values, pa.string()))
    return Dataset(table, info=info, split=split.split, fingerprint=key)


def _drop_names(images: pa.StructArray) -> pa.StructArray:
    embedded = pc.is_valid(images.field("bytes"))
    return make_images(images.field("bytes"), pc.if_else(embedded, pa.scalar(None, pa.string()), images.field("path")))


def make_card(repo_id: str, findings: list[Finding], splits: DatasetDict) -> str:
    """Return the card's text: counts, labels and findings; no file names and no paths."""
    rows = [
        f"| {name} | {len(split):,} | {sum(len(sizes) for sizes in split['image_sizes']):,} |"
        for name, split in splits.items()
    ]
    labels = sorted({label for split in splits.values() for label in split["label"] if label is not None})
    sources = sorted({source for split in splits.values() for source in split["source"] if source is not None})
    kinds = Counter(finding.kind for finding in findings)
    metadata = DatasetCardData(task_categories=["visual-question-answering"], tags=["medical", "dermatology"])
    return CARD.format(
        metadata=metadata.to_yaml(),
        name=repo_id.split("/")[-1],
        splits="\n".join(rows),
        labels=", ".join(labels) or "none given",
        findings=", ".join(f"{count:,} x {kind}" for kind, count in kinds.items()) or "nothing found",
        sources=", ".join(sources) or "unknown",
    )
