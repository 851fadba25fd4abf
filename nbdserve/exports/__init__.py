"""From an export's name to its open disk."""
