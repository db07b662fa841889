"""Every annotation format becomes the same sample, and a bad record says what is wrong with it."""

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


def test_a_record_needs_no_image():
    assert parse_record({"question": "a", "answer": "b"}, 0)["images"] == []


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
    ({"id": "x"}, "record 3 (id 'x'), field 'conversations': the record has none of"),
    ({"img": "a.jpg", "Question": "What?"}, "'question' (flat); its keys are 'img', 'Question'"),
    ({}, "'question' (flat); its keys are none"),
    ({f"k{n}": n for n in range(9)}, "its keys are 'k0', 'k1', 'k2', 'k3', 'k4', 'k5', 'k6', 'k7', ..."),
    ({"image": "a.jpg", "conversations": "hello"}, "field 'conversations': expected a list of turns, found a text"),
    ({"image": "a.jpg", "conversations": []}, "field 'conversations': expected a list of turns"),
    ({"image": "a.jpg", "conversations": turns("no marker <image><image>")}, "2 <image> marker(s) for 1 image(s)"),
    ({"conversations": turns()}, "1 <image> marker(s) for 0 image(s)"),
    ({"image": 5, "conversations": turns()}, "field 'image': expected a path or a list of paths, found a number 5"),
    ({"images": ["a.jpg", None], "conversations": turns()}, "field 'images': expected a path, found null"),
    ({"image": "a", "images": ["a"], "conversations": turns()}, "the record has both 'image' and 'images'"),
    ({"video": "a.mp4", "conversations": turns()}, "field 'video': videos are not supported"),
    ({"conversations": ["hi"]}, "field 'conversations[0]': expected an object, found a text 'hi'"),
    ({"question": "a", "answer": "  "}, "field 'answer': expected some text, found a text '  '"),
    ({"question": "a", "answer": None}, "field 'answer': expected some text, found null"),
    ({"question": "a", "answer": 4}, "field 'answer': expected some text, found a number 4"),
    ({"question": "a", "answer": "b<image>"}, "an <image> marker in the assistant's text"),
    ({"question": "a", "answer": "b", "label": ["x"]}, "field 'label': expected a text, found a list"),
    (
        {"question": "a", "answer": "b", "id": True},
        "field 'id': expected a text or a whole number, found a truth value",
    ),
    ({"question": "a", "answer": "b", "id": 1.5}, "field 'id': expected a text or a whole number, found a number 1.5"),
]


@pytest.mark.parametrize(("raw", "message"), BAD, ids=[str(n) for n in range(len(BAD))])
def test_a_bad_record_is_named_with_field_and_rule(raw, message):
    with pytest.raises(DataError) as error:
        parse_record(raw, 3)
    assert message in str(error.value)
    assert str(error.value).startswith("record 3")
    assert error.value.record == 3


LOST = {
    "img_name": "x.jpg",
    "image_path": "photos/x.PNG",
    "file_name": "x.webp",
    "Image": "x.jpg",
    "img": "x",
    "image_id": "ISIC_1",
    "Images": ["x"],
    "path": "a b/x 1.jpeg",
    "picture": "x",
    "photo": {"bytes": None, "path": "x"},
    "src": ["x.tif"],
    "file": {"path": "x.jpg"},
    "link": "https://x.org/x.jpg?raw=1",
    "Image Path": "x.heic",
}


@pytest.mark.parametrize("key", LOST)
@pytest.mark.parametrize("more", [{}, {"image": None}, {"images": []}])
def test_an_image_under_a_key_that_is_not_read_is_not_lost_in_silence(key, more):
    with pytest.raises(DataError) as error:
        parse_record({"question": "a", "answer": "b", key: LOST[key], **more}, 3)
    reason = f"field '{key}': names an image and is not read; name it under the key 'image' or 'images'"
    assert str(error.value) == f"record 3, {reason}"


@pytest.mark.parametrize(
    "more",
    [
        {"image_id": ""},
        {"image_path": None},
        {"images": [], "file_name": ""},
        {"source": "dialogs.json"},
        {"url": "x.org"},
        {"note": "see fig1.jpg for more"},
        {"note": "x" * 2000 + ".jpg"},
        {"num_images": 0},
        {"image_quality": "good"},
    ],
)
def test_a_record_that_names_no_image_under_other_keys_is_a_text(more):
    assert parse_record({"question": "a", "answer": "see b.jpg", **more}, 0)["images"] == []


def test_other_keys_may_name_what_they_like_beside_an_image():
    record = {
        "image": "a.jpg",
        "file_name": "original.tif",
        "image_id": 7,
        "question": "What is in a.jpg?",
        "answer": "b",
    }
    assert parse_record(record, 0)["images"] == ["a.jpg"]


@pytest.mark.parametrize(
    "more",
    [
        {"mask": "a_mask.png"},
        {"followup": ["b.jpg"]},
        {"thumbnail": {"path": "small/b.jpeg"}},
        {"overlays": [{"mask": "x/y.tif", "of": "a lesion"}]},
    ],
)
def test_an_image_under_any_other_key_is_not_lost_beside_an_image(more):
    key = next(iter(more))
    with pytest.raises(DataError, match=f"field '{key}': names an image and is not read; name it under the key"):
        parse_record({"image": "a.jpg", "question": "a", "answer": "b", **more}, 0)


@pytest.mark.parametrize(
    "more",
    [
        {"path": "../elsewhere/A.jpg"},  # the same image
        {"url": "https://x.org/b.jpg", "source_image": "c.png"},  # where it comes from
        {"note": "compare b.jpg with c.jpg", "mask": None, "thumbnail": ""},
    ],
)
def test_keys_about_the_image_itself_may_name_it(more):
    assert parse_record({"image": "x/a.jpg", "question": "a", "answer": "b", **more}, 0)["images"] == ["x/a.jpg"]


@pytest.mark.parametrize(
    ("more", "field"),
    [
        ({"answer": "It is <image>."}, "answer"),
        ({"system": "<image>"}, "system"),
        ({"question": "![](b.jpg)"}, "question"),
    ],
)
def test_a_marker_in_the_wrong_text_is_reported_with_its_field(more, field):
    with pytest.raises(DataError, match=f"record 0, field '{field}': "):
        parse_record({"image": "a.jpg", "question": "a", "answer": "b", **more}, 0)


@pytest.mark.parametrize("key", ["image2", "image_1", "Image 3", "img-2", "image_path_2"])
def test_a_second_image_under_a_numbered_key_is_not_lost(key):
    with pytest.raises(DataError, match=f"field '{key}': names an image and is not read"):
        parse_record({"image": "a.jpg", key: "b", "question": "a", "answer": "b"}, 0)


@pytest.mark.parametrize("key", ["image", "images", "img", "image_path"])
def test_an_image_inside_a_turn_is_not_lost(key):
    turns = [
        {"role": "user", "content": "What?", key: ["a.jpg"]},
        {"role": "assistant", "content": "b", "image": None},
    ]
    with pytest.raises(DataError, match=rf"field 'messages\[0\]': an image under '{key}' is not read"):
        parse_record({"messages": turns, "image": "b.jpg"}, 0)


@pytest.mark.parametrize("key", ["image", "path", "url"])
def test_a_block_names_its_image_as_transformers_does(key):
    turns = [{"role": "user", "content": [{"type": "image", key: "a.jpg"}, {"type": "text", "text": "What?"}]}]
    sample = parse_record({"messages": [*turns, {"role": "assistant", "content": "b"}]}, 0)
    assert sample["images"] == ["a.jpg"] and sample["messages"][0]["content"] == "<image>What?"


def test_a_question_that_names_a_file_has_to_have_an_image():
    for text in ("What is on 0000.jpg?", "images/x.PNG\nWhat?", "'a.jpeg' or 'b.jpeg'"):
        with pytest.raises(DataError, match=r"the user's text names '.*', and the record has no image; name it under"):
            parse_record({"question": text, "answer": "b"}, 0)


MARKERS = [
    *("<img>0000.jpg</img>", "<IMG>x</IMG>", '<img src="x.jpg">', "<img/>", "![](x.jpg)", "![a mole](photos/x y.jpg)"),
    *(
        "<image_1>",
        "<image 2>",
        "<image1>",
        "<Image>",
        "<IMAGE>",
        "<image>x.jpg</image>",
        "<ImageHere>",
        "<IMG_CONTEXT>",
    ),
    *("<start_of_image>", "[IMG]", "[image]", "＜image＞", "&lt;image&gt;", "{image}", "{{image}}"),
]


@pytest.mark.parametrize("marker", MARKERS)
@pytest.mark.parametrize("image", [{}, {"image": "x.jpg"}])
def test_another_marker_of_an_image_is_refused(marker, image):
    with pytest.raises(DataError) as error:
        parse_record({**image, "question": f"{marker}\nWhat?", "answer": "b"}, 0)
    assert "the user's text contains '" in str(error.value) and "write <image> for its place" in str(error.value)
    with pytest.raises(DataError, match=r"assistant's text"):
        parse_record({**image, "question": "What?", "answer": f"b {marker}"}, 0)


@pytest.mark.parametrize("marker", ["<video>", "<AUDIO>"])
def test_a_place_of_a_film_or_a_sound_is_refused(marker):
    with pytest.raises(DataError, match=f"field 'question': the user's text contains '{marker}'; only images are"):
        parse_record({"image": "x.jpg", "question": f"{marker}What?", "answer": "b"}, 0)


@pytest.mark.parametrize(
    "text", ["a <b and c> d", "I![0](x)" + "y" * 400, "imaging <3 cm", "[image 1] (see)", "< image >"]
)
def test_what_only_looks_like_a_marker_is_kept(text):
    assert parse_record({"question": text.replace("![", "! ["), "answer": "b"}, 0)["messages"][0]["content"]


def test_a_folder_is_told_apart_from_a_missing_annotation_file(tmp_path):
    with pytest.raises(ValueError, match="is a folder, expected a JSON"):
        read_annotations(tmp_path)


def test_to_chat_splits_at_the_markers():
    messages = [{"role": "user", "content": "<image>a <image>"}, {"role": "assistant", "content": "b"}]
    assert to_chat(messages) == [
        {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "a"}, {"type": "image"}]},
        {"role": "assistant", "content": [{"type": "text", "text": "b"}]},
    ]


@pytest.mark.parametrize(
    "text", ["\u2800", "\u3164", "\u115f\u1160", "\u034f\ufe0f", "\u0301", " \u2800\u200b\n", "\U000e0100"]
)
def test_an_answer_that_shows_nothing_is_none(text):
    with pytest.raises(DataError, match="field 'answer': expected some text"):
        parse_record({"question": "a", "answer": text}, 0)
    assert parse_record({"question": "a", "answer": "b", "label": text}, 0)["label"] is None


@pytest.mark.parametrize("text", ["\u2801", "-", "\u00e9", "e\u0301", "\u4e0d", "\U0001f534\ufe0f"])
def test_an_answer_of_one_sign_is_kept(text):
    assert parse_record({"question": "a", "answer": text}, 0)["messages"][1]["content"] == text


@pytest.mark.parametrize(("key", "value"), [("weight", 0), ("weight", 0.5), ("loss", False), ("train", False)])
def test_an_answer_that_is_not_to_be_trained_on_is_not_trained_on_in_silence(key, value):
    chat = [*turns(), {"role": "user", "content": "Sure?"}, {"role": "assistant", "content": "Yes.", key: value}]
    with pytest.raises(DataError, match=rf"field 'messages\[3\]': {key} is {value}, and every answer is trained on"):
        parse_record({"image": "a.jpg", "messages": chat}, 0)


def test_an_answer_that_is_to_be_trained_on_may_say_so():
    chat = [{"role": "user", "content": "a", "loss": False}, {"role": "assistant", "content": "b", "weight": 1}]
    assert len(parse_record({"messages": [*chat[:1], {**chat[1], "loss": True, "train": None}]}, 0)["messages"]) == 2
