"""What a repository on the Hugging Face Hub needs beside a model and its processor, and how it gets there."""

from flip_hf.hub.push import push_to_hub

__all__ = ["push_to_hub"]
