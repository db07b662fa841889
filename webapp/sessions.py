"""What each open page has: its conversation and its map, in memory, until the page is closed."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from PIL import Image

from webapp.conversation import Conversation

PLACES = ("photos", "questions", "maps")  # parts of the page; each shows the messages of its own actions
BUSY = "the last question or map is not finished yet; stop it or wait"


@dataclass(frozen=True)
class LabelMapping:
    """The occlusion map of one label: the drawing, the label, and the map in words."""

    label: str
    image: Image.Image
    text: str


@dataclass
class Session:
    """One open page.

    Attributes:
        conversation: its photos and turns.
        stop: set to end what is computed for it.
        messages: lines to show about the last action, as why a file was refused.
        place: where on the page that action is, of `PLACES`.
        maps: the last maps.
        progress: what of a map is done, `(patches, of patches, seconds left)`.
    """

    conversation: Conversation
    stop: threading.Event = field(default_factory=threading.Event)
    messages: list[str] = field(default_factory=list)
    place: str = PLACES[0]
    maps: list[LabelMapping] = field(default_factory=list)
    progress: tuple[int, int, float] | None = None
    _work: threading.Lock = field(default_factory=threading.Lock)

    def report(self, place: str, messages: list[str]) -> None:
        """Replace the messages, and say to which of `PLACES` they belong."""
        self.place, self.messages = place, messages

    @contextmanager
    def working(self, place: str) -> Iterator[bool]:
        """Yield whether nothing else is computed for this page; if so, nothing else can be until the block ends.

        What is refused meanwhile has the message `BUSY`, until the block ends.
        """
        free = self._work.acquire(blocking=False)
        self.report(place, [] if free else [BUSY])
        try:
            if free:
                self.stop.clear()
            yield free
        finally:
            if free:
                self.messages = [message for message in self.messages if message != BUSY]
                self._work.release()

    @property
    def is_working(self) -> bool:
        return self._work.locked()


class Sessions:
    """The open pages, by the browser's key; a closed one is forgotten at once.

    Args:
        system: system turn of new conversations.
    """

    def __init__(self, system: str | None):
        self.system, self._open, self._lock = system, {}, threading.Lock()

    def __len__(self) -> int:
        return len(self._open)

    def get(self, key: str) -> Session:
        with self._lock:
            if key not in self._open:
                self._open[key] = Session(Conversation(self.system))
            return self._open[key]

    def close(self, key: str) -> None:
        """Forget a page, and end what is computed for it."""
        with self._lock:
            session = self._open.pop(key, None)
        if session is not None:
            session.stop.set()
