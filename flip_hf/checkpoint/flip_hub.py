"""Loads this checkpoint with the package flip_hf: pip install flip_hf.

transformers runs this file where `trust_remote_code=True` is given. It holds no model: the package does, and registers
its classes when it is imported.
"""

from typing import Any

try:
    import flip_hf
except ModuleNotFoundError as error:
    if error.name != "flip_hf":
        raise
    raise ImportError("this checkpoint needs the package flip_hf: pip install flip_hf") from None


# transformers marks the classes that it takes from here, and a marked class copies its code wherever it is saved. The
# package's own classes stay unmarked, and are what is loaded.
class FlipConfig(flip_hf.FlipConfig):
    """Stands for `flip_hf.FlipConfig`."""

    @classmethod
    def from_pretrained(cls, *args: Any, **kwargs: Any) -> Any:
        return flip_hf.FlipConfig.from_pretrained(*args, **kwargs)


class FlipProcessor(flip_hf.FlipProcessor):
    """Stands for `flip_hf.FlipProcessor`."""

    @classmethod
    def from_pretrained(cls, *args: Any, **kwargs: Any) -> Any:
        return flip_hf.FlipProcessor.from_pretrained(*args, **kwargs)
