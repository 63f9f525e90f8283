"""Checks of saved models and processors, and the code that loads them."""
