"""What goes to the Hugging Face Hub, and what never does."""

from pathlib import Path

from huggingface_hub import HfApi

# Adapter, processor, card, curves: nothing that holds data, paths of this machine, optimizer state or a token.
ALLOWED = [
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


def push_adapter(output_dir: Path, repo_id: str, *, private: bool = True, revision: str | None = None) -> str:
    """Upload a finished run's adapter, processor, card and curves, and return the commit's address.

    Args:
        output_dir: the run's folder.
        repo_id: "name" or "owner/name"; made if it does not exist.
        private: whether a repository that is made now is private.
        revision: branch to commit to; the main one when None.

    Source of the token: HF_TOKEN in the environment, or `hf auth login`.
    """
    api = HfApi()
    repo = api.create_repo(repo_id, private=private, exist_ok=True)
    commit = api.upload_folder(
        repo_id=repo.repo_id,
        folder_path=output_dir,
        allow_patterns=ALLOWED,
        revision=revision,
        commit_message="Upload adapter, processor and model card",
    )
    return commit.commit_url
