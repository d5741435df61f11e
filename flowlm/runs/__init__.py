"""What a run leaves in its directory, and a trained run read from it."""
