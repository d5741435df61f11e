"""Ways in and out: export, import, and what a file holds."""
