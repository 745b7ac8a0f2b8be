"""Names of what our processor adds to an image's data in vLLM."""

MASK = "vitos_mask"  # bool (N,): which visual tokens are kept
FUSION = "vitos_fusion"  # float64 (2,): see request.fusion_of
KEY = "vitos_key"  # int64 (2,): see images.content_key
EMBEDDINGS = "vitos_embeddings"  # (V, hidden): visual tokens that were made elsewhere
POSITIONS = "vitos_positions"  # int64 (3, T + 1): see positions.as_given
