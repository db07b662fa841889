"""Model cards: of an adapter, from the facts and the evaluation in its folder, and of a merged model."""

import re
import shlex
from collections import Counter
from pathlib import Path

from huggingface_hub import EvalResult, ModelCardData
from jinja2 import Environment, FileSystemLoader

from common.files import ADAPTER_WEIGHTS, EVALUATION_PLOTS, LOADING_SETTINGS, read_json
from common.html import TEMPLATES
from models.families import FAMILIES
from models.serving import Serving, adapted_modules, read_rank
from publishing import metric_notes
from publishing.run_facts import NO_LABEL, UNKNOWN, read_base, read_facts, read_metrics

RARE = 20  # the card lists labels with fewer training samples
MAX_LABELS = 50  # in the table of counts

RUN_TITLES = {"adapter": "adapter", "base": "base model alone", "shuffled": "adapter, images shuffled"}
METRIC_TITLES = {
    "accuracy": "accuracy",
    "balanced_accuracy": "balanced accuracy",
    "macro_f1": "macro-F1",
    "no_label": "no label named",
    "several_labels": "several named",
    "choice_accuracy": "accuracy of the likeliest label",
    "macro_auroc": "macro-AUROC",
    "macro_average_precision": "macro average precision",
    "calibration": "expected calibration error",
    "calibration_tempered": "expected calibration error, after temperature scaling",
    "temperature": "temperature, fitted on the validation split",
    "bleu": "BLEU (0 to 100)",
    "chrf": "chrF (0 to 100)",
    "rouge_l": "ROUGE-L",
    "exact_match": "exact match",
    "length_ratio": "length ratio",
}
HUB_METRIC_IDS = {"accuracy": "accuracy", "balanced_accuracy": "balanced_accuracy", "macro_f1": "f1"}
MERGED_CARD = """---
{metadata}
---

# {name}

Base model: {base}. Merged from a LoRA adapter for questions about skin images, in {dtype}.
The processor has the chat template and the pixel limits of the training. Decoding is greedy by default.

## How to use it

{readers}

```bash
VLLM_NO_USAGE_STATS=1 vllm serve {path} --host 127.0.0.1 --generation-config vllm \\
    --override-generation-config '{{"temperature": 0.0}}' --limit-mm-per-prompt '{{"video": 0}}'
transformers serve {path} --host 127.0.0.1
```

Not a medical device; not for diagnosis. The licence of the base model applies.
"""


def write_card(output_dir: Path) -> Path:
    """Write `README.md` from the files in a run's folder and return its path.

    Args:
        output_dir: holds `adapter_config.json`, and perhaps `run.json`, `facts.json` and `eval/metrics.json`.

    Raises:
        ValueError: no adapter in the folder, or a file is not JSON.
    """
    path = output_dir / "README.md"
    path.write_text(make_card(output_dir), encoding="utf-8")
    return path


def make_card(output_dir: Path, adapter_dir: Path | None = None) -> str:
    """Return the text of the model card.

    Args:
        output_dir: folder of the run.
        adapter_dir: checkpoint to describe in place of the finished adapter.
    """
    facts, base = read_facts(output_dir, adapter_dir), read_base(output_dir, adapter_dir)
    metrics = read_metrics(adapter_dir or output_dir)
    data = facts.get("data")
    environment = Environment(
        loader=FileSystemLoader(TEMPLATES), trim_blocks=True, lstrip_blocks=True, keep_trailing_newline=True
    )
    environment.filters |= {
        "cell": escape_cell, "metric": format_metric, "setting": format_setting, "number": "{:,}".format,
        "row": table_row, "header": table_header,
    }  # fmt: skip
    values = {
        **facts,
        "base": base,
        "front_matter": front_matter(base, data, metrics).to_yaml(),
        "loading": (loading := read_json(output_dir / LOADING_SETTINGS)),
        "serve": serve_command(adapter_dir or output_dir, base, loading),
        "metrics": metrics,
        "notes": metric_notes,
        "plots": [Path(name).name for name in EVALUATION_PLOTS if ((adapter_dir or output_dir) / name).is_file()],
        "rare_limit": RARE,
        **(label_counts(data) if data else {}),
        **(compare_runs(metrics) if metrics else {}),
    }
    text = environment.get_template("model_card.md").render(values)
    return re.sub(r"\n{3,}", "\n\n", text)


def serve_command(folder: Path, base: dict, loading: dict | None) -> str | None:
    """Return the lines that serve a downloaded adapter by vLLM as it was trained; None without its processor, or for
    one that vLLM cannot load.

    Args:
        folder: holds the adapter and its processor.
        base: as `read_base` returns it.
        loading: how the base was loaded.
    """
    config, processor = (read_json(folder / name) for name in ("adapter_config.json", "processor_config.json"))
    if not (processor and config and "r" in config and (folder / ADAPTER_WEIGHTS).is_file()):
        return None
    try:
        rank = read_rank(str(folder))
    except ValueError:
        return None
    size, modules = processor["image_processor"]["size"], adapted_modules(folder / ADAPTER_WEIGHTS)
    serving = Serving(
        base=base["name"] if base["on_hub"] else f"path/to/{base['name']}",
        name="base",
        adapters={"skin": "skin"},
        pixels={"min_pixels": size["shortest_edge"], "max_pixels": size["longest_edge"]},
        dtype=(loading or {}).get("dtype", "bfloat16"),
        rank=rank,
        tower=any(name.startswith(tuple(family.vision for family in FAMILIES.values())) for name in modules),
        revision=base["commit"] or base["revision"] if base["on_hub"] else None,
        chat_template="skin/chat_template.jinja",
    )
    return "\n".join(["hf download OWNER/NAME --local-dir skin", *serving.lines()])


def front_matter(base: dict, data: dict | None, metrics: dict | None) -> ModelCardData:
    """Return the card's YAML block; a base model or data set that is not on the Hub is left out."""
    dataset, results = data["dataset"] if data else None, _hub_results(metrics) if metrics else []
    return ModelCardData(
        base_model=base["name"] if base["on_hub"] else None,
        datasets=[dataset] if dataset else None,
        library_name="peft",
        pipeline_tag="image-text-to-text",
        tags=["lora", "sft", "medical", "dermatology", "not-for-diagnosis"],
        model_name=f"{base['name'].split('/')[-1]}, LoRA for skin images" if results else None,
        eval_results=results or None,
        **{"license": UNKNOWN, **base["licence"]},
    )


def _hub_results(metrics: dict) -> list[EvalResult]:
    """Return the figures that the Hub lists; none of samples that were trained on."""
    if metric_notes.trained_note(metrics.get("evaluated", {})):
        return []
    diagnosis = metrics["runs"]["adapter"].get("diagnosis", {})
    return [
        EvalResult(
            task_type="image-text-to-text",
            dataset_type="skin-images",
            dataset_name="skin images",
            dataset_split=metrics["split"],
            metric_type=metric_id,
            metric_value=diagnosis[name]["value"],
            metric_name=_hub_metric_name(name, diagnosis[name], metrics),
        )
        for name, metric_id in HUB_METRIC_IDS.items()
        if name in diagnosis and diagnosis[name]["value"] is not None
    ]


def _hub_metric_name(name: str, metric: dict, metrics: dict) -> str:
    unit = metrics.get("cluster_unit")
    of = f" of {metrics['clusters']:,} {unit}" if unit else ""
    interval = "" if metric["low"] is None else f", 95 % interval in brackets: {format_metric(metric)}"
    return f"{METRIC_TITLES[name]}{of}{interval}"


def make_merged_card(name: str, base: dict, dtype: str, readers: dict[str, str]) -> str:
    """Return the card of a merged model.

    Args:
        name: of its folder.
        base: as `describe_base` returns it.
        dtype: of the weights.
        readers: the oldest version of each library that is known to read the folder.
    """
    oldest = " and ".join(f"{library} {version}" for library, version in readers.items())
    metadata = ModelCardData(
        base_model=base["name"] if base["on_hub"] else None,
        library_name="transformers",
        pipeline_tag="image-text-to-text",
        tags=["medical", "dermatology", "not-for-diagnosis"],
        **{"license": UNKNOWN, **base["licence"]},
    )
    return MERGED_CARD.format(
        metadata=metadata.to_yaml(),
        name=name,
        base=base["name"],
        dtype=dtype,
        readers=f"The oldest versions that are known to read this folder are {oldest}.",
        path=shlex.quote(f"path/to/{name}"),
    )


def label_counts(data: dict) -> dict:
    """Return `label_rows`, the samples by label and split, most frequent first, and `rare`, the rare labels."""
    counts = [split["labels"] for split in data["splits"].values()]
    total = sum(map(Counter, counts), Counter())
    ranked = [label for label, _ in total.most_common()]
    rows = [(label, [count.get(label, 0) for count in counts]) for label in ranked[:MAX_LABELS]]
    if rest := ranked[MAX_LABELS:]:
        rows.append((f"{len(rest):,} other labels", [sum(count.get(label, 0) for label in rest) for count in counts]))
    train = data["splits"]["train"]["labels"]
    return {"label_rows": rows, "rare": sorted(n for n in total if n != NO_LABEL and train.get(n, 0) < RARE)}


def compare_runs(metrics: dict) -> dict:
    """Return a row for each metric with a column for each run, and the adapter's differences to the base model."""
    names = [name for name in RUN_TITLES if name in metrics["runs"]]
    runs = {RUN_TITLES[name]: _titled_metrics(metrics["runs"][name]) for name in names}
    rows = dict.fromkeys(title for run in runs.values() for title in run)
    against = metrics.get("against_base") or {}
    differences = [
        f"{METRIC_TITLES[name]} {format_metric(against[name]['difference'], '+')}"
        for name in HUB_METRIC_IDS
        if name in against
    ]
    return {
        "runs": list(runs),
        "metric_rows": [(title, [run.get(title) for run in runs.values()]) for title in rows],
        "differences": differences,
    }


def _titled_metrics(run: dict) -> dict:
    """Return a run's metrics, numbers or values with intervals, by title."""
    probabilities = run.get("probabilities", {})
    errors = {
        key: probabilities[key]["expected_calibration_error"]
        for key in ("calibration", "calibration_tempered")
        if key in probabilities
    }
    metrics = {**run.get("diagnosis", {}), **probabilities, **errors, **run.get("text", {})}
    titled = {title: metrics[key] for key, title in METRIC_TITLES.items() if key in metrics}
    return titled | {
        metric_notes.sensitivity_title(label, row): row for label, row in probabilities.get("sensitivity", {}).items()
    }


def format_metric(metric, sign: str = "") -> str:
    """Return a number, or a value with its interval, as text: "0.93 (0.87 to 0.97)"; "" for None."""
    if metric is None:
        return ""
    if not isinstance(metric, dict):
        return f"{metric:{sign}.2f}"
    value, low, high = (metric[key] for key in ("value", "low", "high"))
    text = "n/a" if value is None else f"{value:{sign}.2f}"
    return text if low is None else f"{text} ({low:{sign}.2f} to {high:{sign}.2f})"


def format_setting(value) -> str:
    """Return a setting as in a YAML file, a list as one line."""
    if isinstance(value, list):
        return ", ".join(map(str, value))
    return str(value).lower() if isinstance(value, bool) else f"{value:g}" if isinstance(value, float) else str(value)


def escape_cell(text) -> str:
    """Return text from the data that cannot end a cell of a Markdown table or open an HTML tag."""
    return " ".join(str(text).split()).replace("\\", "\\\\").replace("|", "\\|").replace("<", "&lt;")


def table_row(cells: list) -> str:
    return f"| {' | '.join(map(escape_cell, cells))} |"


def table_header(cells: list) -> str:
    return f"{table_row(cells)}\n|{'---|' * len(cells)}"
