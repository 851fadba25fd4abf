"""The qcow version 1 format."""
