"""`vitos serve`: OpenAI's chat completions, with the evidence of each answer (extra `serve`).

Read in this order, the way of a request:

- `schema`: what a request and a response may hold.
- `body`: the bytes of a request, within limits, as a chat request; `images`: its images as RGB pictures.
- `scheduler`: one thread that answers the questions of all clients together, one token per step.
- `answer`: a finding as OpenAI's response, or as the events of a stream.
- `app`: the routes that join these; `metrics`: what they count.
- `connections`: how long a connection may be held without a request.
- `launch`: the checks before the start, and the process.
"""
