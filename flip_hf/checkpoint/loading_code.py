"""Makes a saved model loadable without `import flip_hf`."""

import json
from pathlib import Path

from transformers.utils import CONFIG_NAME, PROCESSOR_NAME

from flip_hf.checkpoint.loading_file import CONFIG_AUTO_MAP, PROCESSOR_AUTO_MAP, write_loading_file
from flip_hf.standard_json import settings_json


def add_loading_code(folder: Path) -> None:
    """Adds code to a saved model or processor, so that transformers loads it with `trust_remote_code=True`.

    If flip_hf is installed, the Auto classes and `pipeline("ctr-prediction")` then work without `import flip_hf`. If it
    is not, the error says how to install it. Loading without `trust_remote_code` works as before. Calling this twice
    has no further effect.

    `config.json` names no pipeline. Otherwise, transformers would refuse `pipeline("ctr-prediction", model=folder)`
    without `trust_remote_code=True` even if flip_hf is imported. Loading the configuration registers the pipeline.

    Args:
        folder: folder with the files of `model.save_pretrained`, `processor.save_pretrained`, or both.

    Raises:
        FileNotFoundError: the folder holds neither a model nor a processor.
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
