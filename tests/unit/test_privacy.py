"""The promises of SECURITY.md: no secret and no patient's name in the files of a run, and no loaded code is run."""

import ast
import base64
import json
import pickle
import re
import shutil
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

import eval_sft
import train_sft
from helpers.planted_secrets import COMMENT, FOLDER, PATIENT, PERSON, PLACE, SECRETS, TOKEN, USER
from helpers.runs import train_args
from models.adapters import load_answering_model
from models.loading import load_model
from publishing import hub
from training.checkpoints import MANIFEST, read_manifest, seal

ROOT = Path(train_sft.__file__).parent
ARTIST, GPS_IFD, GPS_AREA = 0x013B, 0x8825, 0x001C  # EXIF tags
CHARTS = {"eval/abstention.png", "eval/confusion.png", "eval/subgroups.png"}  # too few samples for a fourth


def plant_images(demo_raw, folder):
    """Copy twelve drawn images under patients' names, with GPS, artist and comment, and return their records."""
    (folder / "images").mkdir(parents=True)
    records = json.loads((demo_raw / "annotations.json").read_text())[:12]
    for number, record in enumerate(records):
        exif = Image.Exif()
        exif[ARTIST] = PERSON
        exif.get_ifd(GPS_IFD).update({1: "N", 2: (52.0, 31.0, 12.75), GPS_AREA: PLACE.encode()})
        name = f"{PATIENT}_{1961 + number}.jpg"
        with Image.open(demo_raw / "images" / record["image"]) as image:
            image.save(folder / "images" / name, exif=exif, comment=COMMENT.encode())
        del record["id"]
        record |= {"image": name, "split": "train" if number < 8 else "validation"}
    return records


@pytest.fixture(scope="module")
def planted(tiny_base, demo_raw, tmp_path_factory):
    """The folder of a training and an evaluation whose data, paths and environment contain secrets."""
    folder = tmp_path_factory.mktemp("planted") / FOLDER
    data, images, out = folder / "annotations.json", folder / "images", folder / "run"
    data.parent.mkdir()
    data.write_text(json.dumps(plant_images(demo_raw, folder)))
    sent = (images / f"{PATIENT}_1961.jpg").read_bytes()
    assert all(secret.encode() in sent for secret in (PERSON, PLACE, COMMENT))
    with pytest.MonkeyPatch.context() as patch:
        for name, value in (("HF_TOKEN", TOKEN), ("USER", USER), ("LOGNAME", USER)):
            patch.setenv(name, value)
        train_sft.main(train_args(tiny_base, data, out, image_dir=images))
        asked = ["--adapter", out, "--dataset", data, "--image-dir", images, "--split", "train", "--baseline"]
        eval_sft.main([str(word) for word in (*asked, "--max-new-tokens", 4, "--min-group", 2)])
    return out


def read_all(folder):
    """Return every file by its name, pictures inside a page as files of their own."""
    found = {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    pictures = re.findall(rb"data:image/\w+;base64,([A-Za-z0-9+/=]+)", found["eval/report.html"])
    return found | {f"picture {n}": base64.b64decode(text) for n, text in enumerate(pictures)}


def holding(files, *secrets):
    return {name for name, content in files.items() if any(str(secret).encode() in content for secret in secrets)}


def test_no_file_of_a_run_contains_a_token_a_path_a_patients_name_or_camera_metadata(planted):
    files = read_all(planted)
    assert {"eval/predictions.jsonl", "checkpoint-4/optimizer.pt", "metrics.jsonl", "facts.json"} < set(files)
    assert sum(name.startswith("picture") for name in files) >= 11  # eight images with wrong answers, and the charts
    assert holding(files, *SECRETS) == set()
    assert "training_args.bin" not in {Path(name).name for name in files}


def test_the_path_of_a_local_base_model_is_only_in_configurations_and_is_not_pushed(planted, tiny_base):
    here = (str(tiny_base), str(tiny_base.parent), str(ROOT), str(Path.home()))
    places = {Path(name).name for name in holding(read_all(planted), *here)}
    assert places <= {"adapter_config.json", "README.md"}  # PEFT's own card, in checkpoints; the run's is ours
    assert str(tiny_base) not in (planted / "README.md").read_text()
    for files in (hub.collect_files(planted), hub.collect_files(planted, planted / "checkpoint-4")):
        assert holding(files, *SECRETS, *here, "/tmp/", "/home/") == set()
    assert set(hub.collect_files(planted)) >= {*CHARTS, "eval/metrics.json", "facts.json", "run.json"}


def test_plots_have_no_metadata_but_the_name_of_the_library(planted):
    plots = [planted / "training_metrics.png", *(planted / name for name in CHARTS)]
    for path in plots:
        with Image.open(path) as image:
            image.load()
            assert set(image.info) <= {"Software", "dpi"} and image.info["Software"].startswith("Matplotlib")
            assert not image.getexif()


class Bomb:
    """A pickle that touches a file when it is loaded."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


@pytest.fixture
def bomb(tmp_path):
    """An object that touches a file when it is unpickled, and the path of that file."""
    path = tmp_path / "ran"
    pickle.loads(pickle.dumps(Bomb(path)))
    assert path.is_file()
    path.unlink()
    return Bomb(path), path


def test_weights_that_are_a_pickle_are_not_run(tiny_base, adapter, bomb, tmp_path):
    base, tuned = tmp_path / "base", tmp_path / "adapter"
    shutil.copytree(tiny_base, base, ignore=shutil.ignore_patterns("*.safetensors"))
    shutil.copytree(adapter, tuned, ignore=shutil.ignore_patterns("*.safetensors", "checkpoint-*"))
    torch.save(bomb[0], base / "pytorch_model.bin")
    torch.save(bomb[0], tuned / "adapter_model.bin")
    with pytest.raises((ValueError, pickle.UnpicklingError)):
        load_model(str(base), quantization=None, dtype="float32")
    with pytest.raises(ValueError, match=r"has no adapter_model\.safetensors; weights of another"):
        load_answering_model(str(tuned))
    assert not bomb[1].exists()


@pytest.mark.parametrize("name", ["optimizer.pt", "scheduler.pt", "rng_state.pth"])
def test_a_forged_checkpoint_with_a_valid_manifest_runs_no_code(planted, tiny_base, bomb, tmp_path, name):
    data, images, out = planted.parent / "annotations.json", planted.parent / "images", tmp_path / "run"
    path = out / "checkpoint-2"
    shutil.copytree(planted / "checkpoint-2", path)
    run = read_manifest(path)["run"]
    torch.save(bomb[0], path / name)
    with pytest.raises(ValueError, match=rf"checkpoint-2: {name} has"):
        read_manifest(path)
    (path / MANIFEST).unlink()
    seal(path, run)
    with pytest.raises(pickle.UnpicklingError, match="Weights only load failed"):
        train_sft.main(train_args(tiny_base, data, out, image_dir=images))
    assert not bomb[1].exists()


def test_weights_are_saved_as_safetensors_alone(planted):
    saved = {path.name for path in planted.iterdir() if path.is_file()}
    assert load_file(planted / "adapter_model.safetensors")
    assert not any(name.endswith((".bin", ".pt", ".pth", ".pkl", ".ckpt")) for name in saved)


# Modules that run foreign code, open a shell or a connection. Allowed are the Hub's client and `--fetch-links`.
FORBIDDEN_MODULES = {
    *("pickle", "marshal", "shelve", "dill", "cloudpickle", "joblib", "subprocess", "pty", "runpy", "importlib"),
    *("socket", "ssl", "http", "ftplib", "smtplib", "xmlrpc", "requests", "httpx", "httpx2", "aiohttp", "urllib3"),
    *("yaml", "ruamel"),  # YAML is read by common/yaml_files.py alone
}
FORBIDDEN_NAMES = {"eval", "exec", "compile", "__import__"}
FORBIDDEN_METHODS = {
    *("os.system", "os.popen", "os.startfile", "torch.hub.load"),
    *("importlib.import_module", "pandas.read_pickle", "pd.read_pickle", "torch.jit.load"),
}
ALLOWED = {
    ("data_prep/download.py", "urllib.request"),
    ("data_prep/download.py", "http.client"),  # the class of its errors
    *(("evaluation/chat_client.py", name) for name in ("urllib.request", "http.client")),  # of servers the user names
    *(("evaluation/vllm_server.py", name) for name in ("subprocess", "socket")),  # vLLM, on loopback
    ("evaluation/supervisor.py", "subprocess"),
    *((name, "importlib.metadata") for name in ("publishing/run_facts.py", "models/linear_attention.py")),
    *(("common/yaml_files.py", f"ruamel.yaml{part}") for part in ("", ".composer", ".constructor", ".resolver")),
}
NO_PRODUCT = {"tests", "benchmarks", "outputs", "data"}
PACKAGES = ("common", "data_prep", "demo", "evaluation", "models", "planning", "publishing", "training", "webapp")


def product_files():
    """Return every Python file but those of the tests, the benchmarks and an environment."""
    folders = [folder for folder in ROOT.iterdir() if folder.is_dir() and folder.name not in NO_PRODUCT]
    found = [path for folder in folders if not folder.name.startswith(".") for path in folder.rglob("*.py")]
    return [*ROOT.glob("*.py"), *found]


def imported(node):
    if isinstance(node, ast.Import):
        return [name.name for name in node.names]
    if isinstance(node, ast.ImportFrom) and node.level == 0:
        return [node.module]
    return []


def complaints(tree, name):
    """Yield the forbidden imports and calls of a module."""
    for node in ast.walk(tree):
        for module in imported(node):
            network = module in ("urllib.request", "urllib")
            if (module.split(".")[0] in FORBIDDEN_MODULES or network) and (name, module) not in ALLOWED:
                yield f"imports {module}"
        if isinstance(node, ast.Call):
            yield from call_complaints(node)


def call_complaints(call):
    function, options = ast.unparse(call.func), {option.arg: ast.unparse(option.value) for option in call.keywords}
    if function in FORBIDDEN_NAMES | FORBIDDEN_METHODS or function.startswith(("os.exec", "os.spawn")):
        yield f"calls {function}"
    if function == "torch.load" and options.get("weights_only") != "True":
        yield "torch.load without weights_only=True"
    if function.split(".")[-1] == "YAML" and options.get("typ") != "'safe'":
        yield "YAML without typ='safe'"
    if function.startswith("yaml."):
        yield f"calls {function}"
    for option, only in (("trust_remote_code", "False"), ("weights_only", "True"), ("allow_pickle", "False")):
        if options.get(option, only) != only:
            yield f"{option}={options[option]}"
    if {options.get("use_safetensors"), options.get("safe_serialization")} & {"False"}:
        yield "weights that are not safetensors"


def test_no_module_runs_foreign_code_or_opens_a_connection():
    names = {str(path.relative_to(ROOT)): path for path in product_files()}
    assert {"train_sft.py", "eval_sft.py", "collator.py"} < set(names)
    assert {Path(name).parts[0] for name in names} >= set(PACKAGES)
    found = {name: list(complaints(ast.parse(path.read_text()), name)) for name, path in names.items()}
    assert {name: lines for name, lines in found.items() if lines} == {}


def test_the_search_detects_forbidden_code():
    bad = "import pickle\nfrom urllib.request import urlopen\neval('1')\ntorch.load(f)\n"
    bad += "import yaml\nfrom ruamel.yaml import YAML\nYAML(pure=True)\nyaml.safe_load(f)\nos.system('ls')\n"
    bad += "A.from_pretrained(n, trust_remote_code=True, use_safetensors=False)\n"
    assert len(list(complaints(ast.parse(bad), "hub.py"))) == 11
    good = "model.eval()\nre.compile('a')\ntorch.load(f, weights_only=True)\nfrom urllib.parse import urlsplit\n"
    good += "YAML(typ='safe', pure=True)\n"
    assert list(complaints(ast.parse(good), "hub.py")) == []
