"""The engines give the same answers and scores; a server that reads other prompts, or goes down, is an error."""

import argparse
import io
import json
import shlex

from common.cli import run

import pytest
import torch
from peft import get_peft_model
from PIL import Image
from trl import chat_template_utils

import eval_sft
import predict
from collator import opens_thought
from data_prep.images import load_image
from data_prep.sizes import fit_options, fit_size
from evaluation.chat_client import ChatClient, check_url
from evaluation.engines import TransformersEngine, VllmEngine, check_engine_options, open_engine, open_limits
from evaluation.parity import ask, own_answers
from helpers.chat_server import ChatServer, to_example
from models.loading import load_model, load_processor
from models.lora import build_lora_config
from models.serving import served_names
from models.thinking import set_thinking

DEFAULTS = {"quantization": "none", "dtype": "float32", "min_pixels": None, "max_pixels": None, "batch_size": 8}
LABELS = [f"This is {label}." for label in ("melanoma", "psoriasis", "vitiligo")]


def engine_args(**options):
    return argparse.Namespace(**{"engine": "transformers", "server": None, **DEFAULTS, **options})


@pytest.fixture(scope="module")
def engine(adapter):
    with open_engine([str(adapter)], None, engine_args()) as engine:
        yield engine


@pytest.fixture
def server(engine):
    with ChatServer(engine) as server:
        yield server


@pytest.fixture(scope="module")
def examples(demo_raw):
    question = {"role": "user", "content": "<image>What condition is shown?"}
    files = sorted((demo_raw / "images").glob("*.jpg"))[:9]
    return [{"id": file.stem, "images": [str(file)], "messages": [question]} for file in files]


def test_both_engines_give_the_same_answers_and_scores(engine, server, adapter, examples):
    with open_engine([str(adapter)], None, engine_args(engine="vllm", server=server.url)) as other:
        assert list(other.adapters) == ["adapter"]
        for ours, theirs in (("default", "adapter"), (None, None)):
            expected = engine.answers(examples, 8, adapter=ours)
            assert other.answers(examples, 8, adapter=theirs) == expected and any(expected[0])
            scores = engine.scores(examples, [LABELS] * len(examples), adapter=ours)
            torch.testing.assert_close(
                other.scores(examples, [LABELS] * len(examples), adapter=theirs), scores, atol=1e-3, rtol=0
            )
            given = [LABELS, [], *[LABELS] * (len(examples) - 2)]
            *answers, found = other.answer_and_score(examples, 8, given, adapter=theirs)
            *same, own = engine.answer_and_score(examples, 8, given, adapter=ours)
            assert tuple(answers) == tuple(same) == expected and found[1] == own[1] == []
            for values in (found, own):
                rows = torch.tensor([row for row in values if row])
                torch.testing.assert_close(rows, scores[[n != 1 for n in range(len(examples))]], atol=1e-3, rtol=0)
    assert engine.answers(examples, 8, adapter="default") != engine.answers(examples, 8, adapter=None)
    assert {body["temperature"] for body in server.bodies} == {0.0}


@pytest.mark.parametrize("thinking", ["off", "on"])
def test_both_engines_are_asked_for_thoughts_alike(engine, adapter, examples, thinking):
    processor = load_processor(str(adapter))
    processor.chat_template = chat_template_utils.qwen3_5_think_chat_template
    set_thinking(processor, thinking)
    processors = {None: processor, "default": processor}
    ours = TransformersEngine(engine.model, engine.adapters, processors, 8)
    with ChatServer(ours) as server:
        names = {None: "base", "default": "adapter"}
        theirs = VllmEngine(ChatClient(server.url), engine.adapters, names, processors)
        answers = ours.answers(examples[:3], 8, adapter="default")
        assert theirs.answers(examples[:3], 8, adapter="default") == answers
        assert [text.startswith("<think>") for text in answers[0]] == [thinking == "on"] * 3
        scores = ours.scores(examples[:3], [LABELS] * 3, adapter="default")
        torch.testing.assert_close(
            theirs.scores(examples[:3], [LABELS] * 3, adapter="default"), scores, atol=1e-3, rtol=0
        )
        rows = own_answers(ours, "default", examples[:1], argparse.Namespace(batch_size=1, max_new_tokens=8))
        opening = opens_thought(processor)
        assert [ask(theirs.client, "adapter", 8, opening, example) for example in examples[:1]] == rows


def test_images_are_sent_as_training_decodes_them(engine, server, adapter, tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # turned by 90 degrees
    photo = Image.effect_noise((640, 300), 90).convert("RGB")
    server.processor = load_processor(str(adapter), **open_limits(engine.processors[None]))
    photo.save(tmp_path / "photo.jpg", quality=95, exif=exif)
    example = {
        "id": "x",
        "images": [str(tmp_path / "photo.jpg")],
        "messages": [{"role": "user", "content": "Is <image> this a mole?"}],
    }
    with open_engine([str(adapter)], None, engine_args(engine="vllm", server=server.url)) as other:
        other.answers([example], 2, adapter="adapter")
    [sent] = server.bodies
    assert [part["type"] for part in sent["messages"][0]["content"]] == ["text", "image_url", "text"]
    options = fit_options(engine.processors[None].image_processor)
    expected = load_image(tmp_path / "photo.jpg", fit=lambda *size: fit_size(*size, **options))
    [image] = to_example(sent["messages"])["images"]
    assert image.size == expected.size and image.size[0] < image.size[1]
    assert image.mode == "RGB" and image.tobytes() == expected.tobytes()


@pytest.mark.parametrize("kind", ["chat template", "pixel limits"])
def test_a_server_that_reads_other_prompts_is_an_error(server, adapter, examples, kind):
    limits = {"min_pixels": 28 * 28, "max_pixels": 56 * 56} if kind == "pixel limits" else {}
    server.processor = load_processor(str(adapter), **limits)
    if not limits:
        server.processor.chat_template = server.processor.chat_template.replace("You are a helpful", "You are a")
    with open_engine([str(adapter)], None, engine_args(engine="vllm", server=server.url)) as other:
        for ask in (
            lambda: other.answers(examples[:1], 8, adapter="adapter"),
            lambda: other.scores(examples[:1], [LABELS], adapter="adapter"),
        ):
            with pytest.raises(ValueError, match=r"sample '0000': the server reads another prompt: \d+ tokens there"):
                ask()


def test_a_server_without_the_adapter_is_an_error(server, adapter, tiny_base):
    server.names = {"base": None, "other": None}
    with (
        pytest.raises(ValueError, match=r"serves 'base', 'other', expected 'adapter' for .*adapter"),
        open_engine([str(adapter)], None, engine_args(engine="vllm", server=server.url)),
    ):
        pass
    with (
        pytest.raises(ValueError, match="serves 'base', 'other', expected"),
        open_engine([], str(tiny_base), engine_args(engine="vllm", server=server.url)),
    ):
        pass


def evaluate(adapter, data, out, url):
    words = ["--adapter", adapter, "--dataset", data, "--split", "test", "--out", out, "--max-new-tokens", 8]
    words += ["--baseline", "--engine", "vllm", "--server", url, "--batch-size", 2]
    return run(lambda: eval_sft.main([str(word) for word in words]))


def test_a_server_that_goes_down_is_one_line_and_loses_no_batch(engine, adapter, demo_data, tmp_path, capfd):
    with ChatServer(engine) as server:
        assert evaluate(adapter, demo_data, tmp_path / "whole", server.url) == 0
        total = len(server.bodies)
    lines = tmp_path / "cut" / "predictions.jsonl"
    capfd.readouterr()
    with ChatServer(engine, limit=total // 2) as server:
        assert evaluate(adapter, demo_data, tmp_path / "cut", server.url) == 1
    errors = [line for line in capfd.readouterr().err.splitlines() if "error" in line]
    assert len(errors) == 1 and f": no answer from {server.url}: " in errors[0]
    kept = lines.read_text().splitlines()
    assert len(kept) >= 4
    with ChatServer(engine) as server:
        assert evaluate(adapter, demo_data, tmp_path / "cut", server.url) == 0
        assert len(server.bodies) < total
    assert set(kept) <= set(lines.read_text().splitlines())
    for name in ("metrics.json", "predictions.jsonl"):
        assert (tmp_path / "cut" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


def test_answers_of_two_engines_are_not_mixed(engine, server, adapter, demo_data, tmp_path, capsys):
    words = ["--adapter", adapter, "--dataset", demo_data, "--out", tmp_path / "eval", "--max-new-tokens", 8]
    words = [str(word) for word in (*words, "--batch-size", 8)]
    assert run(lambda: eval_sft.main([*words, "--engine", "vllm", "--server", server.url])) == 0
    assert run(lambda: eval_sft.main(words)) == 1
    assert "holds answers made with other settings, engine was 'vllm'" in capsys.readouterr().err


def check(adapter, data, url, *options):
    words = ["--adapter", adapter, "--dataset", data, "--split", "train", "--max-new-tokens", 8, "--sample", 10]
    words += ["--check-server", url, "--quantization", "none", "--dtype", "float32", *options]
    return run(lambda: predict.main([str(word) for word in words]))


def test_the_parity_check_accepts_an_equal_server_and_rejects_another(engine, server, adapter, demo_data, capsys):
    server.processor = load_processor(str(adapter), min_pixels=28 * 28, max_pixels=56 * 56)
    limits = ["--min-pixels", 28 * 28, "--max-pixels", 56 * 56]
    assert check(adapter, demo_data, server.url, *limits) == 0
    assert "adapter: 10 of 10 answers equal (100%), as expected" in capsys.readouterr().out
    sizes = {image.size for body in server.bodies for image in to_example(body["messages"])["images"]}
    assert sizes == {(112, 112)}  # as they are in the files, for the server to resize
    server.names["adapter"] = None  # the base answers
    assert check(adapter, demo_data, server.url, *limits) == 1
    printed = capsys.readouterr().out
    assert "of 10 answers equal" in printed and ", expected at least 95%" in printed and ": here '" in printed
    assert check(adapter, demo_data, server.url, *limits, "--limit", 0) == 0


def test_the_printed_command_has_all_that_the_training_decided(adapter, tiny_base, tmp_path, capsys):
    base = load_model(str(tiny_base), quantization=None, dtype="float32")
    settings = {"r": 20, "lora_alpha": 8, "lora_dropout": 0.0, "train_vision": True, "train_merger": True}
    tower = tmp_path / "tower"
    get_peft_model(base, build_lora_config(base, **settings)).save_pretrained(tower)
    load_processor(str(adapter)).save_pretrained(tower)
    assert predict.main(["--adapter", str(adapter), "--print-server", "vllm", "--system", "Be brief."]) == 0
    printed, _, request = capsys.readouterr().out.partition("\n\n")
    size = load_processor(str(adapter)).image_processor.size
    pixels = {"min_pixels": size["shortest_edge"], "max_pixels": size["longest_edge"]}
    expected = [
        *("VLLM_NO_USAGE_STATS=1", "vllm", "serve", str(tiny_base), "--host", "127.0.0.1", "--port", "8000"),
        *(
            "--served-model-name",
            tiny_base.name,
            "--dtype",
            "float32",
            "--max-model-len",
            "4096",
            "--revision",
            "main",
        ),
        *("--generation-config", "vllm", "--override-generation-config", '{"temperature": 0.0}'),
        *("--mm-processor-kwargs", json.dumps(pixels), "--limit-mm-per-prompt", '{"video": 0}'),
        *("--chat-template", str(adapter / "chat_template.jinja")),
        *("--enable-lora", "--max-lora-rank", "8", "--max-loras", "1", "--lora-modules", f"adapter={adapter}"),
    ]
    assert shlex.split(printed.replace("\\\n", " ")) == expected
    body = json.loads(request.splitlines()[1].removeprefix("# "))
    assert body["messages"][0] == {"role": "system", "content": "Be brief."} and body["model"] == "adapter"
    assert predict.main(["--adapter", str(tower), "--print-server", "vllm"]) == 0
    words = shlex.split(capsys.readouterr().out.partition("\n\n")[0].replace("\\\n", " "))
    assert "--enable-tower-connector-lora" in words and words[words.index("--max-lora-rank") + 1] == "32"


def test_the_printed_command_of_transformers_merges_first(adapter, capsys):
    assert predict.main(["--adapter", str(adapter), "--print-server", "transformers"]) == 0
    words = shlex.split(capsys.readouterr().out.partition("\n\n")[0].replace("\\\n", " "))
    merge = ["python", "merge_adapter.py", "--adapter", str(adapter), "--out", f"{adapter}-merged"]
    assert words == [*merge, "transformers", "serve", f"{adapter}-merged", "--host", "127.0.0.1", "--port", "8000"]


def test_the_printed_request_has_the_system_turn_of_the_data(adapter, write_records, capsys):
    rows = [
        {"image": "red.jpg", "question": "What?", "answer": "A mole.", "system": text} for text in ("Be brief.",) * 2
    ]
    command = ["--adapter", str(adapter), "--print-server", "vllm", "--split", "all"]
    path, images = write_records(rows)
    assert predict.main([*command, "--dataset", str(path), "--image-dir", str(images)]) == 0
    assert '{"role": "system", "content": "Be brief."}' in capsys.readouterr().out
    path, images = write_records([rows[0], {**rows[1], "system": "Be kind."}], name="b.json")
    assert run(lambda: predict.main([*command, "--dataset", str(path), "--image-dir", str(images)])) == 1
    assert "--dataset: 2 different system turns" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "processes", "message"),
    [
        ({"server": "http://127.0.0.1:1"}, 1, "--server: goes with --engine vllm"),
        ({"server": "ftp://x", "engine": "vllm"}, 1, "--server: expected an address like http://127.0.0.1:8000"),
        ({"engine": "vllm"}, 4, "--engine vllm: 4 processes would start 4 servers"),
    ],
)
def test_options_that_do_not_go_together(options, processes, message):
    with pytest.raises(ValueError, match=message):
        check_engine_options(engine_args(**options), processes)


def test_served_names_are_different_and_not_kinds_of_content():
    names = served_names(["a/skin", "b/skin", "you/moles", "runs/text", "runs/image", "runs/Qwen"], "of/Qwen")
    assert names == ["skin-1", "skin-2", "moles", "text-adapter", "image-adapter", "Qwen-adapter"]


def test_an_address_with_a_password_is_refused():
    with pytest.raises(ValueError, match="this client sends none"):
        check_url("http://me:secret@127.0.0.1:8000")
    assert check_url("http://127.0.0.1:8000/v1") == "http://127.0.0.1:8000/v1"


@pytest.mark.parametrize("words", [["--out", "x.jsonl"], ["--question", "What?", "--image", "a.jpg"]])
def test_a_printed_command_answers_nothing(adapter, words, capsys):
    assert run(lambda: predict.main(["--adapter", str(adapter), "--print-server", "vllm", *words])) == 1
    assert "--print-server: answers nothing; --" in capsys.readouterr().err


def test_a_png_keeps_every_pixel():
    from evaluation.chat_client import data_uri

    image = Image.effect_noise((64, 48), 90).convert("RGB")
    sent = to_example([{"role": "user", "content": [{"type": "image_url", "image_url": {"url": data_uri(image)}}]}])
    content = io.BytesIO()
    sent["images"][0].save(content, "PNG")
    assert sent["images"][0].tobytes() == image.tobytes()
