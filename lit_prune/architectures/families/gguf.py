"""Which families llama.cpp's architecture ``deci`` computes as transformers does."""

# RMS norm before attention and MLP, rotary positions on whole heads, a SiLU-gated MLP; biases on the projections may be there.
# Families that add something else to the same layer (norms of q and k, multipliers, soft-capping, 1 + weight norms) are not.
DECI_MODEL_TYPES = ("llama", "mistral", "qwen2")
