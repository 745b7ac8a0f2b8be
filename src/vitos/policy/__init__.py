"""One policy used twice: the model with its two branches, and the plans to answer by."""
