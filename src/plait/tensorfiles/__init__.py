"""Files of tensors: safetensors and pickles, read under limits and written in order."""
