"""A saved model made loadable where nobody imports flip_hf."""

import json
from pathlib import Path

from transformers.utils import CONFIG_NAME, PROCESSOR_NAME

from flip_hf.checkpoint.loading_file import CONFIG_AUTO_MAP, PROCESSOR_AUTO_MAP, write_loading_file
from flip_hf.standard_json import settings_json


def add_loading_code(folder: Path) -> None:
    """Adds what transformers needs to load a saved model, its processor, or both with `trust_remote_code=True`.

    Where flip_hf is installed, the Auto classes and `pipeline("ctr-prediction")` then need no `import flip_hf`; where
    it is not, the error says how to install it. The folder loads as before too. Adding it twice changes nothing.

    No pipeline is named in `config.json`: transformers would then refuse `pipeline("ctr-prediction", model=folder)`
    without `trust_remote_code=True`, also where flip_hf is imported. Loading the configuration registers it.

    Args:
        folder: holds what `model.save_pretrained` or `processor.save_pretrained` wrote, or both.

    Raises:
        FileNotFoundError: it holds neither.
    """
    files = {folder / CONFIG_NAME: CONFIG_AUTO_MAP, folder / PROCESSOR_NAME: PROCESSOR_AUTO_MAP}
    if not any(path.is_file() for path in files):
        raise FileNotFoundError(
            f"{folder} holds neither {CONFIG_NAME} nor {PROCESSOR_NAME}: save the model and its processor there first"
        )
    for path, auto_map in files.items():
        if not path.is_file():
            continue
        settings = json.loads(path.read_text(encoding="utf-8"))
        settings["auto_map"] = auto_map
        path.write_text(settings_json(settings, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    write_loading_file(folder)
