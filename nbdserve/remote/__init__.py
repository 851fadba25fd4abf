"""Disks of other NBD servers: our own client role behind the interface of a disk."""
