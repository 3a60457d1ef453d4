"""Functions of tensors that every model may use: losses, mask resizing, run-length encoding."""
