"""From settings to things: network and family, the training state and its step, meshes, samplers."""
