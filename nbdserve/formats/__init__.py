"""The image formats: raw, qcow (version 1) and qcow2 (versions 2 and 3)."""
