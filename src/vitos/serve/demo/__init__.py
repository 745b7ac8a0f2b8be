"""`vitos demo`: a page in the browser that shows what a model looks at (extra `demo`).

Read in this order:

- `inputs`: what a person gives: a question, a window, boxes.
- `stack`: which pictures a question is about: images, or the frames and slices of a file or a series.
- `examples`: phantoms or record files as examples.
- `compare`: one question answered from all tokens, from those of the evidence, and from random ones.
- `render`, `figures`: these answers as text and HTML, and as small pictures.
- `link`: a view of the page as an address.
- `session`: what one browser tab shows.
- `opening`, `handlers`: what each event on the page changes: first pictures and boxes, then answers.
- `guard`: which requests are refused.
- `private`, `files`: the folder that uploads and pictures lie in, and its end.
- `page`: layout and events, and the start; its style and script are `demo.css` and `demo.js`.
"""
