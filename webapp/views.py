"""The parts of the page as HTML. All texts are escaped by the templates; photos are inside the page, not files."""

from jinja2 import Environment, FileSystemLoader

from common.html import TEMPLATES, encode_image
from webapp.actions import mapped_turn
from webapp.conversation import ADAPTER, BASE
from webapp.occlusion import GRID
from webapp.sessions import Session

THUMBNAIL = 320  # px
SPEAKERS = {ADAPTER: "Adapter", BASE: "Base model alone"}
MAX_BARS = 5

_templates = Environment(
    loader=FileSystemLoader(TEMPLATES / "app"), autoescape=True, trim_blocks=True, lstrip_blocks=True
)
_templates.filters["encode"] = encode_image


def render_header(facts: dict) -> str:
    """Return the top of the page; `facts` are those of `describe_model`."""
    return _render("header", **facts)


def render_photos(session: Session) -> str:
    """Return the photos as the model sees them, those of earlier questions first."""
    conversation = session.conversation
    asked = len(conversation.photos()) - len(conversation.pending)
    return _render("photos", photos=conversation.photos(), asked=asked, side=THUMBNAIL)


def render_examples(samples: list[dict], side: int = 96) -> str:
    """Return a button for each example, with its first photo."""
    return _render("examples", samples=samples, side=side)


def render_questions(questions: list[str]) -> str:
    """Return a button for each suggested question."""
    return _render("questions", questions=questions)


def render_conversation(session: Session) -> str:
    """Return the questions, the answers of each model beside each other, and the likeliest labels."""
    turns, first = [], 1
    for turn in session.conversation.turns:
        numbers = range(first, first := first + len(turn.photos))
        turns.append({"turn": turn, "photos": numbers})
    return _render("conversation", turns=turns, speakers=SPEAKERS, bars=MAX_BARS, working=session.is_working)


def render_messages(session: Session, place: str) -> str:
    """Return the messages if they belong to this place, of `PLACES`."""
    return _render("messages", messages=session.messages if session.place == place else [])


def render_explanation() -> str:
    """Return what an occlusion map is."""
    return _render("explanation", grid=GRID)


def render_maps(session: Session) -> str:
    """Return the occlusion maps, or how far they are."""
    return _render("maps", maps=session.maps, progress=session.progress)


def map_choices(session: Session) -> tuple[list[tuple[str, int]], list[str]]:
    """Return the photos and labels that a map can be drawn of, the likeliest label first; none before an answer."""
    turn = mapped_turn(session.conversation)
    if turn is None:
        return [], []
    photos = [photo for asked in session.conversation.turns[: turn + 1] for photo in asked.photos]
    names = [(f"{number}: {photo.name}", number - 1) for number, photo in enumerate(photos, 1)]
    return names, [label for label, _ in session.conversation.turns[turn].labels.rows]


def _render(name: str, **values) -> str:
    return _templates.get_template(f"{name}.html").render(**values)
