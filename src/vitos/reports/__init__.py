"""What a run showed: pictures, curves, tables, the HTML report and the model card.

All of it is made from stored figures and answers, without a model, and can be made again at any time. Read in this
order:

- `values`: figures out of `results.json`, and how each is written (labels, units, rounding).
- `table`: a table as a `Sheet`, for the terminal, Markdown and HTML alike; the tables of an evaluation.
- `summary`: what an evaluation showed, in sentences.
- `curves`, `overlay`: figures of a run; an image with its kept tokens and boxes. `samples` draws them during training.
- `page` and `report.html.j2`: the one HTML page of all reports. `html` fills it for `vitos eval`, `bench` for
  `vitos bench run`.
- `card` and `card.md.j2`: the model card of a trained checkpoint.
"""
