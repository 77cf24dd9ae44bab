"""Tunes the grouped products at the benchmark's points on this device, and keeps what was fastest for later calls.

    jaxmodels bench tune_grouped_matmul [--out FILE.json]
    python -m benchmarks.tune_grouped_matmul --points "E=64 top-4" --repeats 5 [--out FILE.json]      # some, or quicker

Every implementation that takes a config and runs here; both kinds of sizes, even and Zipf. The table goes to
``$JAXMODELS_CACHE/tuning``, where `grouped_matmul` looks a call up; a table that is to be shipped is such a file,
copied to jaxmodels/kernels/grouped_matmul/tuning. $JAXMODELS_TUNING=0 ignores both.
"""

import argparse
import sys
from collections.abc import Sequence
from typing import Any

from benchmarks._grouped_peers import choose, one_line
from benchmarks._report import check_out, machine, publish
from benchmarks._shapes import ACCELERATOR, CPU, Point
from benchmarks.grouped_matmul import PRODUCTS, _driver
from jaxmodels.errors import UserError

COLUMNS = ("point", "product", "implementation", "config", "even ms", "zipf ms", "default even ms", "default zipf ms",
           "tried", "note")  # fmt: skip
MOST_FLOPS = 1e11  # of a product on a CPU: above, a candidate takes seconds a call, and there are dozens


def main(out: str | None, points: Sequence[str] = (), products: Sequence[str] = PRODUCTS, repeats: int = 15) -> None:
    """Times, prints a table, records, and writes ``out``."""
    check_out(out)
    import jax
    import jax.numpy as jnp

    from jaxmodels.kernels.grouped_matmul import api, tuning

    on_cpu = jax.default_backend() == "cpu"
    chosen = choose(CPU if on_cpu else ACCELERATOR, points)
    names = [name for name, one in api._IMPLEMENTATIONS.items()
             if one.takes_config and one.unfit((8, 64), 1, jnp.dtype(jnp.bfloat16)) is None]  # fmt: skip
    if not names:
        raise UserError(f"no implementation that takes a config runs on {jax.default_backend()}; nothing to tune")
    rows, path = [], None
    for point in chosen:
        if on_cpu and 2.0 * point.shape[0] * point.shape[1] * point.shape[2] > MOST_FLOPS:
            rows.append({"point": point.name, "note": "not tuned: seconds a call"})
            continue
        for name in names:
            found = [tune(point, name, product, repeats) for product in products]
            rows += [row for _, row in found]
            if tuned := [one for one, _ in found if one is not None]:
                path = tuning.record(tuned)  # after every point: a tuning that is cut short keeps what it has
        print(".", end="", file=sys.stderr, flush=True)
    print(file=sys.stderr)
    notes = ["the fastest by the geometric mean of both times; config None: the default"]
    notes += [f"recorded in {path}"] if path else []
    publish("configurations of the grouped products", rows, COLUMNS, machine(("libtpu",)) | _driver(), notes, out)


def tune(point: Point, implementation: str, product: str, repeats: int) -> tuple[Any, dict[str, Any]]:
    """What the tuner found, or None, and its row."""
    from jaxmodels.kernels.grouped_matmul import tuning

    m, k, n, groups = point.shape
    inner, columns = (n, k) if product == "dX" else (k, n)  # as the product is called
    row = {"point": point.name, "product": product, "implementation": implementation}
    try:
        found = tuning.tune(product, m, inner, columns, groups, point.dtype, implementation, repeats=repeats)
    except Exception as error:  # out of memory, a compiler's limit: the other points still count
        return None, row | {"note": f"not tuned: {type(error).__name__}: {one_line(error)}"}
    row |= {f"{kind} ms": ms for kind, ms in found.ms.items()}
    row |= {f"default {kind} ms": ms for kind, ms in found.default_ms.items()}
    note = f"{len(found.discarded)} discarded: {next(iter(found.discarded.values()))}" if found.discarded else ""
    return found, row | {"config": str(found.config), "tried": len(found.tried), "note": note, "rows": m,
                         "inner": inner, "columns": columns, "groups": groups, "dtype": found.dtype,
                         "all": found.tried, "discarded": found.discarded}  # fmt: skip


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", help="a JSON file, with every candidate's times")
    parser.add_argument("--points", nargs="+", default=(), help="names of points of the benchmark; default: all")
    parser.add_argument("--products", nargs="+", default=PRODUCTS, choices=PRODUCTS)
    parser.add_argument("--repeats", type=int, default=15)
    try:
        main(**vars(parser.parse_args()))
    except UserError as error:
        sys.exit(str(error))
