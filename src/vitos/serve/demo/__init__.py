"""`vitos demo`: a page in the browser that shows what a model looks at (extra `demo`).

Read in this order:

- `inputs`: what a person gives: a file and which picture of it, a question, boxes.
- `compare`: one question answered from all tokens, from those of the evidence, and from random ones.
- `render`: these answers as text and HTML.
- `handlers`: what each event on the page changes.
- `guard`: which requests are refused.
- `private`: the folder that uploads lie in, and its end.
- `page`: layout and events, and the start; its style and script are `demo.css` and `demo.js`.
"""
