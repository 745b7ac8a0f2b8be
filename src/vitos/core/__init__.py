"""What has no model, no files and no state: geometry, sparsification, prompts, responses, records."""
