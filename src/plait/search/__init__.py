"""Search for the recipe that loses least: which candidates, on which examples, and how far the result is to be believed."""
