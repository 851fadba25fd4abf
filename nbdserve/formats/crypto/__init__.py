"""Encrypted images: the LUKS header, keys out of passphrases, and sector ciphers."""
