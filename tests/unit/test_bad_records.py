"""Every kind of odd or bad annotation file, conversation and text, and what becomes of it."""

import gzip
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from datasets import load_from_disk

from collator import render
from data_prep.__main__ import main as data_prep
from data_prep.reading import MAX_BYTES_IN_MEMORY
from data_prep.records import DataError, parse_record, read_annotations
from data_prep.sources import Source, read_source

SMALL = {"question": "a", "answer": "b"}
OTHER = {"question": "ü", "answer": "d"}
LINE = json.dumps(SMALL)
LIST = json.dumps([SMALL, OTHER], ensure_ascii=False)
LINES = f"{LINE}\n{json.dumps(OTHER, ensure_ascii=False)}\n"
DEEP = '{"question": "a", "answer": "b", "more": ' + "[" * 100_000 + "]" * 100_000 + "}"

# (name, the file's name, what it holds, the records)
READABLE = [
    ("array", "a.json", LIST, [SMALL, OTHER]),
    ("array over several lines", "a.json", json.dumps([SMALL, OTHER], indent=2), [SMALL, OTHER]),
    ("lines", "a.jsonl", LINES, [SMALL, OTHER]),
    ("lines under the name .json", "a.json", LINES, [SMALL, OTHER]),
    ("an array under the name .jsonl", "a.jsonl", LIST, [SMALL, OTHER]),
    ("one line", "a.jsonl", LINE, [SMALL]),
    ("blank lines", "a.jsonl", f"\n{LINES}\n\n", [SMALL, OTHER]),
    ("lines from Windows", "a.jsonl", LINES.replace("\n", "\r\n"), [SMALL, OTHER]),
    ("byte order mark", "a.json", "\ufeff" + LIST, [SMALL, OTHER]),
    ("byte order mark before lines", "a.jsonl", "\ufeff" + LINES, [SMALL, OTHER]),
    ("letters written as escapes", "a.json", json.dumps([OTHER]), [OTHER]),
    ("a text of 5 million characters", "a.json", json.dumps(["x" * 5_000_000, SMALL]), ["x" * 5_000_000, SMALL]),
]

# (name, the file's name, what it holds, what the error says after the file's path)
UNREADABLE = [
    ("nothing", "a.json", "", ": the file is empty"),
    ("blanks alone", "a.json", " \n ", ": the file is empty"),
    ("empty array", "a.json", "[]", ": contains no records"),
    ("null", "a.json", "null", ": expected a list of records, found null"),
    ("a text", "a.json", '"x"', ": expected a list of records, found a text 'x'"),
    ("an object", "a.json", '{"data": []}', ": expected a list of records, found an object with the keys ['data']"),
    ("prose", "a.json", "Dear reader,", ", line 1, column 1: not JSON: Expecting value"),
    ("UTF-16", "a.json", LIST.encode("utf-16"), ": not UTF-8, most likely UTF-16; save the file as UTF-8"),
    ("no text", "a.json", bytes(range(256)), ": not UTF-8 at byte 128; save the file as UTF-8"),
    ("gzip", "a.jsonl.gz", gzip.compress(LINES.encode()), ": is compressed, or an archive; unpack it first"),
    ("UTF-16, no mark", "a.json", LIST.encode("utf-16-le"), ": not UTF-8, most likely UTF-16; save the file as UTF-8"),
    ("UTF-16, lines", "a.jsonl", LINES.encode("utf-16-be"), ": not UTF-8, most likely UTF-16; save the file as UTF-8"),
    ("Latin-1", "a.json", LIST.encode("latin-1"), ": not UTF-8 at byte 49; save the file as UTF-8"),
    ("Latin-1, lines", "a.jsonl", LINES.encode("latin-1"), ": not UTF-8 at byte 47; save the file as UTF-8"),
    ("truncated in a letter", "a.json", LIST.encode()[:50], ": not UTF-8 at byte 49; save the file as UTF-8"),
    ("truncated in a text", "a.json", LIST[:50], ", record 1, line 1, column 49: not JSON: Unterminated string"),
    ("truncated in a record", "a.json", LIST[:22], ", record 0, line 1, column 20: not JSON: Unterminated string"),
    ("truncated after one", "a.json", f"[{LINE}", ", record 1, line 1, column 34: not JSON: Expecting ','"),
    ("truncated after a comma", "a.json", f"[{LINE},", ", record 1, line 1, column 35: not JSON: Expecting value"),
    ("comma too many", "a.json", f"[{LINE},\n]", ", record 1, line 2, column 1: not JSON: Expecting value"),
    ("no comma", "a.json", f"[{LINE}\n{LINE}]", ", record 1, line 2, column 1: not JSON: Expecting ',' delimiter"),
    ("no colon", "a.json", '[{"a": 1},\n {"b" 2}]', ", record 1, line 2, column 7: not JSON: Expecting ':' delimiter"),
    ("two arrays", "a.json", "[1]\n[2]", ", record 1, line 2, column 1: not JSON: Extra data"),
    ("single quotes", "a.json", "[{'a': 1}]", ", record 0, line 1, column 3: not JSON: Expecting property name"),
    ("a comment", "a.json", "// x\n[]", ", line 1, column 1: not JSON: Expecting value"),
    ("deep nesting", "a.json", f"[{DEEP}]", ", record 0, line 1, column 2: not JSON: nested too deeply"),
    ("deep nesting alone", "a.json", "[" * 100_000, ", record 0, line 1, column 2: not JSON: nested too deeply"),
    (
        "a number of 5,000 digits",
        "a.json",
        "[" + "1" * 5000 + "]",
        ", record 0, line 1, column 2: not JSON: a number of over 4,300 digits",
    ),
]

# (name, the file's name, what it holds, the record that is refused, its reason); all other records are read
FLAWED = [
    ("NaN", "a.json", f'[{LINE},\n{{"label": NaN}}, {LINE}]', 1, "line 2: NaN is not a JSON value"),
    ("Infinity in lines", "a.jsonl", f'{{"age": -Infinity}}\n{LINE}', 0, "line 1: -Infinity is not a JSON value"),
    ("endless number", "a.json", f'[{LINE}, {{"age": 1e999}}]', 1, "line 1: the number 1e999 is too large"),
    ("key twice", "a.json", f'[{{"id": 1, "id": 2}}, {LINE}]', 0, "line 1: duplicate key 'id'"),
    (
        "key twice inside",
        "a.json",
        f'[{LINE}, {{"m": [{{"role": 1, "role": 2}}]}}]',
        1,
        "line 1: duplicate key 'role'",
    ),
    ("key twice in lines", "a.jsonl", f'{LINE}\n{{"a": 1, "a": 1}}\n', 1, "line 2: duplicate key 'a'"),
    ("null", "a.json", f"[null, {LINE}]", 0, "expected an object, found null"),
    ("null in lines", "a.jsonl", f"{LINE}\nnull\n{LINE}", 1, "expected an object, found null"),
    ("a list", "a.json", f"[{LINE}, [{LINE}]]", 1, "expected an object, found a list"),
    ("a number", "a.json", f"[{LINE}, 5]", 1, "expected an object, found a number 5"),
    ("broken line", "a.jsonl", f'{LINE}\n{{"a" 1}}\n{LINE}', 1, "line 2, column 6: not JSON: Expecting ':' delimiter"),
    ("truncated line", "a.jsonl", f'{LINE}\n{{"a": "b', 1, "line 2, column 7: not JSON: Unterminated string"),
    ("two on a line", "a.jsonl", f"{LINE}\n{LINE} {LINE}\n", 1, "line 2, column 34: not JSON: Extra data"),
    ("first line broken", "a.jsonl", f"hello\n{LINE}", 0, "line 1, column 1: not JSON: Expecting value"),
    ("deep line", "a.jsonl", f"{LINE}\n{DEEP}\n{LINE}", 1, "line 2, column 1: not JSON: nested too deeply"),
    ("half a character", "a.json", f'[{LINE}, {{"id": "\\ud83d"}}]', 1, "field 'id': half of a character"),
]


def written(folder: Path, name: str, content: str | bytes) -> Path:
    path = folder / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def names(cases):
    return [case[0] for case in cases]


@pytest.mark.parametrize(("name", "file", "content", "records"), READABLE, ids=names(READABLE))
def test_a_file_is_read_whatever_its_form(tmp_path, name, file, content, records):
    assert read_annotations(written(tmp_path, file, content)) == records


@pytest.mark.parametrize(("name", "file", "content", "reason"), UNREADABLE, ids=names(UNREADABLE))
def test_an_unreadable_file_gives_one_clear_line(tmp_path, name, file, content, reason):
    path = written(tmp_path, file, content)
    with pytest.raises(ValueError) as error:
        read_annotations(path)
    assert str(error.value).startswith(f"{path}{reason}") and "\n" not in str(error.value)


@pytest.mark.parametrize(("name", "file", "content", "record", "reason"), FLAWED, ids=names(FLAWED))
def test_a_flawed_record_is_refused_and_the_others_are_read(tmp_path, name, file, content, record, reason):
    found = read_source(Source(written(tmp_path, file, content)))
    assert [error.record for error in found.errors] == [record]
    assert found.errors[0].reason.startswith(reason) and found.errors[0].source == file
    assert len(found.samples) == found.num_records - 1 >= 1


def test_a_flaw_in_a_questions_file_names_its_record(tmp_path):
    path = written(tmp_path, "q.jsonl", f'{LINE}\n{{"a": 1, "a": 1}}\n')
    with pytest.raises(ValueError, match=r"q\.jsonl, record 1, line 2: duplicate key 'a'"):
        read_annotations(path)


@pytest.mark.parametrize(
    ("name", "make"),
    [("pipe", os.mkfifo), ("device", lambda path: path.symlink_to("/dev/zero")), ("missing", lambda path: None)],
)
def test_what_is_no_file_is_not_opened(tmp_path, name, make):
    make(tmp_path / "a.json")
    with pytest.raises(FileNotFoundError, match=r"annotations: no file .*a\.json"):
        read_annotations(tmp_path / "a.json")


def user(text):
    return {"role": "user", "content": text}


def assistant(text):
    return {"role": "assistant", "content": text}


def system(text):
    return {"role": "system", "content": text}


def nested(depth):
    value = []
    for _ in range(depth):
        value = [value]
    return value


ORDER = "expected an optional system turn, then user and assistant in turn, ending with the assistant"
PAIR = [user("q"), assistant("a")]

# (name, the turns or the record, the reason)
BAD_CHATS = [
    ("no turns", [], "field 'messages': expected a list of turns, found an empty list"),
    ("null", None, "field 'messages': expected a list of turns, found null"),
    ("a number", 5, "field 'messages': expected a list of turns, found a number 5"),
    ("a text", "hello", "field 'messages': expected a list of turns, found a text 'hello'"),
    ("an object", user("q"), "field 'messages': expected a list of turns, found an object with the keys"),
    ("the answer first", PAIR[::-1], f"field 'messages': the roles are assistant, user; {ORDER}"),
    ("a question alone", PAIR[:1], f"field 'messages': the roles are user; {ORDER}"),
    ("an answer alone", PAIR[1:], f"field 'messages': the roles are assistant; {ORDER}"),
    ("only system", [system("x")], f"field 'messages': the roles are system; {ORDER}"),
    ("only two systems", [system("x")] * 2, f"field 'messages': the roles are system, system; {ORDER}"),
    ("system late", [*PAIR, system("x")], f"field 'messages': the roles are user, assistant, system; {ORDER}"),
    ("system between", [PAIR[0], system("x"), PAIR[1]], f"the roles are user, system, assistant; {ORDER}"),
    ("two questions", [PAIR[0], *PAIR], f"field 'messages': the roles are user, user, assistant; {ORDER}"),
    ("two answers", [*PAIR, PAIR[1]], f"field 'messages': the roles are user, assistant, assistant; {ORDER}"),
    ("a question left open", [*PAIR, PAIR[0]], f"field 'messages': the roles are user, assistant, user; {ORDER}"),
    ("a system turn and field", {"messages": [system("x"), *PAIR], "system": "y"}, "the roles are system, system,"),
    ("turn is null", [None, PAIR[1]], "field 'messages[0]': expected an object, found null"),
    ("turn is a number", [PAIR[0], 7], "field 'messages[1]': expected an object, found a number 7"),
    ("turn is a list", [PAIR, PAIR[1]], "field 'messages[0]': expected an object, found a list"),
    ("unknown role", [user("q"), {"role": "bot", "content": "a"}], "field 'messages[1]': role 'bot' is not one of"),
    ("role in capitals", [{"role": "User", "content": "q"}, PAIR[1]], "role 'User' is not one of human, gpt, user,"),
    ("role of a tool", [PAIR[0], {"role": "tool", "content": "a"}], "field 'messages[1]': role 'tool' is not one of"),
    ("role is a number", [{"role": 1, "content": "q"}, PAIR[1]], "field 'messages[0]': role 1 is not one of"),
    ("role is a list", [{"role": ["user"], "content": "q"}, PAIR[1]], "field 'messages[0]': role ['user'] is not one"),
    ("no role", [{"content": "q"}, PAIR[1]], "field 'messages[0]': role None is not one of"),
    ("no text", [{"role": "user"}, PAIR[1]], "field 'messages[0]': expected some text, found null"),
    ("text is null", [user(None), PAIR[1]], "field 'messages[0]': expected some text, found null"),
    ("text is a number", [user(3), PAIR[1]], "field 'messages[0]': expected some text, found a number 3"),
    ("text is true", [PAIR[0], assistant(True)], "field 'messages[1]': expected some text, found a truth value True"),
    ("text is an object", [user({}), PAIR[1]], "field 'messages[0]': expected some text, found an object"),
    ("empty question", [user(""), PAIR[1]], "field 'messages[0]': expected some text, found a text ''"),
    ("blank answer", [PAIR[0], assistant(" \n\t")], "field 'messages[1]': expected some text, found a text ' \\n\\t'"),
    ("no blocks", [user([]), PAIR[1]], "field 'messages[0]': expected some text, found a text ''"),
    ("block is null", [user([None]), PAIR[1]], "field 'messages[0]': expected a block of type text, image or"),
    ("block of text is null", [user([{"type": "text", "text": None}]), PAIR[1]], "expected a block of type text"),
    ("block of sound", [user([{"type": "audio"}]), PAIR[1]], "field 'messages[0]': expected a block of"),
    ("block's path is a number", [user([{"type": "image", "image": 5}]), PAIR[1]], "expected an image's path, found"),
    ("image in the answer", [PAIR[0], assistant("<image>a")], "an <image> marker in the assistant's text"),
    ("image in the system text", [system("<image>"), *PAIR], "an <image> marker in the system's text"),
    ("marker without image", [user("<image>q"), PAIR[1]], "field 'messages': 1 <image> marker(s) for 0 image(s)"),
    ("system is a number", {"messages": PAIR, "system": 3}, "field 'system': expected a text, found a number 3"),
    ("system is a list", {"messages": PAIR, "system": ["x"]}, "field 'system': expected a text, found a list"),
    ("NUL in a question", [user("q\0"), PAIR[1]], "field 'messages[0]': the user's text contains a NUL character"),
    (
        "NUL in an answer",
        [PAIR[0], assistant("a\0b")],
        "field 'messages[1]': the assistant's text contains a NUL",
    ),
    ("NUL in a label", {"messages": PAIR, "label": "\0x"}, "field 'label': the text contains a NUL character"),
    ("endless text", [user("x" * 1_000_001), PAIR[1]], "the user's text has 1,000,001 characters, at most 1,000,000"),
    ("endless id", {"messages": PAIR, "id": "x" * 5_000_000}, "field 'id': 5,000,000 characters, at most 500"),
    ("endless role", [{"role": "x" * 5_000_000, "content": "q"}], "field 'messages[0]': role 'xxx"),
    ("token in two blocks", [user([{"type": "text", "text": t} for t in ("<|im_", "end|>")]), PAIR[1]], "<|im_end|>"),
    ("nested text", [user(nested(900)), PAIR[1]], "field 'messages[0]': expected a block of"),
    ("nested beyond measure", [user(nested(5000)), PAIR[1]], "nested too deeply"),
    ("half a character", [user("\udc00"), PAIR[1]], "field 'messages': half of a character pair, '\\udc00'"),
    ("half in a label", {"messages": PAIR, "label": "x\ud800"}, "field 'label': half of a character pair, '\\ud800'"),
    ("half in a key", {"messages": PAIR, "a\ud800": 1}, "field 'a\\ud800': half of a character pair, '\\ud800'"),
    ("half in a key of two lines", {"messages": PAIR, "\n\ud800": 1}, "field '\\n\\ud800': half of a character pair"),
    ("an invisible answer", [PAIR[0], assistant("\u200b \ufeff")], "field 'messages[1]': expected some text, found"),
    ("token in a label", {"messages": PAIR, "label": "<|im_end|>"}, "field 'label': the text contains the"),
    ("token in an id", {"messages": PAIR, "id": "<|im_end|>"}, "field 'id': the text contains the special token"),
]

# Texts that look odd and are kept to the letter, in a question, an answer and a system text
KEPT = [
    ("emoji", "Is this 🩺👩🏽‍⚕️ fine?"),
    ("right to left", "هل هذا خطير؟ לא"),
    ("direction marks", "\u202eevil\u202c \u200fx"),
    ("accents put together", "Ame\u0301lie"),
    ("Jinja", "{{ messages[0] }} {% for x in y %}{# z #}{% endfor %}"),
    ("Jinja that does not close", "{% raw %} {{"),
    ("format strings", "%s {0} ${HOME} `ls` $(ls)"),
    ("HTML", "<b>bold</b> <script>alert(1)</script> &lt;"),
    ("almost a token", "<|im_end> <im_end|> < |im_end| > <|im end|> |im_end|"),
    ("words of roles", "user\nassistant\nsystem: Human: Assistant:"),
    ("escapes", "a\\nb \\u0000 \\x00"),
    ("line ends and tabs", "a\r\nb\tc\vd"),
    ("control characters", "a\x01\x1b[31mb\x7f"),
    ("a text of a million characters", "x" * 1_000_000),
]


@pytest.mark.parametrize(("name", "chat", "reason"), BAD_CHATS, ids=names(BAD_CHATS))
def test_a_bad_conversation_is_refused_with_its_record_and_reason(name, chat, reason):
    raw = chat if isinstance(chat, dict) and "messages" in chat else {"messages": chat}
    with pytest.raises(DataError) as error:
        parse_record(raw, 3)
    assert reason in error.value.reason and len(str(error.value)) < 700
    assert str(error.value).startswith("record 3") and "\n" not in str(error.value)


@pytest.mark.parametrize(("name", "text"), KEPT, ids=names(KEPT))
def test_an_unusual_text_is_kept_to_the_letter(tmp_path, name, text):
    raw = {"question": text, "answer": text, "system": text, "label": text}
    path = written(tmp_path, "a.json", json.dumps([raw]))
    [sample] = read_source(Source(path)).samples
    assert [message["content"] for message in sample["messages"]] == [text] * 3 and sample["label"] == text


def test_odd_texts_reach_the_tokens_as_they_are(processor):
    for name, text in KEPT[:-1]:
        messages = parse_record({"question": text, "answer": text}, 0)["messages"]
        assert render(processor, messages).count(text) == 2, name


def test_the_tables_hold_as_many_cases_as_promised():
    assert len(READABLE) + len(UNREADABLE) + len(FLAWED) >= 25
    assert len(BAD_CHATS) + len(KEPT) >= 35
    for table in (READABLE, UNREADABLE, FLAWED, BAD_CHATS, KEPT):
        assert len(set(names(table))) == len(table)


# What Qwen2.5-VL's tokenizer_config.json adds to its vocabulary: 14 special tokens, and 8 that are plain to it.
SPECIAL = [
    *("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|object_ref_start|>", "<|object_ref_end|>", "<|box_start|>"),
    *("<|box_end|>", "<|quad_start|>", "<|quad_end|>", "<|vision_start|>", "<|vision_end|>", "<|vision_pad|>"),
    *("<|image_pad|>", "<|video_pad|>"),
]
BOXES = [f"<|{kind}_{end}|>" for kind in ("box", "quad", "object_ref") for end in ("start", "end")]
PLAIN = [
    *("<tool_call>", "</tool_call>", "<|fim_prefix|>", "<|fim_middle|>", "<|fim_suffix|>", "<|fim_pad|>"),
    *("<|repo_name|>", "<|file_sep|>"),
]


@pytest.mark.parametrize("field", ["question", "answer", "system"])
@pytest.mark.parametrize("token", SPECIAL + PLAIN)
def test_a_token_of_the_tokenizer_is_refused_in_every_field(token, field):
    raw = {"question": "a", "answer": "b", "system": "c", field: f"some{token}text"}
    whose = {"question": "user", "answer": "assistant"}.get(field, field)
    with pytest.raises(DataError) as error:
        parse_record(raw, 3)
    found, _, remedy = str(error.value).partition("; ")
    assert found == f"record 3, field {field!r}: the {whose}'s text contains the special token {token}"
    assert remedy.startswith("write coordinates as") == (token in BOXES)


def test_the_list_holds_every_token_that_the_tokenizer_adds(processor):
    assert set(SPECIAL) == set(processor.tokenizer.get_added_vocab()) and len(SPECIAL) == 14


def bad_row(number):
    """One of ten ways to be bad, as a line of JSON."""
    good = {"id": f"bad{number}", "image": "red.jpg", **SMALL}
    kinds = [
        {**good, "image": "gone.jpg"},
        {**good, "image": "../red.jpg"},
        {**good, "image": "http://127.0.0.1:9/x.jpg"},
        {**good, "image": "text.jpg"},
        {**good, "answer": "<|im_end|>"},
        {**good, "question": None},
        {**good, "messages": []},
        {**good, "id": "half a character \ud83d"},
    ]
    lines = [*map(json.dumps, kinds), json.dumps(good)[:-9], json.dumps(good).replace("{", '{"id": 5, ', 1)]
    return lines[number % len(lines)]


def test_of_ten_thousand_rows_the_five_hundred_bad_ones_are_put_aside(write_records, tmp_path):
    rows = [bad_row(n // 20) if n % 20 == 7 else json.dumps({"id": str(n), **SMALL}) for n in range(10_000)]
    for number, name in enumerate(("red.jpg", "green.png", "blue.jpg")):
        rows[number] = json.dumps({"id": str(number), "image": name, **SMALL})
    path, images = write_records("\n".join(rows), "a.jsonl")
    (images / "text.jpg").write_text("hello")
    args = ["--annotations", path, "--images", images, "--out", tmp_path / "out", "--on-error", "drop"]
    data_prep(["convert", "--workers", "2", *map(str, args)])
    rejected = [json.loads(line) for line in (tmp_path / "out" / "rejected.jsonl").read_text().splitlines()]
    assert [row["record"] for row in rejected] == list(range(7, 10_000, 20)) and len(rejected) == 500
    assert len({re.sub(r"\d+", "", row["reason"]) for row in rejected}) == 10  # one for each way to be bad
    kept = [ids_of(tmp_path / "out" / name) for name in ("train", "validation", "test")]
    assert sum(map(len, kept)) == 9_500 and len(set().union(*kept)) == 9_500
    assert set().union(*kept) == {str(n) for n in range(10_000) if n % 20 != 7}


def ids_of(folder: Path) -> list[str]:
    return load_from_disk(str(folder))["id"]


WATCHED = """
import re, sys
from pathlib import Path
from data_prep.records import iter_annotations, parse_record
peak = lambda: int(re.search(r"VmHWM:\\s+(\\d+) kB", Path("/proc/self/status").read_text())[1])
base = peak()
count = sum(bool(parse_record(raw, n)) for n, raw in enumerate(iter_annotations(sys.argv[1])))
print(count, base, peak())
"""


def large_file(path: Path, size: int) -> int:
    """Write records of at least `size` bytes, as an array or as JSON Lines; return how many."""
    record = json.dumps({"id": "s", "image": "a.jpg", "messages": [user("<image>\nWhat?"), assistant("This. " * 20)]})
    before, between, after = ("", "\n", "") if path.suffix == ".jsonl" else ("[", ",\n", "]")
    block = f"{record}{between}" * 10_000
    blocks = size // len(block) + 1
    with path.open("w") as file:
        file.write(before)
        for _ in range(blocks):
            file.write(block)
        file.write(f"{record}{after}")
    return blocks * 10_000 + 1


@pytest.mark.scale
@pytest.mark.parametrize(
    ("name", "size", "most"),
    [
        ("a.json", 20_000_000, 50),
        pytest.param("a.jsonl", 40_000_000, 5, marks=pytest.mark.slow),
        pytest.param("a.jsonl", 2_000_000_000, 5, marks=pytest.mark.slow),
    ],
    ids=["an array of 20 MB", "40 MB of lines", "2 GB of lines"],
)
def test_a_large_file_is_read_in_little_memory(tmp_path, name, size, most):
    count = large_file(tmp_path / name, size)
    ran = subprocess.run([sys.executable, "-c", WATCHED, tmp_path / name], capture_output=True, text=True)
    found, base, peak = map(int, ran.stdout.split())
    print(f"{size / 1e9:.2f} GB: peak {peak / 1024:.0f} MB, {base / 1024:.0f} MB of them Python and its libraries")
    assert found == count
    assert (peak - base) / 1024 < most
    (tmp_path / name).unlink()


@pytest.mark.parametrize("content", ["[{}]", "{}\n{}\n"])
def test_a_file_that_does_not_fit_into_memory_has_to_be_json_lines(tmp_path, content):
    path = written(tmp_path, "a.json", content)
    os.truncate(path, MAX_BYTES_IN_MEMORY + 1)
    with pytest.raises(ValueError, match=r"a\.json: 500,000,001 bytes, at most 500,000,000; save it as JSON Lines"):
        read_annotations(path)
