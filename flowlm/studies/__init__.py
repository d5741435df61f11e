"""Many runs: sweeps of settings, how they are carried out, their tables and the report."""
