"""The model families: everything in which they differ."""

from transformers import (
    PreTrainedConfig,
    Qwen2_5_VLConfig,
    Qwen2_5_VLProcessor,
    Qwen2VLConfig,
    Qwen2VLProcessor,
    Qwen3VLConfig,
    Qwen3VLProcessor,
)

FAMILY = {Qwen2VLConfig: "Qwen2-VL", Qwen2_5_VLConfig: "Qwen2.5-VL", Qwen3VLConfig: "dense Qwen3-VL"}
PROCESSORS = (Qwen2VLProcessor, Qwen2_5_VLProcessor, Qwen3VLProcessor)

# Module paths of the family, from the top model. Patterns are matched against the whole path: a bare "gate_proj" would
# adapt the vision tower's layers too, which carry the same names.
LANGUAGE_LAYERS = "model.language_model.layers."
VISION = "model.visual."
VISION_BLOCKS = VISION + "blocks."
MERGERS = (VISION + "merger.", VISION + "deepstack_merger_list.")  # Qwen3-VL's second leads into its first layers
KEPT_IN_16_BIT = ["model.visual", "lm_head"]  # "visual" alone would match nothing: bitsandbytes anchors its patterns

KINDS = {name.removeprefix("dense "): kind for kind, name in FAMILY.items()}

# From each model's public config.json: hidden_size, intermediate_size, num_hidden_layers, num_attention_heads,
# num_key_value_heads, vocab_size, tie_word_embeddings; and what is its own in the vision tower.
_SMALL_TOWER = {"depth": 24, "hidden_size": 1024, "intermediate_size": 4096, "deepstack_visual_indexes": [5, 11, 17]}
_LARGE_TOWER = {"depth": 27, "hidden_size": 1152, "intermediate_size": 4304, "deepstack_visual_indexes": [8, 16, 24]}
TABLE = {
    "Qwen2-VL-2B": ((1536, 8960, 28, 12, 2, 151936, True), {}),
    "Qwen2-VL-7B": ((3584, 18944, 28, 28, 4, 152064, False), {}),
    "Qwen2-VL-72B": ((8192, 29568, 80, 64, 8, 152064, False), {}),
    "Qwen2.5-VL-3B": ((2048, 11008, 36, 16, 2, 151936, True), {"intermediate_size": 3420}),
    "Qwen2.5-VL-7B": ((3584, 18944, 28, 28, 4, 152064, False), {"intermediate_size": 3420}),
    "Qwen2.5-VL-32B": ((5120, 27648, 64, 40, 8, 152064, False), {"intermediate_size": 3456}),
    "Qwen2.5-VL-72B": ((8192, 29568, 80, 64, 8, 152064, False), {"intermediate_size": 3456}),
    "Qwen3-VL-2B": ((2048, 6144, 28, 16, 8, 151936, True), _SMALL_TOWER),
    "Qwen3-VL-4B": ((2560, 9728, 36, 32, 8, 151936, True), _SMALL_TOWER),
    "Qwen3-VL-8B": ((4096, 12288, 36, 32, 8, 151936, False), _LARGE_TOWER),
    "Qwen3-VL-32B": ((5120, 25600, 64, 64, 8, 151936, False), _LARGE_TOWER),
}
NAMES = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
NAMES += ("num_key_value_heads", "vocab_size")


def tabled_config(name: str) -> PreTrainedConfig:
    """Return the configuration of a model of `TABLE`, as far as shapes depend on it."""
    (*sizes, tied), tower = TABLE[name]
    text, tower = dict(zip(NAMES, sizes, strict=True)), dict(tower)
    text |= {"rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [16, 24, 24]}}
    kind = KINDS[name.rsplit("-", 1)[0]]
    tower["hidden_size" if kind is Qwen2VLConfig else "out_hidden_size"] = text["hidden_size"]
    if kind is KINDS["Qwen2.5-VL"]:
        tower["hidden_size"] = 1280
    return kind(text_config=text, vision_config=tower, tie_word_embeddings=tied)


# What the vision towers of the family call their sizes.
TOWERS = {
    "qwen2_vl": lambda text, head: {"embed_dim": head, "hidden_size": text},
    "qwen2_5_vl": lambda text, head: {
        "hidden_size": head, "intermediate_size": head, "out_hidden_size": text, "fullatt_block_indexes": [1],
    },
    "qwen3_vl": lambda text, head: {
        "hidden_size": head, "intermediate_size": head, "out_hidden_size": text, "deepstack_visual_indexes": [0],
    },
}  # fmt: skip
