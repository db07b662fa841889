"""Serves the page to this machine alone."""

import os
import signal
import sys
import threading
from collections.abc import Callable

import gradio as gr
from fastapi.middleware import Middleware

from common.html import TEMPLATES

MAX_UPLOAD = 400_000_000  # bytes; the largest picture that is accepted has 300 MB when it is not compressed
# The browser asks this server alone, whatever Gradio's page or an answer of the model would have it load.
POLICY = "default-src 'self' data: blob: 'unsafe-inline' 'unsafe-eval'; form-action 'self'; frame-ancestors 'self'"
HEADERS = [(b"content-security-policy", POLICY.encode()), (b"referrer-policy", b"no-referrer")]
HEADERS += [(b"x-dns-prefetch-control", b"off")]
PRIMARY, PRIMARY_HOVER = "#0b5c8a", "#08476b"  # white on them has a contrast of 7 and more
SANS = ["system-ui", "-apple-system", "Segoe UI", "Roboto", "sans-serif"]


class AddHeaders:
    """Adds `HEADERS` to each response (ASGI)."""

    def __init__(self, app):
        self.app = app

    async def __call__(self, scope, receive, send) -> None:
        async def send_with_headers(message) -> None:
            if message["type"] == "http.response.start":
                message["headers"] = [*message["headers"], *HEADERS]
            await send(message)

        await self.app(scope, receive, send_with_headers)


def serve(page: gr.Blocks, *, port: int | None, share: bool, ready: Callable[[str], None]) -> None:
    """Serve a page until Ctrl-C or SIGTERM.

    Args:
        page: see `build_page`.
        port: to listen on; the first free one from 7860 on when None.
        share: whether to open a public address, which leads through Gradio's servers.
        ready: called with the address.

    Raises:
        ValueError: the port is not free.
    """
    bypass_proxy()
    ended = threading.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: ended.set())
    try:
        _, local, public = page.launch(
            server_name="127.0.0.1", server_port=port, share=share, quiet=True, prevent_thread_lock=True,
            footer_links=[], run_history=False, ssr_mode=False, pwa=False, mcp_server=False, enable_monitoring=False,
            max_file_size=MAX_UPLOAD, theme=make_theme(), css_paths=TEMPLATES / "app" / "page.css",
            app_kwargs={"middleware": [Middleware(AddHeaders)], "docs_url": None, "redoc_url": None},
        )  # fmt: skip
    except OSError as error:
        page.close(verbose=False)
        place = f"{port} is not" if port else "none from 7860 on is"
        raise ValueError(f"--port: {place} free to listen on; name another, or end what listens there") from error
    try:
        ready(public or local)
        while not ended.wait(1):
            pass
        print("closed", file=sys.stderr)
    finally:
        page.close(verbose=False)


def bypass_proxy() -> None:
    """Have this machine asked without the proxy of the environment: Gradio asks its own page whether it is up."""
    excepted = os.environ.get("no_proxy") or os.environ.get("NO_PROXY") or ""
    if "127.0.0.1" not in excepted.split(","):
        excepted = ",".join(filter(None, (excepted, "127.0.0.1", "localhost")))
    os.environ["no_proxy"] = os.environ["NO_PROXY"] = excepted


def make_theme() -> gr.themes.Base:
    """Return Gradio's plain theme in fonts of the system; those of its own would be loaded from elsewhere."""
    theme = gr.themes.Base(neutral_hue="slate", radius_size="lg", text_size="lg", font=SANS, font_mono=["monospace"])
    main = {"button_primary_background_fill": PRIMARY, "button_primary_background_fill_hover": PRIMARY_HOVER}
    main |= {f"{name}_dark": colour for name, colour in main.items()}
    return theme.set(**main, button_primary_text_color="white", button_medium_text_size="16px")
