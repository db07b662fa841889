"""Checks of a data set: findings name record, id and file."""

from collections import Counter, defaultdict
from dataclasses import asdict, dataclass

from .images import PATCH_CELL, ImageInfo
from .records import IMAGE_MARKER, DataError

LONG_ANSWER = 2000  # characters

# Kinds of findings, the worst first. Errors would harm training; warnings should be reviewed; notes are counted.
ERRORS = {
    "unusable": "records that cannot be used",
    "leak": "groups or pictures in more than one of the given splits",
    "contradiction": "one picture under different labels",
    "giveaway": "questions that contain the answer's label",
    "tiny": f"images under {PATCH_CELL} px a side",
}
WARNINGS = {
    "exact copy": "image files that are byte for byte the same",
    "near copy": "images that look the same: re-encoded, resized or mirrored",
    "long answer": f"answers over {LONG_ANSWER:,} characters",
    "private": "images with GPS, dates, names or comments (not copied into the data set)",
    "rare label": "labels with too few groups for every split",
}
NOTES = {
    "short answer": "answers of one word",
    "turned": "images stored rotated or mirrored, turned upright by their EXIF orientation",
    "converted": "images stored in another colour mode than RGB, and converted to it",
}
KINDS = {**ERRORS, **WARNINGS, **NOTES}


@dataclass(frozen=True)
class Finding:
    """Result of a check.

    Attributes:
        kind: key of `KINDS`.
        detail: the problem, with the value.
        record: 0-based position in its source; None when the finding is not about one record.
        sample_id: the record's id.
        source: name of the record's file or Hub data set.
        file: image file, as the record names it.
        others: ids of the other samples concerned.
    """

    kind: str
    detail: str
    record: int | None = None
    sample_id: str | None = None
    source: str | None = None
    file: str | None = None
    others: tuple[str, ...] = ()

    def to_dict(self) -> dict:
        return asdict(self)

    def __str__(self) -> str:
        where = [] if self.record is None else [f"{self.source}, record {self.record} (id {self.sample_id!r})"]
        where += [self.file] if self.file else []
        also = f" (also {', '.join(self.others[:5])}{', ...' if len(self.others) > 5 else ''})" if self.others else ""
        return ", ".join(where) + (": " if where else "") + self.detail + also


def count_findings(findings: list[Finding]) -> dict[str, int]:
    """Return the number of findings of each kind that occurs, in the order of `KINDS`."""
    counts = Counter(finding.kind for finding in findings)
    return {kind: counts[kind] for kind in KINDS if counts[kind]}


def has_errors(findings: list[Finding]) -> bool:
    return any(finding.kind in ERRORS for finding in findings)


def check_records(errors: list[DataError]) -> list[Finding]:
    """Turn the errors of unusable records into findings."""
    return [Finding("unusable", error.reason, error.record, error.sample_id, error.source) for error in errors]


def check_texts(samples: list[dict]) -> list[Finding]:
    """Check questions and answers. A question may list labels to choose from, but not contain only the right one."""
    labels = {sample["label"].lower() for sample in samples if sample["label"]}
    findings = []
    for sample in samples:
        for question, answer in _pairs(sample["messages"]):
            if _gives_away(question.lower(), answer.lower(), (sample["label"] or "").lower(), labels):
                findings.append(_about(sample, "giveaway", f"{sample['label']!r} is in {question[:80]!r}"))
            if len(answer.split()) == 1:
                findings.append(_about(sample, "short answer", repr(answer[:80])))
            if len(answer) > LONG_ANSWER:
                findings.append(_about(sample, "long answer", f"{len(answer):,} characters"))
    return findings


def _gives_away(question: str, answer: str, label: str, labels: set[str]) -> bool:
    if not label or label not in question or label not in answer:
        return False
    return not any(other in question for other in labels if other not in label)


def _pairs(messages: list[dict]) -> list[tuple[str, str]]:
    texts = [m["content"].replace(IMAGE_MARKER, "").strip() for m in messages if m["role"] != "system"]
    return list(zip(texts[::2], texts[1::2], strict=True))


def _about(sample: dict, kind: str, detail: str, file: str | None = None, others=()) -> Finding:
    return Finding(kind, detail, sample["record"], sample["id"], sample["origin"], file, tuple(others))


def check_images(samples: list[dict], infos: dict[str, ImageInfo]) -> list[Finding]:
    """Check each image once; the finding names the first sample that uses it."""
    findings = []
    for path, (sample, name) in _first_uses(samples).items():
        info = infos[path]
        if min(info.size) < PATCH_CELL:
            findings.append(_about(sample, "tiny", f"{info.size[0]} x {info.size[1]} px", name))
        if info.turned:
            findings.append(_about(sample, "turned", "turned upright", name))
        if info.mode != "RGB":
            findings.append(_about(sample, "converted", f"mode {info.mode}", name))
        if info.private:
            findings.append(_about(sample, "private", ", ".join(info.private), name))
    return findings


def _first_uses(samples: list[dict]) -> dict[str, tuple[dict, str]]:
    """Return the first sample that uses each image, by path, and the image's name in it."""
    uses = {}
    for sample in samples:
        for path, name in zip(sample["images"], sample["files"], strict=True):
            uses.setdefault(path, (sample, name))
    return uses


def check_copies(samples: list[dict], exact: list[list[str]], near: list[list[str]]) -> list[Finding]:
    """Report copied image files, from lists of paths; a finding names the first sample of its list."""
    uses, findings = _first_uses(samples), []
    for kind, (path, *copies) in [("exact copy", paths) for paths in exact] + [("near copy", paths) for paths in near]:
        sample, name = uses[path]
        detail = f"same as {', '.join(uses[copy][1] for copy in copies)}"
        findings.append(_about(sample, kind, detail, name, [uses[copy][0]["id"] for copy in copies]))
    return findings


def check_labels(samples: list[dict], picture_of: dict[str, str]) -> list[Finding]:
    """Report pictures with more than one label; `picture_of` maps each path to one path of its copies."""
    users = defaultdict(list)
    for sample in samples:
        for path, name in zip(sample["images"], sample["files"], strict=True):
            if sample["label"] is not None:
                users[picture_of[path]].append((sample, name))
    findings = []
    for same in users.values():
        labels = sorted({sample["label"] for sample, _ in same})
        if len(labels) > 1:
            (first, name), *others = same
            ids = [sample["id"] for sample, _ in others]
            findings.append(_about(first, "contradiction", " and ".join(labels), name, ids))
    return findings


def check_splits(samples: list[dict], groups: list[int], splits: list[str]) -> list[Finding]:
    """Report groups in several splits (which only given splits can cause), and labels that are not in every split."""
    members = defaultdict(list)
    for sample, group, split in zip(samples, groups, splits, strict=True):
        members[group].append((sample, split))
    findings = []
    for group in members.values():
        names = sorted({split for _, split in group})
        if len(names) > 1:
            first, others = group[0][0], [sample["id"] for sample, _ in group[1:]]
            findings.append(_about(first, "leak", f"is in {' and '.join(names)}", others=others))
    return findings + _rare_labels(samples, groups, splits)


def _rare_labels(samples: list[dict], groups: list[int], splits: list[str]) -> list[Finding]:
    splits_of, groups_of = defaultdict(set), defaultdict(set)
    for sample, group, split in zip(samples, groups, splits, strict=True):
        if sample["label"] is not None:
            splits_of[sample["label"]].add(split)
            groups_of[sample["label"]].add(group)
    findings = []
    for label in sorted(splits_of):
        if missing := sorted(set(splits) - splits_of[label]):
            detail = f"{label!r} has {len(groups_of[label])} group(s), none in {', '.join(missing)}"
            findings.append(Finding("rare label", detail))
    return findings
