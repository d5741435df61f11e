"""The machine: files and buckets, processes, signals, terminals, and what a setting is."""
