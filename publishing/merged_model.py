"""The card of a merged model, and its upload to the Hub."""

import shlex
from pathlib import Path

from huggingface_hub import HfApi, ModelCardData

from common.hub_client import readable_errors, with_retries
from publishing.hub import PROCESSOR_FILES
from publishing.run_facts import UNKNOWN

UPLOADED_FILES = [
    "config.json",
    "generation_config.json",
    "model.safetensors",
    "model-*.safetensors",
    "model.safetensors.index.json",
    *PROCESSOR_FILES,
    "README.md",
]
CARD = """---
{metadata}
---

# {name}

Base model: {base}. Merged from a LoRA adapter for questions about skin images, in {dtype}.
The processor has the chat template and the pixel limits of the training. Decoding is greedy by default.

Not a medical device; not for diagnosis. The licence of the base model applies.
"""


def make_merged_card(name: str, base: dict, dtype: str) -> str:
    """Return the model card.

    Args:
        name: of the merged model.
        base: see `describe_base`.
        dtype: of the weights.
    """
    metadata = ModelCardData(
        base_model=base["name"] if base["on_hub"] else None,
        library_name="transformers",
        pipeline_tag="image-text-to-text",
        tags=["medical", "dermatology", "not-for-diagnosis"],
        **{"license": UNKNOWN, **base["licence"]},
    )
    return CARD.format(metadata=metadata.to_yaml(), name=name, base=base["name"], dtype=dtype)


def push_merged_model(folder: Path, repo_id: str, *, private: bool) -> str:
    """Upload the merged model and return the URL of the commit.

    Raises:
        ValueError: the upload failed; the message has the command to upload later.
    """
    command = shlex.join(["hf", "upload", repo_id, str(folder), ".", *(["--private"] if private else [])])
    advice = f"; the merged model is in {folder}; to push it later: {command}"
    with readable_errors(f"not pushed to {repo_id}", advice):
        options = {"allow_patterns": UPLOADED_FILES, "commit_message": "Upload merged model"}
        commit = with_retries(lambda: HfApi().upload_folder(repo_id=repo_id, folder_path=folder, **options))
    return commit.commit_url
