"""One evaluator: models, data sets and conditions, stored answer by answer."""
