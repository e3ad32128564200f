"""Names that settings may have without another package's help, for editors and shells that complete them.

The tables that they come from load torch; tests compare the two.
"""

CRITERIA = (
    "hidden_cosine",
    "perplexity",
    "kl",
    "block_influence",
    "angular_block",
    "bridge_residual",
    "deepest",
    "reverse",
    "taylor",
    "magnitude_l1",
    "magnitude_l2",
    "task_metric",
    "laco",
    "fixed",
    "random",
)
OBJECTIVES = ("kd", "healing", "healing_aux", "sft", "sgr", "linear_bridge", "none")
PROBES = ("degeneration", "arithmetic", "code_failures", "speculative")
SUITES = (
    "reasoning",
    "language",
    "knowledge",
    "multilingual",
    "classification",
    "generative",
    "generative_instruct",
)
TASKS = (
    "blimp_sample",
    "humaneval_plus",
    "humaneval_plus_instruct",
    "mbpp_plus",
    "mbpp_plus_instruct",
    "wikitext2_prefix",
    "xsum",
)
"""Tasks that come with the project; lm-eval has thousands: `iterabre ls tasks`."""

TEXTS = ("iterabre-appendix-a", "wikitext-2-raw-test", "wikitext-2-raw-validation")
