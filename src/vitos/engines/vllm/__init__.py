"""vLLM as engine and sampler; the plug-in for vLLM itself."""
