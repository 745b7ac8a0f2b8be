"""`vitos push`: publish a trained model and its card on the Hugging Face hub."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated

import typer

from vitos.cli.screen import console

# What loads the model. Folders below it (such as eval/, which has answers and pictures) stay here.
PUBLISHED = ["*.json", "*.safetensors", "*.jinja", "*.txt", "*.model", "README.md"]


def push(
    model: Annotated[Path, typer.Argument(help="Folder of a trained model, such as runs/mine/model.")],
    repo: Annotated[str, typer.Argument(help="Name on the hub: owner/name.")],
    private: Annotated[bool, typer.Option(help="Make a new repository private (the default) or public.")] = True,
) -> None:
    """Upload a model with its card and results to the hub, as whom `hf auth login` or HF_TOKEN says."""
    console.print(f"Published: {push_to_hub(model, repo, private=private)}")


def push_to_hub(model: Path, repo: str, *, private: bool = True) -> str:
    """Upload a checkpoint and its card (`README.md` with `model-index`); returns the address of the commit.

    Args:
        model: folder of the checkpoint; the repository holds only what loads the model, and its card.
        repo: `owner/name`; made if it does not exist. An existing one keeps its visibility.
        private: whether a new repository is private.

    Raises:
        ValueError: if the name is not `owner/name`, the folder holds no model, or the model has no card.
        HfHubHTTPError, OSError: from huggingface_hub.
    """
    from huggingface_hub import HfApi, ModelCard

    if not re.fullmatch(r"[\w.-]+/[\w.-]+", repo):
        raise ValueError(f"{repo!r} is no name of the hub; write owner/name")
    if not (model / "config.json").is_file() or not any(model.glob("*.safetensors")):
        raise ValueError(f"{model}: holds no model; name the folder model/ of a run")
    if not (card := model / "README.md").is_file():
        raise ValueError(f"{model}: has no card (README.md); `vitos train` writes it after the evaluation")
    ModelCard.load(card)  # metadata that the hub could not read are an error before anything is uploaded
    api = HfApi()
    api.create_repo(repo, private=private, exist_ok=True)
    done = api.upload_folder(
        repo_id=repo,
        folder_path=model,
        allow_patterns=PUBLISHED,
        ignore_patterns=["*/*"],
        commit_message="Model and card written by vitos",
    )
    return done.commit_url
