"""Control: what an operator does with a running server.

`operations` does it, `answers` says what the outcomes look like, `http` is the way in.
"""
