"""The recipe: typed, validated, importable without PyTorch."""
