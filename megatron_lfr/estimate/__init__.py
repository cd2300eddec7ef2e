"""What a run will take, from its configuration alone."""
