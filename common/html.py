"""Parts of the HTML pages: templates, embedded images, shortened text."""

import base64
import hashlib
import io
from collections.abc import Callable
from pathlib import Path

from jinja2 import Environment, FileSystemLoader
from markupsafe import Markup
from matplotlib.figure import Figure
from PIL import Image as PILImage

from common.plots import fit_fonts

TEMPLATES = Path(__file__).parent.parent / "templates"


def render_page(template: str, filters: dict[str, Callable] | None = None, **values) -> str:
    """Return a page that is complete in itself: style, script and images are inside.

    Its policy lets a browser load nothing and run this script alone, whatever a label or an answer contains.

    Args:
        template: file in `TEMPLATES` that extends page.html.
        filters: of the template, by name.
        values: of the template.
    """
    environment = Environment(loader=FileSystemLoader(TEMPLATES), autoescape=True)
    environment.filters |= filters or {}
    style, script = ((TEMPLATES / name).read_text(encoding="utf-8") for name in ("page.css", "page.js"))
    policy = f"default-src 'none'; img-src data:; style-src {_source(style)}; script-src {_source(script)}"
    policy += "; base-uri 'none'; form-action 'none'"
    parts = {"style": Markup(style), "script": Markup(script), "policy": policy}
    return environment.get_template(template).render(**parts, **values)


def _source(content: str) -> str:
    """Return how a Content-Security-Policy names a style or script by its content."""
    return f"'sha256-{base64.b64encode(hashlib.sha256(content.encode()).digest()).decode()}'"


def encode_figure(figure: Figure, alt: str, note: str = "") -> dict:
    """Return a figure as a dict for parts.html: `png` in base64, `alt`, `note`, and the `legend` of `fit_fonts`.

    Args:
        figure: to draw.
        alt: what it shows, for those who do not see it.
        note: how to read it, in a sentence.
    """
    legend = "; ".join(f"{number} {text}" for number, text in fit_fonts(figure).items())
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    return {"png": base64.b64encode(buffer.getvalue()).decode(), "alt": alt, "note": note, "legend": legend}


def shorten(text: str, length: int = 28) -> str:
    return text if len(text) <= length else text[: length - 1] + "…"


def encode_image(image: PILImage.Image, side: int) -> str:
    """Return a picture of at most `side` px a side, without metadata, in base64."""
    image = image.copy()
    image.thumbnail((side, side))
    buffer = io.BytesIO()
    PILImage.frombytes("RGB", image.size, image.tobytes()).save(buffer, "JPEG", quality=82)
    return base64.b64encode(buffer.getvalue()).decode()
