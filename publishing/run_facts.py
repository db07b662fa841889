"""Facts of a run in `facts.json`: base model, data, settings and progress; no path and no file name."""

import json
import re
from collections import Counter
from collections.abc import Mapping
from contextlib import suppress
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path

from huggingface_hub import ModelCard, hf_hub_download

from common.files import (
    ADAPTER_WEIGHTS,
    EVALUATION_METRICS,
    EVALUATION_SETTINGS,
    TRAINING_FACTS,
    atomic_write,
    digest_of_file,
    read_json,
)
from data_prep import fingerprint

HUB_ID = re.compile(r"[\w.-]+(/[\w.-]+)?")
LIBRARIES = ("torch", "transformers", "trl", "peft", "bitsandbytes", "accelerate", "datasets")
NO_LABEL, UNKNOWN = "(no label)", "unknown"
SECTIONS = ("base", "data", "settings", "parameters", "versions", "training")  # of the facts, each an object


def describe_data(splits: Mapping, dataset_path: str) -> dict:
    """Return the data's fingerprint and counts, by split and label.

    Args:
        splits: `Dataset`s by name, "train" among them.
        dataset_path: setting of the recipe; left out unless it is a Hub id, as a local path may be private.
    """
    return {
        "dataset": dataset_path if on_hub(dataset_path) else None,
        "fingerprint": fingerprint(splits["train"]),
        "splits": {name: _count(split) for name, split in splits.items()},
    }


def _count(split) -> dict:
    return {
        "samples": len(split),
        "images": sum(len(sizes) for sizes in split["image_sizes"]),
        "labels": dict(Counter(label or NO_LABEL for label in split["label"]).most_common()),
        "skin_types": dict(sorted(Counter(kind or UNKNOWN for kind in split["skin_type"]).items())),
    }


def on_hub(name: str) -> bool:
    """Return whether the name of a model or data set is a Hub id, and not a local file or folder."""
    return bool(HUB_ID.fullmatch(name)) and not Path(name).exists()


def describe_base(name: str, revision: str | None) -> dict:
    """Return the base model's name, revision, commit and licence.

    Args:
        name: Hub id, or local folder, of which only the last part is returned.
        revision: Hub branch, tag or commit.

    Returns:
        `commit` is that of the cached files, `licence` is from the model card. Both are empty when the Hub cannot be
        reached and nothing is cached.
    """
    if not on_hub(name):
        folder = Path(name).resolve()
        licence = _read_licence(folder / "README.md")
        return {"name": folder.name, "on_hub": False, "revision": None, "commit": None, "licence": licence}
    commit, licence = None, {}
    with suppress(OSError, ValueError):
        commit = Path(hf_hub_download(name, "config.json", revision=revision)).parent.name
        licence = _read_licence(Path(hf_hub_download(name, "README.md", revision=commit)))
    return {"name": name, "on_hub": True, "revision": revision, "commit": commit, "licence": licence}


def _read_licence(card: Path) -> dict:
    """Return `license`, `license_name` and `license_link` of a model card, as far as it has them."""
    with suppress(Exception):  # huggingface_hub raises its YAML library's own errors for a card that is not YAML
        data = ModelCard.load(card, ignore_metadata_errors=True).data
        return {key: str(data[key]) for key in ("license", "license_name", "license_link") if data.get(key)}
    return {}


def library_versions() -> dict[str, str]:
    return {name: version(name) for name in LIBRARIES}


def training_progress(state: dict, date: datetime, *, finished: bool = False, kept_best: bool = False) -> dict:
    """Return steps, epochs and losses of a run.

    Args:
        state: the content of a `trainer_state.json`.
        date: when it was written.
        finished: whether training has ended.
        kept_best: whether the adapter is from the step with the best validation result, and not from the last.
    """
    losses = [row["loss"] for row in state["log_history"] if "loss" in row]
    evaluated = [row["eval_loss"] for row in state["log_history"] if "eval_loss" in row]
    return {
        "date": date.date().isoformat(),
        "finished": finished,
        "step": state["global_step"],
        "steps": state["max_steps"],
        "adapter_step": state["best_global_step"] if kept_best else state["global_step"],
        "epochs": round(state["epoch"] or 0, 2),
        "loss": losses[-1] if losses else None,
        "eval_loss": evaluated[-1] if evaluated else None,
        "lowest_eval_loss": min(evaluated, default=None),
    }


def add_facts(output_dir: Path, **facts) -> None:
    """Add facts to the run's `facts.json`; facts of the same name are replaced."""
    content = {**(read_json(output_dir / TRAINING_FACTS) or {}), **facts}
    atomic_write(output_dir / TRAINING_FACTS, json.dumps(content, indent=2, ensure_ascii=False) + "\n")


def read_facts(output_dir: Path, adapter_dir: Path | None = None) -> dict:
    """Return the run's facts; for a checkpoint (`adapter_dir`), with the progress when it was saved."""
    facts = read_json(output_dir / TRAINING_FACTS) or {}
    if wrong := [name for name in SECTIONS if not isinstance(facts.get(name, {}), dict | None)]:
        raise ValueError(f"{output_dir / TRAINING_FACTS} is damaged: {wrong[0]!r} is no object")
    path = (adapter_dir or output_dir) / "trainer_state.json"
    if adapter_dir is not None and (state := read_json(path)):
        facts["training"] = training_progress(state, datetime.fromtimestamp(path.stat().st_mtime, UTC))
    return facts


def read_base(output_dir: Path, adapter_dir: Path | None = None) -> dict:
    """Return the base model as `describe_base` does; its name is never a local path."""
    if "base" in (facts := read_facts(output_dir)):
        return facts["base"]
    path = (adapter_dir or output_dir) / "adapter_config.json"
    name = (read_json(path) or {}).get("base_model_name_or_path")
    if name is None:
        raise ValueError(f"{path}: no such file, or it names no base model; train an adapter first")
    public = name if on_hub(name) else Path(name).resolve().name
    return {"name": public, "on_hub": on_hub(name), "revision": None, "commit": None, "licence": {}}


def read_metrics(output_dir: Path) -> dict | None:
    """Return the evaluation of the adapter in a folder; None without one, or if it is of an earlier adapter."""
    settings = read_json(output_dir / EVALUATION_SETTINGS)
    if settings is not None and settings.get("adapter") != adapter_digest(output_dir):
        return None
    metrics, path = read_json(output_dir / EVALUATION_METRICS), output_dir / EVALUATION_METRICS
    if metrics is not None and "adapter" not in (metrics.get("runs") or ()):
        raise ValueError(f"{path} is damaged: it has no figures of the adapter; evaluate it again")
    return metrics


def adapter_digest(folder: Path) -> str:
    """Return the SHA-256 of an adapter's weights; an evaluation is valid for these weights only."""
    return digest_of_file(folder / ADAPTER_WEIGHTS)
