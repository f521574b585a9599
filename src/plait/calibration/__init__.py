"""What adapters see and say: texts, the tokens they become, second moments of inputs, and the adapters' own answers."""
