"""Names of images become paths inside the image folder."""

import unicodedata
from pathlib import Path


def is_link(name: str) -> bool:
    return "://" in name


def resolve_image(name: str, image_dir: Path) -> Path:
    """Return the absolute path of an image inside `image_dir`, a resolved path.

    Raises:
        ValueError: the name is an address, or the path is outside the folder.
    """
    quoted = repr(name if len(name) <= 100 else name[:100] + "...")
    if is_link(name) or name.startswith("data:"):
        raise ValueError(f"{quoted} is an address, expected a path inside the image folder")
    if "\0" in name:
        raise ValueError(f"{quoted} contains a NUL character")
    try:
        path = _stored_form(image_dir, name).resolve()
    except (RuntimeError, OSError) as error:  # links that lead to each other
        raise ValueError(f"{quoted} cannot be followed: {error.__class__.__name__}") from error
    if not path.is_relative_to(image_dir):
        raise ValueError(f"{quoted} is outside the image folder")
    return path


def _stored_form(folder: Path, name: str) -> Path:
    """Return the path of a name, each part in the Unicode form that is there: macOS stores decomposed letters."""
    path = folder / name
    if name.isascii() or path.exists():
        return path
    for part in Path(name).parts:
        forms = [part, *(unicodedata.normalize(form, part) for form in ("NFC", "NFD"))]
        folder = next((folder / form for form in forms if (folder / form).exists()), folder / part)
    return folder
