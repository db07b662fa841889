"""The model families and everything in which they differ: `FAMILIES[config.model_type]`."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import NamedTuple

from transformers import (
    AutoConfig,
    PreTrainedConfig,
    PreTrainedModel,
    ProcessorMixin,
    Qwen2_5_VLProcessor,
    Qwen2Tokenizer,
    Qwen2VLImageProcessor,
    Qwen2VLProcessor,
    Qwen2VLVideoProcessor,
    Qwen3_5Tokenizer,
    Qwen3VLProcessor,
    Qwen3VLVideoProcessor,
)

# The numbers in `Shape.sizes`, by their names in config.json; the last entry there is tie_word_embeddings.
TEXT_SIZES = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
TEXT_SIZES += ("num_key_value_heads", "vocab_size")


class Shape(NamedTuple):
    """What config.json of a published model says beyond the defaults of its class.

    Attributes:
        sizes: see `TEXT_SIZES`.
        vision: settings of the vision tower.
        text: other settings of the language model.
    """

    sizes: tuple
    vision: dict = {}
    text: dict = {}


ATTENTION_AND_MLP = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


@dataclass(frozen=True, kw_only=True)
class Family:
    """What sets a family of models apart.

    Module paths start at the top model and are matched as prefixes: vision tower and language model have layers of the
    same names, and a bare "gate_proj" would match both.
    """

    name: str  # in messages
    processor: type[ProcessorMixin]  # families may share one
    token_side: int  # side of the square that one token covers, px
    pixel_limits: tuple[int, int]  # smallest and largest image area of the published processors, px^2
    shapes: dict[str, Shape]  # by published model
    rope: dict  # rotary positions of the published models
    special_layers: int = 0  # language layers at the start that also receive features of the tower
    layer_period: int = 1  # language layers after which their kinds repeat
    experts: str = ""  # path of the experts within a language layer; none without
    linear_attention: str = ""  # name of the module in layers that mix tokens by a recurrence; none without
    lora_targets: tuple[str, ...] = ATTENTION_AND_MLP  # linear language layers that LoRA adapts by default
    output_key: str = "out_hidden_size"  # name in the vision configuration of the language model's width
    language_layers: str = "model.language_model.layers."
    former_language_layers: str = "model.layers."  # before transformers 4.52, and still in files
    vision: str = "model.visual."
    vision_blocks: str = "model.visual.blocks."
    mergers: tuple[str, ...] = ("model.visual.merger.",)
    unquantized: tuple[str, ...] = ("model.visual", "lm_head")  # complete paths; bitsandbytes finds no bare "visual"
    answer_header: str = "<|im_start|>assistant\n"  # the chat template's generation prompt
    end_token: str = "<|im_end|>"
    thinks: bool = False  # whether each answer starts with a think block, empty or not
    # Of models with few random weights, for dry runs, the demo and the tests
    tiny_vision: Callable[[int], dict]  # settings of a tower of two blocks, from its width
    tiny_text: dict  # settings of a language model with heads of 32
    chat_template: str  # name of the published one in trl.chat_template_utils
    tokenizer: type = Qwen2Tokenizer
    image_processor: Callable = Qwen2VLImageProcessor
    video_processor: Callable = Qwen2VLVideoProcessor

    def former_path(self, path: str) -> str:
        """Return a module's path as it was before transformers 4.52."""
        layer = path.removeprefix(self.language_layers)
        return path if layer == path else self.former_language_layers + layer


_ROPE = {"rope_type": "default", "rope_theta": 1e6}
_QWEN2 = {
    "rope": {**_ROPE, "mrope_section": [16, 24, 24]},
    "token_side": 28,
    "pixel_limits": (3136, 12845056),
    "tiny_text": {"rope_parameters": {**_ROPE, "mrope_section": [4, 6, 6]}},
    "chat_template": "qwen2_5_vl",
}
_TOWER_3420 = {"hidden_size": 1280, "intermediate_size": 3420}
_TOWER_3456 = {"hidden_size": 1280, "intermediate_size": 3456}
_SMALL_TOWER = {"depth": 24, "hidden_size": 1024, "intermediate_size": 4096, "deepstack_visual_indexes": [5, 11, 17]}
_LARGE_TOWER = {"depth": 27, "hidden_size": 1152, "intermediate_size": 4304, "deepstack_visual_indexes": [8, 16, 24]}
_TOWER_768 = {"depth": 12, "hidden_size": 768, "intermediate_size": 3072, "num_heads": 12}
_TOWER_1024 = {"depth": 24, "hidden_size": 1024, "intermediate_size": 4096}
_SHAPE_27B = Shape((5120, 17408, 64, 24, 4, 248320, False), {}, {"linear_num_value_heads": 48})
_QWEN3_IMAGES = partial(Qwen2VLImageProcessor, image_mean=[0.5] * 3, image_std=[0.5] * 3)

_TINY_EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 64}

FAMILIES = {
    "qwen2_vl": Family(
        **_QWEN2,
        name="Qwen2-VL",
        processor=Qwen2VLProcessor,
        shapes={
            "Qwen2-VL-2B": Shape((1536, 8960, 28, 12, 2, 151936, True)),
            "Qwen2-VL-7B": Shape((3584, 18944, 28, 28, 4, 152064, False)),
            "Qwen2-VL-72B": Shape((8192, 29568, 80, 64, 8, 152064, False)),
        },
        output_key="hidden_size",
        tiny_vision=lambda width: {"embed_dim": width, "mlp_ratio": 2},
    ),
    "qwen2_5_vl": Family(
        **_QWEN2,
        name="Qwen2.5-VL",
        processor=Qwen2_5_VLProcessor,
        shapes={
            "Qwen2.5-VL-3B": Shape((2048, 11008, 36, 16, 2, 151936, True), _TOWER_3420),
            "Qwen2.5-VL-7B": Shape((3584, 18944, 28, 28, 4, 152064, False), _TOWER_3420),
            "Qwen2.5-VL-32B": Shape((5120, 27648, 64, 40, 8, 152064, False), _TOWER_3456),
            "Qwen2.5-VL-72B": Shape((8192, 29568, 80, 64, 8, 152064, False), _TOWER_3456),
        },
        tiny_vision=lambda width: {"hidden_size": width, "intermediate_size": 2 * width, "fullatt_block_indexes": [1]},
    ),
    "qwen3_vl": Family(
        name="dense Qwen3-VL",
        processor=Qwen3VLProcessor,
        token_side=32,
        pixel_limits=(65536, 16777216),
        shapes={
            "Qwen3-VL-2B": Shape((2048, 6144, 28, 16, 8, 151936, True), _SMALL_TOWER),
            "Qwen3-VL-4B": Shape((2560, 9728, 36, 32, 8, 151936, True), _SMALL_TOWER),
            "Qwen3-VL-8B": Shape((4096, 12288, 36, 32, 8, 151936, False), _LARGE_TOWER),
            "Qwen3-VL-32B": Shape((5120, 25600, 64, 64, 8, 151936, False), _LARGE_TOWER),
        },
        rope={**_ROPE, "mrope_section": [16, 24, 24]},
        special_layers=3,
        mergers=("model.visual.merger.", "model.visual.deepstack_merger_list."),
        tiny_vision=lambda width: {
            **{"hidden_size": width, "intermediate_size": 2 * width},
            **{"num_position_embeddings": 8 * 8, "deepstack_visual_indexes": [0, 1]},
        },
        tiny_text={
            "rope_parameters": {**_ROPE, "mrope_section": [6, 5, 5], "mrope_interleaved": True},
            "head_dim": 32,
        },
        chat_template="qwen3_vl",
        image_processor=_QWEN3_IMAGES,
        video_processor=Qwen3VLVideoProcessor,
    ),
    # Also Qwen3.6 and 3.8. Shapes: the models' config.json, as copies in public repositories give them.
    "qwen3_5": Family(
        name="dense Qwen3.5, 3.6 and 3.8",
        processor=Qwen3VLProcessor,
        token_side=32,
        pixel_limits=(65536, 16777216),
        shapes={
            "Qwen3.5-0.8B": Shape((1024, 3584, 24, 8, 2, 248320, True), _TOWER_768, {"linear_num_value_heads": 16}),
            "Qwen3.5-2B": Shape((2048, 6144, 24, 8, 2, 248320, True), _TOWER_1024, {"linear_num_value_heads": 16}),
            "Qwen3.5-4B": Shape((2560, 9216, 32, 16, 4, 248320, True), _TOWER_1024),
            "Qwen3.5-9B": Shape((4096, 12288, 32, 16, 4, 248320, False)),
            "Qwen3.5-27B": _SHAPE_27B,
            "Qwen3.6-27B": _SHAPE_27B,
            "Qwen3.8-27B": _SHAPE_27B,
        },
        rope={
            **{"rope_type": "default", "rope_theta": 1e7, "partial_rotary_factor": 0.25},
            **{"mrope_section": [11, 11, 10], "mrope_interleaved": True},
        },
        layer_period=4,
        linear_attention="linear_attn",
        # Left out: in_proj_a and in_proj_b, which give one number a head (how fast it forgets, how much it writes) and
        # are hardly wider than LoRA's own matrices; conv1d, which is no linear layer and mixes four neighbours only.
        lora_targets=(*ATTENTION_AND_MLP, "in_proj_qkv", "in_proj_z", "out_proj"),
        thinks=True,
        tiny_vision=lambda width: {
            **{"hidden_size": width, "intermediate_size": 2 * width, "num_position_embeddings": 8 * 8},
        },
        tiny_text={
            "rope_parameters": {
                **{**_ROPE, "partial_rotary_factor": 0.5, "mrope_section": [4, 2, 2], "mrope_interleaved": True},
            },
            "head_dim": 32,
            "full_attention_interval": 2,
            **{"linear_num_key_heads": 2, "linear_num_value_heads": 4},
            **{"linear_key_head_dim": 32, "linear_value_head_dim": 32},
        },
        chat_template="qwen3_5_think",
        tokenizer=Qwen3_5Tokenizer,
        image_processor=_QWEN3_IMAGES,
        video_processor=Qwen3VLVideoProcessor,
    ),
}
_QWEN3_VL, _QWEN3_5 = FAMILIES["qwen3_vl"], FAMILIES["qwen3_5"]
# Shapes: the 30B model's config.json as public repositories copy it, and THUDM/slime's scripts/models of both.
FAMILIES["qwen3_vl_moe"] = replace(
    _QWEN3_VL,
    name="Qwen3-VL with experts",
    shapes={
        "Qwen3-VL-30B-A3B": Shape(
            (2048, 6144, 48, 32, 4, 151936, False),
            _LARGE_TOWER,
            {"num_experts": 128, "num_experts_per_tok": 8, "moe_intermediate_size": 768, "head_dim": 128},
        ),
        "Qwen3-VL-235B-A22B": Shape(
            (4096, 12288, 94, 64, 4, 151936, False),
            _LARGE_TOWER,
            {"num_experts": 128, "num_experts_per_tok": 8, "moe_intermediate_size": 1536, "head_dim": 128},
        ),
    },
    rope={**_ROPE, "mrope_section": [24, 20, 20], "mrope_interleaved": True},
    experts="mlp.experts",
    lora_targets=("q_proj", "k_proj", "v_proj", "o_proj"),  # there is no other MLP than the experts
    tiny_text={**_QWEN3_VL.tiny_text, **_TINY_EXPERTS},
)
# Also Qwen3.6. Shapes: the defaults of transformers' configuration, which are those of Qwen3.5-35B-A3B.
_SHAPE_35B = Shape((2048, 512, 40, 16, 2, 248320, False))
FAMILIES["qwen3_5_moe"] = replace(
    _QWEN3_5,
    name="Qwen3.5 and 3.6 with experts",
    shapes={"Qwen3.5-35B-A3B": _SHAPE_35B, "Qwen3.6-35B-A3B": _SHAPE_35B},
    experts="mlp.experts",
    tiny_text={**_QWEN3_5.tiny_text, **_TINY_EXPERTS, "shared_expert_intermediate_size": 64},
)
NAMES = ", ".join(family.name for family in FAMILIES.values())


def family_of(model: PreTrainedModel | PreTrainedConfig) -> Family:
    """Return the family of a configuration, or of a model with or without an adapter."""
    return FAMILIES[getattr(model, "config", model).model_type]


def families_of(processor: ProcessorMixin) -> list[Family]:
    """Return the families whose processor has this class."""
    return [family for family in FAMILIES.values() if isinstance(processor, family.processor)]


def published_config(name: str) -> PreTrainedConfig | None:
    """Return the configuration of a published model ("Qwen2-VL-2B"), complete as to shapes; None if unknown."""
    name = name.removeprefix("Qwen/").removesuffix("-Instruct")
    for model_type, family in FAMILIES.items():
        if name in family.shapes:
            (*sizes, tied), vision, other = family.shapes[name]
            text = {**dict(zip(TEXT_SIZES, sizes, strict=True)), **other, "rope_parameters": dict(family.rope)}
            vision = {**vision, family.output_key: text["hidden_size"]}
            return AutoConfig.for_model(model_type, text_config=text, vision_config=vision, tie_word_embeddings=tied)
    return None
