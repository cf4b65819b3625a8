"""Search for the best merge of task vectors on held-out data."""
