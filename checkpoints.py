"""Which checkpoint a run goes on from."""

import json
import re
from pathlib import Path

from safetensors import SafetensorError, safe_open

ADAPTER = "adapter_model.safetensors"
REQUIRED = ("adapter_config.json", ADAPTER, "optimizer.pt", "scheduler.pt", "trainer_state.json")
NAME = re.compile(r"checkpoint-(\d+)")


def list_checkpoints(output_dir: Path) -> list[Path]:
    """Return the checkpoints in `output_dir`, the newest step first."""
    found = [path for path in output_dir.glob("checkpoint-*") if path.is_dir() and NAME.fullmatch(path.name)]
    return sorted(found, key=lambda path: int(NAME.fullmatch(path.name).group(1)), reverse=True)


def check_checkpoint(path: Path) -> None:
    """Raise ValueError when training cannot go on from `path`; the message names the file."""
    if not path.is_dir():
        raise ValueError(f"checkpoint {path}: no such folder")
    for name in REQUIRED:
        if not (path / name).is_file() or (path / name).stat().st_size == 0:
            raise ValueError(f"checkpoint {path}: {name} is missing or empty")
    try:
        state = json.loads((path / "trainer_state.json").read_text(encoding="utf-8"))
        state["global_step"]
        with safe_open(path / ADAPTER, framework="pt") as tensors:
            tensors.keys()
    except (ValueError, KeyError, TypeError, SafetensorError) as error:
        raise ValueError(f"checkpoint {path}: unreadable: {error}") from error


def check_same_lora(path: Path, config: dict) -> None:
    """Raise ValueError when the checkpoint's adapter has another shape or scale than the one about to train."""
    saved = json.loads((path / "adapter_config.json").read_text(encoding="utf-8"))
    for key in ("r", "lora_alpha", "target_modules", "use_rslora", "use_dora"):
        if saved.get(key) != config[key]:
            rule = "keep the LoRA settings to go on, or choose another output_dir"
            raise ValueError(f"checkpoint {path}: {key} was {saved.get(key)!r} and is {config[key]!r} now; {rule}")


def choose_checkpoint(output_dir: Path, resume: str | None) -> tuple[Path | None, list[str]]:
    """Return the checkpoint to go on from, and a line for each one that was passed over.

    Args:
        output_dir: the run's folder.
        resume: "auto" takes the newest usable checkpoint, or none; a path takes that one; None starts afresh.

    Raises:
        ValueError: the named checkpoint is unreadable, or a fresh start would write into an earlier run.
    """
    found = list_checkpoints(output_dir)
    if resume is None and found:
        rule = "choose another output_dir, or go on with --resume_from_checkpoint auto"
        raise ValueError(f"output_dir: {output_dir} holds a run already ({found[0].name}); {rule}")
    if resume in (None, "auto") and not found and (output_dir / ADAPTER).exists():
        raise ValueError(f"output_dir: {output_dir} holds a finished adapter and no checkpoint; choose another one")
    if resume is None:
        return None, []
    if resume != "auto":
        check_checkpoint(Path(resume))
        return Path(resume), []
    passed_over = []
    for path in found:
        try:
            check_checkpoint(path)
            return path, passed_over
        except ValueError as error:
            passed_over.append(str(error))
    return None, passed_over
