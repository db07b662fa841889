"""A conversation about photos: its turns, and the prompts that an adapter and its base model get."""

from dataclasses import dataclass, field

from data_prep.records import IMAGE_MARKER, SPECIAL_TOKEN, normalise_messages
from evaluation.questions import question_text
from webapp.labels import LabelRanking
from webapp.photos import Photo

ADAPTER, BASE = "adapter", "base"
MAX_PHOTOS = 16  # of a conversation; each stays in memory at the model's size


@dataclass
class Answer:
    """A model's answer so far, and `note`: why it is not complete."""

    text: str = ""
    note: str = ""


@dataclass
class Turn:
    """A question, and its answers by speaker.

    Attributes:
        question: as people read it.
        message: the question with a marker for each of its photos.
        photos: those that came with this question.
        answers: of `ADAPTER` and `BASE`.
        labels: how likely the adapter finds each label; `labels_note` is why there are none.
        reference: the data's own answer to an example.
    """

    question: str
    message: str
    photos: list[Photo]
    answers: dict[str, Answer] = field(default_factory=dict)
    labels: LabelRanking | None = None
    labels_note: str = ""
    reference: str | None = None


@dataclass
class Conversation:
    """Turns so far, the photos that wait for the next question, and the system turn, if there is one.

    `expected` is the data's answer to each question of an example.
    """

    system: str | None = None
    pending: list[Photo] = field(default_factory=list)
    turns: list[Turn] = field(default_factory=list)
    expected: dict[str, str] = field(default_factory=dict)

    def photos(self) -> list[Photo]:
        return [*(photo for turn in self.turns for photo in turn.photos), *self.pending]

    def add_photos(self, photos: list[Photo]) -> list[str]:
        """Add photos for the next question; return a line for each that is one too many."""
        free = max(0, MAX_PHOTOS - len(self.photos()))
        self.pending += photos[:free]
        return [f"{photo.name}: at most {MAX_PHOTOS} photos in a conversation" for photo in photos[free:]]

    def ask(self, question: str) -> Turn:
        """Add a turn with the photos that wait.

        Raises:
            ValueError: no photo yet, an empty question, special tokens in it, or markers for other photos.
        """
        if not self.photos():
            raise ValueError("add a photo first")
        asked = [{"role": "user", "content": question.strip()}, {"role": "assistant", "content": "?"}]
        message = normalise_messages(asked, self.pending, field="question", names=["question", "answer"])[0]
        turn = Turn("", message["content"], self.pending)
        self.turns, self.pending = [*self.turns, turn], []
        turn.question = question_text(self.example(ADAPTER)["messages"])
        turn.reference = self.expected.get(turn.question)
        return turn

    def drop_turn(self) -> None:
        """Take the last turn back; its photos wait again."""
        turn = self.turns.pop()
        self.pending = [*turn.photos, *self.pending]

    def example(self, speaker: str, *, turns: int | None = None) -> dict:
        """Return what `collate_prompts` takes: images and messages, the last one a question.

        Args:
            speaker: whose earlier answers are in the messages.
            turns: how many turns; all when None.
        """
        chosen = self.turns[:turns]
        messages = [{"role": "system", "content": self.system}] if self.system else []
        for turn in chosen:
            messages.append({"role": "user", "content": turn.message})
            if turn is not chosen[-1]:
                messages.append({"role": "assistant", "content": _plain(turn.answers.get(speaker, Answer()).text)})
        images = [photo.image for turn in chosen for photo in turn.photos]
        return {"id": "question", "images": images, "messages": messages}


def _plain(answer: str) -> str:
    """Return an answer without what would be a marker or a special token in the next prompt."""
    return SPECIAL_TOKEN.sub("", answer).replace(IMAGE_MARKER, "").strip()
