"""What hypothesis makes up, thousands at a time: nothing but our own errors comes out, and what comes out is right.

`FUZZ_EXAMPLES=20000 pytest tests/unit/test_fuzz.py` tries more than the few of every run.
"""

import io
import json
import tempfile
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from collator import build_labels
from common.unicode_text import normalise
from common.yaml_files import read_yaml
from data_prep.images import load_image
from data_prep.inspection import inspect_image
from data_prep.labels import build_label_map, find_label, label_key, named_labels, split_name
from data_prep.metadata import clean_copy
from data_prep.reading import Flaw
from data_prep.records import ATTRIBUTES, SPECIAL_TOKEN, DataError, iter_annotations, parse_record, to_chat
from helpers.fuzzing import fuzz
from helpers.profiles import DISPLAY_P3, make_profile

WORDS = ["<image>", "a", " ", "\n", "<|im_end|>", "<|im_", "end|>", "\0", "\ud83d", "هل", "🩺", "{{ x }}", "<", "|>"]
texts = st.text(max_size=8) | st.lists(st.sampled_from(WORDS), max_size=4).map("".join)
atoms = st.none() | st.booleans() | st.integers() | st.floats() | texts
values = st.recursive(atoms, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(texts, inner, max_size=3))
roles = st.sampled_from(["user", "assistant", "system", "human", "gpt"]) | values
paths = st.sampled_from(["a.jpg", "../b", ""]) | values
kinds = st.sampled_from(["text", "image", "image_url", "audio"]) | values
links = paths | st.fixed_dictionaries({"url": paths})
blocks = values | st.fixed_dictionaries({"type": kinds}, optional={"text": values, "image": links, "image_url": links})
contents = texts | st.lists(blocks, max_size=3) | values
said = {"role": roles, "from": roles, "content": contents, "value": contents}
turns = st.fixed_dictionaries({}, optional=said) | values
fair = st.tuples(texts, texts).map(lambda two: [{"role": "user", "content": two[0]}, {"from": "gpt", "value": two[1]}])
chats = fair | st.lists(turns, max_size=4) | values
keys = {"conversations": chats, "messages": chats, "question": contents, "answer": contents, "system": values}
keys |= {"id": values, "image": paths, "images": st.lists(paths, max_size=2) | values, "video": values, "more": values}
records = st.fixed_dictionaries({}, optional=keys | dict.fromkeys(ATTRIBUTES, values)) | values


def check_sample(sample: dict) -> None:
    """What every usable sample promises."""
    said = [message["role"] for message in sample["messages"]]
    said = said[1:] if said[0] == "system" else said
    assert said and said == ["user", "assistant"] * (len(said) // 2)
    blocks = [block for message in to_chat(sample["messages"]) for block in message["content"]]
    assert sum(block["type"] == "image" for block in blocks) == len(sample["images"])
    assert all(message["content"].strip() for message in sample["messages"])
    written = json.dumps(sample, ensure_ascii=False)
    assert not SPECIAL_TOKEN.search(written) and "\\u0000" not in written
    assert written.encode() and isinstance(sample["id"], str) and sample["id"]


@fuzz
@given(raw=records, format=st.sampled_from([None, "llava", "messages", "flat"]))
def test_any_record_becomes_a_sound_sample_or_a_data_error(raw, format):
    try:
        sample = parse_record(raw, 7, format=format)
    except DataError as error:
        assert str(error).startswith("record 7") and "\n" not in str(error) and str(error).encode()
        assert json.dumps([error.sample_id, error.reason], ensure_ascii=False).encode()
        return
    check_sample(sample)


def read(data: bytes, name: str) -> list:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / name
        path.write_bytes(data)
        try:
            return list(iter_annotations(path))
        except ValueError as error:
            assert str(error).startswith(str(path)) and "\n" not in str(error)
            raise


plain = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
)


@fuzz
@given(rows=st.lists(plain, min_size=1), indent=st.sampled_from([None, 1]), ascii=st.booleans())
def test_an_array_is_read_as_json_reads_it(rows, indent, ascii):
    text = json.dumps(rows, indent=indent, ensure_ascii=ascii).encode("utf-8", "replace")
    assert read(text, "a.json") == json.loads(text)


@fuzz
@given(
    rows=st.lists(plain.filter(lambda row: not isinstance(row, list)), min_size=2),
    name=st.sampled_from(["a.json", "a.jsonl"]),
)
def test_lines_are_read_as_json_reads_each(rows, name):
    lines = [json.dumps(row).encode() for row in rows]
    assert read(b"\n".join(lines), name) == [json.loads(line) for line in lines]


@fuzz
@given(
    data=st.lists(plain, min_size=1).map(lambda rows: json.dumps(rows).encode()) | st.binary(max_size=80),
    cut=st.integers(0, 200), at=st.integers(0, 200), wrong=st.binary(max_size=4),
    name=st.sampled_from(["a.json", "a.jsonl"]),
)  # fmt: skip
def test_a_damaged_file_is_refused_or_read_as_json_reads_it(data, cut, at, wrong, name):
    damaged = (data[:at] + wrong + data[at + len(wrong) :])[: len(data) - cut if cut < len(data) else None]
    try:
        records = read(damaged, name)
    except ValueError:
        return
    if damaged.lstrip(b"\xef\xbb\xbf \t\r\n").startswith(b"["):
        for ours, theirs in zip(records, json.loads(damaged.decode("utf-8-sig")), strict=True):
            assert isinstance(ours, Flaw) or repr(ours) == repr(theirs)


tags = st.sampled_from(["a: ", "- ", "[", "]", "{", "}", ", ", "\n", "  ", "!!int ", "!!python/name:os ", "&x ", "*x"])
lines = st.lists(tags | st.sampled_from(["2e-4", ".nan", "<<: ", "? ", ": ", "'", "null"]) | st.text(max_size=3))


@fuzz
@given(text=lines.map("".join))
def test_any_yaml_is_a_mapping_or_a_value_error(text):
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "x.yaml"
        path.write_bytes(text.encode("utf-8", "replace"))
        try:
            assert isinstance(read_yaml(path, "--config"), dict)
        except ValueError as error:
            assert str(error).startswith(str(path)) and "\n" not in str(error)


def pictures() -> list[bytes]:
    """One small picture in each kind of file, with an orientation and a name in it."""
    exif = Image.Exif()
    exif[0x0112], exif[0x013B] = 6, "someone"
    marked = {"exif": exif, "icc_profile": make_profile(DISPLAY_P3)}
    picture, coded = Image.effect_noise((40, 30), 60).convert("RGB"), []
    for kind in ("JPEG", "PNG", "TIFF", "GIF", "BMP", "WEBP", "MPO", "PPM", "JPEG2000", "AVIF", "HEIF"):
        file = io.BytesIO()
        picture.save(file, kind, **(marked if kind in ("JPEG", "PNG", "TIFF", "WEBP", "MPO", "HEIF") else {}))
        coded.append(file.getvalue())
    return coded


changes = st.lists(st.tuples(st.integers(0, 400) | st.integers(0), st.integers(0, 255)), max_size=5)


@pytest.mark.filterwarnings("ignore")  # Pillow's, about damaged metadata
@fuzz
@given(data=st.sampled_from(pictures()), changes=changes, cut=st.integers(0, 3000))
def test_a_damaged_image_is_a_picture_or_refused_alike_everywhere(data, changes, cut):
    data = bytearray(data)
    for place, value in changes:
        data[place % len(data)] = value
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "x.jpg"
        path.write_bytes(data[: len(data) - cut] if cut < len(data) // 2 else data)
        found = inspect_image(str(path))
        try:
            picture = load_image(path)
            assert load_image(path, fit=lambda width, height: (28, 28)).size == (28, 28)
            assert (picture.mode, picture.size) == ("RGB", found.size)
            if found.private:
                assert load_image({"bytes": clean_copy(str(path))[0]}).tobytes() == picture.tobytes()
        except (ValueError, OSError) as error:
            assert found == str(error) and "\n" not in found


def labels_by_hand(ids: list[int], header: list[int], end: int) -> list[int]:
    """Walk along the row: behind a header the answer begins, behind the end token it is over."""
    labels, answering = [], False
    for place, token in enumerate(ids):
        if place >= len(header) and ids[place - len(header) : place] == header:
            answering = True
        labels.append(token if answering else -100)
        if token == end:
            answering = False
    return labels


few = st.integers(0, 4)  # so few tokens that headers and ends meet in every way


@fuzz
@given(
    rows=st.integers(0, 30).flatmap(lambda width: st.lists(st.lists(few, min_size=width, max_size=width), min_size=1)),
    header=st.lists(few, min_size=1, max_size=3),
    end=few,
)
def test_labels_are_those_of_a_walk_along_the_row(rows, header, end):
    ids = torch.tensor(rows, dtype=torch.long)
    expected = [labels_by_hand(row, header, end) for row in rows]
    assert build_labels(ids, header_ids=header, end_id=end).tolist() == expected


LETTERS = [*"neNEvus-_.’' \u2028\u0301\u200b痣是不メー점िـİß", "ميلا", "ไม่"]
scripts = st.lists(st.sampled_from(LETTERS), max_size=12).map("".join)


@fuzz
@given(
    names=st.lists(scripts, min_size=1, max_size=4),
    text=scripts | st.text(max_size=20),
    answers=st.lists(scripts, max_size=4),
)
def test_any_text_names_labels_of_the_map_and_a_label_names_itself(names, text, answers):
    labels = list({label_key(name): name for name in names if split_name(name)}.values())
    if not labels:
        return
    references = [(label, (answer,)) for label, answer in zip(labels, answers, strict=False)]
    label_map = build_label_map(labels, None, references)
    for label in named_labels(text, label_map):
        start, end = find_label(text, label, label_map)
        assert 0 <= start < end <= len(text)
    assert all(label in named_labels(label, label_map) for label in labels)
    assert normalise(normalise(text)) == normalise(text)
