"""Pictures, curves, tables, the HTML report and the model card.

Everything here is made from `results.json`, `cases.jsonl` and `metrics.jsonl`, so a report can be made again at any
time without a model.
"""
