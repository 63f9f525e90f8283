"""FLIP in other engines, one file per engine."""
