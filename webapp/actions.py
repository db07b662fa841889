"""What the page can do: each action changes a session; those that take time yield whenever there is news."""

import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from data_prep.records import IMAGE_MARKER
from evaluation.questions import question_text
from webapp import occlusion
from webapp.conversation import ADAPTER, BASE, Answer, Conversation, Turn
from webapp.engine import Engine
from webapp.labels import LabelReader
from webapp.photos import load_photo, load_photos
from webapp.sessions import LabelMapping, Session


def add_photos(session: Session, paths: list[str], engine: Engine) -> None:
    """Read uploaded files, delete them, and keep the photos for the next question."""
    try:
        photos, refused = load_photos(paths, engine.processor)
    finally:
        for path in paths:
            Path(path).unlink(missing_ok=True)
    session.report("photos", refused + session.conversation.add_photos(photos))


def remove_photo(session: Session, number: int) -> None:
    """Remove a photo that waits for a question."""
    session.messages = []
    if 0 <= number < len(session.conversation.pending):
        del session.conversation.pending[number]


def start_again(session: Session, system: str | None) -> None:
    """Forget the photos, the conversation and the maps."""
    session.stop.set()
    session.conversation, session.maps, session.messages, session.progress = Conversation(system), [], [], None


def take_example(session: Session, sample: dict, engine: Engine) -> str:
    """Start again with the photos of a sample's first question, and return that question."""
    messages = sample["messages"]
    start_again(session, messages[0]["content"] if messages[0]["role"] == "system" else None)
    session.conversation.expected = {
        question_text(messages[:position]): message["content"]
        for position, message in enumerate(messages)
        if message["role"] == "assistant"
    }
    content = next(message["content"] for message in messages if message["role"] == "user")
    for number, image in enumerate(sample["images"][: content.count(IMAGE_MARKER)], 1):
        session.conversation.pending.append(load_photo(image, f"example photo {number}", engine.processor))
    texts = [text.strip() for text in content.split(IMAGE_MARKER) if text.strip()]
    return texts[0] if len(texts) == 1 else content.strip()


def ask(session: Session, question: str, engine: Engine, reader: LabelReader | None, *, base: bool) -> Iterator[None]:
    """Ask the adapter, rank the labels, and ask the base model."""
    with session.working("questions") as free:
        if not free:
            return
        conversation = session.conversation
        try:
            turn = conversation.ask(question)
        except ValueError as error:
            session.report("questions", [str(error)])
            return
        try:
            yield from _answer(session, turn, engine, reader, base=base)
        except ValueError as error:
            session.report("questions", [str(error)])
            if not turn.answers[ADAPTER].text:
                conversation.drop_turn()


def _answer(session: Session, turn: Turn, engine: Engine, reader: LabelReader | None, *, base: bool) -> Iterator[None]:
    conversation, speakers = session.conversation, (ADAPTER, BASE) if base else (ADAPTER,)
    turn.answers = {speaker: Answer() for speaker in speakers}
    yield
    for speaker in speakers:
        example = conversation.example(speaker)
        for text, note in engine.stream(example, session.stop, adapter=speaker == ADAPTER):
            turn.answers[speaker] = Answer(text, note)
            yield
        if speaker == ADAPTER and reader is not None and not session.stop.is_set():
            answers, turn.labels_note = reader.candidates(turn.question, example["messages"])
            if answers:
                turn.labels = reader.rank(turn.question, answers, engine.score([example], list(answers.values()))[0])
            yield


def mapped_turn(conversation: Conversation) -> int | None:
    """Return the number of the last turn whose labels are ranked; None without one."""
    ranked = [number for number, turn in enumerate(conversation.turns) if turn.labels is not None]
    return ranked[-1] if ranked else None


def draw_maps(session: Session, photo: int, labels: list[str], engine: Engine) -> Iterator[None]:
    """Draw the occlusion map of each label over a photo of the conversation.

    Args:
        session: whose last turn with ranked labels is taken.
        photo: number of the photo in the conversation.
        labels: two of the ranked ones.
        engine: the model.
    """
    with session.working("maps") as free:
        if not free:
            return
        turn = mapped_turn(session.conversation)
        if turn is None:
            session.report("maps", ["ask a question first whose answer names a label"])
            return
        try:
            yield from _draw_maps(session, turn, photo, labels, engine)
        except ValueError as error:
            session.report("maps", [str(error)])
        finally:
            session.progress = None


def _draw_maps(session: Session, turn: int, photo: int, labels: list[str], engine: Engine) -> Iterator[None]:
    example = session.conversation.example(ADAPTER, turns=turn + 1)
    answers = session.conversation.turns[turn].labels.answers
    if not 0 <= photo < len(example["images"]) or not set(labels) <= answers.keys():
        raise ValueError("choose a photo of the conversation and two of its labels")
    grey, total = occlusion.grey_of(engine.processor.image_processor), occlusion.GRID**2 + 1
    examples = occlusion.occluded_examples(example, photo, grey)
    session.maps, session.progress, scores, start = [], (0, total, 0.0), [], time.monotonic()
    yield
    for batch in engine.score_all(examples, [answers[label] for label in labels]):
        if session.stop.is_set():
            session.report("maps", ["stopped"])
            return
        scores.append(batch)
        done = sum(map(len, scores))
        session.progress = (done, total, (time.monotonic() - start) / done * (total - done))
        yield
    drops = occlusion.drops_of(np.concatenate(scores))
    scale = occlusion.scale_of(drops)
    session.maps = [
        LabelMapping(
            label,
            occlusion.draw_map(example["images"][photo], row, scale),
            occlusion.describe_map(label, row),
        )
        for label, row in zip(labels, drops, strict=True)
    ]
