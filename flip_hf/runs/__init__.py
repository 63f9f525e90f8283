"""The application: a run's settings, its folder, and what the scripts do."""
