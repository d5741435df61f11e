"""Networks, as pure functions of a tree of parameters."""
