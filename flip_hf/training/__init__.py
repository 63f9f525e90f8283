"""What the example scripts share: the run's configuration, the one loop, and what it reports."""
