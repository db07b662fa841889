"""A frozen vision tower reads each image once; an adapted one is not taken for frozen."""

import pytest
import torch
from peft import LoraConfig, get_peft_model
from PIL import Image

from collator import load_pixels
from demo.tiny_model import save_tiny_model
from evaluation.generation import answer_and_score
from evaluation.image_features import ImageFeatures, byte_size, digest, is_adapted
from models.adapters import load_answering_model
from models.loading import load_processor

ANSWERS = ["This is melanoma.", "It is psoriasis."]


@pytest.fixture(scope="module", params=["qwen2_5_vl", "qwen3_vl"])
def answering(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp(request.param)
    save_tiny_model(folder, ["This is melanoma. It is psoriasis. What is shown?"], num_layers=3, family=request.param)
    model = load_answering_model(None, base=str(folder), quantization="none", dtype="float32")
    return model, load_processor(str(folder))


@pytest.fixture
def examples(demo_splits):
    samples = [demo_splits["train"][n] for n in (0, 1, 2)]
    return [{"id": s["id"], "images": s["images"], "messages": s["messages"][:-1]} for s in samples]


def test_kept_outputs_give_the_same_answers_and_likelihoods(answering, examples):
    model, processor = answering
    features = ImageFeatures(model)
    plain = answer_and_score(model, processor, examples, 8, [ANSWERS] * 3)
    first = answer_and_score(model, processor, examples, 8, [ANSWERS] * 3, features=features)
    count = features.runs
    again = answer_and_score(model, processor, examples, 8, [ANSWERS] * 3, features=features)
    turned = answer_and_score(model, processor, examples[::-1], 8, [ANSWERS] * 3, features=features)
    assert first == again and count == features.runs == 3
    assert first[0] == plain[0] == turned[0][::-1]
    assert torch.allclose(torch.tensor(first[2]), torch.tensor(plain[2]), atol=1e-4)
    assert torch.allclose(torch.tensor(first[2]), torch.tensor(turned[2][::-1]), atol=1e-4)


def test_the_least_recently_used_images_leave(answering, examples):
    model, processor = answering
    images = [load_pixels(example, processor)[0] for example in examples]
    one = ImageFeatures(model)
    keys = [digest(image) for image in images]
    one(images[:1], keys[:1], processor.image_processor)
    size = byte_size(one.kept[keys[0]])
    features = ImageFeatures(model, limit=2 * size)
    for n in (0, 1, 0, 2):
        features([images[n]], [keys[n]], processor.image_processor)
    assert list(features.kept) == [keys[0], keys[2]]
    assert (features.runs, features.size) == (3, 2 * size)


def test_pixels_and_size_make_the_digest():
    wide, high = Image.new("RGB", (56, 28)), Image.new("RGB", (28, 56))
    assert wide.tobytes() == high.tobytes() and digest(wide) != digest(high)
    assert digest(wide) != digest(Image.new("RGB", (56, 28), (0, 0, 1)))


@pytest.mark.parametrize("options", [{"target_modules": r".*visual.*\.qkv"}, {"modules_to_save": ["merger"]}])
def test_a_tower_with_weights_of_an_adapter_is_not_frozen(answering, options):
    model, _ = answering
    adapted = get_peft_model(model, LoraConfig(**{"target_modules": ["q_proj"], **options}))
    try:
        assert is_adapted(model)
        with pytest.raises(ValueError, match="an adapter has weights in the vision tower"):
            ImageFeatures(model)
    finally:
        adapted.unload()
