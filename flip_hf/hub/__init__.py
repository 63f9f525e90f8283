"""Pushes models to the Hugging Face Hub, with a model card and the code that loads them."""

from flip_hf.hub.push import push_to_hub

__all__ = ["push_to_hub"]
