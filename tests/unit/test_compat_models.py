"""What models/compat.py relies on: each test fails when transformers, bitsandbytes or TRL changes it."""

import pytest
import torch
from bitsandbytes.nn import Linear4bit, Params4bit
from peft import get_peft_model
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from transformers import AutoModelForImageTextToText
from trl import chat_template_utils

from collator import VisionSFTCollator
from demo.tiny_model import save_tiny_model
from helpers.runs import TEXTS
from helpers.stored import save_stored
from models.attention import REGISTERED, use_varlen, varlen_attention
from models.compat import (
    anchored_match,
    default_16_bit_modules,
    get_attention,
    grouped_product,
    ignore_in_ddp,
    is_stored_quantized,
    keep_trainable_on_cpu,
    lora_factors,
    register_experts,
    set_attention,
    set_up_compiler,
)
from models.experts import expert_layers
from models.families import FAMILIES
from models.loading import load_model
from models.lora import build_lora_config

pytestmark = pytest.mark.canary


@pytest.fixture
def model(tiny_base):
    return AutoModelForImageTextToText.from_pretrained(tiny_base).eval()


def test_config_attn_implementation_sets_the_attention_of_tower_and_language_model(model):
    use_varlen(model)
    found = get_attention(model), get_attention(model.model.visual), get_attention(model.model.language_model)
    assert found == (REGISTERED,) * 3, (
        "transformers: config._attn_implementation no longer reaches the parts of a model"
    )


def calls_of(model, batch):
    """Return the keyword arguments of each attention call of a forward pass."""
    calls = []

    def attend(*args, **kwargs):
        calls.append({**kwargs, "module": type(args[0]).__name__})
        return varlen_attention(*args, **kwargs)

    set_attention(model, REGISTERED, attend)
    with torch.no_grad():
        model(**batch, use_cache=False)
    return [[call for call in calls if ("Vision" in call["module"]) == vision] for vision in (True, False)]


def test_attention_functions_get_the_segments_of_tower_and_packs(model, processor, demo_splits):
    batch = VisionSFTCollator(processor, packed=True)([demo_splits["train"][n] for n in range(3)])
    tower, language = calls_of(model, batch)
    assert len(tower) == model.config.vision_config.depth, (
        "transformers: the tower no longer passes all windows in one call to an attention with 'flash' in its name"
    )
    assert all(call["cu_seq_lens_q"][-1] == len(batch["pixel_values"]) for call in tower), (
        "transformers: the tower no longer passes its windows as cu_seq_lens_q"
    )
    assert len(language) == model.config.text_config.num_hidden_layers
    assert all(call["text_cu_seqlens"] is batch["text_cu_seqlens"] for call in language), (
        "transformers: unknown keywords of a forward pass no longer reach the attention of the language model"
    )


def test_nf4_layers_have_the_switch_for_avx512():
    layer = Linear4bit(64, 64)
    assert hasattr(layer, "support_avx512bf16_for_cpu"), (
        "bitsandbytes: Linear4bit.support_avx512bf16_for_cpu is gone; evaluation may repack weights before training"
    )
    layer.support_avx512bf16_for_cpu = True
    keep_trainable_on_cpu(torch.nn.Sequential(layer))
    assert layer.support_avx512bf16_for_cpu is False


@pytest.mark.parametrize("kind", FAMILIES)
def test_trl_has_the_published_chat_template(kind):
    name = f"{FAMILIES[kind].chat_template}_chat_template"
    assert hasattr(chat_template_utils, name), f"trl: chat_template_utils.{name} is gone; the tiny models need it"


def test_transformers_leaves_what_the_list_names_in_16_bit():
    assert anchored_match("model.visual.merger.mlp.0", ["model.visual"]), (
        "transformers: should_convert_module no longer takes a path from the top of the model"
    )
    assert not anchored_match("model.visual.merger.mlp.0", ["visual"]), (
        "transformers: should_convert_module takes a part of a path; models.quantization.stored_readings may go"
    )


def test_the_lm_head_is_in_16_bit_by_default(model):
    assert default_16_bit_modules(model) == ["lm_head"], "transformers: get_keys_to_not_convert names other modules"


def test_a_model_says_whether_its_files_are_quantised(tiny_base, model, tmp_path):
    stored = load_model(str(save_stored(tiny_base, tmp_path, ["lm_head"])), quantization="nf4", dtype="float32")
    quantised = load_model(str(tiny_base), quantization="nf4", dtype="float32")
    found = [is_stored_quantized(one) for one in (stored, quantised, model)]
    assert found == [True, False, False], "transformers: hf_quantizer.pre_quantized is gone, or means something else"


@pytest.fixture(scope="module")
def base_with_experts(tmp_path_factory):
    folder = tmp_path_factory.mktemp("experts")
    save_tiny_model(folder, TEXTS, hidden_size=64, num_layers=3, family="qwen3_vl_moe")
    return folder


def test_experts_are_computed_by_a_registered_function_that_sees_pefts_factors(base_with_experts):
    model, seen = AutoModelForImageTextToText.from_pretrained(base_with_experts), []
    settings = {"r": 4, "lora_alpha": 8, "lora_dropout": 0.0, "target_experts": True}
    adapted = get_peft_model(model, build_lora_config(model, **settings))

    def compute(module, hidden_states, top_k_index, top_k_weights):
        weight, [(left, right, scaling)] = lora_factors(module, "gate_up_proj")
        seen.append((tuple(weight.shape), tuple(left.shape), tuple(right.shape), scaling))
        return hidden_states

    register_experts("watched", compute)
    model.set_experts_implementation("watched")
    with torch.no_grad():
        adapted(input_ids=torch.arange(4)[None])
    assert seen == [((4, 128, 64), (4, 128, 4), (4, 4, 64), 2.0)] * 3, (
        "transformers or peft: experts are called in another way, or PEFT puts something else on their weights"
    )
    weight, factors = lora_factors(expert_layers(adapted)["base_model.model.model.language_model.layers.0.mlp.experts."
                                                          "base_layer.base_layer"], "gate_up_proj")  # fmt: skip
    assert weight.shape == (4, 128, 64) and not factors, "peft: its updates stay on a parameter after a forward pass"


def test_experts_are_quantised_while_they_are_read(base_with_experts):
    model = load_model(str(base_with_experts), quantization="nf4", dtype="float32")
    weights = [layer.gate_up_proj_nf4 for layer in expert_layers(model).values()]
    assert len(weights) == 3 and all(isinstance(weight, Params4bit) for weight in weights), (
        "transformers: quantizers no longer turn a weight into a parameter of their own, or no longer ask for each"
    )
    assert weights[0].quant_state.shape == torch.Size([4, 128, 64])


def test_grouped_products_are_those_of_each_group():
    x, weight = torch.randn(10, 8), torch.randn(3, 8, 4)
    found = grouped_product(x, weight, torch.tensor([4, 4, 10], dtype=torch.int32))
    expected = torch.cat([x[:4] @ weight[0], x[4:] @ weight[2]])
    assert torch.allclose(found, expected, atol=1e-6), "transformers: moe._grouped_mm takes other arguments"


def test_distributed_training_leaves_out_what_it_is_told_to():
    module = torch.nn.Linear(2, 2)
    ignore_in_ddp(module, ["weight"])
    assert module._ddp_params_and_buffers_to_ignore == ["weight"], "torch: DDP is told in another way what to ignore"


def test_a_compiled_function_may_have_more_than_eight_variants_once_that_is_allowed():
    def variants(count):
        torch.compiler.reset()
        compiled = torch.compile(lambda x, n: x + n, backend="eager", dynamic=False, fullgraph=True)
        return [compiled(torch.zeros(2 + n), n).sum().item() for n in range(count)]

    config = torch._dynamo.config
    with config.patch(recompile_limit=8):
        with pytest.raises(torch._dynamo.exc.FailOnRecompileLimitHit):
            variants(9)
            pytest.fail("torch: more variants than recompile_limit are no error any more; set_up_compiler can go")
        set_up_compiler()
        assert variants(20)[-1] == 21 * 19, "torch: recompile_limit no longer decides how many variants there may be"
    torch.compiler.reset()


@pytest.mark.parametrize("constant", [False, True])
def test_floats_are_constants_of_compiled_functions_once_that_is_set_up(constant):
    """Else a function that multiplies by one is traced twice."""

    class Scaled(torch.nn.Module):
        scale = 0.5

        def forward(self, x):
            return torch.sin(x) * self.scale

    torch.compiler.reset()
    graphs, config = [], torch._dynamo.config
    with config.patch(specialize_float=False):
        if constant:
            set_up_compiler()
        compiled = torch.compile(Scaled(), backend=lambda graph, _: graphs.append(graph) or graph, dynamic=True)
        compiled(torch.ones(3))
    inputs = [node.name for node in graphs[0].graph.nodes if node.op == "placeholder"]
    assert any("scale" in name for name in inputs) is not constant, "torch: specialize_float has another meaning"
    torch.compiler.reset()


@pytest.fixture
def one_process_group(tmp_path):
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


@pytest.mark.parametrize("constant", [False, True])
def test_sizes_of_sharded_layers_are_constants_of_compiled_functions_once_that_is_set_up(one_process_group, constant):
    """Else each width of a layer is an input, and the layer compiles for twice as long."""

    class Folded(torch.nn.Identity):
        def forward(self, x):
            return torch.sin(x.view(-1, self.width))

    torch.compiler.reset()
    graphs, config = [], torch._dynamo.config
    layer = fully_shard(Folded(), mesh=init_device_mesh("cpu", (1,)))
    layer.width = 4
    with config.patch(skip_fsdp_guards=True):
        if constant:
            set_up_compiler()
        run = torch.compile(Folded.forward, backend=lambda graph, _: graphs.append(graph) or graph, dynamic=True)
        run(layer, torch.ones(12))
    inputs = [node.meta["example_value"] for node in graphs[0].graph.nodes if node.op == "placeholder"]
    found = [value for value in inputs if isinstance(value, torch.SymInt) and int(value) == layer.width]
    assert (found != []) is not constant, "torch: skip_fsdp_guards has another meaning"
    torch.compiler.reset()
