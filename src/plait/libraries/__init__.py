"""Uses of other libraries' internals: one module per library, of transformers one per subject, each with a test of it."""
