"""A judge: another model that grades answers in words, asked over an OpenAI-compatible URL.

    claims ─► known? (cache.py) ─► asked, many at once, with retries (client.py) ─► grades in 0..1, or None (judge.py)

A grade that cannot be had is None, and is counted with its reason; it is never a 0. Nothing here needs torch.
"""
