"""Names of methods and budgets. Imports nothing: `jaxmodels list` reads it."""

BUDGETS = (0.01, 0.02, 0.05, 0.1, 0.2, 0.3, 0.5, 0.7, 0.9, 1.0)
PRIMARY = "ig_gate"  # what random_matched matches and bottom turns round: its scores have most examples behind them
DRAWN = ("random", "random_matched")  # once for each random mask
SCORED = ("activation", "activation_quantile", "activation_contrast", "ig_site", "ig_gate", "ig_abs", "grad_x_act")
METHODS = (*DRAWN, "bottom", *SCORED)
SITE_METHODS = ("random", "activation", "ig_gate")  # of budgets for one site
RETRAINED = ("ig_gate", "activation", *DRAWN)  # with the mask in place
NEEDED = (*DRAWN, "activation", "ig_gate")  # that are lost too, not only kept: those of the statements


def of(methods: tuple[str, ...], direction: str) -> tuple[str, ...]:
    """Those that are tried in a direction, keep or drop."""
    return methods if direction == "keep" else tuple(method for method in methods if method in NEEDED)
