"""How ICD and MeSH codes are spelled: what is one, what it lies below, what a wrong one may have meant."""

import difflib
import re
from collections.abc import Iterable, Mapping, Sequence

from jaxmodels.errors import UserError

SYSTEMS = {  # the spelling of each; V codes (V10.1) and three-digit MeSH numbers fit several
    "ICD-10": re.compile(r"[A-Z]\d[0-9A-Z](\.[0-9A-Z]{1,4})?"),
    "ICD-9": re.compile(r"(\d{3}|V\d{2})(\.\d{1,2})?|E\d{3}(\.\d)?"),
    "MeSH": re.compile(r"[A-Z]\d{2}(\.\d{3})*"),
}


def path(code: str) -> list[str]:
    """From below the root to the code: its first letter, then every prefix that ends at a dot (section 3.1)."""
    parts = code.split(".")
    prefixes = [".".join(parts[:i + 1]) for i in range(len(parts))]
    return prefixes if len(parts[0]) == 1 else [code[0], *prefixes]


def fits(code: str) -> set[str]:
    """The systems in which a code is well-formed."""
    return {name for name, pattern in SYSTEMS.items() if pattern.fullmatch(code)}


def check(codes: Sequence[str], counts: Mapping[str, int] | None = None) -> None:
    """Raises UserError for no code, for ICD-9 among ICD-10 codes, and for malformed ones, told with their counts.

    Codes most of which belong to no known system are taken for a user's own, which need no more than a name between
    dots.
    """
    if not codes:
        raise UserError("no code is given; at least one is needed to make a tree")
    found = [fits(code) for code in codes]
    if all(found) and set.intersection(*found):
        return
    nine, ten = ([code for code, systems in zip(codes, found, strict=True) if is_in in systems and other not in systems]
                 for is_in, other in (("ICD-9", "ICD-10"), ("ICD-10", "ICD-9")))
    if ten and any("ICD-10" not in fits(_dotted(code)) for code in nine):  # E119 may be E11.9 without its dot
        raise UserError(f"ICD-9 and ICD-10 codes are mixed: {len(nine)} such as {nine[0]!r} and {len(ten)} such as "
                        f"{ten[0]!r}; translate or drop one kind")
    system = max(SYSTEMS, key=lambda name: sum(name in systems for systems in found))
    wrong = [code for code, systems in zip(codes, found, strict=True) if system not in systems]
    if 2 * len(wrong) >= len(codes):  # codes of a user's own
        system, wrong = "dotted", [code for code in codes if not all(code.split("."))]
    if wrong:
        valid = [code for code in codes if code not in set(wrong)]
        raise UserError(f"{len(wrong)} of {len(codes)} codes are not well-formed {system} codes: "
                        f"{listed(wrong, valid, counts)}; correct or drop them")


def meant(code: str) -> str | None:
    """The well-formed code that one is with capitals and a dot, ``A41.9`` for ``a419``; None for those without any."""
    dotted = _dotted(code.upper())
    return dotted if not fits(code) and fits(dotted) else None


def listed(wrong: Sequence[str], valid: Iterable[str], counts: Mapping[str, int] | None = None, most: int = 5) -> str:
    """The first wrong codes, the most frequent where counts are known: ``'A419', 12 times (did you mean 'A41.9'?)``."""
    counts = counts or {}
    shown = []
    for code in sorted(wrong, key=lambda code: -counts.get(code, 0))[:most]:
        told, times = hint(code, valid), counts.get(code)
        often = "" if times is None else ", once" if times == 1 else f", {times} times"
        shown.append(told.replace(repr(str(code)), f"{str(code)!r}{often}", 1))
    return "; ".join(shown) + ("; ..." if len(wrong) > most else "")


def hint(code: str, valid: Iterable[str]) -> str:
    """``'A419' (did you mean 'A41.9'?)``: a wrong code and the nearest valid one, if any is near."""
    text = str(code)
    valid = valid if hasattr(valid, "__getitem__") else list(valid)
    plain = text.strip().upper().replace(",", ".")
    dotted = _dotted(plain)
    for candidate in (plain, *(dotted[:end].rstrip(".") for end in range(len(dotted), 2, -1))):
        if candidate != text and candidate in valid:
            return f"{text!r} (did you mean {candidate!r}?)"
    nine = fits(text) == {"ICD-9"} and "ICD-10" not in fits(dotted)
    if nine and any("ICD-10" in fits(other) for other in list(valid)[-3:]):
        return f"{text!r} (an ICD-9 code, and these are ICD-10)"
    if dotted != text and fits(dotted):
        return f"{text!r} (did you mean {dotted!r}?)"
    near = difflib.get_close_matches(text, [name for name in valid if name[:1] == plain[:1]], n=1, cutoff=0.5)
    return f"{text!r} (did you mean {near[0]!r}?)" if near else repr(text)


def _dotted(code: str) -> str:
    return code if "." in code or len(code) <= 3 else f"{code[:3]}.{code[3:]}"
