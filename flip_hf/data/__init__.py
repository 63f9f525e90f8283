"""Turns the rows of a click log into batches of tensors."""
