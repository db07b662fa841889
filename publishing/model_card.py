"""The model card: facts of a run in, README.md out, nothing made up."""

import re
from collections import Counter
from pathlib import Path

from huggingface_hub import EvalResult, ModelCardData
from jinja2 import Environment, FileSystemLoader, Template

from common.files import EVALUATION_PLOTS, LOADING_SETTINGS
from common.html import TEMPLATES
from publishing.run_facts import NO_LABEL, UNKNOWN, _read_json, read_base, read_facts, read_metrics

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
        loading=_read_json(output_dir / LOADING_SETTINGS),
        **sections,
        **(label_counts(sections["data"]) if sections["data"] else {}),
        metrics=metrics,
        **(describe_results(metrics) if metrics else {}),
        plots=[Path(name).name for name in EVALUATION_PLOTS if (output_dir / name).is_file()],
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
