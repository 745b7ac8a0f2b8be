"""`vitos bench`: models x benchmarks x token selectors x budgets in one run that can be stopped, and its tables."""
