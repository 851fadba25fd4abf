"""The NBD protocol without I/O, both roles: bytes in, values out."""
