"""nbdserve: an NBD server for raw, qcow and qcow2 disk images."""

__version__ = "0.1.0"
