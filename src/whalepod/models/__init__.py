"""The DeepSeek family as plain single-device PyTorch; parallelism is applied from outside.

Shape letters: B batch, S positions of the queries, L positions of the keys, T = B x S tokens,
D hidden size, H heads, C latent (KV) rank, R rotary width, V vocabulary, E experts,
K experts per token, N rows of the grouped products, I intermediate width.
Sizes that a shard changes (heads, experts, widths) are read from the tensors.
"""
