"""Uses of other libraries' internals: one module per library, each with a test of what it expects."""
