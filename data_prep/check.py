"""Checks of a data set: findings name record, id and file."""

import re
from collections import Counter, defaultdict
from dataclasses import asdict, dataclass, fields
from pathlib import Path

from common.files import read_json_lines
from common.unicode_text import space_characters

from .boxes import wrong_coordinates
from .inspection import ImageInfo
from .labels import LabelMap, Reference, describe_unread, named_labels
from .records import IMAGE_MARKER, DataError
from .sizes import PATCH_CELL
from .split import SPLITS
from .tables import SPREADSHEET_ERROR

LONG_ANSWER = 2000  # characters
# What Python, pandas, JavaScript and SQL print for a missing value; "None" and "N/A" may be meant
PLACEHOLDERS = {"nan", "NaN", "-nan", "<NA>", "NaT", "null", "NULL", "undefined", "[object Object]", "\\N"}
MAX_AGE, DATE = 120, re.compile(r"\d{1,4}[-/.:]\d{1,2}[-/.:]\d{1,4}")
BLACK = 16  # of 255; an image without a brighter value is nearly black

# Kinds of findings, the worst first. Errors would harm training; warnings should be reviewed; notes are counted.
ERRORS = {
    "unusable": "records that cannot be used",
    "leak": "groups or pictures in more than one of the given splits",
    "contradiction": "the same pictures and question under different labels",
    "tiny": f"images under {PATCH_CELL} px a side",
}
WARNINGS = {
    "giveaway": "questions that contain the answer's label (not counted in an evaluation)",
    "ungrouped": "sets of samples without a patient or lesion, beside others that have one",
    "other label": "samples whose answers name another label and not their own",
    "rounded group": "groups that are numbers without their last digits, as 1.23E+05",
    "placeholder": "labels or answers that are a program's word for a missing value, as 'nan'",
    "odd age": "ages that are no years of a life: under 0, over 120, or dates",
    "exact copy": "image files that are byte for byte the same",
    "near copy": "images that look the same: re-encoded, resized or mirrored",
    "damaged": "JPEG files with errors inside, of which parts may be grey or shifted",
    "repeated": "samples that others repeat: the same pictures, questions and answers",
    "long answer": f"answers over {LONG_ANSWER:,} characters",
    "private": "images with GPS, dates, names, comments or previews (not copied into the data set)",
    "coordinates": "records whose coordinates are not those of the image that the model gets; see --scale-boxes",
    "bit depth": "16-bit images with values of fewer bits, which are scaled to fill the range",
    "dark": f"images that are nearly black: no value over {BLACK} of 255",
    "unread label": "sets of labels that fewer than half of the answers name",
    "spelling": "labels that differ by case, white space or Unicode form, and are one",
    "rare label": "labels with too few groups for every split",
    "shared group": "groups that several sources name: kept together",
}
NOTES = {
    "attribute spelling": "skin types, sexes and sites written in several ways: taken as one",
    "group spelling": "groups written in several ways: taken as one",
    "short answer": "answers of one word",
    "turned": "images stored rotated or mirrored, turned upright by their EXIF orientation",
    "converted": "images stored in other colours than sRGB, and converted to it",
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
        images: which of its images each of these samples is about, 0-based; the first when empty.
    """

    kind: str
    detail: str
    record: int | None = None
    sample_id: str | None = None
    source: str | None = None
    file: str | None = None
    others: tuple[str, ...] = ()
    images: tuple[int, ...] = ()

    def to_dict(self) -> dict:
        return asdict(self)

    def __str__(self) -> str:
        where = [] if self.record is None else [f"{self.source}, record {self.record} (id {self.sample_id!r})"]
        where += [self.file] if self.file else []
        also = f" (also {', '.join(self.others[:5])}{', ...' if len(self.others) > 5 else ''})" if self.others else ""
        return ", ".join(where) + (": " if where else "") + self.detail + also


def read_findings(path: Path) -> list[Finding]:
    """Return the findings in a file that `convert` wrote; ValueError, which names the file, if it has other lines."""
    try:
        return [Finding(**row) for row in read_json_lines(path)]
    except TypeError as error:
        keys = ", ".join(field.name for field in fields(Finding))
        raise ValueError(f"{path}: expected findings, with {keys}, as `convert` writes them: {error}") from error


def count_findings(findings: list[Finding]) -> dict[str, int]:
    """Return the number of findings of each kind that occurs, in the order of `KINDS`."""
    counts = Counter(finding.kind for finding in findings)
    return {kind: counts[kind] for kind in KINDS if counts[kind]}


def has_errors(findings: list[Finding]) -> bool:
    return any(finding.kind in ERRORS for finding in findings)


def check_records(errors: list[DataError]) -> list[Finding]:
    """Turn the errors of unusable records into findings."""
    return [Finding("unusable", error.reason, error.record, error.sample_id, error.source) for error in errors]


def check_texts(samples: list[dict], label_map: LabelMap) -> list[Finding]:
    """Check questions and answers. A question may list labels to choose from, but not contain only the right one."""
    findings = []
    for sample in samples:
        answers = [turn["content"] for turn in sample["messages"] if turn["role"] == "assistant"]
        if found := next((text for text in (sample["label"], *answers) if text and _is_placeholder(text)), None):
            findings.append(about(sample, "placeholder", repr(found[:80])))
        for question, answer in _pairs(sample["messages"]):
            if sample["label"] and _gives_away(question, answer, sample["label"], label_map):
                findings.append(about(sample, "giveaway", f"{sample['label']!r} is in {question[:80]!r}"))
            if len(space_characters(answer).split()) == 1:
                findings.append(about(sample, "short answer", repr(answer[:80])))
            if len(answer) > LONG_ANSWER:
                findings.append(about(sample, "long answer", f"{len(answer):,} characters"))
    return findings


def _is_placeholder(text: str) -> bool:
    text = text.strip().rstrip(".")
    return text in PLACEHOLDERS or SPREADSHEET_ERROR.fullmatch(text) is not None


def check_ages(samples: list[dict]) -> list[Finding]:
    ages = [(sample, sample["age"]) for sample in samples if sample["age"]]
    return [about(sample, "odd age", f"age {age!r:.80}") for sample, age in ages if _is_odd_age(age)]


def _is_odd_age(age: str) -> bool:
    """Whether an age is no number of years; bands and words are none."""
    try:
        return not 0 <= float(age.replace(",", ".")) <= MAX_AGE
    except ValueError:
        return DATE.match(age) is not None


def _gives_away(question: str, answer: str, label: str, label_map: LabelMap) -> bool:
    return named_labels(question, label_map) == [label] and label in named_labels(answer, label_map)


def check_answers(samples: list[dict], references: list[Reference], label_map: LabelMap) -> list[Finding]:
    """Report samples whose answers name one other label, and not their own: one of the two may be wrong.

    Args:
        samples: those with a label.
        references: of each of these.
        label_map: patterns of all labels.
    """
    findings = []
    for sample, (label, answers) in zip(samples, references, strict=True):
        named = {name for answer in answers for name in named_labels(answer, label_map)}
        if len(named) == 1 and label not in named:
            findings.append(about(sample, "other label", f"label {label!r}, and the answer is {answers[-1]!r:.100}"))
    return findings


def check_grouped(samples: list[dict]) -> list[Finding]:
    """Report the samples without a group when others have one: they may be of patients in other splits."""
    first, *others = [sample for sample in samples if not sample["group"]] or [None]
    if first is None or len(others) + 1 == len(samples):
        return []
    detail = f"{len(others) + 1} of {len(samples)} samples have no group, and may be of patients in other splits"
    return [about(first, "ungrouped", detail, others=[sample["id"] for sample in others])]


def check_spellings(spellings: dict[str, Counter], kind: str) -> list[Finding]:
    """Report values with several spellings, from how often each was there, by the one that is kept."""
    return [
        Finding(kind, f"{label!r}: " + ", ".join(f"{other!r} {count} times" for other, count in counts.items()))
        for label, counts in spellings.items()
    ]


def check_readable(references: list[Reference], label_map: LabelMap) -> list[Finding]:
    """Report when fewer than half of the labelled samples have an answer that names their label."""
    unread = describe_unread(references, label_map)
    return [Finding("unread label", unread)] if unread else []


def _pairs(messages: list[dict]) -> list[tuple[str, str]]:
    texts = [m["content"].replace(IMAGE_MARKER, "").strip() for m in messages if m["role"] != "system"]
    return list(zip(texts[::2], texts[1::2], strict=True))


def about(sample: dict, kind: str, detail: str, file: str | None = None, others=(), images=()) -> Finding:
    """Return a finding about a sample; see `Finding`."""
    where = (sample["record"], sample["id"], sample["origin"])
    return Finding(kind, detail, *where, file, tuple(others), tuple(images))


def check_images(samples: list[dict], infos: dict[str, ImageInfo]) -> list[Finding]:
    """Check each image once; the finding names the first sample that uses it."""
    findings = []
    for path, (sample, position) in _first_uses(samples).items():
        info = infos[path]
        profile = f", profile {info.profile}" if info.profile else ""
        found = {
            "tiny": min(info.size) < PATCH_CELL and f"{info.size[0]} x {info.size[1]} px",
            "turned": info.turned and "turned upright",
            "converted": (info.mode != "RGB" or info.profile) and f"mode {info.mode}{profile}",
            "bit depth": info.bits is not None and info.bits < 16 and f"values of {info.bits} bits",
            "dark": info.brightest < BLACK and f"brightest value {info.brightest} of 255",
            "damaged": info.damage,
            "private": ", ".join(info.private),
        }
        name = sample["files"][position]
        findings += [about(sample, kind, detail, name, images=[position]) for kind, detail in found.items() if detail]
    return findings


def check_coordinates(samples: list[dict], **limits: int) -> list[Finding]:
    """Report coordinates that the resizing to `limits` makes wrong, see `boxes.wrong_coordinates`."""
    details = [(sample, wrong_coordinates(sample, **limits)) for sample in samples]
    return [about(sample, "coordinates", detail) for sample, detail in details if detail]


def _first_uses(samples: list[dict]) -> dict[str, tuple[dict, int]]:
    """Return the first sample that uses each image, by path, and the image's position in it."""
    uses = {}
    for sample in samples:
        for position, path in enumerate(sample["images"]):
            uses.setdefault(path, (sample, position))
    return uses


def check_copies(samples: list[dict], exact: list[list[str]], near: list[list[str]]) -> list[Finding]:
    """Report copied image files, from lists of paths; a finding names the first sample of its list."""
    uses, findings = _first_uses(samples), []
    for kind, paths in [("exact copy", paths) for paths in exact] + [("near copy", paths) for paths in near]:
        (first, *others), positions = zip(*(uses[path] for path in paths), strict=True)
        name, *copies = [uses[path][0]["files"][uses[path][1]] for path in paths]
        ids = [sample["id"] for sample in others]
        findings.append(about(first, kind, f"same as {', '.join(copies)}", name, ids, positions))
    return findings


def check_labels(samples: list[dict], picture_of: dict[str, str]) -> list[Finding]:
    """Report sets of pictures with more than one label for one question; two sets may share a picture.

    Args:
        samples: with `asks`, which is the same for all wordings of one question.
        picture_of: for each image path the path that stands for all copies of the picture.
    """
    same = defaultdict(list)
    for sample in samples:
        if sample["label"] is not None and sample["images"]:
            same[tuple(sorted(picture_of[path] for path in sample["images"])), sample["asks"]].append(sample)
    findings = []
    for first, *others in same.values():
        labels = sorted({sample["label"] for sample in (first, *others)})
        if len(labels) > 1:
            ids = [sample["id"] for sample in others]
            findings.append(about(first, "contradiction", " and ".join(labels), ", ".join(first["files"]), ids))
    return findings


def check_repeats(samples: list[dict], picture_of: dict[str, str]) -> list[Finding]:
    """Report samples that have the same pictures and messages as others, which then count several times."""
    same = defaultdict(list)
    for sample in samples:
        pictures = tuple(picture_of[path] for path in sample["images"])
        same[pictures, tuple((turn["role"], turn["content"]) for turn in sample["messages"])].append(sample)
    return [
        about(first, "repeated", f"{len(others) + 1} times", others=[sample["id"] for sample in others])
        for first, *others in same.values()
        if others
    ]


def check_leaks(samples: list[dict], groups: list[int], given: list[str | None]) -> list[Finding]:
    """Report the samples whose group stands in several of the given splits, but for those in the last of them."""
    members = defaultdict(lambda: defaultdict(list))
    for sample, group, split in zip(samples, groups, given, strict=True):
        if split is not None:
            members[group][split].append(sample)
    findings = []
    for by_split in members.values():
        *leaking, kept = sorted(by_split, key=SPLITS.index)
        for split in leaking:
            first, *others = by_split[split]
            detail = f"is in {split}, and its group or picture in {kept} (id {by_split[kept][0]['id']!r})"
            findings.append(about(first, "leak", detail, others=[sample["id"] for sample in others]))
    return findings


def flawed_samples(findings: list[Finding]) -> dict[str, str]:
    """Return the reason to drop each sample that an error names, by its id."""
    return {
        name: f"{KINDS[finding.kind]}: {finding.detail}"
        for finding in reversed(findings)
        if finding.kind in ERRORS and finding.kind != "unusable"
        for name in (finding.sample_id, *finding.others)
    }


def check_rare_labels(samples: list[dict], groups: list[int], splits: list[str]) -> list[Finding]:
    """Report labels that are not in every split."""
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
