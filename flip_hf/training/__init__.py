"""The engine: the training loop, what it optimises, saves and reports, and what Trainer is told."""
