"""Chat messages and images become tensors; labels are the assistant's answers and nothing else."""

from functools import partial
from itertools import pairwise

import numpy as np
import torch
from PIL import Image
from torch.nn.utils.rnn import pad_sequence
from transformers import BaseImageProcessor, ProcessorMixin

from data_prep.images import load_image
from data_prep.records import IMAGE_MARKER, to_chat
from data_prep.sizes import fit_options, fit_size
from models.families import Family, families_of
from models.thinking import CLOSING, OPENING, has_thoughts, split_thought

IGNORED = -100  # PyTorch's ignore_index
# Without an answer it has no labels, so its gradients are zeros.
DUMMY_EXAMPLE = {
    "id": "dummy image",
    "images": [Image.new("RGB", (28, 28))],
    "messages": [{"role": "user", "content": IMAGE_MARKER}],
}


def build_labels(input_ids: torch.Tensor, *, header_ids: list[int], end_id: int) -> torch.Tensor:
    """Return labels that supervise each answer and the token that ends it.

    Args:
        input_ids: token ids, shape (B, T).
        header_ids: ids of the text before an answer, such as "<|im_start|>assistant\\n".
        end_id: id of the token that ends a turn, such as "<|im_end|>".

    Returns:
        Shape (B, T): the token's id from the first token after each header to the next `end_id`, both included; -100
        everywhere else.
    """
    width = len(header_ids)
    if input_ids.size(1) < width:
        return torch.full_like(input_ids, IGNORED)
    headers = (input_ids.unfold(1, width, 1) == input_ids.new_tensor(header_ids)).all(dim=-1)  # (B, T - width + 1)
    position = torch.arange(input_ids.size(1), device=input_ids.device).expand_as(input_ids)
    last_start = torch.full_like(input_ids, -1)
    last_start[:, width:] = torch.where(headers[:, :-1], position[:, width:], -1)
    last_end = torch.full_like(input_ids, -1)
    last_end[:, 1:] = torch.where(input_ids == end_id, position, -1)[:, :-1]
    inside = last_start.cummax(dim=1).values > last_end.cummax(dim=1).values
    return torch.where(inside, input_ids, IGNORED)


def mrope_positions(input_ids: torch.Tensor, grids: torch.Tensor, *, image_id: int, merge: int) -> torch.Tensor:
    """Return one sample's positions in time, height and width, equal to those of the model's `get_rope_index`.

    Args:
        input_ids: token ids, shape (T,).
        grids: patches of each image in time, height and width, shape (N, 3).
        image_id: id of the token that an image consists of.
        merge: side of the square of patches that one token covers.

    Returns:
        Shape (3, T). Text counts up in all three rows. An image's tokens have their rows and columns, counted from the
        next position; the text after it continues from the largest of them.
    """
    parts, position, done, used = [], 0, 0, 0
    image_tokens = (input_ids == image_id).nonzero().flatten().tolist()
    for frames, height, width in grids.tolist():
        start, shape = image_tokens[used], (frames, height // merge, width // merge)
        parts.append(torch.arange(position, position + start - done).expand(3, -1))
        position += start - done
        parts.append(torch.stack(torch.meshgrid(*map(torch.arange, shape), indexing="ij")).flatten(1) + position)
        size = shape[0] * shape[1] * shape[2]
        position, done, used = position + max(shape), start + size, used + size
    parts.append(torch.arange(position, position + len(input_ids) - done).expand(3, -1))
    return torch.cat(parts, dim=1)


def answer_rows(labels: torch.Tensor) -> torch.Tensor:
    """Return the places in a row of labels (1, T) that predict a label: those before it, shape (K,)."""
    return (labels[0, 1:] != -100).nonzero().flatten()


def render(processor: ProcessorMixin, messages: list[dict], *, add_generation_prompt: bool = False) -> str:
    """Return the sample's text in the processor's chat template, one image token for each image."""
    return processor.apply_chat_template(chat_of(processor, messages), add_generation_prompt=add_generation_prompt)


def chat_of(processor: ProcessorMixin, messages: list[dict]) -> list[dict]:
    """Return messages as the processor's chat template expects them: typed blocks, and thoughts apart from answers."""
    if not has_thoughts(processor):
        return to_chat(messages)
    split = [split_thought(m["content"]) if m["role"] == "assistant" else (None, m["content"]) for m in messages]
    chat = to_chat([{**m, "content": content} for m, (_, content) in zip(messages, split, strict=True)])
    thoughts = [{} if thought is None else {"reasoning_content": thought} for thought, _ in split]
    return [{**message, **thought} for message, thought in zip(chat, thoughts, strict=True)]


def find_header(processor: ProcessorMixin) -> tuple[Family, str]:
    """Return the family whose generation prompt the chat template has, and the text after which an answer is learnt.

    With thoughts the prompt ends by opening one. It is learnt from its opening on, as TRL's training templates do.
    Without, the prompt ends with an empty one, which is not learnt.

    Raises:
        ValueError: the prompt is another one: `build_labels` would supervise its end.
    """
    turn = [{"role": "user", "content": "?"}]
    prompt = render(processor, turn, add_generation_prompt=True).removeprefix(render(processor, turn))
    prompts = {
        f"{family.answer_header}{thought}": family
        for family in families_of(processor)
        for thought in ((OPENING, OPENING + CLOSING) if family.thinks else ("",))
    }
    if prompt not in prompts:
        expected = " or ".join(map(repr, prompts))
        raise ValueError(f"chat template: expected the generation prompt {expected}, found {prompt!r}")
    return prompts[prompt], prompt.removesuffix(OPENING)


def load_pixels(example: dict, processor: ProcessorMixin) -> list[Image.Image]:
    """Return a sample's images, upright, in RGB, resized as the model needs them.

    Images of an example with `fitted` have that size already. A second fit could give another one: a size that
    `fit_size` rounds up to whole cells can lie above max_pixels, and would be made smaller.

    Raises:
        ValueError: an image cannot be used; the message names the sample.
    """
    if example.get("fitted"):
        return example["images"]
    images, fit = [], partial(fit_size, **fit_options(processor.image_processor))
    for number, source in enumerate(example.get("images") or []):
        try:
            images.append(load_image(source, fit=fit))
        except (ValueError, OSError) as error:
            raise ValueError(f"sample {example.get('id')!r}, image {number}: {error}") from error
    return images


def count_patches(images: list[Image.Image], sizing: BaseImageProcessor) -> dict[str, torch.Tensor]:
    """Return `image_grid_thw` of resized images: patches in time, height and width, shape (N, 3)."""
    patch = sizing.patch_size
    return {"image_grid_thw": torch.tensor([(1, image.height // patch, image.width // patch) for image in images])}


def to_patches(
    images: list[Image.Image], sizing: BaseImageProcessor, *, device: torch.device | str = "cpu"
) -> dict[str, torch.Tensor]:
    """Return `pixel_values` (P, D), computed on `device`, and `image_grid_thw` (N, 3) of resized images, as the
    processor does.
    """
    patch, merge = sizing.patch_size, sizing.merge_size
    grids = count_patches(images, sizing)["image_grid_thw"]
    counts = grids.prod(dim=1).tolist()
    mean, std = (
        (torch.tensor(x)[:, None] * (1 / sizing.rescale_factor)).to(device)
        for x in (sizing.image_mean, sizing.image_std)
    )
    # First access to so much new memory takes longer than the arithmetic. NumPy requests huge pages, which halves it.
    shape = (sum(counts), 3, sizing.temporal_patch_size, patch * patch)
    on_cpu = torch.device(device).type == "cpu"
    values = torch.from_numpy(np.empty(shape, np.float32)) if on_cpu else torch.empty(shape, device=device)
    for image, rows, (_, height, width) in zip(images, values.split(counts), grids.tolist(), strict=True):
        pixels = torch.from_numpy(np.array(image)).to(device)
        pixels = pixels.view(height // merge, merge, patch, width // merge, merge, patch, 3)
        pixels = pixels.permute(0, 3, 1, 4, 6, 2, 5).reshape(-1, 3, patch * patch)  # by token, patch, colour
        rows.copy_(pixels.float().sub_(mean).div_(std).unsqueeze(2))  # the same pixels in all frames of a patch
    return {"pixel_values": values.flatten(1), "image_grid_thw": grids}


def expand_images(ids: list[int], tokens: list[int], *, image_id: int) -> torch.Tensor:
    """Return a text's ids with its n-th image token repeated `tokens[n]` times, shape (T,)."""
    row = torch.tensor(ids)
    is_image = row == image_id
    if (count := int(is_image.sum())) != len(tokens):
        raise ValueError(f"{count} image tokens in the text, expected {len(tokens)}")
    return row.repeat_interleave(torch.ones_like(row).masked_scatter(is_image, torch.tensor(tokens, dtype=torch.long)))


def encode(
    processor: ProcessorMixin, examples: list[dict], texts: list[str], *, padding_side: str, patches: bool = True
) -> dict:
    """Return the model's inputs for rendered texts and the examples' images, equal to the processor's but faster.

    Without `patches` there are no `pixel_values`.

    Returns:
        `input_ids`, `attention_mask`, `mm_token_type_ids`, each (B, T); with images also `pixel_values` (P, D), a row
        for each patch, D = colours x frames x height x width (3 x 2 x 14 x 14, for example), and `image_grid_thw`
        (N, 3), in patches.

    Raises:
        ValueError: an image cannot be used, or a text contains image tokens; the message names the sample.
    """
    tokenizer, sizing = processor.tokenizer, processor.image_processor
    image_id = tokenizer.convert_tokens_to_ids(processor.image_token)
    token_area = (sizing.patch_size * sizing.merge_size) ** 2  # px^2
    images, rows = [], []
    for example, ids in zip(examples, tokenizer(texts, add_special_tokens=False)["input_ids"], strict=True):
        pixels = load_pixels(example, processor)
        tokens = [image.width * image.height // token_area for image in pixels]
        try:
            rows.append(expand_images(ids, tokens, image_id=image_id))
        except ValueError as error:
            raise ValueError(f"sample {example.get('id')!r}: {error}") from error
        images += pixels
    pad = partial(pad_sequence, batch_first=True, padding_side=padding_side)
    input_ids = pad(rows, padding_value=tokenizer.pad_token_id)
    return {
        "input_ids": input_ids,
        "attention_mask": pad([torch.ones_like(row) for row in rows]),
        "mm_token_type_ids": (input_ids == image_id).long(),
        **((to_patches(images, sizing) if patches else count_patches(images, sizing)) if images else {}),
    }


class VisionSFTCollator:
    """Makes a batch for `SFTTrainer` from samples in the schema of `data_prep`.

    Args:
        processor: the model's processor; its chat template and pixel limits are used unchanged.
        max_length: longest allowed sample, tokens. A longer one raises: truncated image tokens crash the model, and a
            truncated answer leaves nothing to learn.
        packed: concatenate the samples into one row instead of padding them to rows of one length. The model must keep
            them apart: `attention.use_varlen`, or SDPA, which reads the boundaries from the positions.
        dummy_image: add a sample with an empty image and no labels to a batch without images, so that each batch uses
            all weights: processes wait for each other's gradients of the vision tower.

    Raises:
        ValueError: a sample's markers, length or answers are wrong; the message names its id. Or the generation prompt
            of the chat template is not the header of the answers that are learnt.
    """

    def __init__(
        self,
        processor: ProcessorMixin,
        *,
        max_length: int | None = None,
        packed: bool = False,
        dummy_image: bool = False,
    ):
        (family, header), tokenizer = find_header(processor), processor.tokenizer
        self.processor, self.max_length, self.packed, self.dummy_image = processor, max_length, packed, dummy_image
        self.header_ids = tokenizer.encode(header, add_special_tokens=False)
        self.end_id = tokenizer.convert_tokens_to_ids(family.end_token)
        self.image_id = tokenizer.convert_tokens_to_ids(processor.image_token)

    def __call__(self, examples: list[dict]) -> dict[str, torch.Tensor]:
        """Return a right-padded batch: the tensors of `encode`, and `labels` (B, T). Packed: see `_pack`."""
        answered = len(examples)
        if self.dummy_image and not any(example.get("images") for example in examples):
            examples = [*examples, DUMMY_EXAMPLE]
        texts = [self._render(example) for example in examples]
        batch = encode(self.processor, examples, texts, padding_side="right")
        self._check_lengths(batch, examples)
        batch["labels"] = build_labels(batch["input_ids"], header_ids=self.header_ids, end_id=self.end_id)
        self._check_answers(batch["labels"][:answered], examples[:answered])
        return self._pack(batch, examples) if self.packed else batch

    def _pack(self, batch: dict, examples: list[dict]) -> dict:
        """Return the samples of a padded batch as one row.

        Returns:
            `input_ids` and `labels` (1, T); `position_ids` (4, 1, T): tokens counted from each sample's start, then
            time, height and width; `text_cu_seqlens` (B + 1), the samples' boundaries, and `text_max_seqlen` for
            `varlen_attention`, which the vision tower would use without "text_"; `answer_rows` (K,), for
            `spare_last_layer`; `pixel_values` and `image_grid_thw` unchanged. There is no mask, as SDPA would then not
            look at the positions.
        """
        kept = batch.pop("attention_mask").bool()
        lengths = kept.sum(dim=1)
        cu_seqlens = torch.cat([lengths.new_zeros(1), lengths.cumsum(0)]).to(torch.int32)
        row = {name: batch[name][kept][None] for name in ("input_ids", "labels")}
        grids = batch.get("image_grid_thw", torch.zeros(0, 3, dtype=torch.long)).split(
            [len(example.get("images") or []) for example in examples]
        )
        options = {"image_id": self.image_id, "merge": self.processor.image_processor.merge_size}
        spans = list(pairwise(cu_seqlens.tolist()))
        mrope = [
            mrope_positions(row["input_ids"][0, a:b], g, **options) for (a, b), g in zip(spans, grids, strict=True)
        ]
        counts = torch.cat([torch.arange(b - a) for a, b in spans])
        row["answer_rows"] = answer_rows(row["labels"])
        row["position_ids"] = torch.cat([counts[None], torch.cat(mrope, dim=1)])[:, None]
        images = {name: batch[name] for name in ("pixel_values", "image_grid_thw") if name in batch}
        return {**row, **images, "text_cu_seqlens": cu_seqlens, "text_max_seqlen": int(lengths.max())}

    def _render(self, example: dict) -> str:
        markers = sum(message["content"].count(IMAGE_MARKER) for message in example["messages"])
        if markers != len(example.get("images") or []):
            counts = f"{markers} {IMAGE_MARKER} marker(s) for {len(example.get('images') or [])} image(s)"
            raise ValueError(f"sample {example.get('id')!r}: {counts}")
        return render(self.processor, example["messages"])

    def _check_lengths(self, batch: dict, examples: list[dict]) -> None:
        if self.max_length is None:
            return
        lengths = batch["attention_mask"].sum(dim=1).tolist()
        image_tokens = (batch["mm_token_type_ids"] == 1).sum(dim=1).tolist()
        for example, length, image in zip(examples, lengths, image_tokens, strict=True):
            if length > self.max_length:
                rule = f"max_length is {self.max_length}; raise it, or lower max_pixels"
                raise ValueError(f"sample {example.get('id')!r}: {length} tokens, {image} of them image; {rule}")

    def _check_answers(self, labels: torch.Tensor, examples: list[dict]) -> None:
        """Raise ValueError for a wrong number of answers, as when a text contains tokens of the chat template."""
        ends = (labels == self.end_id).sum(dim=1).tolist()
        for example, count in zip(examples, ends, strict=True):
            expected = sum(message["role"] == "assistant" for message in example["messages"])
            if count != expected or not expected:
                raise ValueError(f"sample {example.get('id')!r}: {count} answers to learn from, expected {expected}")


def render_prompt(processor: ProcessorMixin, messages: list[dict], *, skip_thought: bool = False) -> str:
    """Return the prompt of messages that end with the user's turn; `skip_thought` closes a thought that it opens."""
    prompt = render(processor, messages, add_generation_prompt=True)
    return prompt + CLOSING if skip_thought and prompt.endswith(OPENING) else prompt


def opens_thought(processor: ProcessorMixin) -> str:
    """Return the start of a thought if the processor's prompts end with it, else nothing."""
    prompt = render(processor, [{"role": "user", "content": "?"}], add_generation_prompt=True)
    return OPENING if prompt.endswith(OPENING) else ""


def collate_prompts(
    processor: ProcessorMixin, examples: list[dict], *, skip_thought: bool = False, patches: bool = True
) -> dict[str, torch.Tensor]:
    """Return a left-padded batch of prompts, see `render_prompt` and `encode`."""
    texts = [render_prompt(processor, example["messages"], skip_thought=skip_thought) for example in examples]
    return encode(processor, examples, texts, padding_side="left", patches=patches)
