"""Parts of the HTML pages: templates, embedded images, shortened text."""

import base64
import io
from pathlib import Path

from matplotlib.figure import Figure
from PIL import Image as PILImage

from common.plots import fit_fonts

TEMPLATES = Path(__file__).parent.parent / "templates"


def encode_figure(figure: Figure, alt: str) -> dict:
    """Return a figure as a dict for the page's template: `png` in base64, `alt`, and the `legend` of `fit_fonts`."""
    legend = "; ".join(f"{number} {text}" for number, text in fit_fonts(figure).items())
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    return {"png": base64.b64encode(buffer.getvalue()).decode(), "alt": alt, "legend": legend}


def shorten(text: str, length: int = 28) -> str:
    return text if len(text) <= length else text[: length - 1] + "…"


def encode_image(image: PILImage.Image, side: int) -> str:
    """Return a picture of at most `side` px a side, without metadata, in base64."""
    image = image.copy()
    image.thumbnail((side, side))
    buffer = io.BytesIO()
    PILImage.frombytes("RGB", image.size, image.tobytes()).save(buffer, "JPEG", quality=82)
    return base64.b64encode(buffer.getvalue()).decode()
