"""Architecture configs of the recipes' base models, so that plans and tests need no download.

Each file holds the published config.json's values; `<org>--<model>.json` is named after the hub id.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

from orpo_lite.recipe.loading import resolve_path

if TYPE_CHECKING:
    from transformers import PretrainedConfig

FOLDER = Path(__file__).parent


def base_config(name_or_path: str) -> PretrainedConfig | None:
    """The transformers config of a local model folder or of a hub id that ships here; None for any other id.

    Never asks the hub. Each call builds a new object: change it freely.
    """
    from transformers import AutoConfig

    folder = Path(resolve_path(name_or_path))
    if (folder / "config.json").is_file():
        return AutoConfig.from_pretrained(folder)
    shipped = FOLDER / f"{name_or_path.replace('/', '--')}.json"
    return AutoConfig.for_model(**json.loads(shipped.read_text("utf-8"))) if shipped.is_file() else None
