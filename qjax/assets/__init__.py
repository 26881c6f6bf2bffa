"""The small language model that comes with the package, for demonstrations and tests."""

from __future__ import annotations

from importlib import resources
from pathlib import Path

BUNDLED_MODEL = "books-9m"


def bundled_model_path() -> Path:
    """Folder of the bundled model, in Hugging Face layout; its README.md says what it is.

    Raises:
      FileNotFoundError: If the package was installed without its data files.
    """
    folder = Path(str(resources.files(__name__))) / BUNDLED_MODEL
    if not (folder / "config.json").is_file():
        raise FileNotFoundError(f"{folder} is missing; install qjax from a complete wheel")
    return folder
