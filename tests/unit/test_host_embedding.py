"""The input embedding in the host's memory: the same rows, no weights that anything else finds, and its refusals."""

import pytest
import torch

from models.families import published_config
from models.host_embedding import HostEmbedding, move_embedding_to_host
from models.loading import load_model
from training.config import parse_config
from training.config_checks import check_base

WORDS = ["--config", "configs/demo.yaml", "--dataset_path", "x", "--offload_embedding", "true"]


@pytest.mark.parametrize("shape", [(2, 3), (1, 0), (5,), (1, 4096)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_it_returns_the_rows_of_the_embedding(shape, dtype):
    embedding = torch.nn.Embedding(7, 4, dtype=dtype)
    ids = torch.randint(7, shape)
    assert torch.equal(HostEmbedding(embedding.weight)(ids), embedding(ids))


def test_an_id_outside_of_the_vocabulary_is_an_error():
    with pytest.raises(IndexError):
        HostEmbedding(torch.ones(7, 4))(torch.tensor([[7]]))


def test_the_model_has_no_embedding_that_could_be_moved_trained_or_saved(tiny_base):
    model = load_model(str(tiny_base), quantization=None, dtype=torch.float32)
    weight, before = model.get_input_embeddings().weight.detach(), model.state_dict()
    move_embedding_to_host(model)
    missing = before.keys() - model.state_dict().keys()
    assert missing == {"model.language_model.embed_tokens.weight"}
    model.to(torch.float16)
    assert torch.equal(model.get_input_embeddings().rows, weight)


def test_a_model_whose_head_is_the_embedding_is_refused():
    settings = parse_config([*WORDS, "--model_name_or_path", "Qwen/Qwen2.5-VL-3B-Instruct"])
    with pytest.raises(ValueError, match=r"offload_embedding: Qwen/.*3B.* uses the embedding as its LM head too"):
        check_base(settings, published_config("Qwen2.5-VL-3B"))
    check_base(settings, published_config("Qwen2.5-VL-7B"))
