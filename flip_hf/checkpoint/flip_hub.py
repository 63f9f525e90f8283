"""Loads this checkpoint with the package flip_hf: pip install flip_hf.

transformers runs this file if `trust_remote_code=True` is given. The file contains no model. It imports the package,
which registers its classes with transformers.
"""

from typing import Any

try:
    import flip_hf
except ModuleNotFoundError as error:
    if error.name != "flip_hf":
        raise
    raise ImportError("this checkpoint needs the package flip_hf: pip install flip_hf") from None


# transformers marks the classes that it finds in this file, and saving a marked class copies its code. These subclasses
# take the mark and load the package's own classes, which stay unmarked.
class FlipConfig(flip_hf.FlipConfig):
    """Loads a `flip_hf.FlipConfig`."""

    @classmethod
    def from_pretrained(cls, *args: Any, **kwargs: Any) -> Any:
        return flip_hf.FlipConfig.from_pretrained(*args, **kwargs)


class FlipProcessor(flip_hf.FlipProcessor):
    """Loads a `flip_hf.FlipProcessor`."""

    @classmethod
    def from_pretrained(cls, *args: Any, **kwargs: Any) -> Any:
        return flip_hf.FlipProcessor.from_pretrained(*args, **kwargs)
