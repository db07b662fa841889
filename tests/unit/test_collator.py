"""The tensors of a batch: images at their markers, labels on the answers and nowhere else."""

import io

import pytest
import torch
from datasets import Dataset
from PIL import Image
from qwen_vl_utils import fetch_image
from transformers import AutoModelForImageTextToText
from trl.chat_template_utils import get_training_chat_template

from collator import VisionSFTCollator, build_labels, collate_prompts, encode, load_pixels, render
from data_prep.records import to_chat
from data_prep.sizes import fit_options, fit_size
from models.attention import use_varlen
from models.loading import load_processor
from planning.estimates import estimate_lengths
from training.lengths import measure_lengths

RED, GREEN = Image.new("RGB", (112, 112), "red"), Image.new("RGB", (112, 56), "green")


def chat(*texts, system=None):
    roles = ("user", "assistant")
    messages = [{"role": roles[n % 2], "content": text} for n, text in enumerate(texts)]
    return [{"role": "system", "content": system}] * (system is not None) + messages


CASES = {
    "one image": {"images": [RED], "messages": chat("<image>What is it?", "melanoma")},
    "no image": {"images": [], "messages": chat("Hello?", "It is psoriasis.")},
    "system turn": {"images": [RED], "messages": chat("Look <image> here", "vitiligo", system="Be brief.")},
    "several turns": {"images": [RED], "messages": chat("<image>\nWhat?", "This.", "Sure?", "It is\n\nmelanoma.")},
    "second image in a later turn": {
        "images": [RED, GREEN],
        "messages": chat("<image>What?", "melanoma", "And <image>? Compare.", "vitiligo"),
    },
    "the header as plain words": {"images": [], "messages": chat("im_start assistant\n what", "assistant\nassistant")},
}


def example(name):
    return {"id": name, **CASES[name]}


@pytest.fixture
def collate(processor):
    return VisionSFTCollator(processor)


def expected_ids(processor, messages):
    """Return the supervised ids turn by turn: each answer's tokens and <|im_end|>."""
    tokenizer = processor.tokenizer
    answers = [m["content"] for m in messages if m["role"] == "assistant"]
    return [token for text in answers for token in [*tokenizer.encode(text), tokenizer.encode("<|im_end|>")[0]]]


@pytest.mark.parametrize("name", CASES)
def test_build_labels_supervises_only_assistant_turns(processor, collate, name):
    labels = collate([example(name)])["labels"][0]
    assert labels[labels != -100].tolist() == expected_ids(processor, CASES[name]["messages"])


def test_build_labels_on_ids_written_out_by_hand():
    header, end = [1, 2, 3], 9
    rows = torch.tensor(
        [
            [1, 2, 3, 5, 6, 9, 4, 1, 2, 3, 7, 9, 4],
            [1, 7, 3, 5, 9, 9, 1, 2, 3, 9, 5, 0, 0],  # no header at first; then an empty answer
            [8, 8, 8, 8, 8, 8, 8, 8, 8, 8, 1, 2, 3],  # a header at the very end
        ]
    )
    assert build_labels(rows, header_ids=header, end_id=end).tolist() == [
        [-100, -100, -100, 5, 6, 9, -100, -100, -100, -100, 7, 9, -100],
        [-100, -100, -100, -100, -100, -100, -100, -100, -100, 9, -100, -100, -100],
        [-100] * 13,
    ]


@pytest.mark.parametrize("name", CASES)
def test_labels_agree_with_trls_assistant_mask(processor, collate, name):
    """TRL's training template marks the newline after <|im_end|> as well; up to that the two are the same."""
    sample = example(name)
    images = load_pixels(sample, processor)
    theirs = processor.apply_chat_template(
        to_chat_with(images, sample["messages"]),
        chat_template=get_training_chat_template(processor),
        tokenize=True,
        return_dict=True,
        return_assistant_tokens_mask=True,
        return_tensors="pt",
        processor_kwargs={"images_kwargs": {"do_resize": False}},
    )
    ours = collate([sample])
    newline = processor.tokenizer.encode("\n")[0]
    end = processor.tokenizer.convert_tokens_to_ids("<|im_end|>")
    ids = torch.as_tensor(theirs["input_ids"])
    after_end = torch.zeros_like(ids, dtype=torch.bool)
    after_end[:, 1:] = (ids[:, :-1] == end) & (ids[:, 1:] == newline)
    mask = torch.as_tensor(theirs["assistant_masks"]).bool() & ~after_end
    assert torch.equal(ours["input_ids"], ids)
    assert torch.equal(ours["labels"] != -100, mask)


def to_chat_with(images, messages):
    """Fill the typed image blocks with the images, in order."""
    left = iter(images)
    filled = to_chat(messages)
    for message in filled:
        for block in message["content"]:
            if block["type"] == "image":
                block["image"] = next(left)
    return filled


def test_images_are_at_the_positions_of_their_markers(processor, collate):
    batch = collate([example("second image in a later turn")])
    text = processor.tokenizer.decode(batch["input_ids"][0])
    red, green = "<|image_pad|>" * 16, "<|image_pad|>" * 8
    assert f"user\n<|vision_start|>{red}<|vision_end|>What?<|im_end|>" in text
    assert f"And<|vision_start|>{green}<|vision_end|>? Compare." in text
    assert batch["image_grid_thw"].tolist() == [[1, 8, 8], [1, 4, 8]]
    assert batch["pixel_values"].shape == (64 + 32, 1176)
    mean = batch["pixel_values"].reshape(96, 3, -1).mean(dim=2)  # (patches, RGB), normalised
    assert (mean[:64, 0] > 0).all() and (mean[:64, 1] < 0).all()
    assert (mean[64:, 0] < 0).all() and (mean[64:, 1] > -1).all()


SHAPES = [  # patch size, merge size, mean and deviation: Qwen2-VL and Qwen2.5-VL, then Qwen3-VL
    {},
    {"patch_size": 16, "image_mean": [0.5] * 3, "image_std": [0.5] * 3},
    {"patch_size": 8, "merge_size": 4, "temporal_patch_size": 3},
]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("side", ["left", "right"])
def test_a_batch_equals_the_processors(processor, shape, side):
    for name, value in shape.items():
        setattr(processor.image_processor, name, value)
    photo = Image.merge("RGB", [Image.effect_noise((130, 97), 60 + n) for n in range(3)])
    examples = [{"messages": chat("<image>?", "melanoma"), "images": [photo]}, *map(example, CASES)]
    texts = [render(processor, one["messages"]) for one in examples]
    ours = encode(processor, examples, texts, padding_side=side)
    images = [image for one in examples for image in load_pixels(one, processor)]
    options = {"text_kwargs": {"padding": True, "padding_side": side}, "images_kwargs": {"do_resize": False}}
    theirs = processor(text=texts, images=images, **options, return_tensors="pt")
    assert set(ours) == set(theirs)
    for key, value in theirs.items():
        assert ours[key].dtype == value.dtype and torch.allclose(ours[key], value, atol=1e-6), key


def test_an_image_is_resized_as_by_qwen_vl_utils(processor):
    for size in [(600, 450), (31, 300), (900, 90)]:
        photo = Image.effect_noise(size, 60).convert("RGB")
        ours = load_pixels({"images": [photo]}, processor)[0]
        theirs = fetch_image({"image": photo, "min_pixels": 28 * 28, "max_pixels": 112 * 112})
        assert ours.size == theirs.size and ours.tobytes() == theirs.tobytes()


def test_a_large_jpeg_costs_as_many_tokens_as_its_own_size_says(processor):
    file = io.BytesIO()
    Image.new("RGB", (1009, 1531)).save(file, "JPEG")  # an eighth of it, rounded up, has other proportions
    images = [{"bytes": file.getvalue(), "path": None}]
    expected = fit_size(1009, 1531, **fit_options(processor.image_processor))
    assert load_pixels({"images": images}, processor)[0].size == expected


@pytest.mark.parametrize("size", [(60, 40), (600, 450), (31, 300), (1009, 1531)])
def test_training_counting_and_planning_agree_about_the_size_of_an_image(processor, size):
    options = fit_options(processor.image_processor)
    (image,) = load_pixels({"images": [Image.new("RGB", size)]}, processor)
    assert image.size == fit_size(*size, **options)
    sample = {"id": "s", "messages": example("one image")["messages"], "label": None, "image_sizes": [list(size)]}
    split = Dataset.from_list([sample])
    token_side = options.pop("cell")
    counted = measure_lengths(split, processor).image
    assert counted == estimate_lengths(split, token_side=token_side, **options).image
    assert counted == [image.width * image.height // token_side**2]


def test_a_batch_is_padded_on_the_right_and_keeps_the_token_types(processor, collate):
    batch = collate([example(name) for name in CASES])
    lengths = batch["attention_mask"].sum(dim=1)
    for row, name in enumerate(CASES):
        alone = collate([example(name)])
        length = alone["input_ids"].size(1)
        assert lengths[row] == length
        for key in ("input_ids", "labels", "mm_token_type_ids"):
            assert torch.equal(batch[key][row, :length], alone[key][0])
        assert (batch["labels"][row, length:] == -100).all()
        assert batch["attention_mask"][row].tolist() == [1] * length + [0] * (len(batch["input_ids"][row]) - length)
    image_token = processor.tokenizer.convert_tokens_to_ids("<|image_pad|>")
    assert torch.equal(batch["mm_token_type_ids"] == 1, batch["input_ids"] == image_token)


def test_a_batch_without_images_has_no_pixels(collate):
    assert set(collate([example("no image")])) == {"input_ids", "attention_mask", "mm_token_type_ids", "labels"}


def test_a_sample_over_max_length_raises_with_its_numbers(processor):
    length = VisionSFTCollator(processor)([example("one image")])["input_ids"].size(1)
    VisionSFTCollator(processor, max_length=length)([example("one image")])
    rule = rf"sample 'one image': {length} tokens, 16 of them image; max_length is {length - 1}"
    with pytest.raises(ValueError, match=rule):
        VisionSFTCollator(processor, max_length=length - 1)([example("one image")])


def test_a_sample_with_the_wrong_number_of_markers_raises(collate):
    with pytest.raises(ValueError, match=r"sample 'x': 1 <image> marker\(s\) for 2 image\(s\)"):
        collate([{"id": "x", "images": [RED, RED], "messages": chat("<image>What?", "melanoma")}])


def test_a_text_with_tokens_of_an_answer_raises(collate):
    smuggled = chat("Hi<|im_end|>\n<|im_start|>assistant\nYes<|im_end|>", "No")
    with pytest.raises(ValueError, match="sample 'x': 2 answers to learn from, expected 1"):
        collate([{"id": "x", "images": [], "messages": smuggled}])
    with pytest.raises(ValueError, match="sample 'x': 0 answers to learn from, expected 0"):
        collate([{"id": "x", "images": [], "messages": chat("Only a question")}])


def test_a_text_with_an_image_token_raises(collate):
    smuggled = {"id": "x", "images": [], "messages": chat("<|image_pad|>?", "No")}
    with pytest.raises(ValueError, match="sample 'x': 1 image tokens in the text, expected 0"):
        collate([example("one image"), smuggled])


def test_a_missing_image_names_the_sample(collate, tmp_path):
    gone = {"id": "x", "images": [str(tmp_path / "gone.jpg")], "messages": chat("<image>?", "melanoma")}
    with pytest.raises(ValueError, match="sample 'x', image 0: no such file"):
        collate([gone])


def test_paths_bytes_and_pictures_collate_alike(collate, tmp_path):
    path = tmp_path / "a.png"
    RED.save(path)
    forms = [RED, str(path), {"bytes": path.read_bytes(), "path": None}, {"bytes": None, "path": str(path)}]
    batches = [collate([{**example("one image"), "images": [form]}])["pixel_values"] for form in forms]
    assert all(torch.equal(batch, batches[0]) for batch in batches)


@pytest.mark.parametrize(
    ("limits", "tokens"),
    [({}, 21 * 16), ({"max_pixels": 112 * 112}, 4 * 3), ({"min_pixels": 896 * 896}, 37 * 28)],
)
def test_pixel_limits_decide_how_many_tokens_an_image_costs(tiny_base, limits, tokens):
    wide = {"id": "w", "images": [Image.new("RGB", (600, 450))], "messages": chat("<image>?", "melanoma")}
    batch = VisionSFTCollator(load_processor(str(tiny_base), **limits))([wide])
    assert (batch["mm_token_type_ids"] == 1).sum() == tokens


def test_prompts_are_padded_on_the_left_and_end_with_the_assistants_header(processor):
    samples = [{**example(name), "messages": CASES[name]["messages"][:-1]} for name in CASES]
    batch = collate_prompts(processor, samples)
    header = processor.tokenizer.encode("<|im_start|>assistant\n")
    assert all(row[-len(header) :].tolist() == header for row in batch["input_ids"])
    assert all((mask.diff() >= 0).all() for mask in batch["attention_mask"])


@pytest.fixture
def pack(processor):
    return VisionSFTCollator(processor, packed=True)


@pytest.fixture(params=["sdpa", "varlen"])
def model(request, tiny_base):
    model = AutoModelForImageTextToText.from_pretrained(tiny_base).eval()
    if request.param == "varlen":
        use_varlen(model)
    return model


def test_a_pack_is_the_concatenation_of_the_samples(pack, collate):
    examples = [example(name) for name in CASES]
    row, alone = pack(examples), [collate([one]) for one in examples]
    for name in ("input_ids", "labels"):
        assert torch.equal(row[name], torch.cat([batch[name] for batch in alone], dim=1))
    lengths = [batch["input_ids"].size(1) for batch in alone]
    assert row["text_cu_seqlens"].diff().tolist() == lengths and row["text_max_seqlen"] == max(lengths)
    assert row["text_cu_seqlens"].dtype == torch.int32
    assert torch.equal(row["pixel_values"], torch.cat([b["pixel_values"] for b in alone if "pixel_values" in b]))
    assert set(row) == {
        *(
            "input_ids",
            "labels",
            "position_ids",
            "pixel_values",
            "image_grid_thw",
            "text_cu_seqlens",
            "text_max_seqlen",
            "answer_rows",
        )
    }
    learnt = (row["labels"] != -100)[0].nonzero().flatten()
    assert torch.equal(row["answer_rows"], learnt - 1)


def test_positions_are_those_of_the_model(pack, collate, model):
    examples = [example(name) for name in CASES]
    row = pack(examples)
    start = 0
    for one in examples:
        batch = collate([one])
        names = ("input_ids", "image_grid_thw", "mm_token_type_ids", "attention_mask")
        expected, _ = model.model.get_rope_index(**{name: batch[name] for name in names if name in batch})
        end = start + batch["input_ids"].size(1)
        assert torch.equal(row["position_ids"][1:, :, start:end], expected)
        assert torch.equal(row["position_ids"][0, 0, start:end], torch.arange(end - start))
        start = end
    assert row["position_ids"].shape == (4, 1, start)


def test_packed_loss_and_gradients_equal_those_of_separate_samples(pack, collate, model):
    examples = [example(name) for name in CASES]
    packed = pack(examples)
    count = (packed["labels"] != -100).sum()
    loss = model(**packed, use_cache=False).loss
    loss.backward()
    packed_gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    batches = [collate([one]) for one in examples]
    total = sum(model(**batch).loss * (batch["labels"] != -100).sum() for batch in batches) / count
    total.backward()
    assert loss.item() == pytest.approx(total.item(), abs=1e-5)
    for name, parameter in model.named_parameters():
        if parameter.grad is not None:
            assert torch.allclose(packed_gradients[name], parameter.grad, atol=1e-5), name


@torch.no_grad()
def test_a_changed_sample_changes_no_logit_of_another(pack, model):
    names = ["one image", "several turns", "second image in a later turn"]
    examples = [example(name) for name in names]
    before = pack(examples)
    blue = Image.new("RGB", (112, 112), "blue")
    examples[1] = {**examples[1], "images": [blue], "messages": chat("<image>\nWhat?", "That.", "Sure?", "It is not.")}
    after = pack(examples)
    logits = [model(**batch, use_cache=False).logits[0] for batch in (before, after)]
    (a, b), (c, d) = before["text_cu_seqlens"][1:3].tolist(), after["text_cu_seqlens"][1:3].tolist()
    assert torch.allclose(logits[0][:a], logits[1][:c], atol=1e-6)
    assert torch.allclose(logits[0][b:], logits[1][d:], atol=1e-6)
    assert (logits[0][a:b][:5] - logits[1][c:d][:5]).abs().max() < 1e-6  # the header before the image
    assert (logits[0][b - 1] - logits[1][d - 1]).abs().max() > 1e-3


def test_a_sample_over_max_length_is_named_in_a_pack_too(processor):
    with pytest.raises(ValueError, match=r"sample 'one image': \d+ tokens, 16 of them image; max_length is 40"):
        VisionSFTCollator(processor, max_length=40, packed=True)([example("no image"), example("one image")])
