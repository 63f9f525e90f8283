"""From a click log's rows to the tensors of a batch."""
