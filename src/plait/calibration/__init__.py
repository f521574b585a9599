"""Inputs and outputs of adapters: texts, the tokens they become, second moments of inputs, and the adapters' own answers."""
