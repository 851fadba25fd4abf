"""Where bytes are: files and memory, and instruments that stand in for them."""
