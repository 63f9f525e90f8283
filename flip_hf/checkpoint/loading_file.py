"""The file in a checkpoint that lets transformers find FLIP in a process that has not imported flip_hf.

`config.json` and `processor_config.json` name the file's classes under `auto_map`, which transformers reads with
`trust_remote_code=True`. A model that was loaded from such a checkpoint saves the file again.
"""

import shutil
from pathlib import Path

LOADING_FILE = "flip_hub.py"
"""Name of the file, here and in a checkpoint."""
CONFIG_AUTO_MAP = {"AutoConfig": "flip_hub.FlipConfig"}
"""The `auto_map` of `config.json`. Models need no entry, because transformers loads their configuration first."""
PROCESSOR_AUTO_MAP = {"AutoProcessor": "flip_hub.FlipProcessor"}
"""The `auto_map` of `processor_config.json`."""


def write_loading_file(folder: Path) -> Path:
    """Copies the file to a folder and returns its path there."""
    target = folder / LOADING_FILE
    shutil.copyfile(Path(__file__).with_name(LOADING_FILE), target)
    return target
