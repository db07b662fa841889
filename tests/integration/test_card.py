"""The model card: every fact and result of a run, and nothing else."""

import hashlib
import json
import os
import shutil
import subprocess
import sys
from datetime import UTC, datetime

import pytest
from datasets import Dataset
from ruamel.yaml import YAML

from data_prep import fingerprint
from helpers.hub_server import HubServer
from publishing import run_facts
from publishing.model_card import escape_cell, format_metric, label_counts, make_card, write_card
from publishing.run_facts import add_facts, describe_base, describe_data, read_base, training_progress

SHARE = {"value": 0.933333, "low": 0.866667, "high": 0.966667}
LOW = {"value": 0.25, "low": 0.15, "high": 0.36}
EXACT = {"value": 1.0, "low": None, "high": None}
DIAGNOSIS = {
    "accuracy": SHARE,
    "balanced_accuracy": SHARE,
    "macro_f1": {"value": None, "low": None, "high": None},
    "no_label": EXACT,
    "per_label": {"a|b": {"precision": 0.9, "recall": 0.8, "f1": 0.847059, "support": 15, "clusters": 9}},
    "confusion": {"rows": ["a|b"], "columns": ["a|b", "(none)"], "counts": [[12, 3]]},
    "top_confusions": [{"label": "a|b", "answered": "(none)", "count": 3}],
}
PROBABILITIES = {
    "macro_auroc": SHARE,
    "calibration": {"expected_calibration_error": 0.25, "bins": [{"samples": 60, "confidence": 0.5, "accuracy": 0.4}]},
    "abstention": [{"coverage": 0.5, "accuracy": 1.0}],
    "sensitivity": {"melanoma": {**LOW, "specificity": 0.9, "positives": 15, "threshold_from": "validation"}},
}
METRICS = {
    "split": "test",
    "samples": 1060,
    "diagnosed": 1000,
    "labels": ["a|b"],
    **{"clusters": 400, "cluster_unit": "patients or lesions", "samples_with_group": 1000},
    **{"clusters_needed": 10, "unseen_share": 0.00746},
    "runs": {
        "base": {"diagnosis": {"accuracy": LOW, "no_label": EXACT, "several_labels": LOW}},
        "adapter": {
            "diagnosis": DIAGNOSIS,
            "probabilities": PROBABILITIES,
            "text": {"bleu": 41.2},
        },
    },
    "subgroups": {
        "skin_type": {
            "groups": {
                "I": {"samples": 12, "clusters": 7, "accuracy": SHARE, "balanced_accuracy": SHARE, "macro_f1": LOW},
                "II": {"samples": 3, "clusters": 2, "suppressed": True},
            },
            "worst": "I",
            "gap": 0.2,
        },
        "age": None,
    },
    "against_base": {
        "accuracy": {"difference": {"value": 0.2, "low": -0.1, "high": 0.3}},
        "clusters": 400,
        "permutation_test": {"better": 10, "worse": 2, "p": 0.0386},
        "gain": {"knowledge": {**LOW, "p": 0.002}, "form": {"value": -0.05, "low": None, "high": None}},
    },
}
STATE = {
    "global_step": 1000,
    "max_steps": 1000,
    "epoch": 3.0,
    "best_global_step": 750,
    "log_history": [{"loss": 2.0}, {"eval_loss": 1.0}, {"loss": 0.5}, {"eval_loss": 1.5}],
}


DATE = datetime(2026, 2, 3, 23, 59, tzinfo=UTC)


def make_split(labels, skin_types=None):
    count = len(labels)
    return Dataset.from_dict(
        {
            "id": [f"patient_{n}.jpg" for n in range(count)],
            "images": [[{"path": f"/data/patient_{n}.jpg"}] for n in range(count)],
            "messages": [[{"role": "user", "content": f"question {n}"}] for n in range(count)],
            "label": labels,
            "skin_type": skin_types or [None] * count,
            "image_sizes": [[[60, 40]]] * count,
        }
    )


@pytest.fixture
def folder(tmp_path):
    """A run's folder with a local base model."""
    config = {"base_model_name_or_path": str(tmp_path / "models" / "my-base"), "r": 8}
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    (tmp_path / "adapter_model.safetensors").write_bytes(b"weights")
    return tmp_path


@pytest.fixture
def complete(folder):
    """The same with all facts of a training."""
    base = {"name": "Qwen/Q", "on_hub": True, "revision": "main", "commit": "c0ffee", "licence": {"license": "mit"}}
    splits = {"train": make_split(["nevus"] * 30 + ["a|b", None]), "test": make_split(["a|b"])}
    loading = {"quantization": "nf4", "double_quant": True, "dtype": "bfloat16"}
    (folder / "run.json").write_text(json.dumps(loading))
    add_facts(
        folder,
        base=base,
        data=describe_data(splits, "owner/skin"),
        settings={"learning_rate": 5e-05, "bf16": True, "fold": None, "lora_target_modules": ["q_proj", "v_proj"]},
        parameters={"trainable": 20_185_088, "all": 8_312_351_744, "parts": {"language model": 20_185_088}},
        versions={"torch": "2.15.0", "peft": "0.21.2"},
        training=training_progress(STATE, DATE, finished=True),
    )
    return folder


def write_metrics(folder, metrics):
    (folder / "eval").mkdir()
    (folder / "eval" / "metrics.json").write_text(json.dumps(metrics))


def front_matter(text):
    return YAML(typ="safe").load(text.split("---\n")[1])


def test_the_fingerprint_depends_on_the_content_and_not_on_order_or_path():
    rows = list(make_split(["a", "b", None]))
    moved = [{**row, "images": [{"path": "/elsewhere.jpg"}]} for row in reversed(rows)]
    assert fingerprint(rows) == fingerprint(moved)
    assert len(fingerprint(rows)) == 64
    changes = {"id": "x", "messages": [], "label": "c", "image_sizes": [[40, 60]]}
    changed = {fingerprint([{**rows[0], key: value}, *rows[1:]]) for key, value in changes.items()}
    assert len(changed | {fingerprint(rows), fingerprint(rows[1:])}) == 6


def test_the_fingerprint_is_the_same_on_every_machine():
    row = {"id": "ham_1", "messages": [{"role": "user", "content": "é?"}], "label": None, "image_sizes": [[600, 450]]}
    assert fingerprint([row]) == "0a9a0239784bf35f8ae90970b9f3a4dbcf004bbf56e11350e3250dc74f8de12f"


def test_counts_contain_no_file_name_and_no_path(tmp_path):
    splits = {"train": make_split(["a", "b", "b", None], ["I", "I", None, "VI"]), "test": make_split(["a"])}
    facts = describe_data(splits, str(tmp_path))
    assert facts["dataset"] is None
    train = {"samples": 4, "images": 4, "labels": {"b": 2, "a": 1, "(no label)": 1}}
    assert facts["splits"]["train"] == {**train, "skin_types": {"I": 2, "VI": 1, "unknown": 1}}
    assert facts["splits"]["test"]["samples"] == 1
    assert "jpg" not in json.dumps(facts) and str(tmp_path) not in json.dumps(facts)
    assert describe_data(splits, "owner/skin")["dataset"] == "owner/skin"


def test_infrequent_labels_are_summed_and_rare_ones_listed():
    labels = {f"label {n:02}": 100 - n for n in range(60)} | {"rare": 3, "(no label)": 1}
    found = label_counts({"splits": {"train": {"labels": labels}, "test": {"labels": {"rare": 2, "unseen": 1}}}})
    assert len(found["label_rows"]) == 51
    assert found["label_rows"][0] == ("label 00", [100, 0])
    others = sum(100 - n for n in range(50, 60)) + 3 + 1
    assert found["label_rows"][-1] == ("13 other labels", [others, 3])
    assert found["rare"] == ["rare", "unseen"]


def test_a_local_base_has_its_folders_name_and_its_cards_licence(tmp_path):
    base = tmp_path / "models" / "my-base"
    base.mkdir(parents=True)
    known = {"name": "my-base", "on_hub": False, "revision": None, "commit": None}
    assert describe_base(str(base), "main") == {**known, "licence": {}}
    (base / "README.md").write_text("---\nlicense: other\nlicense_name: qwen-research\nlicense_link: LICENSE\n---\n")
    licence = {"license": "other", "license_name": "qwen-research", "license_link": "LICENSE"}
    assert describe_base(str(base), "main") == {**known, "licence": licence}
    for broken in ("no head", "---\nlicense: [\n---\n", "---\n- 1\n---\n"):
        (base / "README.md").write_text(broken)
        assert describe_base(str(base), "main")["licence"] == {}


def test_commit_and_licence_of_a_base_on_the_hub_are_unknown_offline(tmp_path):
    server = HubServer().start()
    files = {"config.json": b"{}", "README.md": b"---\nlicense: apache-2.0\n---\n"}
    server.repos["qwen/base"] = {"private": False, "branches": {"main": files}, "commits": []}
    describe = "import json; from publishing.run_facts import describe_base\n"
    describe += "print(json.dumps(describe_base('qwen/base', 'main')))"

    def call(code, **environment):
        env = {**os.environ, **server.environment(tmp_path / "home", **environment)}
        return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=env, check=True).stdout

    nothing = {"name": "qwen/base", "on_hub": True, "revision": "main", "commit": None, "licence": {}}
    assert json.loads(call(describe, HF_HUB_OFFLINE="1")) == nothing
    found = json.loads(call(describe))
    [commit] = [path.name for path in tmp_path.glob("home/hub/models--qwen--base/snapshots/*")]
    assert found == {**nothing, "commit": commit, "licence": {"license": "apache-2.0"}}
    server.stop()
    assert json.loads(call(describe)) == found  # from the cache


def test_progress_holds_steps_and_losses():
    assert training_progress(STATE, DATE) == {
        "date": "2026-02-03",
        "finished": False,
        "step": 1000,
        "steps": 1000,
        "adapter_step": 1000,
        "epochs": 3.0,
        "loss": 0.5,
        "eval_loss": 1.5,
        "lowest_eval_loss": 1.0,
    }
    assert training_progress(STATE, DATE, kept_best=True)["adapter_step"] == 750
    empty = training_progress({**STATE, "log_history": [], "epoch": None}, DATE)
    assert (empty["loss"], empty["eval_loss"], empty["lowest_eval_loss"], empty["epochs"]) == (None, None, None, 0)


def test_facts_are_merged_into_the_file(folder):
    add_facts(folder, base={"name": "x"}, data=1)
    add_facts(folder, data=2)
    assert json.loads((folder / "facts.json").read_text()) == {"base": {"name": "x"}, "data": 2}
    assert not list(folder.glob("*.unfinished"))


def test_a_card_without_facts_says_so_and_contains_no_path(folder):
    text = write_card(folder).read_text()
    assert front_matter(text) == {
        "library_name": "peft",
        "license": "unknown",
        "pipeline_tag": "image-text-to-text",
        "tags": ["lora", "sft", "medical", "dermatology", "not-for-diagnosis"],
    }
    for text_part in (
        "# my-base: a LoRA adapter for questions about skin images",
        "**Not a medical device, and not for diagnosis.**",
        "This adapter has not been evaluated.",
        "The data of the training are unknown.",
        "The settings of the training are unknown.",
        "The base model's licence is unknown",
        'from_pretrained("path/to/my-base"',
    ):
        assert text_part in text
    assert str(folder) not in text and "Training is not finished" not in text


def test_a_complete_card_contains_the_facts_of_the_training(complete):
    text = make_card(complete)
    head = front_matter(text)
    assert (head["base_model"], head["datasets"], head["license"]) == ("Qwen/Q", ["owner/skin"], "mit")
    assert "model-index" not in head and "model_name" not in head
    for text_part in (
        "trained for 1,000 steps, last saved on 2026-02-03.",
        "| nf4 with double quantisation, bfloat16 |",
        "| base model | `Qwen/Q`, revision `main`, commit `c0ffee` |",
        "| trained parameters | 20,185,088 of 8,312,351,744 (language model 20,185,088) |",
        "| steps | 1,000 of 1,000 (3.0 epochs) |",
        "| training loss | 0.5000 at the last log |",
        "| validation loss | 1.5000 at the end, lowest 1.0000 |",
        "| `learning_rate` | 5e-05 |\n| `bf16` | true |\n| `lora_target_modules` | q_proj, v_proj |\n",
        "|  | train | test |\n|---|---|---|\n| samples | 32 | 1 |\n| images | 32 | 1 |\n| nevus | 30 | 0 |\n",
        "| a\\|b | 1 | 1 |\n| (no label) | 1 | 0 |\n",
        "- Labels with fewer than 20 training samples: a\\|b.",
        "- No training sample has a skin type",
        "[owner/skin](https://huggingface.co/datasets/owner/skin)",
        "torch 2.15.0, peft 0.21.2\n",
        "The base model's licence is `mit`, and applies to the adapter too.",
        'from_pretrained("Qwen/Q", revision="c0ffee", dtype="auto"',
    ):
        assert text_part in text
    assert "fold" not in text


def test_metrics_are_in_the_card_and_in_its_front_matter(complete):
    write_metrics(complete, METRICS)
    (complete / "eval" / "confusion.png").touch()
    text = make_card(complete)
    for text_part in (
        "Measured on 1,060 questions of the split `test`, 1,000 of which ask for the label, "
        "of 400 patients or lesions. Ranges are 95 % intervals from a bootstrap over patients or lesions.\n",
        "| metric | adapter | base model alone |\n|---|---|---|\n",
        "| accuracy | 0.93 (0.87 to 0.97) | 0.25 (0.15 to 0.36) |\n",
        "| macro-F1 | n/a |  |\n| no label named | 1.00 | 1.00 |\n",
        "| macro-AUROC | 0.93 (0.87 to 0.97) |  |\n| expected calibration error | 0.25 |  |\n",
        "| sensitivity for melanoma at 90% specificity, threshold from the validation split | 0.25 (0.15 to 0.36) |",
        "| BLEU (0 to 100) | 41.20 |  |\n",
        "on the same samples: accuracy +0.20 (-0.10 to +0.30).",
        "correct on 10 samples, only the base model on 2 (permutation test over 400 patients or lesions, p = 0.039).",
        "The base model names no label in 100.0% of its answers and several in 25.0%. The likelihoods",
        "by +0.250 (+0.150 to +0.360), p = 0.002, which is knowledge. The other -0.050 of the difference is form.",
        "\n\n![confusion](eval/confusion.png)\n\n### By label\n\n",
        "\n\n| label | precision | recall | F1 | samples | patients or lesions |\n",
        "| a\\|b | 0.90 | 0.80 | 0.85 | 15 | 9 |\n",
        "### By skin type\n\n",
        "\n\n| skin type | samples | patients or lesions | accuracy | balanced accuracy | macro-F1 |\n",
        "| I | 12 | 7 | 0.93 (0.87 to 0.97) | 0.93 (0.87 to 0.97) | 0.25 (0.15 to 0.36) |\n",
        "| II | 3 | 2 | too few samples |  |  |\n",
        "Lowest accuracy: I, 0.20 below the highest.",
    ):
        assert text_part in text
    assert "has not been evaluated" not in text and "By age" not in text and "\n\n\n" not in text
    [entry] = front_matter(text)["model-index"]
    assert entry["name"] == "Q, LoRA for skin images"
    [result] = entry["results"]
    assert result["dataset"] == {"name": "skin images", "type": "skin-images", "split": "test"}
    assert [(row["type"], row["value"]) for row in result["metrics"]] == [
        ("accuracy", 0.933333),
        ("balanced_accuracy", 0.933333),
    ]
    assert result["metrics"][0]["name"] == (
        "accuracy of 400 patients or lesions, 95 % interval in brackets: 0.93 (0.87 to 0.97)"
    )


def test_figures_of_samples_that_were_trained_on_are_no_result(complete):
    write_metrics(complete, METRICS | {"evaluated": {"samples": 10, "trained": 6}})
    text = make_card(complete)
    assert (
        "6 of these 10 samples are of the training split: the figures say how well they were learnt, and not" in text
    )
    assert "model-index" not in front_matter(text)


def test_an_evaluation_with_accuracy_alone_is_enough(folder):
    runs = {"adapter": {"diagnosis": {"accuracy": SHARE}}}
    write_metrics(folder, {"split": "test", "samples": 60, "diagnosed": 60, "runs": runs})
    text = make_card(folder)
    assert "| metric | adapter |\n|---|---|\n| accuracy | 0.93 (0.87 to 0.97) |\n" in text
    assert "By label" not in text and "Difference" not in text


def test_an_evaluation_of_an_earlier_adapter_is_left_out(folder):
    write_metrics(folder, METRICS)
    digest = hashlib.sha256(b"weights").hexdigest()
    (folder / "eval" / "settings.json").write_text(json.dumps({"adapter": digest, "split": "test"}))
    assert "Measured on" in make_card(folder)
    (folder / "adapter_model.safetensors").write_bytes(b"trained on")
    assert "has not been evaluated" in make_card(folder)


def test_the_card_depends_on_the_files_alone(complete, tmp_path_factory):
    write_metrics(complete, METRICS)
    copy = tmp_path_factory.mktemp("elsewhere") / "copy"
    shutil.copytree(complete, copy)
    assert write_card(copy).read_text() == write_card(complete).read_text() == make_card(copy)


def test_texts_from_the_data_are_escaped():
    assert escape_cell("a|b\n# c <script>\\") == "a\\|b # c &lt;script>\\\\"
    assert format_metric({"value": 0.2, "low": 0.1, "high": 0.3}, "+") == "+0.20 (+0.10 to +0.30)"
    undefined = {"value": None, "low": None, "high": None}
    assert [format_metric(metric) for metric in (3, undefined, None)] == ["3.00", "n/a", ""]


def test_the_error_names_a_folder_without_an_adapter_and_invalid_facts(tmp_path, folder):
    empty = tmp_path / "empty"
    empty.mkdir()
    with pytest.raises(ValueError, match=r"empty/adapter_config\.json: no such file, or it names no base model"):
        write_card(empty)
    (folder / "facts.json").write_text("{")
    with pytest.raises(ValueError, match=r"facts\.json is damaged: not JSON: "):
        read_base(folder)


def test_the_listed_libraries_are_installed():
    assert set(run_facts.library_versions()) == set(run_facts.LIBRARIES)
