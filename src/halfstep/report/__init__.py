"""Records in, something to look at out: the terminal, an HTML page, TensorBoard."""
