"""Building blocks that work on tensors only: without dataset ids, configurations or files."""
