"""The one shape alphabet of the library (house_style.md section 8).

| letter | dimension                | letter | dimension                       |
|--------|--------------------------|--------|---------------------------------|
| B      | batch                    | E      | experts                         |
| T      | query length (tokens)    | s      | neurons of one expert           |
| S      | key length               | C      | capacity                        |
| D      | model width              | L      | layers                          |
| F      | hidden width of the FFN  | V      | vocabulary                      |
| N      | query heads              | A      | languages                       |
| K      | key-value heads          | G      | query heads that share one key  |
| H      | width of one head        | M      | rows of a grouped product       |

Public functions spell shapes with these letters, ``Float[Array, "B T D"]``; jaxtyping checks them in the tests.
"""

from jaxtyping import Array, Bool, Float, Int

__all__ = ["Array", "Bool", "Float", "Int"]
