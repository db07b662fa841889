"""The parts of the page that need no model: photos, prompts, label bars, occlusion maps, sessions, HTML."""

import os
import signal

import gradio as gr
import numpy as np
import pytest
from PIL import Image

from collator import collate_prompts
from common.html import encode_image
from data_prep import load_splits
from data_prep.images import load_image
from data_prep.labels import build_label_map
from webapp import occlusion, views
from webapp.conversation import ADAPTER, BASE, MAX_PHOTOS, Answer, Conversation
from webapp.labels import (
    NOT_ASKED,
    NOT_EVALUATED,
    LabelRanking,
    LabelReader,
    judge_confidence,
    rank_labels,
    read_labels,
)
from webapp.photos import Photo, load_photo, load_photos
from webapp.server import serve
from webapp.sessions import BUSY, PLACES, LabelMapping, Session, Sessions

LEVEL = {"target": 0.9, "samples": 60, "confidence": 0.62, "accuracy": 0.95, "coverage": 0.8}
QUESTION = "What condition is shown?"


def photo(name="a.jpg", colour="red", size=(56, 56)):
    return Photo(name, Image.new("RGB", size, colour), (560, 560), 4)


@pytest.fixture
def reader():
    label_map = build_label_map(["melanoma", "nevus", "vitiligo"])
    wording = ({QUESTION: "This is {label}.", "": "{label}"}, {})
    asks = {QUESTION: True, "Is the skin light or dark?": False}
    return LabelReader(label_map, wording, asks, temperature=2.0, level=LEVEL, uncalibrated="")


# Photos


def test_a_photo_is_upright_at_the_models_size_with_its_tokens(processor, tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # stored on its side
    Image.new("RGB", (400, 200), "red").save(tmp_path / "a.jpg", exif=exif)
    found = load_photo(tmp_path / "a.jpg", "a.jpg", processor)
    assert found.original_size == (200, 400)
    assert found.image.size == (56, 140) and found.tokens == 10  # at most 112 x 112 px, tokens of 28 x 28 px
    prompt = {"id": 0, "images": [found.image], "messages": [{"role": "user", "content": "<image>?"}]}
    batch = collate_prompts(processor, [prompt])
    assert (batch["mm_token_type_ids"] == 1).sum() == found.tokens
    original = collate_prompts(processor, [{**prompt, "images": [tmp_path / "a.jpg"]}])
    assert (batch["pixel_values"] == original["pixel_values"]).all()  # the page shows, and asks about, the same pixels


def test_what_cannot_be_used_is_refused_in_the_words_of_load_image(processor, tmp_path):
    Image.new("RGB", (60, 40)).save(tmp_path / "good.png")
    (tmp_path / "text.jpg").write_text("not an image")
    (tmp_path / "empty.png").touch()
    names = ["text.jpg", "good.png", "empty.png", "gone.png"]
    photos, refused = load_photos([str(tmp_path / name) for name in names], processor)
    assert [found.name for found in photos] == ["good.png"]
    expected = []
    for name in ("text.jpg", "empty.png", "gone.png"):
        with pytest.raises((ValueError, OSError)) as error:
            load_image(tmp_path / name)
        expected.append(f"{name}: {error.value}")
    assert refused == expected


# Conversations


def test_the_prompt_is_that_of_the_data(processor, demo_splits):
    sample = next(row for row in demo_splits["train"] if len(row["messages"]) == 4)
    conversation = Conversation(pending=[load_photo(sample["images"][0], "x", processor)])
    first, answer, second = (message["content"] for message in sample["messages"][:3])
    turn = conversation.ask(first.removeprefix("<image>\n"))
    turn.answers = {ADAPTER: Answer(answer), BASE: Answer("another")}
    conversation.ask(second)
    ours, theirs = conversation.example(ADAPTER), {**sample, "messages": sample["messages"][:3]}
    batches = [collate_prompts(processor, [example]) for example in (ours, theirs)]
    assert batches[0]["input_ids"].tolist() == batches[1]["input_ids"].tolist()
    assert conversation.example(BASE)["messages"][1]["content"] == "another"
    assert conversation.example(ADAPTER, turns=1)["messages"] == ours["messages"][:1]


def test_photos_belong_to_the_question_they_came_with():
    conversation = Conversation("You look at skin.", pending=[photo("1"), photo("2")])
    conversation.ask("What has changed between <image> and <image>?")
    assert conversation.turns[0].question == "What has changed between [image 1] and [image 2]?"
    conversation.add_photos([photo("3")])
    conversation.ask("And now?")
    messages = conversation.example(ADAPTER)["messages"]
    assert [message["role"] for message in messages] == ["system", "user", "assistant", "user"]
    assert messages[-1]["content"] == "<image>And now?" and len(conversation.example(ADAPTER)["images"]) == 3
    assert conversation.pending == []
    conversation.drop_turn()
    assert [found.name for found in conversation.pending] == ["3"] and len(conversation.turns) == 1


@pytest.mark.parametrize(
    ("question", "reason"),
    [("", "expected some text"), ("a<|im_end|>", "special token <|im_end|>"), ("<image><image>?", "2 <image> marker")],
)
def test_a_question_that_cannot_be_asked_is_refused_and_changes_nothing(question, reason):
    conversation = Conversation(pending=[photo()])
    with pytest.raises(ValueError, match="question") as error:
        conversation.ask(question)
    assert reason in str(error.value)
    assert conversation.turns == [] and len(conversation.pending) == 1


def test_a_question_needs_a_photo_and_photos_have_a_limit():
    conversation = Conversation()
    with pytest.raises(ValueError, match="add a photo first"):
        conversation.ask("What?")
    refused = conversation.add_photos([photo(str(number)) for number in range(MAX_PHOTOS + 1)])
    assert refused == [f"{MAX_PHOTOS}: at most {MAX_PHOTOS} photos in a conversation"]
    assert len(conversation.pending) == MAX_PHOTOS


def test_an_answer_cannot_forge_turns_or_images_of_the_next_prompt():
    conversation = Conversation(pending=[photo()])
    conversation.ask("What?").answers = {ADAPTER: Answer("a<image>b<|im_end|>c")}
    conversation.ask("And?")
    assert conversation.example(ADAPTER)["messages"][1]["content"] == "abc"


# Labels


def test_bars_are_the_softmax_over_the_temperature():
    ranked = rank_labels(["a", "b", "c"], np.array([-1.0, -3.0, -2.0]), 2.0)
    weights = np.exp([-0.5, -1.0, -1.5])
    assert [label for label, _ in ranked] == ["a", "c", "b"]
    assert [value for _, value in ranked] == pytest.approx(weights / weights.sum())


def test_a_confidence_is_judged_by_the_level_of_the_evaluation():
    assert judge_confidence(0.7, LEVEL) == (
        "Confidence 70.0%: 95% of the evaluation's answers from 62.0% on were right (60 samples of the validation "
        "split). That holds for photos like those: any other picture, even noise, can have such a confidence too.",
        False,
    )
    text, abstain = judge_confidence(0.43, LEVEL)
    assert abstain and "its confidence of 43.0% is under 62.0%, the level" in text
    text, abstain = judge_confidence(0.99, {**LEVEL, "confidence": None})
    assert abstain and "no confidence at which 90% of the answers were right" in text
    assert judge_confidence(0.1, None) == ("", False)


def test_only_questions_of_the_evaluation_have_calibrated_labels(reader):
    asked = [{"role": "user", "content": f"<image>{QUESTION}"}]
    answers, reason = reader.candidates(QUESTION, asked)
    assert answers["nevus"] == "This is nevus." and reason == ""
    ranking = reader.rank(QUESTION, answers, np.array([0.0, -4.0, -4.0]))
    share = 1 / (1 + 2 * np.exp(-2))
    assert ranking.rows[0] == ("melanoma", pytest.approx(share)) and ranking.uncalibrated == ""
    assert not ranking.abstain and ranking.verdict.startswith(f"Confidence {share:.1%}")
    other = reader.rank("What?", answers, np.array([0.0, -4.0, -4.0]))
    assert other.rows[0][1] == pytest.approx(1 / (1 + 2 * np.exp(-4))) and other.uncalibrated == NOT_ASKED
    assert other.verdict == ""


def test_labels_are_not_ranked_where_the_prompt_gives_one_away(reader):
    def reason_for(question, *earlier):
        turns = [{"role": role, "content": text} for role, text in earlier]
        return reader.candidates(question, [*turns, {"role": "user", "content": question}])[1]

    assert "does not ask for the label" in reason_for("Is the skin light or dark?")
    assert "names a label already" in reason_for("Is this melanoma?")
    assert "names a label already" in reason_for("Sure?", ("user", "What?"), ("assistant", "This is nevus."))
    assert reason_for("Is it melanoma or nevus?") == ""
    assert reason_for(QUESTION, ("user", "Is the skin dark?"), ("assistant", "It is dark.")) == ""
    assert reason_for(QUESTION, ("system", "You know melanoma.")) == ""


def test_without_an_evaluation_the_wording_is_that_of_the_data(demo_data, tmp_path):
    splits = load_splits(str(demo_data))
    reader = read_labels(str(tmp_path), splits, "test")
    assert reader.uncalibrated == NOT_EVALUATED and reader.temperature is None
    asked = next(question for question, asks in reader.asks.items() if asks)
    assert reader.candidates(asked, [])[0]["vitiligo"].rstrip(".").endswith("vitiligo")
    assert read_labels(str(tmp_path), None, "test") is None


# Occlusion maps


def test_patches_cover_the_image_once():
    boxes = occlusion.patch_boxes(100, 50, 8)
    covered = np.zeros((50, 100), int)
    for left, top, right, bottom in boxes:
        covered[top:bottom, left:right] += 1
    assert len(boxes) == 64 and (covered == 1).all()
    assert boxes[0] == (0, 0, 12, 6) and boxes[-1] == (88, 44, 100, 50)


def test_each_example_has_another_patch_in_grey_and_the_first_none(processor):
    images = [Image.new("RGB", (56, 28), colour) for colour in ("red", "white")]
    grey = occlusion.grey_of(processor.image_processor)
    examples = list(occlusion.occluded_examples({"id": 0, "images": images, "messages": []}, 1, grey, grid=2))
    assert len(examples) == 5 and examples[0]["images"] == images
    for example, box in zip(examples[1:], occlusion.patch_boxes(56, 28, 2), strict=True):
        assert example["images"][0] is images[0]
        pixels = np.asarray(example["images"][1])
        inside = np.zeros((28, 56), bool)
        inside[box[1] : box[3], box[0] : box[2]] = True
        assert (pixels[inside] == grey).all() and (pixels[~inside] == 255).all()
    question = [{"role": "user", "content": "<image>?"}]
    blank = {"id": 0, "images": [Image.new("RGB", (28, 28), grey)], "messages": question}
    assert abs(collate_prompts(processor, [blank])["pixel_values"]).max() < 0.01  # half a level of 255


def test_drops_are_log_odds_so_that_certainty_hides_nothing():
    likelihoods = np.array([[0.999, 0.1], [0.99, 0.1], [0.999, 0.2]])
    drops = occlusion.drops_of(np.log(likelihoods).astype(np.float32))
    odds = likelihoods / (1 - likelihoods)
    assert drops == pytest.approx(np.log(odds[0] / odds[1:]).T, abs=1e-3)
    assert np.isfinite(occlusion.drops_of(np.zeros((3, 2), np.float32))).all()


def test_a_map_tints_by_sign_and_strength_and_frames_the_strongest():
    drops = np.array([2.0, -2.0, 0.0, 1.0])
    drawn = np.asarray(occlusion.draw_map(Image.new("RGB", (30, 30), "white"), drops, 2.0, side=100)).astype(int)
    orange, blue, plain, weak = (drawn[y, x] for y, x in ((25, 25), (25, 75), (75, 25), (75, 75)))
    assert orange[0] > orange[2] and blue[2] > blue[0] and plain.tolist() == [255, 255, 255]
    assert orange[2] < weak[2] < 255
    assert drawn[0, 0].tolist() == [255, 255, 255] and drawn[2, 2].tolist() == [0, 0, 0]  # frame in white and black
    assert occlusion.draw_map(Image.new("RGB", (40, 20)), drops, 2.0, side=100).size == (100, 50)
    assert occlusion.scale_of(np.array([[0.01, -0.02]])) == occlusion.MIN_SCALE
    assert occlusion.scale_of(np.array([[1.0, -3.0]])) == 3.0


def test_a_map_is_described_in_words():
    drops = np.array([np.log(3), 0.0, 0.0, 0.0])
    assert occlusion.describe_map("melanoma", drops) == (
        "Greying out the patch in row 1, column 1 lowers the odds of melanoma most: they are divided by 3.00, by 1.00 "
        "on average over the other 3 patches."
    )
    assert occlusion.describe_map("nevus", np.full(4, -1.0)).startswith("No single patch makes nevus less likely")


# Sessions and HTML


def test_a_closed_page_is_forgotten_and_its_work_ends():
    sessions = Sessions("system")
    first, second = sessions.get("a"), sessions.get("b")
    first.conversation.pending.append(photo())
    assert sessions.get("a") is first and second.conversation.photos() == []
    assert first.conversation.system == "system"
    sessions.close("a")
    assert first.stop.is_set() and len(sessions) == 1
    assert sessions.get("a").conversation.photos() == []


def test_a_page_computes_one_thing_at_a_time():
    session = Session(Conversation())
    with session.working("questions") as first:
        with session.working("maps") as second:
            assert (first, second) == (True, False)
        assert (session.messages, session.place) == ([BUSY], "maps")
        session.stop.set()
    assert session.messages == []
    with session.working("maps") as again:
        assert again and not session.stop.is_set()
    assert not session.is_working


def test_all_texts_are_escaped():
    bad = '<script>x()</script>"${1+1}'
    conversation = Conversation(pending=[photo(bad)])
    turn = conversation.ask(bad)
    turn.answers = {ADAPTER: Answer(bad, bad)}
    turn.labels = LabelRanking([(bad, 0.5)], {bad: bad}, bad, bad, True)
    turn.reference = bad
    session = Session(conversation, messages=[bad], maps=[LabelMapping(bad, photo().image, bad)])
    pages = [views.render_photos(session), views.render_conversation(session)]
    pages.append(views.render_messages(session, "photos"))
    pages += [views.render_maps(session), views.render_questions([bad])]
    pages.append(views.render_header({"adapter": bad, "base": bad, "loading": bad, "measured": bad}))
    for page in pages:
        assert "<script" not in page and "&lt;script&gt;" in page and '"$' not in page


def test_the_page_shows_sizes_tokens_and_the_pixels_themselves():
    session = Session(Conversation(pending=[photo("a.jpg")]))
    page = views.render_photos(session)
    assert "56 x 56 px, from 560 x 560" in page and "4 tokens" in page and 'data-number="0"' in page
    assert encode_image(session.conversation.pending[0].image, views.THUMBNAIL) in page
    session.conversation.ask("What?")
    assert "in the conversation" in views.render_photos(session) and "data-number" not in views.render_photos(session)


def test_a_map_can_be_drawn_of_photos_up_to_the_last_ranked_turn():
    session = Session(Conversation(pending=[photo("a"), photo("b")]))
    assert views.map_choices(session) == ([], [])
    turn = session.conversation.ask("What?")
    turn.labels = LabelRanking([("x", 0.6), ("y", 0.4)], {}, "")
    session.conversation.add_photos([photo("c")])
    session.conversation.ask("And?")
    assert views.map_choices(session) == ([("1: a", 0), ("2: b", 1)], ["x", "y"])


def test_a_message_is_shown_where_its_action_is_and_nowhere_else():
    session = Session(Conversation())
    session.report("maps", ["stopped"])
    assert [place for place in PLACES if "stopped" in views.render_messages(session, place)] == ["maps"]


@pytest.mark.parametrize("others", ["", "intranet.clinic"])
def test_a_proxy_of_the_environment_is_not_asked_for_the_page(monkeypatch, others):
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")  # nothing listens there
    monkeypatch.setenv("no_proxy", others)
    monkeypatch.setenv("NO_PROXY", others)
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    addresses = []

    def end(address):
        addresses.append(address)
        os.kill(os.getpid(), signal.SIGTERM)

    with gr.Blocks() as page:
        gr.Textbox()
    try:
        serve(page, port=None, share=False, ready=end)
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
    assert len(addresses) == 1 and addresses[0].startswith("http://127.0.0.1:")
    assert os.environ["no_proxy"] == ",".join(filter(None, (others, "127.0.0.1", "localhost")))
