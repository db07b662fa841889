"""Greedy decoding in a cache of fixed size, whose step a GPU repeats as one captured graph.

Python needs 30 ms to launch the kernels of one step of a model of 7B, a captured graph less than one. The shapes in a
graph are fixed: rows that have ended stay until all have, which costs nothing, as a step takes as long as reading the
weights.
"""

import sys
from collections import OrderedDict
from weakref import WeakKeyDictionary

import torch
from accelerate.utils.memory import should_reduce_batch_size
from peft import PeftModel
from transformers import PreTrainedModel, StaticCache

KEPT = 2  # shapes whose caches and graphs are kept
LENGTH_STEP, ROW_STEP = 64, 8  # shapes are rounded up to these, so that several batches share a graph
SPARE = 2  # a cache may be this many times larger than a batch needs
WORTHWHILE = 8  # new tokens; capturing takes as long as about four steps


class StaticDecoder:
    """The cache and the graphs of one shape; a graph for the base and one for each adapter.

    Args:
        model: base model, with or without adapters.
        rows: prompts of a batch; fewer are filled up with copies.
        length: tokens of a prompt and its answer, padding included.
    """

    def __init__(self, model: PreTrainedModel | PeftModel, rows: int, length: int):
        device = model.device
        self.rows, self.length = rows, length
        self.cache = StaticCache(config=model.config, max_cache_len=length)
        self.tokens = torch.zeros(rows, dtype=torch.long, device=device)
        self.positions = torch.zeros(rows, dtype=torch.long, device=device)
        self.place = torch.zeros(1, dtype=torch.long, device=device)  # in the cache, of the next token
        self.visible = torch.zeros(rows, 1, 1, length, dtype=torch.bool, device=device)
        self.graphs: dict[tuple, torch.cuda.CUDAGraph] = {}
        self.graph: torch.cuda.CUDAGraph | None = None  # of the adapter that is enabled

    def load(self, prefix) -> None:
        """Copy a prefix, see `generation.Prefix`, into the buffers; their addresses stay."""
        rows = torch.arange(self.rows, device=self.tokens.device) % len(prefix.mask)
        width = prefix.mask.size(1)
        self.cache.reset()
        copy_cache(prefix.cache, self.cache, rows)
        self.tokens.copy_(prefix.logits.argmax(-1)[rows])
        self.positions.copy_(prefix.positions[rows])
        self.place.fill_(width)
        self.visible.zero_()
        self.visible[:, 0, 0, :width] = prefix.mask[rows].bool()

    def step(self, model) -> None:
        """Replace the tokens by those that follow them."""
        self.visible.index_fill_(3, self.place, True)
        output = model(
            input_ids=self.tokens[:, None],
            attention_mask=self.visible,
            position_ids=self.positions[:, None].expand(3, -1, -1),
            cache=self.cache,
            use_cache=True,
        )
        self.tokens.copy_(output.logits[:, -1].argmax(-1))
        self.positions.add_(1)
        self.place.add_(1)

    def capture(self, model, prefix, pool) -> None:
        """Take the graph of the adapter that is enabled, or capture a step and load the prefix again."""
        key = active_adapters(model)
        self.graph = self.graphs.get(key)
        if self.graph is not None:
            return
        graph, stream = torch.cuda.CUDAGraph(), torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):  # kernels allocate their workspaces at their first call
            self.step(model)
        torch.cuda.current_stream().wait_stream(stream)
        with torch.cuda.graph(graph, pool=pool, capture_error_mode="thread_local"):
            self.step(model)
        self.graphs[key] = self.graph = graph
        self.load(prefix)

    def advance(self, model) -> None:
        """Do one step, by its graph if there is one."""
        if self.graph is None:
            self.step(model)
        else:
            self.graph.replay()


class StaticDecoders:
    """The decoders of a model, of the shapes that were used last."""

    def __init__(self):
        self.kept: OrderedDict[tuple[int, int], StaticDecoder] = OrderedDict()
        self.pool, self.failed = None, False

    def get(self, model, rows: int, length: int) -> StaticDecoder:
        """Return a decoder with at least these sizes, a new one if those that are kept are smaller or far larger."""
        key = -(-rows // ROW_STEP) * ROW_STEP if rows > 1 else 1, -(-length // LENGTH_STEP) * LENGTH_STEP
        most = SPARE * key[0] * key[1]
        # one row alone has another kernel for 4-bit products than several
        fitting = [
            (n, size) for n, size in self.kept
            if n >= key[0] and size >= key[1] and n * size <= most and (n > 1) == (rows > 1)
        ]  # fmt: skip
        key = min(fitting, key=lambda shape: shape[0] * shape[1], default=key)
        if key not in self.kept:
            while len(self.kept) >= KEPT:
                self.kept.popitem(last=False)
            self.kept[key] = StaticDecoder(model, *key)
        self.kept.move_to_end(key)
        return self.kept[key]

    def clear(self) -> None:
        self.kept.clear()


_decoders: WeakKeyDictionary[torch.nn.Module, StaticDecoders] = WeakKeyDictionary()


def decoders_of(model: torch.nn.Module) -> StaticDecoders:
    return _decoders.setdefault(model, StaticDecoders())


def open_decoder(model, prefix, max_new_tokens: int) -> StaticDecoder | None:
    """Return a decoder with a captured step and the prefix loaded, or None where that is not possible or worthwhile.

    That a model's step cannot be captured, as its kernels wait for the CPU, is printed once.

    Raises:
        RuntimeError: out of memory.
    """
    decoders = decoders_of(model)
    if model.device.type != "cuda" or decoders.failed or max_new_tokens < WORTHWHILE:
        return None
    rows, width = prefix.mask.shape
    decoder, problem = None, None
    try:
        decoders.pool = decoders.pool or torch.cuda.graph_pool_handle()
        decoder = decoders.get(model, rows, width + max_new_tokens)
        decoder.load(prefix)
        decoder.capture(model, prefix, decoders.pool)
    except (RuntimeError, NotImplementedError) as error:
        decoder = None
        decoders.clear()
        if should_reduce_batch_size(error):
            raise
        problem = str(error).strip().split("\n")[0]
    if problem:
        decoders.failed = True
        print(f"decoding step by step, about ten times slower: no graph of a step: {problem}", file=sys.stderr)
    return decoder


def decode_static(model, decoder: StaticDecoder, count: int, max_new_tokens: int, ends: torch.Tensor) -> torch.Tensor:
    """Return the likeliest continuation of each loaded prompt, shape (count, N), N at most `max_new_tokens`.

    Tokens after a row's end are arbitrary.
    """
    tokens = decoder.tokens.new_zeros(count, max_new_tokens)
    ended = torch.zeros(count, dtype=torch.bool, device=tokens.device)
    for step in range(max_new_tokens):
        tokens[:, step] = decoder.tokens[:count]
        ended |= torch.isin(tokens[:, step], ends)
        if step + 1 == max_new_tokens or ended.all():
            break
        decoder.advance(model)
    return tokens[:, : step + 1]


def copy_cache(source, target: StaticCache, rows: torch.Tensor) -> None:
    """Copy rows of a cache, or its states in layers with linear attention, into an empty one of fixed size."""
    for index, layer in enumerate(source.layers):
        if getattr(layer, "keys", None) is not None:
            target.update(layer.keys[rows], layer.values[rows], index)
        else:
            target.update_conv_state(source.get_conv_state(index)[rows], index)
            target.update_recurrent_state(source.get_recurrent_state(index)[rows], index)


def active_adapters(model) -> tuple:
    """Return what changes with the adapter that is enabled: names, or nothing for the base alone."""
    if not isinstance(model, PeftModel):
        return ()
    status = model.get_model_status()
    return tuple(status.active_adapters) if status.enabled else ()
