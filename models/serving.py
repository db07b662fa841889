"""What vLLM is told of a base model and its adapters, so that it answers as they were trained."""

import json
import shlex
from dataclasses import dataclass, replace
from pathlib import Path

from safetensors import safe_open
from transformers import ProcessorMixin

from common.files import ADAPTER_WEIGHTS
from models.adapters import base_of, find_file, loading_settings, read_adapter_config
from models.families import family_of
from models.loading import load_config

VLLM_RANKS = (8, 16, 32, 64, 128, 256, 320, 512)  # MaxLoRARanks of vllm/config/lora.py
CONTENT_KINDS = ("text", "image", "video", "audio", "input")  # see `served_names`
MAX_MODEL_LEN = 16384  # tokens of prompt and answer together; a server reserves memory for one such request


@dataclass(frozen=True, kw_only=True)
class Serving:
    """A base model with its adapters, as a server gets them.

    Attributes:
        base: folder or Hub id of the base, or of a merged model.
        name: what requests call it.
        adapters: folder or Hub id of each adapter by the name that requests use.
        pixels: `min_pixels` and `max_pixels`, px^2.
        dtype: of the weights and the arithmetic.
        rank: largest rank of the adapters; 0 without any.
        tower: whether an adapter has weights in the vision tower or its merger.
        targets: vLLM's names of the layers prepared for adapters, see `on_cpu`; all that it supports if empty.
        revision: of the base.
        chat_template: file of the training's template; None for the base's own.
        max_model_len: most tokens of a request.
    """

    base: str
    name: str
    adapters: dict[str, str]
    pixels: dict[str, int]
    dtype: str
    rank: int = 0
    tower: bool = False
    targets: tuple[str, ...] = ()
    revision: str | None = None
    chat_template: str | None = None
    max_model_len: int = MAX_MODEL_LEN

    def lines(self, port: int = 8000) -> list[str]:
        """Return the lines of a shell's command that starts `vllm serve` on loopback, an option on each."""
        words = [["VLLM_NO_USAGE_STATS=1", "vllm", "serve", self.base], ["--host", "127.0.0.1", "--port", str(port)]]
        for word in self.options():
            words.append([word]) if word.startswith("--") else words[-1].append(word)
        return shell_lines(words)

    def options(self) -> list[str]:
        """Return the options of `vllm serve BASE`.

        The base's published generation settings are not used: they would sample, and penalise repeated tokens.
        """
        words = ["--served-model-name", self.name, "--dtype", self.dtype, "--max-model-len", str(self.max_model_len)]
        words += ["--revision", self.revision] if self.revision else []
        words += ["--generation-config", "vllm", "--override-generation-config", json.dumps({"temperature": 0.0})]
        words += ["--mm-processor-kwargs", json.dumps(self.pixels), "--limit-mm-per-prompt", json.dumps({"video": 0})]
        words += ["--chat-template", self.chat_template] if self.chat_template else []
        if self.adapters:
            rank = next(rank for rank in VLLM_RANKS if rank >= self.rank)
            words += [
                "--enable-lora",
                "--max-lora-rank",
                str(rank),
                "--max-loras",
                str(len(self.adapters)),
            ]
            words += ["--enable-tower-connector-lora"] if self.tower else []
            words += ["--lora-target-modules", *self.targets] if self.targets else []
            words += ["--lora-modules", *(f"{name}={path}" for name, path in self.adapters.items())]
        return words


def shell_lines(words: list[list[str]]) -> list[str]:
    """Return a command with a group of words on each line."""
    first, *rest = [shlex.join(group) for group in words]
    return [f"{line} \\" for line in [first, *(f"    {line}" for line in rest[:-1])]] + [f"    {rest[-1]}"]


def describe_serving(
    adapters: list[str],
    processors: list[ProcessorMixin],
    *,
    base: str | None,
    quantization: str,
    dtype: str | None,
) -> Serving:
    """Return how to serve adapters on their base, or a base alone.

    Args:
        adapters: folders or Hub ids, of one base.
        processors: of each adapter; of the base when there is none.
        base: base model, in place of the one that the adapters name.
        quantization: "auto" or "none": a server loads the base in 16 bit.
        dtype: of the arithmetic; as in training when None.

    Raises:
        ValueError: 4 bit was asked for, vLLM cannot load an adapter, or two adapters need different servers.
    """
    if quantization == "nf4":
        raise ValueError("--quantization: vLLM gets the base in 16 bit; nf4 goes with --engine transformers")
    settings = [loading_settings(a, base=base, quantization="none", dtype=dtype) for a in adapters or [None]]
    bases = [base or base_of(adapter)[0] for adapter in adapters] or [base]
    templates = [processor.chat_template for processor in processors]
    for key, values in {
        "base": list(zip(bases, settings, strict=True)),
        "pixel limits": [dict(processor.image_processor.size) for processor in processors],
        "chat template": templates,
    }.items():
        if other := [n for n, value in enumerate(values) if value != values[0]]:
            raise ValueError(f"--adapter: {adapters[other[0]]} has another {key} than {adapters[0]}: one server each")
    config = load_config(bases[0], revision=settings[0].get("revision"))
    vision, ranks = family_of(config).vision, [read_rank(adapter) for adapter in adapters]
    modules = {name for adapter in adapters for name in adapted_modules(find_file(adapter, ADAPTER_WEIGHTS))}
    size = processors[0].image_processor.size
    template = find_file(adapters[0], "chat_template.jinja") if adapters else None
    return Serving(
        base=bases[0],
        name=served_name(bases[0]),
        adapters=dict(zip(served_names(adapters, base), adapters, strict=True)),
        pixels={"min_pixels": size["shortest_edge"], "max_pixels": size["longest_edge"]},
        dtype=settings[0]["dtype"],
        rank=max(ranks, default=0),
        tower=any(name.startswith(vision) for name in modules),
        revision=settings[0].get("revision"),
        chat_template=str(template) if template else None,
        max_model_len=min(MAX_MODEL_LEN, config.get_text_config().max_position_embeddings),
    )


def served_name(name: str) -> str:
    """Return what requests call a model or adapter: the last part of its path or Hub id."""
    return Path(name).name or name


def served_names(adapters: list[str], base: str | None) -> list[str]:
    """Return a name for each adapter that is not the base's; those of folders of the same name are numbered.

    vLLM applies an adapter that is called like a kind of content to all requests with such content, the base's too.
    """
    taken = {*CONTENT_KINDS, *(served_name(base or base_of(adapter)[0]) for adapter in adapters)}
    names = [f"{name}-adapter" if name in taken else name for name in map(served_name, adapters)]
    return [name if names.count(name) == 1 else f"{name}-{n}" for n, name in enumerate(names, 1)]


def read_rank(adapter: str) -> int:
    """Return an adapter's largest rank.

    Raises:
        ValueError: vLLM cannot load it.
    """
    config = read_adapter_config(adapter)
    unfit = {"LoRA alone": config.peft_type != "LORA", "no DoRA": getattr(config, "use_dora", False)}
    unfit |= {"no modules_to_save": bool(getattr(config, "modules_to_save", None))}
    if rules := [rule for rule, broken in unfit.items() if broken]:
        raise ValueError(
            f"--adapter: {adapter}: vLLM loads {rules[0]}; merge it (merge_adapter.py) and serve the result"
        )
    rank = max(config.r, *config.rank_pattern.values(), 0)
    if rank > VLLM_RANKS[-1]:
        raise ValueError(f"--adapter: {adapter}: rank {rank}, vLLM loads at most {VLLM_RANKS[-1]}")
    return rank


def adapted_modules(weights: Path) -> set[str]:
    """Return the paths of the base's modules that a file of LoRA weights is for."""
    with safe_open(weights, "pt") as file:
        names = [name.removeprefix("base_model.model.") for name in file.keys()]  # noqa: SIM118
    return {name.partition(".lora_")[0] for name in names}


def on_cpu(serving: Serving) -> Serving:
    """Return how to serve the same on a CPU: in float32, and with no other layer prepared for adapters than needed.

    vLLM 0.32 prepares Qwen3-VL's LM head too, and then ends on a CPU when it is asked for likelihoods. Layers of the
    tower are named one by one: "proj" alone would also be its patch embedding.
    """
    weights = [find_file(adapter, ADAPTER_WEIGHTS) for adapter in serving.adapters.values()]
    names = {name.removeprefix("model.") for path in weights for name in adapted_modules(path)}
    targets = {name if name.startswith("visual.") else name.rpartition(".")[2] for name in names}
    return replace(serving, dtype="float32", targets=tuple(sorted(targets)))
