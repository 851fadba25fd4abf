"""Disks around other disks; each is there only where somebody asked for it."""
