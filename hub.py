"""What goes to the Hugging Face Hub, and what never does."""

from pathlib import Path

from huggingface_hub import HfApi

# Adapter, processor, card, curves, how the base was loaded: no data, no optimizer state, no token.
RUN_FACTS = "run.json"
ALLOWED = [
    RUN_FACTS,
    "adapter_config.json",
    "adapter_model.safetensors",
    "chat_template.jinja",
    "processor_config.json",
    "preprocessor_config.json",
    "video_preprocessor_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "README.md",
    "training_metrics.png",
]


def open_repository(repo_id: str, *, private: bool = True) -> str:
    """Make the repository if it does not exist and return its full id; done before training, so that a missing token
    costs a second and not a night.

    Args:
        repo_id: "name" or "owner/name".
        private: whether a repository that is made now is private.

    Source of the token: HF_TOKEN in the environment, or `hf auth login`.
    """
    return HfApi().create_repo(repo_id, private=private, exist_ok=True).repo_id


def push_adapter(output_dir: Path, repo_id: str, *, revision: str | None = None) -> str:
    """Upload a finished run's adapter, processor, card and curves, and return the commit's address.

    Args:
        output_dir: the run's folder.
        repo_id: "owner/name", as `open_repository` gives it.
        revision: branch to commit to; the main one when None.
    """
    commit = HfApi().upload_folder(
        repo_id=repo_id,
        folder_path=output_dir,
        allow_patterns=ALLOWED,
        revision=revision,
        commit_message="Upload adapter, processor and model card",
    )
    return commit.commit_url
