"""A trained model for others: `api`, an OpenAI-compatible HTTP server, and `demo`, a page in the browser.

The two share nothing but the policy: the server merges the questions of many clients, the page compares the answers to
one question.
"""

NOTICE = "Research use only; not a medical device."
"""What the server, the demo and the command line tell whoever starts or sees them."""
