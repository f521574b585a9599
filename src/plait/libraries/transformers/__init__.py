"""Uses of transformers beyond its documented API, by subject."""
