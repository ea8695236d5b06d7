"""Numbers that others have published, to stand beside ours. None of them was measured here."""

DUO = "DuoAttention (Xiao et al., ICLR 2025, arXiv 2410.10819)"

# LongBench, average of 21 tasks.
LONGBENCH_METHODS = ("full", "H2O", "StreamingLLM", "TOVA", "DuoAttention")
LONGBENCH = (
    ("Llama-2-7B-32K-Instruct, 25% retrieval heads", (37.52, 26.84, 27.80, 29.78, 34.49)),
    ("Llama-3-8B-Instruct-1048k, 50% retrieval heads", (40.08, 35.76, 32.26, 35.55, 40.21)),
)

# RULER at 4K, Llama-3.1-8B-Instruct, kvpress' leaderboard: dense prefill, and the question is not
# seen when the cache is cut. By percent of streaming heads.
RULER_STREAMING = (25.0, 50.0, 75.0, 87.5)
RULER_FULL = 95.69
RULER = (
    ("learned gates", (95.67, 95.31, 73.20, 26.50)),
    ("a score without training, in the same tool", (95.54, 95.66, 93.71, 35.71)),
)
