"""What all results share: the lock, parts of run records, outputs that appear whole, progress, versions."""
