"""The HTTP server: OpenAI's chat completions with evidence."""
