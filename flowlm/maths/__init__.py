"""Arrays in, arrays out: priors, the path, warped time, the flow map's identities, and all that has a vocabulary axis."""
