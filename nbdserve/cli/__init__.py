"""The command line: `nbdserve serve`, `list` and `image ...`.

Each command is a module with `define(parser)` and `run(arguments)`. What a
command needs is imported when it runs, so that `--help` or a typing error costs
little more than Python's own start.
"""
