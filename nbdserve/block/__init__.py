"""What a disk is to the rest of nbdserve: the interface that every format has."""
