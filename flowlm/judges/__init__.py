"""Judges, which say how good samples are; one file for each judge."""
