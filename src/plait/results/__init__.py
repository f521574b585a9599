"""What all results share: the lock, parts of run records, outputs that appear complete or not at all, progress, versions."""
