"""Every shipped mapping reads its source's true column layout, bad cells included."""

from pathlib import Path

import pytest
from datasets import Image as ImageFeature
from datasets import List
from PIL import Image

from data_prep.__main__ import main as data_prep
from data_prep.convert import InvalidRecordsError, prepare, prepare_dataset
from data_prep.mapping import load_mapping, shipped
from data_prep.rows import make_record, read_rows
from data_prep.sources import Source

SCIN_CASES = "case_id,source,age_group,sex_at_birth,fitzpatrick_skin_type,image_1_path,image_2_path,image_3_path\n"
SCIN_LABELS = (
    "case_id,dermatologist_skin_condition_on_label_name,weighted_skin_condition_label,"
    "dermatologist_fitzpatrick_skin_type_label_1,monk_skin_tone_label_us\n"
)
FITZPATRICK = (
    "md5hash,fitzpatrick_scale,fitzpatrick_centaur,label,nine_partition_label,three_partition_label,qc,url,"
    "url_alphanum\n"
)
PAD = (
    "patient_id,lesion_id,smoke,drink,background_father,background_mother,age,pesticide,gender,skin_cancer_history,"
    "cancer_history,has_piped_water,has_sewage_system,fitspatrick,region,diameter_1,diameter_2,diagnostic,itch,grew,"
    "hurt,changed,bleed,elevation,img_id,biopsed\n"
)
DERM1M = (
    "filename,caption,truncated_caption,source,source_type,disease_label,hierarchical_disease_label,skin_concept,"
    "body_location,symptoms,age,gender\n"
)
# mapping -> the table as its makers write it, and what its rows become: (id, images, label, group, skin type, age,
# sex, site), or the reason why a row is left out, or the error that it is.
TABLES = {
    "ham10000": (
        "lesion_id,image_id,dx,dx_type,age,sex,localization,dataset\n"
        "HAM_0000118,ISIC_0027419,bkl,histo,80.0,male,scalp,vidir_modern\n"
        "HAM_0006766,ISIC_0033374,nv,consensus,,unknown,unknown,vidir_modern\n"
        "HAM_0000001,ISIC_0000001,xyz,histo,0.0,female,face,rosendahl\n",
        [
            ("ISIC_0027419", ["ISIC_0027419.jpg"], "benign keratosis", "HAM_0000118", None, "80", "male", "scalp"),
            ("ISIC_0033374", ["ISIC_0033374.jpg"], "melanocytic nevus", "HAM_0006766", None, None, None, None),
            ValueError("column 'dx': 'xyz' is not one of akiec, bcc"),
        ],
    ),
    "fitzpatrick17k": (
        FITZPATRICK + "5e82a4,3,3,drug induced pigmentary changes,inflammatory,non-neoplastic,,https://x/a.jpg,a.jpg\n"
        "9bc21a,-1,-1,necrobiosis lipoidica,inflammatory,non-neoplastic,1 Diagnostic,,\n"
        "0000aa,2,2,psoriasis,inflammatory,non-neoplastic,3 Wrongly labelled,,\n",
        [
            ("5e82a4", ["5e82a4.jpg"], "drug induced pigmentary changes", None, "III", None, None, None),
            ("9bc21a", ["9bc21a.jpg"], "necrobiosis lipoidica", None, None, None, None, None),
            "qc is '3 Wrongly labelled'",
        ],
    ),
    "pad_ufes_20": (
        PAD + "PAT_1516,1765,,,,,8,,,,,,,,ARM,,,NEV,False,False,False,False,False,False,PAT_1516_1765_530.png,False\n"
        "PAT_46,881,False,False,POMERANIA,UNK,55,False,FEMALE,True,True,True,True,3.0,NECK,6.0,5.0,BCC,True,UNK,False,"
        "True,True,True,PAT_46_881_939.png,True\n"
        "PAT_1,1,,,,,x,,MALE,,,,,7.0,FACE,,,MEL,,,,,,,PAT_1_1_1.png,False\n",
        [
            ("PAT_1516_1765_530.png", ["PAT_1516_1765_530.png"], "melanocytic nevus", "PAT_1516", None, "8", None,
             "ARM"),
            ("PAT_46_881_939.png", ["PAT_46_881_939.png"], "basal cell carcinoma", "PAT_46", "III", "55", "FEMALE",
             "NECK"),
            ValueError("column 'fitspatrick': '7' is not one of 1, 2, 3, 4, 5, 6"),
        ],
    ),
    "ddi": (
        ",DDI_ID,DDI_file,skin_tone,malignant,disease\n0,1,000001.png,56,True,melanoma-in-situ\n"
        "35,36,000036.png,34,False,melanocytic-nevi\n2,3,000003.png,56,True,\n",
        [
            ("1", ["000001.png"], "melanoma in situ", None, "V-VI", None, None, None),
            ("36", ["000036.png"], "melanocytic nevi", None, "III-IV", None, None, None),
            "no label to answer with",
        ],
    ),
    "isic_archive": (
        "isic_id,attribution,copyright_license,age_approx,diagnosis_1,diagnosis_2,diagnosis_3,lesion_id,patient_id,sex\n"
        'ISIC_1,Anonymous,CC-0,80.0,Malignant,"Malignant adnexal epithelial proliferations - Follicular",'
        '"Melanoma, NOS",IL_1,IP_1,male\n'
        "ISIC_2,Anonymous,CC-BY,40,Benign,,,IL_2,,\nISIC_3,Anonymous,CC-BY,,,,,,,\n",
        [
            ("ISIC_1", ["ISIC_1.jpg"], "Melanoma, NOS", "IP_1", None, "80", "male", None),
            ("ISIC_2", ["ISIC_2.jpg"], "Benign", "IL_2", None, "40", None, None),
            "no label to answer with",
        ],
    ),
    "skincap": (
        "id,skincap_file_path,ori_file_path,disease,caption_zh,caption_zh_polish_en,Do not consider this image\n"
        '1,1.png,0a94.jpg,squamous-cell carcinoma,x,"A plaque, ulcerated.",0\n2,2.png,000001.png,melanoma,x,y,1\n',
        [
            ("1", ["1.png"], "squamous cell carcinoma", "0a94.jpg", None, None, None, None),
            "Do not consider this image is '1'",
        ],
    ),
    "derm1m": (
        DERM1M + 'youtube/nSw7_frame_35_3.jpg,"A rash, red.",A rash,youtube,edu,vasculitis,vasculitis,'
        'No visual concepts,"ear, nose",No symptom information,No age information,male\n'
        "pubmed/98_a8_PMC9907656_1.jpg,Text,,pubmed_fail,knowledge,no definitive diagnosis,,macule,abdomen,x,80,"
        "No gender information\npublic/7.png,,,public,edu,acne,acne,,,,,\n",
        [
            ("youtube/nSw7_frame_35_3.jpg", ["youtube/nSw7_frame_35_3.jpg"], "vasculitis", "youtube/nSw7", None, None,
             "male", "ear, nose"),
            ("pubmed/98_a8_PMC9907656_1.jpg", ["pubmed/98_a8_PMC9907656_1.jpg"], None, "PMC9907656", None, "80", None,
             "abdomen"),
            "no caption to answer with",
        ],
    ),
}  # fmt: skip


def outcome(row, mapping):
    try:
        record, reason = make_record(row, mapping)
    except ValueError as error:
        return error
    keys = ("id", "images", "label", "group", "skin_type", "age", "sex", "site")
    return reason or tuple(record[key] for key in keys)


def check_rows(path, name, expected):
    mapping = load_mapping(name)
    rows = read_rows(path, mapping)
    assert len(rows) == len(expected)
    for row, wanted in zip(rows, expected, strict=True):
        found = outcome(row, mapping)
        if isinstance(wanted, ValueError):
            assert isinstance(found, ValueError) and str(found).startswith(str(wanted))
        else:
            assert found == wanted


@pytest.mark.parametrize("name", TABLES)
def test_a_mapping_reads_its_sources_layout(tmp_path, name):
    text, expected = TABLES[name]
    (tmp_path / "table.csv").write_text("\ufeff" + text, encoding="utf-8")
    check_rows(tmp_path / "table.csv", name, expected)


def test_isic_2019_joins_truth_and_metadata(tmp_path):
    (tmp_path / "ISIC_2019_Training_Metadata.csv").write_text(
        "image,age_approx,anatom_site_general,lesion_id,sex\nISIC_0000000,55,anterior torso,,female\n"
        "ISIC_0034246,65.0,lower extremity,HAM_0000002,female\nISIC_0000017_downsampled,,,,\n"
    )
    truth = tmp_path / "ISIC_2019_Training_GroundTruth.csv"
    truth.write_text(
        "image,MEL,NV,BCC,AK,BKL,DF,VASC,SCC,UNK\nISIC_0000000,0.0,1.0,0.0,0.0,0.0,0.0,0.0,0.0,0.0\n"
        "ISIC_0034246,1,0,0,0,0,0,0,0,0\nISIC_0000017_downsampled,1,1,0,0,0,0,0,0,0\nISIC_9,0,0,0,0,0,0,0,0,0\n"
    )
    nevus = ("ISIC_0000000", ["ISIC_0000000.jpg"], "melanocytic nevus", None, None, "55", "female", "anterior torso")
    melanoma = (
        "ISIC_0034246",
        ["ISIC_0034246.jpg"],
        "melanoma",
        "HAM_0000002",
        None,
        "65",
        "female",
        "lower extremity",
    )
    both = ValueError("the columns MEL, NV are 1 at once")
    check_rows(truth, "isic2019", [nevus, melanoma, both, "no label to answer with"])


def test_scin_cases_have_one_to_three_images_and_weighted_labels(tmp_path):
    (tmp_path / "scin_labels.csv").write_text(
        SCIN_LABELS
        + '-1000600354148496558,"[\'Eczema\', ""Bowen\'s""]","{\'Eczema\': 0.33, ""Bowen\'s"": 0.67}",,3.0\n'
        "77,[],{},FST2,1.0\n78,x,broken,FST2,1.0\n79,x,\"{'Acne, NOS': 1.0}\",FST5,9.0\n"
    )
    cases = tmp_path / "scin_cases.csv"
    cases.write_text(
        SCIN_CASES
        + "-1000600354148496558,SCIN,AGE_UNKNOWN,OTHER_OR_UNSPECIFIED,NONE_IDENTIFIED,dataset/images/-1.png,"
        "dataset/images/2.png,\n77,SCIN,AGE_18_TO_29,MALE,FST3,a.png,,\n78,SCIN,,,,b.png,,\n79,SCIN,,,,c.png,d.png,e.png\n"
    )
    two = ["dataset/images/-1.png", "dataset/images/2.png"]
    first = ("-1000600354148496558", two, "Bowen's", "-1000600354148496558", "Monk 3", None, None, None)
    last = ("79", ["c.png", "d.png", "e.png"], "Acne, NOS", "79", "V", None, None, None)
    broken = ValueError("expected a dictionary of weights, found 'broken'")
    check_rows(cases, "scin", [first, "no label to answer with", broken, last])


def test_every_shipped_mapping_is_tested():
    assert set(shipped()) == {*TABLES, "isic2019", "scin", "folder"}
    for name in shipped():
        load_mapping(name)


def test_a_wrong_column_name_suggests_the_nearest(tmp_path):
    path = tmp_path / "t.csv"
    path.write_text("DDI_ID,DDI_fil,skin_tone,disease\n1,a.png,12,x\n")
    with pytest.raises(ValueError, match=r"t\.csv: no column 'DDI_file'; did you mean 'DDI_fil'\?"):
        read_rows(path, load_mapping("ddi"))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("imagez: [a]\nquestions: [b]\nanswer: c\n", "unknown key 'imagez'; did you mean 'images'?"),
        ("images: [a]\n", "lacks answer, questions"),
        ("- a\n", "expected lines of the form"),
        ("a: [", "not YAML"),
    ],
)
def test_a_wrong_mapping_gives_one_line(tmp_path, text, message):
    (tmp_path / "r.yaml").write_text(text)
    with pytest.raises(ValueError) as error:
        load_mapping(tmp_path / "r.yaml")
    assert message in str(error.value) and "\n" not in str(error.value)
    with pytest.raises(ValueError, match="mapping: no file ham; shipped are ddi, derm1m"):
        load_mapping("ham")


def draw(path: Path, colour):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (60, 40), colour).save(path)


def test_a_table_finds_its_images_in_subfolders(tmp_path):
    for part, name in (
        ("part_1", "ISIC_1.jpg"),
        ("part_2", "ISIC_2.jpg"),
        ("part_1", "ISIC_3.jpg"),
        ("part_2", "ISIC_3.jpg"),
    ):
        draw(tmp_path / part / name, (10 * int(part[-1]), 90, 30 * int(name[5])))
    table = tmp_path / "m.csv"
    header = "lesion_id,image_id,dx,dx_type,age,sex,localization\n"
    table.write_text(header + "L1,ISIC_1,nv,histo,50,male,back\nL1,ISIC_2,nv,histo,50,male,back\n")
    splits = prepare([Source(table, tmp_path, "ham10000")], split=(1, 0, 0), show_progress=False).splits
    assert splits["train"]["source"] == ["HAM10000", "HAM10000"]
    assert splits["train"]["group"] == ["L1", "L1"]
    assert all("dermatoscopic" in m[0]["content"] or "lesion" in m[0]["content"] for m in splits["train"]["messages"])
    table.write_text(header + "L1,ISIC_3,nv,histo,50,male,back\n")
    with pytest.raises(InvalidRecordsError, match=r"image 'ISIC_3\.jpg' is in 2 folders"):
        prepare([Source(table, tmp_path, "ham10000")], show_progress=False)


def test_sources_mix_by_their_weights(tmp_path):
    for source, count in (("a", 6), ("b", 2)):
        for number in range(count):
            draw(tmp_path / source / "x" / f"{number}.png", (40 * number, 200 if source == "a" else 0, 90))
    mixed = [Source(tmp_path / "a", weight=1), Source(tmp_path / "b", weight=1)]
    train = prepare(mixed, split=(1, 0, 0), show_progress=False).splits["train"]
    assert train["weight"] == pytest.approx([8 / 2 / 6] * 6 + [8 / 2 / 2] * 2)
    with pytest.raises(ValueError, match="give every source a weight above 0, or none of them"):
        prepare([mixed[0], Source(tmp_path / "b")], show_progress=False)


def test_a_table_without_a_mapping_is_refused(tmp_path):
    (tmp_path / "t.csv").write_text("a,b\n1,2\n")
    with pytest.raises(ValueError, match="is a table: `python -m data_prep convert --mapping NAME` says"):
        prepare([Source(tmp_path / "t.csv")], show_progress=False)


def test_the_first_row_that_a_mapping_skips_is_named(tmp_path, caplog):
    for number in range(3):
        draw(tmp_path / f"{number}.png", ("red", "blue", "green")[number])
    mapping = "images: ['{f}.png']\nquestions: What?\nanswer: This is {dx}.\nlabel: {columns: [dx]}\n"
    (tmp_path / "m.yaml").write_text(mapping + "skip: {column: dx, matching: bad}\n")
    (tmp_path / "t.csv").write_text("f,dx\n0,nevus\n1,bad\n2,bad\n")
    prepare([Source(tmp_path / "t.csv", tmp_path, str(tmp_path / "m.yaml"))], show_progress=False)
    assert "2 rows skipped by the mapping: dx is 'bad' (the first is t.csv: record 1)" in caplog.text


def test_recipe_is_an_alias_of_mapping(tmp_path, capsys):
    for number in range(2):
        draw(tmp_path / f"{number}.png", ("red", "blue")[number])
    table, mapping = tmp_path / "t.csv", tmp_path / "m.yaml"
    table.write_text("file,label\n0.png,nevus\n1.png,melanoma\n")
    mapping.write_text("images: ['{file}']\nlabel: {columns: [label]}\nquestions: [What?]\nanswer: '{label}'\n")
    sources = tmp_path / "sources.yaml"
    sources.write_text("- {data: t.csv, images: ., recipe: m.yaml}")
    options = ["--split", "1", "0", "0", "--annotations", str(table), "--images", str(tmp_path)]
    for command in (
        ["check", *options, "--mapping", str(mapping)],
        ["check", *options, "--recipe", str(mapping)],
        ["check", *options[:4], "--sources", str(sources)],
    ):
        assert data_prep(command) == 0
        assert "train            2 samples       2 images   melanoma 1, nevus 1" in capsys.readouterr().out
    for name in ("mapping", "recipe"):
        made = prepare_dataset(table, tmp_path, **{name: str(mapping)}, split=(1, 0, 0), show_progress=False)
        assert made["train"]["label"] == ["nevus", "melanoma"]


MAPPING = "images: ['{file}']\nlabel: {columns: [label]}\nquestions: [What?]\nanswer: '{label}'\n"


def test_an_image_folder_whose_images_nobody_names_is_an_error(write_records):
    path, images = write_records([{"question": "a", "answer": "b", "scan": "0001"}] * 2)
    for on_error in ("fail", "drop"):
        with pytest.raises(ValueError) as error:
            prepare([Source(path, images)], on_error=on_error, show_progress=False)
        assert str(error.value) == (
            f"image_dir: {images} is given, and none of the 2 records of {path} names an image; "
            "the key is 'image' or 'images', and theirs are 'question', 'answer', 'scan'"
        )
    assert len(prepare([Source(path)], split=(1, 0, 0), show_progress=False).splits["train"]) == 2


def test_records_without_images_among_others_are_counted(write_records, caplog):
    path, images = write_records(
        [{"question": "a", "answer": "b"}, {"image": "red.jpg", "question": "a", "answer": "b"}]
    )
    prepare([Source(path, images)], split=(1, 0, 0), show_progress=False)
    assert "1 of 2 records of a.json have no image" in caplog.text


def test_flawed_rows_are_dropped_or_end_the_command(tmp_path):
    draw(tmp_path / "0.png", "red")
    mapping, table = tmp_path / "m.yaml", tmp_path / "t.csv"
    mapping.write_text(MAPPING)
    table.write_text("file,label\n0.png,nevus\n0.png\n,nevus\n")
    source = Source(table, tmp_path, str(mapping))
    with pytest.raises(InvalidRecordsError) as error:
        prepare([source], show_progress=False)
    assert str(error.value).split("\n") == [
        "2 of 3 records have an error; `python -m data_prep convert --on-error drop` leaves them out",
        "  t.csv: record 1, line 3: 1 cells, and the header has 2",
        "  t.csv: record 2, column 'file': empty, and the mapping makes an image's name from it",
    ]
    kept = prepare([source], on_error="drop", split=(1, 0, 0), show_progress=False)
    assert kept.splits["train"]["label"] == ["nevus"] and len(kept.errors) == 2


def test_the_same_bytes_in_two_folders_are_one_image(tmp_path):
    for part in ("HAM10000_images_part_1", "ham10000_images_part_1", "__MACOSX", ".ipynb_checkpoints", "a.jpg"):
        draw(tmp_path / "HAM" / part / "ISIC_1.jpg", "blue" if part.startswith(("_", ".")) else "red")
    table = tmp_path / "HAM10000_metadata.csv"
    table.write_text("lesion_id,image_id,dx,dx_type,age,sex,localization\nL1,ISIC_1,nv,histo,50,male,back\n")
    prepared = prepare([Source(table, tmp_path / "HAM", "ham10000")], split=(1, 0, 0), show_progress=False)
    [row] = prepared.splits.cast_column("images", List(ImageFeature(decode=False)))["train"]
    assert [image["path"] for image in row["images"]] == [str(tmp_path / "HAM/HAM10000_images_part_1/ISIC_1.jpg")]
    assert "exact copy" not in {finding.kind for finding in prepared.findings}
    draw(tmp_path / "HAM" / "a.jpg" / "ISIC_1.jpg", "green")
    with pytest.raises(InvalidRecordsError, match=r"'ISIC_1\.jpg' is in 3 folders"):
        prepare([Source(table, tmp_path / "HAM", "ham10000")], show_progress=False)
