"""What `scripts/make_small.py` is made of: pictures, questions, features, the projector's start, and the training."""
