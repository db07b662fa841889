"""A client of servers with OpenAI's chat interface: vLLM, `transformers serve`, llama.cpp."""

import base64
import io
import json
from collections.abc import Callable
from http.client import HTTPException
from threading import Lock
from urllib.error import HTTPError, URLError
from urllib.parse import urlsplit
from urllib.request import ProxyHandler, Request, build_opener

from PIL import Image

from data_prep.records import to_chat

TIMEOUT = 900  # s for one answer, waiting for its turn included
CHAT = "/v1/chat/completions"


class ChatClient:
    """Sends requests to one server, directly: images of patients go through no proxy.

    Args:
        url: the server's address, with or without "/v1".
        lost: returns what is known of a server that no longer answers.
    """

    def __init__(self, url: str, lost: Callable[[], str] | None = None):
        self.url = url.rstrip("/").removesuffix("/v1")
        self.opener = build_opener(ProxyHandler({}))
        self.lost, self.lock = lost or (lambda: f"no answer from {self.url}"), Lock()
        self.end: str | None = None  # what `lost` has returned, once for all requests

    def is_ready(self) -> bool:
        """Return whether the server says that it can answer."""
        try:
            with self.opener.open(self.url + "/health", timeout=10):
                return True
        except (OSError, HTTPException):
            return False

    def models(self) -> list[str]:
        """Return the names of the models that the server lists."""
        return [model["id"] for model in self.request("/v1/models")["data"]]

    def request(self, path: str, body: dict | None = None) -> dict:
        """Return the server's reply, sent by GET, or with a `body` by POST.

        Raises:
            ValueError: the server refuses the request, or does not answer.
        """
        data = None if body is None else json.dumps(body).encode()
        request = Request(self.url + path, data, {"Content-Type": "application/json"})
        try:
            with self.opener.open(request, timeout=TIMEOUT) as reply:
                return json.load(reply)
        except HTTPError as error:
            raise ValueError(f"{self.url}: {error.code}: {_reason(error)}") from error
        except (URLError, OSError, HTTPException) as error:
            raise ValueError(f"{self._describe_end()}: {getattr(error, 'reason', error)}") from error
        except json.JSONDecodeError as error:
            raise ValueError(f"{self.url}{path}: the reply is not JSON") from error

    def _describe_end(self) -> str:
        with self.lock:
            self.end = self.end or self.lost()
        return self.end


def _reason(error: HTTPError) -> str:
    """Return the server's own words about a refused request, in one line."""
    text = error.read().decode(errors="replace")
    try:
        reply = json.loads(text)
        text = reply.get("error", reply).get("message", text)
    except (ValueError, AttributeError):
        pass
    return " ".join(str(text).split())[:300]


def check_url(url: str, option: str = "--server") -> str:
    """Return the address of a server, checked.

    Raises:
        ValueError: not http or https, or with a user or password: keys are not sent.
    """
    parts = urlsplit(url)
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise ValueError(f"{option}: expected an address like http://127.0.0.1:8000, found {url!r}")
    if parts.username or parts.password or parts.query:
        raise ValueError(f"{option}: the address holds a user, password or key; this client sends none")
    return url


def chat_messages(messages: list[dict], images: list[Image.Image]) -> list[dict]:
    """Return a sample's messages with its images as PNG data URIs, where their markers stand."""
    uris = iter([data_uri(image) for image in images])
    return [
        {"role": message["role"], "content": [_part(block, uris) for block in message["content"]]}
        for message in to_chat(messages)
    ]


def _part(block: dict, uris) -> dict:
    return {"type": "image_url", "image_url": {"url": next(uris)}} if block["type"] == "image" else block


def data_uri(image: Image.Image) -> str:
    """Return an image's pixels as a data URI of a PNG, which loses nothing."""
    content = io.BytesIO()
    image.save(content, "PNG", compress_level=1)  # loopback is fast; level 6 would take four times as long
    return f"data:image/png;base64,{base64.b64encode(content.getvalue()).decode()}"
