"""Training small models from scratch: tokenizer, optimizer, loop, and the files of a run."""
