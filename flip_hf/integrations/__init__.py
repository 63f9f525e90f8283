"""FLIP in other engines: one file each."""
