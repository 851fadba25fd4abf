"""`nbdserve image`: make, describe and check image files."""
