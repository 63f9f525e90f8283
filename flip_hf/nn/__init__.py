"""Building blocks that know tensors only: no ids of a data set, no configuration, no files."""
