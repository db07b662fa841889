"""The model families and everything in which they differ: `FAMILIES[config.model_type]`."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

from transformers import (
    AutoConfig,
    PreTrainedConfig,
    PreTrainedModel,
    ProcessorMixin,
    Qwen2_5_VLProcessor,
    Qwen2VLImageProcessor,
    Qwen2VLProcessor,
    Qwen2VLVideoProcessor,
    Qwen3VLProcessor,
    Qwen3VLVideoProcessor,
)

# The numbers in `Family.shapes`, by their names in config.json; the last entry there is tie_word_embeddings.
TEXT_SIZES = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
TEXT_SIZES += ("num_key_value_heads", "vocab_size")


@dataclass(frozen=True, kw_only=True)
class Family:
    """What sets a family of models apart.

    Module paths start at the top model and are matched as prefixes: vision tower and language model have layers of the
    same names, and a bare "gate_proj" would match both.
    """

    name: str  # in messages
    processor: type[ProcessorMixin]  # families may share one
    decoder_layer: str  # class name of a language layer
    token_side: int  # side of the square that one token covers, px
    pixel_limits: tuple[int, int]  # smallest and largest image area of the published processors, px^2
    shapes: dict[str, tuple[tuple, dict]]  # by published model: see `TEXT_SIZES`; settings of the vision tower
    special_layers: int = 0  # language layers at the start that also receive features of the tower
    output_key: str = "out_hidden_size"  # name in the vision configuration of the language model's width
    language_layers: str = "model.language_model.layers."
    vision: str = "model.visual."
    vision_blocks: str = "model.visual.blocks."
    mergers: tuple[str, ...] = ("model.visual.merger.",)
    unquantized: tuple[str, ...] = ("model.visual", "lm_head")  # complete paths; bitsandbytes finds no bare "visual"
    answer_header: str = "<|im_start|>assistant\n"  # the chat template's generation prompt
    end_token: str = "<|im_end|>"
    # Of models with few random weights, for dry runs, the demo and the tests
    tiny_vision: Callable[[int], dict]  # settings of a tower of two blocks, from its width
    tiny_text: dict  # settings of a language model with heads of 32
    chat_template: str  # name of the published one in trl.chat_template_utils
    image_processor: Callable = Qwen2VLImageProcessor
    video_processor: Callable = Qwen2VLVideoProcessor


_ROPE = {"rope_type": "default", "rope_theta": 1e6}
_QWEN2 = {
    "token_side": 28,
    "pixel_limits": (3136, 12845056),
    "tiny_text": {"rope_parameters": {**_ROPE, "mrope_section": [4, 6, 6]}},
    "chat_template": "qwen2_5_vl",
}
_TOWER_3420 = {"hidden_size": 1280, "intermediate_size": 3420}
_TOWER_3456 = {"hidden_size": 1280, "intermediate_size": 3456}
_SMALL_TOWER = {"depth": 24, "hidden_size": 1024, "intermediate_size": 4096, "deepstack_visual_indexes": [5, 11, 17]}
_LARGE_TOWER = {"depth": 27, "hidden_size": 1152, "intermediate_size": 4304, "deepstack_visual_indexes": [8, 16, 24]}

FAMILIES = {
    "qwen2_vl": Family(
        **_QWEN2,
        name="Qwen2-VL",
        processor=Qwen2VLProcessor,
        decoder_layer="Qwen2VLDecoderLayer",
        shapes={
            "Qwen2-VL-2B": ((1536, 8960, 28, 12, 2, 151936, True), {}),
            "Qwen2-VL-7B": ((3584, 18944, 28, 28, 4, 152064, False), {}),
            "Qwen2-VL-72B": ((8192, 29568, 80, 64, 8, 152064, False), {}),
        },
        output_key="hidden_size",
        tiny_vision=lambda width: {"embed_dim": width, "mlp_ratio": 2},
    ),
    "qwen2_5_vl": Family(
        **_QWEN2,
        name="Qwen2.5-VL",
        processor=Qwen2_5_VLProcessor,
        decoder_layer="Qwen2_5_VLDecoderLayer",
        shapes={
            "Qwen2.5-VL-3B": ((2048, 11008, 36, 16, 2, 151936, True), _TOWER_3420),
            "Qwen2.5-VL-7B": ((3584, 18944, 28, 28, 4, 152064, False), _TOWER_3420),
            "Qwen2.5-VL-32B": ((5120, 27648, 64, 40, 8, 152064, False), _TOWER_3456),
            "Qwen2.5-VL-72B": ((8192, 29568, 80, 64, 8, 152064, False), _TOWER_3456),
        },
        tiny_vision=lambda width: {"hidden_size": width, "intermediate_size": 2 * width, "fullatt_block_indexes": [1]},
    ),
    "qwen3_vl": Family(
        name="dense Qwen3-VL",
        processor=Qwen3VLProcessor,
        decoder_layer="Qwen3VLTextDecoderLayer",
        token_side=32,
        pixel_limits=(65536, 16777216),
        shapes={
            "Qwen3-VL-2B": ((2048, 6144, 28, 16, 8, 151936, True), _SMALL_TOWER),
            "Qwen3-VL-4B": ((2560, 9728, 36, 32, 8, 151936, True), _SMALL_TOWER),
            "Qwen3-VL-8B": ((4096, 12288, 36, 32, 8, 151936, False), _LARGE_TOWER),
            "Qwen3-VL-32B": ((5120, 25600, 64, 64, 8, 151936, False), _LARGE_TOWER),
        },
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
        image_processor=partial(Qwen2VLImageProcessor, image_mean=[0.5] * 3, image_std=[0.5] * 3),
        video_processor=Qwen3VLVideoProcessor,
    ),
}
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
            (*sizes, tied), vision = family.shapes[name]
            text = dict(zip(TEXT_SIZES, sizes, strict=True))
            text["rope_parameters"] = {**_ROPE, "mrope_section": [16, 24, 24]}
            vision = {**vision, family.output_key: text["hidden_size"]}
            return AutoConfig.for_model(model_type, text_config=text, vision_config=vision, tie_word_embeddings=tied)
    return None
