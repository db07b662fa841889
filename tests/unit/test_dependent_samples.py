"""Samples of one patient, lesion or image count as dependent in intervals, tests and controls, and pages say so."""

import itertools
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from datasets import Dataset, Image, List, Value

from data_prep.groups import group_samples
from data_prep.labels import build_label_map
from evaluation.calibration import LabelScores, probability_metrics
from evaluation.clusters import cluster_samples, describe_clusters, image_keys
from evaluation.comparison import permutation_test
from evaluation.metrics import clusters_by_label, fewest_clusters, interval
from evaluation.questions import Questions, shuffle_images
from evaluation.report import format_verdict, write_report
from evaluation.summary import summarise
from publishing.metric_notes import base_notes, interval_notes, shuffled_notes

LABELS = ["melanoma", "nevus"]
LABEL_MAP = build_label_map(LABELS)
MISSING = {"value": None, "low": None, "high": None}


def make_row(index, label, prediction, *, group=None, likeliest=None, **more):
    columns = dict.fromkeys(("skin_type", "age", "sex", "site")) | {"source": "s", "group": group}
    scores = {"scores": {name: float(name == likeliest) for name in LABELS}} if likeliest else {}
    texts = {"question": "What is it?", "reference": f"A {label}.", "prediction": prediction}
    return {"index": index, "id": f"r{index}", "label": label, **columns, **texts, **scores, **more}


def summarise_runs(runs, **options):
    return summarise(runs, LABEL_MAP, columns=[], sensitivity_of=[], min_group=10, **options)


def lesions(count, size, correct):
    """Rows of `count` lesions with `size` questions each, of which `correct` (for each lesion) are answered right."""
    return [
        make_row(n, "nevus", f"A {'nevus' if n % size < correct[n // size] else 'melanoma'}.", group=f"l{n // size}")
        for n in range(count * size)
    ]


@pytest.mark.parametrize("correct", [(10, 10, 10), (0, 0, 0), (5, 5, 5), (2, 5, 9)])
def test_three_lesions_have_no_interval_however_many_questions(correct):
    summary = summarise_runs({"adapter": lesions(3, 10, correct), "base": lesions(3, 10, (0, 0, 0))})
    for run in ("adapter", "base"):
        diagnosis = summary["runs"][run]["diagnosis"]
        assert (diagnosis["samples"], diagnosis["clusters"]) == (30, 3)
        assert diagnosis["per_label"]["nevus"]["clusters"] == 3
        assert diagnosis["accuracy"]["low"] is diagnosis["macro_f1"]["high"] is None
    assert summary["against_base"]["accuracy"]["difference"]["low"] is None
    assert interval_notes(summary) == [
        "No intervals: they need at least 10 patients or lesions, and the answers are of 3."
    ]


def test_there_are_intervals_from_ten_clusters_on_and_wider_ones_for_few():
    resampled = np.linspace(0, 1, 1001)
    assert interval(0.5, resampled, 9) == {"value": 0.5, "low": None, "high": None}
    widths = [
        interval(0.5, resampled, count)["high"] - interval(0.5, resampled, count)["low"] for count in (10, 15, 50)
    ]
    assert widths == sorted(widths, reverse=True)
    assert interval(0.5, resampled, 10**6)["low"] == pytest.approx(0.025, abs=1e-4)


def test_the_interval_of_a_mean_over_labels_follows_the_clusters_of_each_label():
    true, clusters = np.array([0] * 20 + [1] * 5 + [2] * 5), np.array([*range(20), *range(20, 25), *[25] * 5])
    assert clusters_by_label(true[:25], clusters[:25]) == 2 / (1 / 20 + 1 / 5)
    assert clusters_by_label(true, clusters) == 3 / (1 / 20 + 1 / 5 + 1)
    assert clusters_by_label(true[20:], np.zeros(10)) == 2.0
    assert fewest_clusters(true, clusters) == 1
    resampled = np.linspace(0, 1, 1001)
    narrow, wide = interval(0.5, resampled, 25), interval(0.5, resampled, 25, spread=8)
    assert interval(0.5, resampled, 25, spread=25) == narrow
    assert wide["low"] < narrow["low"] and wide["high"] > narrow["high"]


@pytest.mark.parametrize(("count", "shown"), [(4, False), (5, True)])
def test_macro_auroc_has_a_range_from_five_patients_of_each_label_on(count, shown):
    runs = {"adapter": [], "base": []}
    for n in range(20):
        label, group = ("melanoma" if n < count else "nevus"), f"p{n}"
        runs["adapter"].append(make_row(n, label, f"A {label}.", group=group, likeliest=LABELS[n % 2]))
    summary = summarise_runs({"adapter": runs["adapter"]})
    found = summary["runs"]["adapter"]["probabilities"]["macro_auroc"]
    assert found["value"] is not None and (found["low"] is not None) == shown
    note = "Macro-AUROC has no range: it needs at least 5 patients or lesions of each label, and melanoma has 4."
    assert (note in interval_notes(summary)) != shown


def test_dependent_samples_widen_the_interval_and_raise_the_p_value():
    rows = lesions(20, 10, [10] * 14 + [0] * 6)
    alone = [row | {"group": None} for row in rows]
    base = [row | {"prediction": "A nevus." if n >= 170 else "A melanoma."} for n, row in enumerate(rows)]
    grouped, single = (summarise_runs({"adapter": run, "base": base}) for run in (rows, alone))
    spans = [
        run["runs"]["adapter"]["diagnosis"]["accuracy"]["high"]
        - run["runs"]["adapter"]["diagnosis"]["accuracy"]["low"]
        for run in (grouped, single)
    ]
    assert spans[0] > 2.5 * spans[1]  # sqrt(10) = 3.2
    tests = [run["against_base"]["permutation_test"] for run in (grouped, single)]
    assert tests[0] == {
        "better": 140,
        "worse": 30,
        "p": 0.0127,
    }  # 14 against 3 lesions: 2 sum(C(17, k), k <= 3) / 2^17
    assert tests[1]["p"] < 1e-15


@pytest.mark.parametrize("seed", range(6))
def test_the_permutation_test_equals_the_enumeration_of_all_flips(seed):
    rng = np.random.default_rng(seed)
    differences, clusters = rng.integers(-1, 2, 40), rng.integers(0, 8, 40) * 7
    sums = [differences[clusters == number].sum() for number in np.unique(clusters)]
    flips = [abs(np.dot(signs, sums)) for signs in itertools.product((-1, 1), repeat=len(sums))]
    expected = np.mean(np.array(flips) >= abs(differences.sum()))
    assert permutation_test(differences, clusters) == pytest.approx(expected, rel=5e-3)


def test_few_clusters_bound_the_p_value_from_below():
    assert permutation_test(np.ones(30, dtype=int), np.repeat([0, 1, 2], 10)) == 0.25  # 2 / 2^3
    assert permutation_test(np.ones(5, dtype=int), np.zeros(5)) == 1.0


@pytest.mark.scale
def test_the_permutation_test_finds_a_difference_by_chance_in_at_most_5_of_100():
    """500 pairs of equally good runs on 15 patients with ten questions each; McNemar's test finds one in a third."""
    rng = np.random.default_rng(0)
    patient, found, ungrouped = np.repeat(np.arange(15), 10), 0, 0
    for _ in range(500):
        correct = [rng.random(150) < rng.beta(0.8, 0.8, 15)[patient] for _ in range(2)]
        differences = correct[0].astype(int) - correct[1]
        found += permutation_test(differences, patient) < 0.05
        ungrouped += permutation_test(differences, np.arange(150)) < 0.05
    assert 0.02 <= found / 500 <= 0.07 and ungrouped / 500 > 0.3


def test_many_samples_are_tested_in_a_moment():
    differences = np.random.default_rng(0).integers(-1, 2, 20_000)
    assert 0 <= permutation_test(differences, np.arange(20_000) // 3) <= 1


def test_clusters_are_samples_of_one_group_id_or_image():
    rows = [
        {"id": "a", "group": "p1", "source": "x"},
        {"id": "b", "group": "p1", "source": "x"},
        {"id": "c", "group": "P1", "source": "y"},  # as `convert` joins the groups of several sources
        {"id": "d", "group": None, "source": "x"},
        {"id": "e", "group": None, "source": "y"},
        {"id": "e", "group": None, "source": "y"},  # another turn of one conversation
    ]
    assert cluster_samples(rows) == [0, 0, 0, 3, 4, 4]
    images = [("1",), ("2",), ("3",), ("2", "9"), ("4",), ("4",)]
    assert cluster_samples(rows, images) == [0, 0, 0, 0, 4, 4]
    assert describe_clusters(rows, [0, 0, 2, 0, 4, 4]) == {
        "clusters": 3,
        "cluster_unit": "independent groups",
        "samples_with_group": 3,
    }
    assert describe_clusters(rows[:3], [0, 0, 2])["cluster_unit"] == "patients or lesions"
    assert describe_clusters(rows[3:5], [3, 4])["cluster_unit"] == "samples"


def test_clusters_are_the_groups_that_convert_keeps_in_one_split():
    """Each row is one sample, so that both see the same; the texts of the last two differ in case and white space."""
    groups = ["5", "5.0", "p 1", "P  1", "005", None, None, None, None, None]
    images = [("a",), ("b",), ("c",), ("d",), ("e",), ("c",), ("f",), (), (), ()]
    texts = ["What?"] * 7 + ["Is a mole\nround?", "is a  mole round?", "Is it red?"]
    samples = [
        {"id": f"s{n}", "group": group, "images": list(names), "messages": [{"role": "user", "content": text}]}
        for n, (group, names, text) in enumerate(zip(groups, images, texts, strict=True))
    ]
    found = cluster_samples(samples, images, [sample["messages"] for sample in samples])
    assert found == group_samples(samples, {name: name for name in "abcdef"}) == [0, 0, 2, 2, 0, 2, 6, 7, 7, 9]


def test_samples_that_only_begin_with_the_same_text_are_two_clusters():
    turns = [[{"role": "user", "content": text}] for text in ("Hello", "Hello", "Hello", "Hello")]
    turns[1], turns[3] = turns[1] + turns[1], turns[3] + [{"role": "user", "content": "What is a nevus?"}]
    rows = [{"id": name, "group": None} for name in ("a", "a", "b", "b")]
    assert cluster_samples(rows, [()] * 4, turns) == [0, 0, 2, 2]


def test_questions_about_one_image_are_one_cluster_without_any_group():
    rows = [row | {"group": None} for row in lesions(12, 10, [10] * 8 + [0] * 4)]
    clusters = cluster_samples(rows, [(f"{n // 10}.jpg",) for n in range(120)])
    summary = summarise_runs({"adapter": rows}, clusters=clusters)
    assert (summary["clusters"], summary["cluster_unit"]) == (12, "independent groups")
    assert summary["runs"]["adapter"]["diagnosis"]["accuracy"]["low"] < 0.45


def scores_of(true, probability, clusters=None):
    """Scores of two labels; `probability` is that of the first."""
    probability = np.array(probability, dtype=float)
    logits = np.log(np.stack([probability, 1 - probability], axis=1))
    return LabelScores(LABELS, logits, np.array(true), np.arange(len(true)) if clusters is None else clusters)


def test_the_threshold_for_sensitivity_is_that_of_the_validation_split():
    negatives = np.linspace(0.02, 0.4, 20)  # all but two are at most 0.36
    validation = scores_of([1] * 20 + [0], [*negatives, 0.9])
    test = scores_of([0] * 4 + [1] * 5, [0.35, 0.361, 0.5, 0.9, 0.1, 0.37, 0.38, 0.2, 0.3])
    found = probability_metrics(test, validation=validation, sensitivity_of=["melanoma"])["sensitivity"]["melanoma"]
    assert (found["threshold_from"], found["threshold_negatives"]) == ("validation", 20)
    assert (found["value"], found["specificity_found"]["value"]) == (0.75, 0.6)  # and not the 0.9 it was set for
    assert (found["positives"], found["clusters"], found["low"]) == (4, 4, None)


@pytest.mark.parametrize("validation", [None, scores_of([1] * 9 + [0] * 30, [0.1] * 39)])
def test_without_enough_of_a_validation_split_the_threshold_is_said_to_flatter(validation):
    test = scores_of([0] * 4 + [1] * 5, [0.35, 0.361, 0.5, 0.9, 0.1, 0.37, 0.38, 0.2, 0.3])
    found = probability_metrics(test, validation=validation, sensitivity_of=["melanoma"])["sensitivity"]["melanoma"]
    assert (found["threshold_from"], found["value"]) == ("evaluated", 0.5)
    assert found["specificity_found"]["value"] == 1.0


def test_a_label_that_all_samples_have_has_no_sensitivity_at_a_specificity():
    test = scores_of([0] * 20, [0.9] * 20)
    found = probability_metrics(test, sensitivity_of=["melanoma"])["sensitivity"]["melanoma"]
    assert {key: found[key] for key in MISSING} == MISSING and found["specificity_found"] == MISSING


@pytest.mark.parametrize(
    ("count", "per_cluster", "shown"), [(6, 1, False), (49, 1, False), (50, 1, True), (60, 20, False), (60, 6, True)]
)
def test_a_calibration_error_needs_fifty_samples_of_ten_patients(count, per_cluster, shown):
    test = scores_of([0] * count, [0.75] * count, np.arange(count) // per_cluster)
    found = probability_metrics(test, validation=test, sensitivity_of=[])
    assert ("calibration" in found) == ("calibration_tempered" in found) == shown
    if shown:
        assert found["calibration"]["expected_calibration_error"] == pytest.approx(0.25)


def gain_runs(adapter_choices, base_choices, base_answer="I cannot say."):
    """Twenty nevi that the adapter names; the likeliest labels are nevus for the first of each model's count."""
    runs = {"adapter": [], "base": []}
    for run, choices in (("adapter", adapter_choices), ("base", base_choices)):
        for n in range(20):
            likeliest = "nevus" if n < choices else "melanoma"
            answer = "A nevus." if run == "adapter" else base_answer
            runs[run].append(make_row(n, "nevus", answer, group=f"p{n}", likeliest=likeliest))
    return runs


@pytest.mark.parametrize(("base_choices", "knowledge"), [(20, 0.0), (5, 0.75), (0, 1.0)])
def test_a_gain_is_knowledge_as_far_as_the_likelihoods_show_it(base_choices, knowledge):
    summary = summarise_runs(gain_runs(20, base_choices))
    gain = summary["against_base"]["gain"]
    assert summary["against_base"]["accuracy"]["difference"]["value"] == 1.0
    assert (gain["knowledge"]["value"], gain["form"]["value"]) == (knowledge, 1 - knowledge)
    note = base_notes(summary)[1]
    assert note.startswith("The base model names no label in 100.0% of its answers.")
    assert f"differs by {knowledge:+.3f}" in note and f"The other {1 - knowledge:+.3f}" in note
    line = f"knowledge {knowledge:+.3f}, form {1 - knowledge:+.3f} (the base names no label in 100.0% of its answers)"
    assert line in format_verdict(summary, Path("out"))


def test_a_base_that_names_labels_loses_by_knowledge_alone():
    gain = summarise_runs(gain_runs(20, 0, "A melanoma."))["against_base"]["gain"]
    assert (gain["knowledge"]["value"], gain["form"]["value"]) == (1.0, 0.0)


def test_without_likelihoods_the_part_of_form_is_called_unknown():
    runs = gain_runs(20, 5)
    for row in itertools.chain(*runs.values()):
        del row["scores"]
    summary = summarise_runs(runs)
    assert "gain" not in summary["against_base"]
    assert "without the likelihoods of the labels nobody knows how much" in base_notes(summary)[1]


def test_data_without_any_patient_say_what_that_means():
    rows = [row | {"group": None} for row in lesions(1, 20, [15])]
    notes = interval_notes(summarise_runs({"adapter": rows}))
    assert notes[0] == "Ranges are 95 % intervals from a bootstrap over samples."
    assert notes[-1].startswith("No sample names a patient or lesion ('group')")
    assert interval_notes(summarise_runs({"adapter": [rows[0] | {"group": "p"}, *rows[1:]]}))[-1] == notes[0]


def test_an_accuracy_of_one_is_not_called_certain():
    note = interval_notes(summarise_runs({"adapter": lesions(20, 3, [3] * 20)}))[1]
    assert (
        "what happens in 13.9% of all patients or lesions is missed by 20 one time in twenty" in note
    )  # 1 - 0.05^0.05


def questions_of(images):
    """Questions with the images of these names; `images` has a list for each sample."""
    features = {"images": List(Image(decode=False)), "image_sizes": List(List(Value("int32")))}
    content = [[{"path": name, "bytes": None} for name in names] for names in images]
    dataset = Dataset.from_dict({"images": content, "image_sizes": [[[8, 8]] * len(names) for names in images]})
    rows = [{"id": f"r{n}"} for n in range(len(images))]
    dataset, numbers = dataset.cast_column("images", features["images"]), list(range(len(rows)))
    return Questions(rows, [[]] * len(rows), dataset, numbers, numbers)


def test_shuffled_samples_never_keep_their_picture():
    images = [[f"{n // 10}.jpg"] for n in range(40)]  # ten questions on each of four images
    shuffled = shuffle_images(questions_of(images))
    assert all(images[source] != images[target] for target, source in enumerate(shuffled))
    assert Counter(shuffled) == Counter(range(40))


@pytest.mark.parametrize(
    ("images", "kept"),
    [
        ([["a"], ["b"], ["c"], ["d", "e"]], [3]),  # the only pair
        ([["a"], ["b"], ["d", "e"], ["e", "d"]], [2, 3]),  # two pairs of the same pictures
        ([["a"], ["a"], ["a"]], [0, 1, 2]),
        ([[], [], ["a"], ["b"]], [0, 1]),  # texts alone have nothing to shuffle
    ],
)
def test_samples_that_cannot_be_shuffled_keep_their_images(images, kept):
    shuffled = shuffle_images(questions_of(images))
    assert [index for index, source in enumerate(shuffled) if index == source] == kept


def test_most_of_one_picture_leaves_out_as_few_as_possible():
    images = [["a"]] * 6 + [["b"], ["c"]]
    shuffled = shuffle_images(questions_of(images))
    assert sum(images[source] != images[target] for target, source in enumerate(shuffled)) == 4
    assert all(images[source] != images[target] or source == target for target, source in enumerate(shuffled))


def test_embedded_images_are_told_apart_by_their_bytes():
    image = {"path": "img.jpg", "bytes": b"1"}
    keys = image_keys([{"images": [image]}, {"images": [image | {"bytes": b"2"}]}, {"images": [image]}])
    assert keys[0] == keys[2] != keys[1]


def test_the_shuffled_control_is_compared_on_the_samples_that_it_has():
    adapter = [make_row(n, "nevus", "A nevus." if n < 3 else "A melanoma.", group=f"p{n}") for n in range(4)]
    shuffled = [row | {"image_of": f"r{(row['index'] + 1) % 3}"} for row in adapter[:3]] + [adapter[3]]
    shuffled[0] = shuffled[0] | {"prediction": "A melanoma."}
    summary = summarise_runs({"adapter": adapter, "shuffled": shuffled})
    assert summary["runs"]["adapter"]["diagnosis"]["accuracy"]["value"] == 0.75
    assert summary["runs"]["shuffled"]["diagnosis"]["accuracy"]["value"] == 0.666667
    against = summary["against_shuffled"]
    assert (against["samples"], against["our_accuracy"], summary["shuffled_left_out"]) == (3, 1.0, 1)
    assert summary["shuffled_same_label"] == 1.0
    reason = "(without images, or no other sample shows as many other images)"
    line = f"Left out of the shuffled control: 1 of 4 samples {reason}."
    assert shuffled_notes(summary)[-1] == line and line in format_verdict(summary, Path("out"))


@pytest.mark.parametrize("run", ["shuffled", "base"])
def test_a_control_that_no_sample_can_have_is_left_out_with_a_line(run):
    rows = [make_row(n, "nevus", "A nevus.", group=f"p{n}") for n in range(3)]
    summary = summarise_runs({"adapter": rows, run: rows})
    assert summary["shuffled_left_out"] == 3 and "shuffled" not in summary["runs"]
    assert "against_shuffled" not in summary and "3 of 3 samples" in shuffled_notes(summary)[0]


def test_the_page_shows_patients_beside_every_figure(tmp_path):
    choices = gain_runs(20, 5)
    runs = {name: [row | {"group": f"p{row['index'] // 4}", "sex": "f" if row["index"] % 3 else "m"} for row in rows]
            for name, rows in choices.items()}  # fmt: skip
    summary = summarise(runs, LABEL_MAP, columns=["sex"], sensitivity_of=["nevus"], min_group=5)
    (tmp_path / "reliability.png").touch()  # of an earlier evaluation with more samples
    counts = {"evaluated": {"samples": 20, "of": 20, "questions": 20}, "max_new_tokens": 8}
    write_report(tmp_path, {"split": "test", **counts, **summary}, runs, LABEL_MAP, [{"images": []}] * 20)
    page = " ".join((tmp_path / "report.html").read_text(encoding="utf-8").split())
    for part in (
        "20 samples of 5 patients or lesions</small>",
        "No intervals: they need at least 10 patients or lesions, and the answers are of 5.",
        "permutation test over 5 patients or lesions, p = 0.062",
        "No calibration error: it needs at least 50 samples, of at least 10 patients or lesions.",
        "<td>nevus</td><td>20</td><td>5</td>",
        '<b>question</b><div dir="auto">What is it?</div>',  # Arabic runs from right to left
        "<th>sex</th><th>samples</th><th>patients or lesions</th>",
        "the threshold is from the evaluated samples themselves, which makes the sensitivity too high",
    ):
        assert part in page, part
    assert not (tmp_path / "reliability.png").exists() and (tmp_path / "confusion.png").exists()
    assert "bootstrap" not in page and "0.000 to" not in page
