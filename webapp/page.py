"""The page itself: its parts, and which action each of them starts."""

from collections.abc import Iterator
from dataclasses import dataclass

import gradio as gr

from webapp import actions, views
from webapp.conversation import Conversation
from webapp.engine import Engine
from webapp.labels import LabelReader
from webapp.sessions import Session, Sessions

NOTICE = '<p class="notice" role="note"><b>Not a medical device.</b> For research only, never for diagnosis.</p>'
# A click on one of a list's buttons is the event `select`, with the button's number.
CHOOSE = """element.addEventListener('click', event => {
  const button = event.target.closest('button[data-number]');
  if (button) trigger('select', {number: Number(button.dataset.number)});
});"""
AT_ONCE = 8  # questions that wait for the model in threads of their own; others wait in Gradio's queue
QUEUE_SIZE = 64


@dataclass
class App:
    """What the page shows and uses.

    Attributes:
        engine: the model.
        reader: how labels are read; None when there are none.
        facts: of the header, see `describe_adapter`.
        questions: suggestions, the first of them in the field at the start.
        examples: samples of the data to choose from.
        base: whether the base model answers too.
        sessions: the open pages.
    """

    engine: Engine
    reader: LabelReader | None
    facts: dict
    questions: list[str]
    examples: list[dict]
    base: bool
    sessions: Sessions


class Page:
    """The parts of the page, and what happens when they are used."""

    def __init__(self, app: App):
        self.app, empty = app, Session(Conversation())
        self.messages = {}
        with gr.Row(elem_id="columns"):
            with gr.Column(scale=2, min_width=320):
                self._build_photos(empty)
            with gr.Column(scale=3, min_width=320):
                self._build_questions(empty)
                self._build_maps(empty)
        self._connect()

    def _build_photos(self, empty: Session) -> None:
        _html("<h2>Photos</h2>")
        self.upload = gr.File(label="Photos", show_label=False, file_count="multiple", height=130, elem_id="upload")
        self.messages["photos"] = _messages(empty, "photos")
        self.photos = _html(views.render_photos(empty), js_on_load=CHOOSE, elem_id="photos")
        self.new = gr.Button("New case", size="md", elem_id="new")
        self.examples = None
        if self.app.examples:
            _html("<h2>Examples from the data</h2>")
            self.examples = _html(views.render_examples(self.app.examples), js_on_load=CHOOSE, elem_id="examples")

    def _build_questions(self, empty: Session) -> None:
        _html("<h2>Questions</h2>")
        self.conversation = _html(views.render_conversation(empty), elem_id="conversation")
        first = self.app.questions[0] if self.app.questions else ""
        self.question = gr.Textbox(first, label="Your question", lines=1, max_lines=6, elem_id="question")
        self.suggestions = _html(views.render_questions(self.app.questions), js_on_load=CHOOSE, elem_id="suggestions")
        self.messages["questions"] = _messages(empty, "questions")
        with gr.Row():
            self.ask = gr.Button("Ask", variant="primary", size="md", scale=3, min_width=120, elem_id="ask")
            self.stop = gr.Button("Stop", size="md", scale=1, min_width=80, elem_id="stop")

    def _build_maps(self, empty: Session) -> None:
        with gr.Column(visible=self.app.reader is not None):
            _html("<h2>Where it looks</h2>" + views.render_explanation())
            with gr.Row():
                self.photo = gr.Dropdown([], label="Photo", elem_id="map-photo")
                self.label = gr.Dropdown([], label="Label", elem_id="map-label")
                self.other = gr.Dropdown([], label="A wrong label beside it", elem_id="map-other")
            self.messages["maps"] = _messages(empty, "maps")
            self.draw = gr.Button("Draw the maps", size="md", elem_id="draw")
            self.maps = _html(views.render_maps(empty), elem_id="maps")

    def _connect(self) -> None:
        messages = list(self.messages.values())
        photos = [self.photos, *messages]
        choices = [self.photo, self.label, self.other]
        everything = [*photos, self.conversation, self.question, *choices, self.maps]
        on = {"api_visibility": "private", "show_progress": "hidden"}
        shared = {**on, "concurrency_limit": AT_ONCE}
        self.upload.upload(self._add_photos, self.upload, [self.upload, *photos], **shared)
        self.photos.select(self._remove_photo, None, photos, **on)
        self.new.click(self._start_again, None, everything, **on)
        if self.examples is not None:
            self.examples.select(self._take_example, None, everything, **on)
        self.suggestions.select(self._suggest, None, self.question, **on)
        gr.on(
            [self.ask.click, self.question.submit], self._ask, self.question, everything,
            trigger_mode="multiple", **shared,
        )  # fmt: skip
        self.stop.click(self._stop, None, None, queue=False, **on)
        self.draw.click(self._draw, choices, [self.maps, *messages], trigger_mode="multiple", **shared)

    def _add_photos(self, paths: list[str] | None, request: gr.Request) -> dict:
        session = self._session(request)
        actions.add_photos(session, paths or [], self.app.engine)
        return {self.upload: None, **self._photos(session)}

    def _remove_photo(self, event: gr.EventData, request: gr.Request) -> dict:
        session = self._session(request)
        actions.remove_photo(session, event.number)
        return self._photos(session)

    def _start_again(self, request: gr.Request) -> dict:
        session = self._session(request)
        actions.start_again(session, self.app.sessions.system)
        return self._everything(session)

    def _take_example(self, event: gr.EventData, request: gr.Request) -> dict:
        session = self._session(request)
        question = actions.take_example(session, self.app.examples[event.number], self.app.engine)
        return {**self._everything(session), self.question: question}

    def _suggest(self, event: gr.EventData) -> str:
        return self.app.questions[event.number]

    def _ask(self, question: str, request: gr.Request) -> Iterator[dict]:
        app, session = self.app, self._session(request)
        before = turns = len(session.conversation.turns)
        for _ in actions.ask(session, question, app.engine, app.reader, base=app.base):
            shown = {self.conversation: views.render_conversation(session)}
            if len(session.conversation.turns) > turns:  # it was accepted
                turns = len(session.conversation.turns)
                shown |= {**self._photos(session), self.question: ""}
            yield shown
        refused = session.messages and len(session.conversation.turns) == before
        yield {**self._everything(session), **({self.question: question} if refused else {})}

    def _stop(self, request: gr.Request) -> None:
        self._session(request).stop.set()

    def _draw(self, photo: int | None, label: str, other: str, request: gr.Request) -> Iterator[dict]:
        session = self._session(request)
        for _ in actions.draw_maps(session, photo or 0, [label, other], self.app.engine):
            yield self._maps(session)
        yield self._maps(session)

    def _session(self, request: gr.Request) -> Session:
        return self.app.sessions.get(request.session_hash)

    def _photos(self, session: Session) -> dict:
        return {self.photos: views.render_photos(session), **self._messages(session)}

    def _maps(self, session: Session) -> dict:
        return {self.maps: views.render_maps(session), **self._messages(session)}

    def _messages(self, session: Session) -> dict:
        return {part: views.render_messages(session, place) for place, part in self.messages.items()}

    def _everything(self, session: Session) -> dict:
        photos, labels = views.map_choices(session)
        return {
            **self._photos(session),
            **self._maps(session),
            self.conversation: views.render_conversation(session),
            self.photo: gr.Dropdown(photos, value=photos[-1][1] if photos else None),
            self.label: gr.Dropdown(labels, value=labels[0] if labels else None),
            self.other: gr.Dropdown(labels, value=labels[1] if labels else None),
        }


def build_page(app: App) -> gr.Blocks:
    """Return the page. Its uploads go to the folder of `private_uploads`."""

    def close(request: gr.Request) -> None:
        app.sessions.close(request.session_hash)

    with gr.Blocks(title=f"Ask {app.facts['adapter']}", analytics_enabled=False, delete_cache=(60, 600)) as blocks:
        _html(views.render_header(app.facts))
        Page(app)
        _html(NOTICE, elem_id="notice")
        blocks.unload(close)
    return blocks.queue(max_size=QUEUE_SIZE)


def _messages(session: Session, place: str) -> gr.HTML:
    return _html(views.render_messages(session, place), elem_id=f"messages-{place}", elem_classes="told")


def _html(value: str, **options) -> gr.HTML:
    return gr.HTML(value, apply_default_css=False, **options)
