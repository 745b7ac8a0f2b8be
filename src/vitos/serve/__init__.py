"""A trained model for others: an OpenAI-compatible HTTP server (`app.py`) and a web demo (`demo.py`)."""
