"""Names of methods and budgets. Imports nothing: `jaxmodels list` reads it."""

BUDGETS = (0.01, 0.02, 0.05, 0.1, 0.2, 0.3, 0.5, 0.7, 0.9, 1.0)
PRIMARY = "ig_gate"  # what bottom turns round: its scores have most examples behind them
MATCHED = {"random_matched": PRIMARY, "random_matched_activation": "activation"}  # controls, and whose counts they have
DRAWN = ("random", *MATCHED)  # once for each random mask
SCORED = ("activation", "activation_quantile", "activation_contrast", "ig_site", "ig_gate", "ig_abs", "grad_x_act")
METHODS = (*DRAWN, "bottom", *SCORED)
SITE_METHODS = ("random", "activation", "ig_gate")  # of budgets for one site
RETRAINED = ("ig_gate", "activation", "random", "random_matched")  # with the mask in place
JUDGED = ("activation", "ig_gate")  # the paper's two methods, which the statements are about
NEEDED = (*DRAWN, *JUDGED)  # that are lost too, not only kept


def controls(method: str) -> tuple[str, ...]:
    """What a method is compared with: random masks, and those with its number of neurons in every site and layer."""
    return ("random", *(control for control, like in MATCHED.items() if like == method))


def of(methods: tuple[str, ...], direction: str) -> tuple[str, ...]:
    """Those that are tried in a direction, keep or drop."""
    return methods if direction == "keep" else tuple(method for method in methods if method in NEEDED)
