"""The live mixer: a setting that is moved, what base, adapters and merge answer at it, and what of it is kept."""
