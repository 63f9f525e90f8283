"""The commands of `flip-hf`: their settings, what they do, and the files of a run."""
