"""Side by side figures of nbdserve, qemu-nbd and nbdkit: ``python -m tests.bench``."""
