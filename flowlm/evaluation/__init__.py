"""What a model is worth: likelihood, and samples before the judges."""
