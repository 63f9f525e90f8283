"""The file that a checkpoint may carry so that transformers finds FLIP in a process where nobody imported it.

`config.json` and `processor_config.json` name the classes in it under `auto_map`, where transformers looks with
`trust_remote_code=True`. What was loaded from such a checkpoint is saved as one.
"""

import shutil
from pathlib import Path

LOADING_FILE = "flip_hub.py"
"""The file's name, here and beside a checkpoint."""
CONFIG_AUTO_MAP = {"AutoConfig": "flip_hub.FlipConfig"}
"""What `config.json` says. The models need no line: to load any, transformers loads its configuration first."""
PROCESSOR_AUTO_MAP = {"AutoProcessor": "flip_hub.FlipProcessor"}
"""What `processor_config.json` says."""


def write_loading_file(folder: Path) -> Path:
    """Puts the file into a folder, and returns its path there."""
    target = folder / LOADING_FILE
    shutil.copyfile(Path(__file__).with_name(LOADING_FILE), target)
    return target
