"""The training engine: the loop, the optimiser, checkpoints, evaluation and the adapter for `transformers.Trainer`."""
