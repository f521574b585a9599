"""Base model + merge → full model: streamed shard by shard, complete, resumable."""
