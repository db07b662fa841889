"""What is known about a run, and the model card that says it: facts in, README.md out, nothing made up."""

import json
import re
from collections import Counter
from collections.abc import Mapping
from contextlib import suppress
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path

import yaml
from huggingface_hub import EvalResult, ModelCard, ModelCardData, hf_hub_download
from jinja2 import Environment, FileSystemLoader, Template

from checkpoints import digest_of_file
from data_prep import fingerprint

RUN_FACTS = "run.json"  # how the base model is loaded
FACTS = "facts.json"  # what training knows about itself: base, data, settings, progress; no path and no file name
METRICS = "eval/metrics.json"
SETTINGS = "eval/settings.json"  # of the evaluation; names the adapter that was measured
PLOTS = tuple(f"eval/{name}.png" for name in ("abstention", "confusion", "reliability", "subgroups"))  # and no others
WEIGHTS = "adapter_model.safetensors"
TEMPLATES = Path(__file__).parent / "templates"
HUB_ID = re.compile(r"[\w.-]+(/[\w.-]+)?")
LIBRARIES = ("torch", "transformers", "trl", "peft", "bitsandbytes", "accelerate", "datasets")
NO_LABEL, UNKNOWN = "(no label)", "unknown"
FEW = 20  # training samples, below which the card warns about a label
SHOWN = 50  # labels in the table of counts

RUNS = {"adapter": "adapter", "base": "base model alone", "shuffled": "adapter, images shuffled"}
SECTIONS = ("diagnosis", "probabilities", "text")
NAMES = {
    "macro_f1": "macro-F1",
    "no_label": "share of answers without a label",
    "several_labels": "share of answers with several labels",
    "choice_accuracy": "accuracy of the likeliest label",
    "macro_auroc": "macro-AUROC",
    "macro_average_precision": "macro average precision",
    "temperature": "temperature, fitted on the validation split",
    "calibration: expected_calibration_error": "expected calibration error",
    "calibration_tempered: expected_calibration_error": "expected calibration error, after temperature scaling",
    "bleu": "BLEU (0 to 100)",
    "chrf": "chrF (0 to 100)",
    "rouge_l": "ROUGE-L",
}
INDEXED = {"accuracy": "accuracy", "balanced_accuracy": "balanced_accuracy", "macro_f1": "f1"}  # metric ids of the Hub


def describe_data(splits: Mapping, dataset_path: str) -> dict:
    """Return the data's fingerprint and counts, by split and label.

    Args:
        splits: `Dataset`s of the project's schema by name, "train" among them.
        dataset_path: what the recipe names; kept only when it is a Hub id, as a local path is nobody's business.
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
    """Tell whether a name that was given for a model or a data set is a Hub id, and not a file or folder here."""
    return bool(HUB_ID.fullmatch(name)) and not Path(name).exists()


def describe_base(name: str, revision: str | None) -> dict:
    """Return the base model's public name, revision, commit and licence, as far as they are known.

    Args:
        name: Hub id, or local folder, of which only the last part is kept.
        revision: Hub branch, tag or commit.

    The commit is that of the files that were loaded; the licence comes from the model's own card. Without a network,
    and for a folder without a card, it is not known.
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
    """Return the fields `license`, `license_name` and `license_link` of a model card; none of a file without them."""
    with suppress(OSError, ValueError, TypeError, yaml.YAMLError):
        data = ModelCard.load(card, ignore_metadata_errors=True).data
        found = {key: data.get(key) for key in ("license", "license_name", "license_link")}
        return {key: str(value) for key, value in found.items() if value}
    return {}


def library_versions() -> dict[str, str]:
    return {name: version(name) for name in LIBRARIES}


def progress(state: dict, date: datetime, *, finished: bool = False, kept_best: bool = False) -> dict:
    """Return how far a run has come.

    Args:
        state: the content of a `trainer_state.json`.
        date: when that was.
        finished: whether training has ended.
        kept_best: whether the adapter is that of the best evaluation, and not of the last step.
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
    """Write facts into the run's `facts.json`, in place of those of the same name."""
    unfinished = (output_dir / FACTS).with_suffix(".unfinished")
    content = {**(_read_json(output_dir / FACTS) or {}), **facts}
    unfinished.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    unfinished.replace(output_dir / FACTS)


def read_facts(output_dir: Path, adapter_dir: Path | None = None) -> dict:
    """Return the run's facts; of a checkpoint (`adapter_dir`), how far training had come when it was saved."""
    facts = _read_json(output_dir / FACTS) or {}
    path = (adapter_dir or output_dir) / "trainer_state.json"
    if adapter_dir is not None and (state := _read_json(path)):
        facts["training"] = progress(state, datetime.fromtimestamp(path.stat().st_mtime, UTC))
    return facts


def read_base(output_dir: Path, adapter_dir: Path | None = None) -> dict:
    """Return what is known about the adapter's base model; its name is never a local path."""
    if "base" in (facts := read_facts(output_dir)):
        return facts["base"]
    path = (adapter_dir or output_dir) / "adapter_config.json"
    name = (_read_json(path) or {}).get("base_model_name_or_path")
    if name is None:
        raise ValueError(f"{path}: no such file, or it names no base model; train an adapter first")
    public = name if on_hub(name) else Path(name).resolve().name
    return {"name": public, "on_hub": on_hub(name), "revision": None, "commit": None, "licence": {}}


def read_metrics(output_dir: Path) -> dict | None:
    """Return the evaluation of the adapter in the folder; None when there is none, or it is of an earlier adapter."""
    settings = _read_json(output_dir / SETTINGS)
    if settings is not None and settings["adapter"] != adapter_digest(output_dir):
        return None
    return _read_json(output_dir / METRICS)


def adapter_digest(folder: Path) -> str:
    """Return the SHA-256 of an adapter's weights, which ties an evaluation to what it measured."""
    return digest_of_file(folder / WEIGHTS)


def _read_json(path: Path) -> dict | None:
    """Return the JSON object in a file, None when there is no such file."""
    try:
        return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None
    except ValueError as error:
        raise ValueError(f"{path}: not JSON: {error}") from error


def write_card(output_dir: Path) -> Path:
    """Write `README.md` from the files in a run's folder and return its path.

    Args:
        output_dir: holds `adapter_config.json`; `run.json`, `facts.json` and `eval/metrics.json` are used if there.

    Raises:
        ValueError: no adapter in the folder, or a file is not JSON.
    """
    path = output_dir / "README.md"
    path.write_text(make_card(output_dir), encoding="utf-8")
    return path


def make_card(output_dir: Path, adapter_dir: Path | None = None) -> str:
    """Return the model card's text.

    Args:
        output_dir: the run's folder.
        adapter_dir: a checkpoint of the run, when it is the checkpoint's card and not the finished adapter's.
    """
    facts, base = read_facts(output_dir, adapter_dir), read_base(output_dir, adapter_dir)
    metrics = None if adapter_dir else read_metrics(output_dir)
    sections = {name: facts.get(name) for name in ("data", "settings", "parameters", "training", "versions")}
    text = _template().render(
        front_matter=front_matter(base, sections["data"], metrics).to_yaml(),
        base=base,
        loading=_read_json(output_dir / RUN_FACTS),
        **sections,
        **(label_counts(sections["data"]) if sections["data"] else {}),
        metrics=metrics,
        **(describe_results(metrics) if metrics else {}),
        plots=[Path(name).name for name in PLOTS if (output_dir / name).is_file()],
        few=FEW,
    )
    return re.sub(r"\n{3,}", "\n\n", text)


def _template() -> Template:
    environment = Environment(
        loader=FileSystemLoader(TEMPLATES), trim_blocks=True, lstrip_blocks=True, keep_trailing_newline=True
    )
    filters = {"cell": cell, "figure": figure, "setting": setting, "row": row, "header": header}
    environment.filters |= {**filters, "number": "{:,}".format}
    return environment.get_template("model_card.md")


def front_matter(base: dict, data: dict | None, metrics: dict | None) -> ModelCardData:
    """Return the card's machine-readable part; a base model or data set that is not on the Hub is left out."""
    dataset = data["dataset"] if data else None
    return ModelCardData(
        base_model=base["name"] if base["on_hub"] else None,
        datasets=[dataset] if dataset else None,
        library_name="peft",
        pipeline_tag="image-text-to-text",
        tags=["lora", "sft", "medical", "dermatology", "not-for-diagnosis"],
        model_name=f"{base['name'].split('/')[-1]}, LoRA for skin images" if metrics else None,
        eval_results=_indexed(metrics) if metrics else None,
        **{"license": UNKNOWN, **base["licence"]},
    )


def _indexed(metrics: dict) -> list[EvalResult]:
    found = metrics["runs"]["adapter"].get("diagnosis", {})
    return [
        EvalResult(
            task_type="image-text-to-text",
            dataset_type="skin-images",
            dataset_name="skin images",
            dataset_split=metrics["split"],
            metric_type=kind,
            metric_value=found[name]["value"],
            metric_name=f"{label(name)}, 95 % interval in brackets: {figure(found[name])}",
        )
        for name, kind in INDEXED.items()
        if name in found and found[name]["value"] is not None
    ]


def label_counts(data: dict) -> dict:
    """Return the table of samples by label and split, the most frequent first, and the labels that are rare."""
    splits = data["splits"]
    total = Counter()
    for split in splits.values():
        total.update(split["labels"])
    ranked = [name for name, _ in total.most_common()]
    rows = [(name, [split["labels"].get(name, 0) for split in splits.values()]) for name in ranked[:SHOWN]]
    if rest := ranked[SHOWN:]:
        others = [sum(split["labels"].get(name, 0) for name in rest) for split in splits.values()]
        rows.append((f"{len(rest):,} other labels", others))
    train = splits["train"]["labels"]
    rare = sorted(name for name in total if name != NO_LABEL and train.get(name, 0) < FEW)
    return {"label_rows": rows, "rare": rare}


def describe_results(metrics: dict) -> dict:
    """Return the table of measures, a column for each run, and how the adapter compares with the base model."""
    found = {name: _figures(metrics["runs"][name]) for name in RUNS if name in metrics["runs"]}
    keys = dict.fromkeys(key for figures in found.values() for key in figures)
    against = metrics.get("against_base") or {}
    differences = [
        f"{label(name)} {figure(item['difference'], '+')}" for name, item in against.items() if "difference" in item
    ]
    return {
        "runs": [RUNS[name] for name in found],
        "measures": [(label(key), [figures.get(key) for figures in found.values()]) for key in keys],
        "against_base": {"differences": differences, "mcnemar": against.get("mcnemar")} if differences else None,
    }


def _figures(run: dict) -> dict:
    """Return a run's numbers and intervals by name, those that stand one level deeper as "outer: inner"."""
    flat = {}
    for section in SECTIONS:
        for key, item in run.get(section, {}).items():
            if is_figure(item):
                flat[key] = item
            elif isinstance(item, dict) and key not in ("per_label", "confusion"):
                flat |= {f"{key}: {inner}{_at(value)}": value for inner, value in item.items() if is_figure(value)}
    return flat


def _at(item) -> str:
    return f" (at specificity {item['specificity']})" if isinstance(item, dict) and "specificity" in item else ""


def is_figure(item) -> bool:
    return isinstance(item, int | float) or (isinstance(item, dict) and "value" in item)


def label(key: str) -> str:
    return NAMES.get(key, key.replace("_", " "))


def figure(item, sign: str = "") -> str:
    """Return a number, or a value with its 95 % interval, as text: "0.93 (0.87 to 0.97)"; nothing for None."""
    if item is None:
        return ""
    item = item if isinstance(item, dict) else {"value": item}
    value, low, high = item["value"], item.get("low"), item.get("high")
    if value is None:
        return "n/a"
    text = f"{value:{sign}.2f}"
    return text if low is None or high is None else f"{text} ({low:{sign}.2f} to {high:{sign}.2f})"


def setting(value) -> str:
    """Return a setting's value as a recipe would write it, a list in one line."""
    if isinstance(value, list):
        return ", ".join(map(str, value))
    if isinstance(value, bool):
        return str(value).lower()
    return f"{value:g}" if isinstance(value, float) else str(value)


def cell(text) -> str:
    """Return a text from the data so that it stays one cell of a Markdown table."""
    return " ".join(str(text).split()).replace("\\", "\\\\").replace("|", "\\|").replace("<", "&lt;")


def row(texts: list) -> str:
    return f"| {' | '.join(map(cell, texts))} |"


def header(texts: list) -> str:
    return f"{row(texts)}\n|{'---|' * len(texts)}"
