"""Every annotation format becomes the same sample, and a bad record says what is wrong with it."""

import json

import pytest

from data_prep.records import DataError, parse_record, read_annotations, to_chat


def turns(question="<image>\nWhat is it?", answer="A nevus."):
    return [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]


EXPECTED = [{"role": "user", "content": "<image>\nWhat is it?"}, {"role": "assistant", "content": "A nevus."}]


@pytest.mark.parametrize(
    "raw",
    [
        {"image": "a.jpg", "conversations": turns()},
        {"images": ["a.jpg"], "conversations": turns()},
        {"image": "a.jpg", "messages": EXPECTED},
        {"images": ["a.jpg"], "messages": turns()},
        {"image": "a.jpg", "question": "<image>\nWhat is it?", "answer": " A nevus.\n"},
        {
            "messages": [
                {
                    "role": "user",
                    "content": [{"type": "image", "image": "a.jpg"}, {"type": "text", "text": "\nWhat is it?"}],
                },
                {"role": "assistant", "content": [{"type": "text", "text": "A nevus."}]},
            ]
        },
        {
            "images": ["a.jpg"],
            "messages": [
                {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "\nWhat is it?"}]},
                {"role": "assistant", "content": "\nA nevus."},
            ],
        },
        {
            "messages": [
                {
                    "role": "user",
                    "content": [
                        {"type": "image_url", "image_url": {"url": "a.jpg"}},
                        {"type": "text", "text": "\nWhat is it?"},
                    ],
                },
                {"role": "assistant", "content": "A nevus."},
            ]
        },
    ],
)
def test_parse_record_reads_every_format_into_the_same_sample(raw):
    sample = parse_record({"id": "x", "label": "nevus", "group": 7, "skin_type": "III", **raw}, 5)
    assert sample == {
        "record": 5,
        "id": "x",
        "images": ["a.jpg"],
        "messages": EXPECTED,
        "label": "nevus",
        "group": "7",
        "skin_type": "III",
        **dict.fromkeys(("age", "sex", "site", "split")),
    }


def test_markers_stay_where_they_are_in_any_user_turn():
    record = {
        "images": ["a.jpg", "b.jpg"],
        "conversations": [*turns("Before <image> after"), *turns("And <image>?", "The same.")],
    }
    assert [m["content"] for m in parse_record(record, 0)["messages"]] == [
        "Before <image> after",
        "A nevus.",
        "And <image>?",
        "The same.",
    ]


def test_images_without_a_marker_go_before_the_first_user_text():
    record = {"images": ["a.jpg", "b.jpg"], "system": "Be brief.", "question": "Compare.", "answer": "Alike."}
    assert parse_record(record, 0)["messages"] == [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "<image><image>Compare."},
        {"role": "assistant", "content": "Alike."},
    ]


def test_an_empty_system_text_leaves_the_templates_own():
    record = {"question": "a", "answer": "b", "system": " "}
    assert [m["role"] for m in parse_record(record, 0)["messages"]] == ["user", "assistant"]


def test_text_only_records_and_unusual_texts_are_kept():
    sample = parse_record({"question": "هل هذا خطير؟ {{ x }} 🩺", "answer": "לא"}, 0)
    assert sample["images"] == []
    assert [m["content"] for m in sample["messages"]] == ["هل هذا خطير؟ {{ x }} 🩺", "לא"]


def test_a_record_without_an_id_is_named_by_its_content():
    first, again = (parse_record({"question": "a", "answer": "b"}, n)["id"] for n in (0, 9))
    other = parse_record({"question": "a", "answer": "c"}, 0)["id"]
    assert first == again != other


def test_a_named_format_wins_over_recognition():
    raw = {"question": "a", "answer": "b", "conversations": turns("no image here")}
    assert parse_record(raw, 0, format="flat")["messages"][0]["content"] == "a"
    with pytest.raises(DataError, match=r"record 0, field 'conversations': the record has more than one of"):
        parse_record(raw, 0)


BAD = [
    ([], "record 3, expected an object, found a list"),
    ({"id": "x"}, "record 3 (id 'x'), field 'conversations': the record has none of"),
    ({"image": "a.jpg", "conversations": "hello"}, "field 'conversations': expected a list of turns, found a text"),
    ({"image": "a.jpg", "conversations": []}, "field 'conversations': expected a list of turns"),
    ({"image": "a.jpg", "conversations": turns("no marker <image><image>")}, "2 <image> marker(s) for 1 image(s)"),
    ({"conversations": turns()}, "1 <image> marker(s) for 0 image(s)"),
    ({"image": 5, "conversations": turns()}, "field 'image': expected a path or a list of paths, found a number 5"),
    ({"images": ["a.jpg", None], "conversations": turns()}, "field 'images': expected a path, found null"),
    ({"image": "a", "images": ["a"], "conversations": turns()}, "the record has both 'image' and 'images'"),
    ({"video": "a.mp4", "conversations": turns()}, "field 'video': videos are not supported"),
    ({"conversations": turns("hi")[::-1]}, "the roles are assistant, user; expected an optional system turn"),
    ({"conversations": turns("hi")[:1]}, "the roles are user; expected"),
    ({"messages": [{"role": "system", "content": "x"}]}, "the roles are system; expected"),
    ({"messages": [{"role": "tool", "content": "x"}]}, "field 'messages[0]': role 'tool' is not one of"),
    ({"conversations": ["hi"]}, "field 'conversations[0]': expected an object, found a text 'hi'"),
    ({"question": "a", "answer": "  "}, "field 'answer': expected some text, found a text '  '"),
    ({"question": "a", "answer": None}, "field 'answer': expected some text, found null"),
    ({"question": "a", "answer": 4}, "field 'answer': expected some text, found a number 4"),
    ({"question": "a", "answer": "b<image>"}, "an <image> marker stands in the assistant's text"),
    ({"question": "a", "answer": "b", "system": 3}, "field 'system': expected a text, found a number 3"),
    ({"question": "a", "answer": "b", "label": ["x"]}, "field 'label': expected a text, found a list"),
    (
        {"question": "a", "answer": "b", "id": True},
        "field 'id': expected a text or a whole number, found a truth value",
    ),
    ({"question": "a\ud83d", "answer": "b"}, "field 'text': half of a character pair, '\\ud83d'"),
    ({"question": "a", "answer": "b", "id": 1.5}, "field 'id': expected a text or a whole number, found a number 1.5"),
    (
        {"messages": [{"role": "user", "content": [{"type": "audio"}]}]},
        "field 'messages[0]': expected a block of type text, image or image_url",
    ),
]


@pytest.mark.parametrize(("raw", "message"), BAD, ids=[str(n) for n in range(len(BAD))])
def test_a_bad_record_is_named_with_field_and_rule(raw, message):
    with pytest.raises(DataError) as error:
        parse_record(raw, 3)
    assert message in str(error.value)
    assert str(error.value).startswith("record 3")
    assert error.value.record == 3


@pytest.mark.parametrize("token", ["<|im_end|>", "<|im_start|>", "<|image_pad|>", "<|endoftext|>", "<tool_call>"])
@pytest.mark.parametrize("field", ["question", "answer", "system"])
def test_special_tokens_in_a_text_are_refused(token, field):
    raw = {"question": "a", "answer": "b", "system": "c"}
    with pytest.raises(DataError, match=r"text contains the special token"):
        parse_record({**raw, field: f"some {token} text"}, 0)


def test_every_added_token_of_the_tokenizer_is_refused(processor):
    for token in processor.tokenizer.get_added_vocab():
        with pytest.raises(DataError, match="special token"):
            parse_record({"question": f"a{token}b", "answer": "c"}, 0)


def test_read_annotations_takes_json_and_json_lines_whatever_the_name(tmp_path):
    records = [{"question": "a", "answer": "b"}, {"question": "ü", "answer": "d"}]
    as_list, as_lines = json.dumps(records), "\n".join(json.dumps(r, ensure_ascii=False) for r in records) + "\n"
    for name, text in [
        ("a.json", as_list),
        ("b.jsonl", as_lines),
        ("c.json", as_lines),
        ("d.json", "\ufeff" + as_list),
    ]:
        (tmp_path / name).write_text(text, encoding="utf-8")
        assert read_annotations(tmp_path / name) == records


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "a.json: the file is empty"),
        ("[]", "a.json: holds no records"),
        ("null", "a.json: expected a list of records, found null"),
        ('{"data": []}', "a.json: expected a list of records, found an object with the keys ['data']"),
        ('"x"', "a.json: expected a list of records, found a text 'x'"),
        ('[{"a": 1},\n {"b" 2}]', "a.json, line 2, column 7: not JSON: Expecting ':' delimiter"),
        ('{"a": 1}\n{"a": ', "a.json, line 2, column 7: not JSON: Expecting value"),
        ('[{"a": NaN}]', "a.json: not JSON: NaN is not a JSON value"),
        ("[" * 100_000, "a.json: not JSON: maximum recursion depth exceeded"),
        (b"[\xff]", "a.json: not UTF-8 at byte 1"),
    ],
)
def test_an_unreadable_annotation_file_gives_one_clear_line(tmp_path, text, message):
    path = tmp_path / "a.json"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(ValueError) as error:
        read_annotations(path)
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_a_missing_annotation_file_and_a_folder_are_told_apart(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"annotations: no file .*nope\.json"):
        read_annotations(tmp_path / "nope.json")
    with pytest.raises(ValueError, match="is a folder, expected a JSON"):
        read_annotations(tmp_path)


def test_to_chat_splits_at_the_markers():
    messages = [{"role": "user", "content": "<image>a <image>"}, {"role": "assistant", "content": "b"}]
    assert to_chat(messages) == [
        {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "a "}, {"type": "image"}]},
        {"role": "assistant", "content": [{"type": "text", "text": "b"}]},
    ]
