"""Names of the pruning rules: apart from what computes them, so that reading a config imports nothing heavy."""

# name -> (score, rule). ``contribution`` rules are the default of jaxmodels: frequency misses rare, huge neurons.
SCHEMES = {
    "frequency adaptive": ("frequency", "adaptive"),
    "frequency uniform": ("frequency", "uniform"),
    "frequency global": ("frequency", "global"),
    "contribution adaptive": ("contribution", "adaptive"),
    "contribution uniform": ("contribution", "uniform"),
    "deviation uniform": ("deviation", "uniform"),
    "neuron frequency uniform": ("neuron_frequency", "uniform"),
    "neuron contribution uniform": ("neuron_contribution", "uniform"),
}
CONTROLS = ("lowest frequency", "weight norm", "union of the panel")
RULES = (*SCHEMES, *CONTROLS)
MAIN, BEST = "frequency adaptive", "contribution uniform"
