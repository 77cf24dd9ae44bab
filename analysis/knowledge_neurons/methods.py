"""Names of methods and budgets. Imports nothing: `jaxmodels list` reads it."""

BUDGETS = (0.01, 0.02, 0.05, 0.1, 0.2, 0.3, 0.5, 0.7, 0.9, 1.0)
PRIMARY = "ig_gate"  # what random_matched matches and bottom turns round: its scores have most examples behind them
DRAWN = ("random", "random_matched")  # once for each seed
SCORED = ("activation", "activation_quantile", "activation_contrast", "ig_site", "ig_gate", "ig_abs", "grad_x_act")
METHODS = (*DRAWN, "bottom", *SCORED)
