"""Outputs of the vision tower, kept by image: a frozen tower gives the adapter and the base the same."""

import hashlib
from collections import OrderedDict

import torch
from PIL import Image
from transformers import BaseImageProcessor, PreTrainedModel
from transformers.utils import ModelOutput

from collator import to_patches
from models.families import family_of

LIMIT = 4 * 2**30  # bytes of main memory; an image of 600 x 450 px takes 2.4 MB in a model of 7B
GPU_SHARE = 0.04  # of a GPU's memory


def is_adapted(model: PreTrainedModel) -> bool:
    """Return whether an adapter has weights in the vision tower, whose outputs then depend on it."""
    tower = model.get_submodule(family_of(model).vision.removesuffix("."))
    return any(type(module).__module__.startswith("peft.") for module in tower.modules())


class ImageFeatures:
    """The tower's outputs of the images that were used last; least recently used ones leave.

    On a CPU the tower reads images one by one, so that outputs do not depend on which others are missing. On a GPU it
    reads all that are missing together; the outputs differ by the rounding of its dtype.

    Args:
        model: the base model, whose adapters leave the tower alone, see `is_adapted`.
        limit: bytes of the model's device; see `default_limit` when None.
    """

    def __init__(self, model: PreTrainedModel, limit: int | None = None):
        if is_adapted(model):
            raise ValueError("an adapter has weights in the vision tower: its outputs cannot be kept")
        self.model, self.size, self.runs = model, 0, 0
        self.limit = default_limit(model.device) if limit is None else limit
        self.kept: OrderedDict[bytes, dict[str, list[torch.Tensor]]] = OrderedDict()

    def __call__(self, images: list[Image.Image], keys: list[bytes], sizing: BaseImageProcessor) -> ModelOutput:
        """Return what the model's `get_image_features` does for resized images.

        Args:
            images: RGB, of whole cells, see `load_pixels`.
            keys: the `digest` of each.
            sizing: the processor's.
        """
        missing = [n for n, key in enumerate(keys) if key not in self.kept and keys.index(key) == n]
        found = {key: self.kept[key] for key in keys if key in self.kept}
        group = 1 if self.model.device.type == "cpu" else len(missing)
        for start in range(0, len(missing), group or 1):
            numbers = missing[start : start + group]
            for n, output in zip(numbers, self._run([images[n] for n in numbers], sizing), strict=True):
                found[keys[n]] = output
        self._keep({key: found[key] for key in keys})
        return self._join([found[key] for key in keys])

    @torch.inference_mode()
    def _run(self, images: list[Image.Image], sizing: BaseImageProcessor) -> list[dict[str, list[torch.Tensor]]]:
        """Return each image's outputs, one for each layer whose outputs the model uses."""
        patches = to_patches(images, sizing, device=self.model.device)
        pixels = patches["pixel_values"].to(self.model.dtype)
        output = self.model.model.get_image_features(pixels, patches["image_grid_thw"].to(self.model.device))
        self.output_class, self.runs = type(output), self.runs + len(images)
        layers = {"pooler_output": [output.pooler_output]}
        if "deepstack_features" in output:
            layers["deepstack_features"] = output.deepstack_features
        return [
            {name: [layer[n].clone() for layer in outputs] for name, outputs in layers.items()}
            for n in range(len(images))
        ]

    def _keep(self, used: dict[bytes, dict]) -> None:
        for key, output in used.items():
            self.size += 0 if key in self.kept else byte_size(output)
            self.kept[key] = output
            self.kept.move_to_end(key)
        while self.size > self.limit:
            self.size -= byte_size(self.kept.popitem(last=False)[1])

    def _join(self, outputs: list[dict]) -> ModelOutput:
        layers = {
            name: [[output[name][n] for output in outputs] for n in range(len(first))]
            for name, first in outputs[0].items()
        }
        return self.output_class(**{**layers, "pooler_output": layers["pooler_output"][0]})


def default_limit(device: torch.device) -> int:
    """Return how many bytes of outputs to keep."""
    if device.type != "cuda":
        return LIMIT
    return int(GPU_SHARE * torch.cuda.get_device_properties(device).total_memory)


def digests_of(example: dict) -> list[bytes]:
    """Return the digests of an example's resized images, which `load_ahead` may have computed."""
    return example.get("digests") or [digest(image) for image in example["images"]]


def digest(image: Image.Image) -> bytes:
    """Return a digest of an image's size and pixels."""
    return hashlib.blake2b(image.tobytes(), digest_size=16, person=b"%dx%d" % image.size).digest()


def byte_size(output: dict[str, list[torch.Tensor]]) -> int:
    return sum(tensor.nbytes for tensors in output.values() for tensor in tensors)
