"""Who says what samples are worth, a file for each judge."""
