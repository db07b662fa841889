"""Metrics equal those of scikit-learn, scipy or a calculation by hand; 95 % intervals cover the truth."""

import random

import numpy as np
import pytest
import sacrebleu
from rouge_score import rouge_scorer
from scipy.special import softmax
from sklearn.metrics import accuracy_score, average_precision_score, balanced_accuracy_score, f1_score, roc_auc_score

from data_prep.labels import NONE, SEVERAL
from evaluation.calibration import LabelScores, accuracy_by_coverage, auroc, fit_temperature, probability_metrics
from evaluation.comparison import compare_paired
from evaluation.metrics import (
    DIAGNOSIS_METRICS,
    age_band,
    bootstrap_weights,
    compute_metrics,
    confusion_counts,
    diagnosis_metrics,
    encode_diagnoses,
    interval,
    metrics_with_intervals,
    subgroup_metrics,
    unseen_share,
)
from evaluation.text_metrics import rouge_l, text_metrics

LABELS = ["acne", "eczema", "nevus"]


def rows(true, answered, **more):
    return [
        {
            "id": f"r{n}",
            "label": label,
            "answered": answer,
            "group": None,
            "source": "s",
            **{k: v[n] for k, v in more.items()},
        }
        for n, (label, answer) in enumerate(zip(true, answered, strict=True))
    ]


def random_rows(rng, count, labels=LABELS):
    true = rng.choice(labels, count)
    answered = np.where(rng.random(count) < 0.6, true, rng.choice([*labels, NONE, SEVERAL], count))
    return rows(true.tolist(), answered.tolist())


def test_metrics_equal_those_of_scikit_learn():
    found = encode_diagnoses(random_rows(np.random.default_rng(0), 400), LABELS)
    figure = {name: value[0] for name, value in compute_metrics(confusion_counts(found)).items()}
    assert figure["accuracy"] == pytest.approx(accuracy_score(found.true, found.answered))
    recalls = [np.mean(found.answered[found.true == n] == n) for n in range(3)]
    assert figure["balanced_accuracy"] == pytest.approx(np.mean(recalls))
    assert figure["macro_f1"] == pytest.approx(f1_score(found.true, found.answered, labels=[0, 1, 2], average="macro"))
    assert figure["no_label"] == pytest.approx(np.mean(found.answered == 3))
    assert figure["several_labels"] == pytest.approx(np.mean(found.answered == 4))


def test_weighted_metrics_equal_those_of_the_resampled_data():
    found = encode_diagnoses(random_rows(np.random.default_rng(1), 50), LABELS)
    weights = bootstrap_weights(found.clusters, resamples=5)
    spread = compute_metrics(confusion_counts(found, weights))
    for n, row in enumerate(weights.astype(int)):
        true, answered = np.repeat(found.true, row), np.repeat(found.answered, row)
        assert spread["accuracy"][n] == pytest.approx(accuracy_score(true, answered))
        assert spread["macro_f1"][n] == pytest.approx(
            f1_score(true, answered, labels=sorted(set(true)), average="macro")
        )


def test_all_samples_of_a_group_are_drawn_together():
    groups = np.array([0, 0, 1, 1, 1, 2])
    weights = bootstrap_weights(groups, resamples=50)
    assert (weights[:, 0] == weights[:, 1]).all() and (weights[:, 2] == weights[:, 4]).all()
    assert len(np.unique(weights[:, 0])) > 1
    assert (weights[:, [0, 2, 5]].sum(1) == 3).all()


def test_a_perfect_predictor():
    found = diagnosis_metrics(encode_diagnoses(rows(LABELS * 20, LABELS * 20), LABELS))
    assert [found[name]["value"] for name in DIAGNOSIS_METRICS] == [1, 1, 1, 0, 0]
    assert found["accuracy"] == {"value": 1.0, "low": None, "high": None}  # no resample differs
    assert unseen_share(60) == pytest.approx(1 - 0.05 ** (1 / 60), abs=1e-6)
    assert found["macro_f1"]["low"] is None
    exact = {"precision": 1.0, "recall": 1.0, "f1": 1.0, "support": 20, "clusters": 20}
    assert found["per_label"]["nevus"] == exact
    assert found["top_confusions"] == []


def test_a_constant_predictor():
    found = diagnosis_metrics(encode_diagnoses(rows(["acne"] * 30 + ["nevus"] * 10, ["acne"] * 40), LABELS))
    assert found["accuracy"]["value"] == 0.75
    assert found["balanced_accuracy"]["value"] == 0.5  # eczema does not occur
    assert found["macro_f1"]["value"] == pytest.approx((2 * 30 / 70) / 2, abs=1e-6)
    assert found["per_label"]["acne"] == {
        **{"precision": 0.75, "recall": 1.0, "f1": 0.857143},
        **{"support": 30, "clusters": 30},
    }
    assert found["per_label"]["eczema"]["support"] == 0
    assert found["top_confusions"] == [{"label": "nevus", "answered": "acne", "count": 10}]
    assert found["confusion"]["counts"][2] == [10, 0, 0, 0, 0]


def test_a_shuffled_predictor_scores_chance():
    rng = np.random.default_rng(3)
    true = rng.choice(LABELS, 6000).tolist()
    found = diagnosis_metrics(encode_diagnoses(rows(true, rng.permutation(true).tolist()), LABELS))
    assert found["accuracy"]["value"] == pytest.approx(1 / 3, abs=0.02)
    assert found["accuracy"]["low"] < 1 / 3 < found["accuracy"]["high"]


def test_answers_with_no_label_or_several_are_wrong_and_counted():
    found = diagnosis_metrics(encode_diagnoses(rows(["acne"] * 4, ["acne", NONE, NONE, SEVERAL]), LABELS))
    assert (found["accuracy"]["value"], found["no_label"]["value"], found["several_labels"]["value"]) == (
        0.25,
        0.5,
        0.25,
    )
    assert found["top_confusions"][0] == {"label": "acne", "answered": NONE, "count": 2}


@pytest.mark.scale
@pytest.mark.parametrize(("patients", "low", "high"), [(15, 0.90, 0.99), (150, 0.93, 0.97)])
@pytest.mark.parametrize("name", ["accuracy", "balanced_accuracy"])
def test_intervals_cover_the_truth(name, patients, low, high):
    """300 sets of patients with one to three images, whose answers are right together or wrong together."""
    rng = np.random.default_rng(7)
    covered = 0
    for _ in range(300):
        sizes = rng.integers(1, 4, patients)
        patient = np.repeat(np.arange(patients), sizes)
        skill = rng.beta(4, 1.6, patients)  # mean 0.714
        right = rng.random(len(patient)) < skill[patient]
        true = rng.integers(0, 2, patients)[patient]
        found = encode_diagnoses(
            [
                {"id": n, "label": LABELS[t], "answered": LABELS[t if r else 1 - t], "group": str(g), "source": "s"}
                for n, (t, r, g) in enumerate(zip(true, right, patient, strict=True))
            ],
            LABELS[:2],
        )
        reported = metrics_with_intervals(found, (name,) if name == "accuracy" else ("accuracy", name))[name]
        covered += reported["low"] <= 4 / 5.6 <= reported["high"]
    assert low <= covered / 300 <= high


def test_paired_differences_and_their_test():
    true = LABELS * 40
    ours = encode_diagnoses(rows(true, [t if n % 10 else NONE for n, t in enumerate(true)]), LABELS)
    theirs = encode_diagnoses(rows(true, [t if n % 3 else NONE for n, t in enumerate(true)]), LABELS)
    found = compare_paired(ours, theirs)
    assert found["accuracy"]["difference"]["value"] == pytest.approx(108 / 120 - 80 / 120, abs=1e-6)
    # one sample a cluster: McNemar's exact test, 2 sum(C(44, k), k <= 8) / 2^44
    assert found["permutation_test"] == {"better": 36, "worse": 8, "p": 2.54e-05}
    assert compare_paired(ours, ours)["permutation_test"] == {"better": 0, "worse": 0, "p": 1.0}


def test_subgroups_name_the_worst_and_suppress_small_groups():
    true = ["acne"] * 50
    answered = ["acne"] * 20 + ["nevus"] * 10 + ["acne"] * 17 + ["nevus"] * 3
    samples = rows(true, answered, skin_type=["I"] * 20 + ["VI"] * 20 + [None] * 7 + ["II"] * 3)
    reported = subgroup_metrics(samples, encode_diagnoses(samples, LABELS), "skin_type", min_size=5)
    assert reported["groups"]["II"] == {"samples": 3, "clusters": 3, "suppressed": True}
    assert reported["groups"]["VI"]["accuracy"]["value"] == 0.5
    assert reported["groups"]["unknown"]["samples"] == 7
    assert (reported["worst"], reported["gap"]) == ("VI", 0.5)
    assert subgroup_metrics(samples, encode_diagnoses(samples, LABELS), "source", min_size=5) is None


@pytest.mark.parametrize(
    ("age", "name"),
    [
        *(
            ("19", "under 20"),
            ("20.0", "20 to 39"),
            ("80", "80 and over"),
            (None, "unknown"),
            ("40_TO_49", "40_TO_49"),
        ),
        *(("19,5", "under 20"), ("nan", "unknown"), ("inf", "unknown"), ("", "unknown"), ("1,000,0", "1,000,0")),
    ],
)
def test_ages_fall_into_bands(age, name):
    assert age_band(age) == name


def test_text_scores():
    perfect = text_metrics(["This is acne."] * 3, ["This is acne."] * 3)
    assert perfect == {"bleu": 100.0, "chrf": 100.0, "rouge_l": 1.0, "exact_match": 1.0, "length_ratio": 1.0}
    found = text_metrics(["a b c d"], ["a b"])
    assert (found["rouge_l"], found["exact_match"], found["length_ratio"]) == (pytest.approx(2 / 3, abs=1e-6), 0, 0.5)
    assert text_metrics(["a"], [""])["bleu"] == 0


def test_a_value_that_all_resamples_share_has_no_interval():
    assert interval(0.5, np.array([0.5, 0.5]), 50) == {"value": 0.5, "low": None, "high": None}
    assert interval(np.nan, np.array([]), 50) == {"value": None, "low": None, "high": None}


def random_scores(count=400, seed=0, sharpness=1.0):
    """Logits whose softmax, divided by `sharpness`, is the true probability of each label."""
    rng = np.random.default_rng(seed)
    logits = rng.normal(size=(count, 3)) * 1.5
    shares = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    true = np.array([rng.choice(3, p=row) for row in shares])
    return LabelScores(LABELS, logits * sharpness, true, np.arange(count))


def test_ranking_equals_scikit_learns():
    scores = random_scores()
    scores.logits[::3] = np.round(scores.logits[::3])  # ties
    shares = softmax(scores.logits, axis=1)
    found = probability_metrics(scores, sensitivity_of=["nevus"])
    own = [roc_auc_score(scores.true == n, shares[:, n]) for n in range(3)]
    assert found["macro_auroc"]["value"] == pytest.approx(np.mean(own), abs=1e-6)
    assert found["macro_auroc"]["low"] < np.mean(own) < found["macro_auroc"]["high"]
    for n, label in enumerate(LABELS):
        assert found["per_label"][label]["auroc"] == pytest.approx(own[n], abs=1e-6)
        precision = average_precision_score(scores.true == n, shares[:, n])
        assert found["per_label"][label]["average_precision"] == pytest.approx(precision, abs=1e-6)
    weights = bootstrap_weights(scores.clusters, resamples=4)
    for row, value in zip(weights, auroc(shares[:, 0], scores.true == 0, weights), strict=True):
        assert value == pytest.approx(roc_auc_score(scores.true == 0, shares[:, 0], sample_weight=row))


def test_known_predictors_have_known_rankings():
    true = np.repeat([0, 1, 2], 30)
    perfect = LabelScores(LABELS, np.eye(3)[true] * 10, true, np.arange(90))
    found = probability_metrics(perfect, sensitivity_of=["acne"])
    assert (found["macro_auroc"]["value"], found["choice_accuracy"]["value"]) == (1, 1)
    assert found["sensitivity"]["acne"]["value"] == 1
    assert found["calibration"]["expected_calibration_error"] == pytest.approx(0, abs=1e-3)
    flat = LabelScores(LABELS, np.zeros((90, 3)), true, np.arange(90))
    constant = probability_metrics(flat, sensitivity_of=["acne"])
    assert constant["macro_auroc"]["value"] == 0.5
    assert constant["sensitivity"]["acne"]["value"] == 0
    error = constant["calibration"]["expected_calibration_error"]
    assert error == pytest.approx(0, abs=1e-6)  # a third sure, a third right


def test_temperature_scaling_removes_overconfidence():
    validation, test = random_scores(2000, 1, sharpness=3), random_scores(2000, 2, sharpness=3)
    assert fit_temperature(validation) == pytest.approx(3, rel=0.1)
    found = probability_metrics(test, validation=validation, sensitivity_of=[])
    kinds = ("calibration", "calibration_tempered")
    before, after = (found[kind]["expected_calibration_error"] for kind in kinds)
    assert before > 0.15 and after < 0.03
    assert sum(row["samples"] for row in found["calibration"]["bins"]) == 2000


def test_sensitivity_is_the_highest_at_90_percent_specificity():
    true = np.array([0] * 10 + [1] * 20)
    score = np.concatenate([np.linspace(0.9, 0.45, 10), [0.8, 0.6], np.linspace(0.4, 0.1, 18)])
    logits = np.log(np.stack([score, 1 - score], axis=1))
    found = probability_metrics(LabelScores(LABELS[:2], logits, true, np.arange(30)), sensitivity_of=["acne"])
    assert found["sensitivity"]["acne"]["value"] == 1.0  # two of twenty others lie above 0.45
    assert (found["sensitivity"]["acne"]["specificity"], found["sensitivity"]["acne"]["positives"]) == (0.9, 10)
    score[12] = 0.7  # a third one
    logits = np.log(np.stack([score, 1 - score], axis=1))
    found = probability_metrics(LabelScores(LABELS[:2], logits, true, np.arange(30)), sensitivity_of=["acne"])
    assert found["sensitivity"]["acne"]["value"] == 0.6  # down to 0.65, above the third of them


def test_coverage_keeps_the_most_confident_answers():
    probabilities = np.array([[0.9, 0.1], [0.8, 0.2], [0.6, 0.4], [0.55, 0.45]])
    found = accuracy_by_coverage(probabilities, np.array([0, 0, 1, 0]))
    assert found[0] == {"coverage": 0.5, "accuracy": 1.0}
    assert found[-1] == {"coverage": 1.0, "accuracy": 0.75}


def test_balanced_accuracy_is_scikit_learns_when_all_answers_name_a_label():
    rng = np.random.default_rng(5)
    true, answered = rng.choice(LABELS, 200).tolist(), rng.choice(LABELS, 200).tolist()
    found = diagnosis_metrics(encode_diagnoses(rows(true, answered), LABELS))
    assert found["balanced_accuracy"]["value"] == pytest.approx(balanced_accuracy_score(true, answered), abs=1e-6)


SCRIPTS = [
    "这是黑色素瘤。",
    "痣",
    "Это меланома.",
    "هذا ورم ميلانيني.",
    "นี่คือมะเร็ง",
    "これはメラノーマです。",
    "흑색종",
    "Tanı: nevüs.",
]


@pytest.mark.parametrize("text", SCRIPTS)
def test_equal_texts_of_any_script_have_the_best_values(text):
    found = text_metrics([text], [text])
    assert (found["bleu"], found["rouge_l"], found["exact_match"]) == (pytest.approx(100), 1, 1)
    other = text_metrics([text], [text[:1]])
    assert (other["exact_match"] == (text == text[:1]) and other["bleu"] < 100) or text == text[:1]


def test_english_texts_have_the_values_of_the_libraries():
    references = ["This is a basal-cell carcinoma, not acne.", "It is acne_2.", "nevus"]
    predictions = ["This is basal cell carcinoma.", "It's acne 2", "nevus"]
    found = text_metrics(references, predictions)
    scorer = rouge_scorer.RougeScorer(["rougeL"])
    rouge = [scorer.score(*pair)["rougeL"].fmeasure for pair in zip(references, predictions, strict=True)]
    assert found["rouge_l"] == pytest.approx(np.mean(rouge), abs=1e-6)
    words = ["a", "b", "c"]
    rng = random.Random(0)
    for _ in range(200):
        pair = [" ".join(rng.choices(words, k=rng.randrange(6))) for _ in range(2)]
        assert rouge_l(*pair) == pytest.approx(scorer.score(*pair)["rougeL"].fmeasure, abs=1e-12)
    assert found["bleu"] == pytest.approx(sacrebleu.corpus_bleu(predictions, [references]).score, abs=1e-6)
