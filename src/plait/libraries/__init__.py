"""What plait knows of the inside of other libraries: one module per library, each with a test of what it expects."""
