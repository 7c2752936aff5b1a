"""sd_atoms."""
