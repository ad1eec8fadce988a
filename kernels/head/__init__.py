"""The all-MLP decode head: `decode_head`."""
