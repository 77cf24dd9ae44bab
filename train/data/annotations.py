"""Texts that people label, and what they send back: JSON lines, doccano, Label Studio.

* ``jsonl``: ``{"id", "text", "entities": [{"start", "end", "label", "confidence"}], "confidence"}`` a line;
* ``doccano``: ``{"text", "label": [[start, end, type]], "sentence": id}`` a line, for its sequence labelling; it keeps
  other keys as metadata, and ``id`` is its own;
* ``label_studio``: a JSON list of tasks with predictions, for a project with ``<Labels name="label" toName="text">``
  and ``<Text name="text" value="$text"/>``.

Places count characters (code points) from 0, the end not included, as both tools do today. Older versions of Label
Studio wrote places in UTF-16 (its issues 1008, 1347): an exported region carries its text, so both are tried. An export
is read whatever its format, which its first character tells.
"""

import hashlib
import json
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args

from jaxmodels.cnn_cnn_lstm.schemes import tags_of
from jaxmodels.errors import UserError
from train.data.conll import read_text
from train.data.spans import LISTS, Span, entities_of, parse_line, word_type
from train.runtime.config import did_you_mean
from train.runtime.files import write_atomic

Format = Literal["jsonl", "doccano", "label_studio"]
FORMATS = get_args(Format)
SHOWN = 10  # ids that an error names
NAME, TEXT = "label", "text"  # of the controls in Label Studio


class Item(NamedTuple):
    """A text with its entities. confidences: of the entities, and of the whole; none for what people have labelled.
    where: file and place that it was read from."""

    id: str
    text: str
    spans: tuple[Span, ...]
    confidences: tuple[float, ...] = ()
    confidence: float | None = None
    where: str = ""


def identity(text: str) -> str:
    """The id of a text: the same text has the same, whatever tool it went through."""
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()[:16]


# Out


def write_items(path: str | Path, items: Sequence[Item], kind: str) -> Path:
    """Whole or not at all. Raises UserError for a format that is not known."""
    if kind not in FORMATS:
        raise UserError(f"format {kind!r} is unknown; {did_you_mean(kind, FORMATS)}")
    if kind == "label_studio":
        text = json.dumps([_task(item) for item in items], ensure_ascii=False, indent=1) + "\n"
    else:
        row = _doccano if kind == "doccano" else _own
        text = "".join(json.dumps(row(item), ensure_ascii=False) + "\n" for item in items)
    return write_atomic(Path(path), lambda file: file.write(text.encode()))


def _own(item: Item) -> dict[str, Any]:
    entities = [{"start": span.start, "end": span.stop, "label": span.type} for span in item.spans]
    for entity, sure in zip(entities, item.confidences, strict=False):
        entity["confidence"] = round(sure, 4)
    whole = {} if item.confidence is None else {"confidence": round(item.confidence, 4)}
    return {"id": item.id, "text": item.text, "entities": entities, **whole}


def _doccano(item: Item) -> dict[str, Any]:
    return {"text": item.text, "label": [list(span) for span in item.spans], "sentence": item.id}


def _task(item: Item) -> dict[str, Any]:
    result = [{"id": f"{item.id}-{i}", "from_name": NAME, "to_name": TEXT, "type": "labels",
               "value": {"start": span.start, "end": span.stop, "text": item.text[span.start:span.stop],
                         "labels": [span.type]}} for i, span in enumerate(item.spans)]
    for region, sure in zip(result, item.confidences, strict=False):
        region["score"] = round(sure, 4)
    whole = {} if item.confidence is None else {"score": round(item.confidence, 4)}
    return {"data": {"text": item.text, "sentence": item.id},
            "predictions": [{"model_version": "jaxmodels", **whole, "result": result}]}


# In


def read_items(path: str | Path, counts: Counter[str] | None = None) -> list[Item]:
    """The labelled texts of an export. counts: gets what was left out (``not_labelled``: tasks without annotation,
    or skipped; ``other_regions``; ``further_labels`` of a region) and ``utf16`` for regions whose places were in that.

    Raises UserError with file and place for what does not fit.
    """
    path, counts = Path(path), Counter() if counts is None else counts
    text = read_text(path, counts)
    if text.lstrip()[:1] == "[":
        try:
            tasks = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise UserError(f"{path} is not JSON ({error}); export it again") from None
        found = [_from_task(task, f"{path}: task {i + 1}", counts) for i, task in enumerate(tasks)]
        return [item for item in found if item is not None]
    return [_from_line(line, f"{path}:{number}") for number, line in enumerate(text.split("\n"), 1) if line.strip()]


def matched(items: Iterable[Item], pool: Mapping[str, str]) -> dict[str, Item]:
    """The items by id. pool: id -> text. A text decides, for tools may lose ids; of one that comes twice, the last.

    Raises UserError with the ids (or the beginnings of texts without one) that are not of the pool.
    """
    found, strangers = {}, []
    for item in items:
        known = identity(item.text)
        if known in pool:
            found[known] = item._replace(id=known)
        else:
            strangers.append(item)
    if strangers:
        names = [f"{item.id or repr(item.text[:30])} ({item.where})" for item in strangers[:SHOWN]]
        changed = sum(item.id in pool for item in strangers)
        told = f" ({changed} with another text than the pool's)" if changed else ""
        more = f" and {len(strangers) - SHOWN} more" if len(strangers) > SHOWN else ""
        raise UserError(f"{len(strangers)} exported texts are not of the pool{told}: {', '.join(names)}{more}; give "
                        "the pool that the batch was chosen from")
    return found


def item_tags(item: Item, places: Sequence[tuple[int, int]], counts: Counter[str]) -> list[str]:
    """IOB2 tags of the words of an item, which are at `places` in its text."""
    entities = entities_of(item.spans, places, item.text, item.where or item.id, counts)
    return tags_of(entities, len(places))


def _from_line(line: str, where: str) -> Item:
    row, text, spans = parse_line(line, where)
    if not any(key in row for key in LISTS):
        old = "annotations" in row
        raise UserError(f"{where}: {'annotations without the names of labels' if old else 'no entities'}; "
                        + ("export from doccano as JSONL (text label)" if old else
                           f"write a list {' or '.join(LISTS[:2])}, empty where there is none"))
    meta = row.get("meta") if isinstance(row.get("meta"), Mapping) else {}
    known = row.get("sentence") or meta.get("sentence") or row.get("id")
    return Item(str(known or ""), text, tuple(spans), where=where)


def _from_task(task: Any, where: str, counts: Counter[str]) -> Item | None:
    """Of Label Studio's JSON, or of its JSON_MIN, where the task's data and the regions stand side by side."""
    data = task.get("data", task) if isinstance(task, Mapping) else None
    text = data.get(TEXT) if isinstance(data, Mapping) else None
    if not isinstance(text, str):
        raise UserError(f"{where} has no text; export a project whose tasks have $text")
    if "data" in task:
        made = _list(task.get("annotations", task.get("completions")), f"{where}: annotations")  # so before 1.0
        if not all(isinstance(one, Mapping) for one in made):  # some of its interfaces give their ids alone
            raise UserError(f"{where}: annotations without regions; export as JSON")
        done = [one for one in made if not one.get("was_cancelled")]
        if not done:
            counts["not_labelled"] += 1
            return None
        regions = done[-1].get("result")  # of several annotators the last; agreement is theirs to settle
    else:
        regions = task.get(NAME)
    spans = tuple(span for i, region in enumerate(_list(regions, f"{where}: regions"))
                  if (span := _region(region, text, f"{where}, region {i + 1}", counts)) is not None)
    return Item(str(data.get("sentence") or ""), text, spans, where=where)


def _list(value: Any, where: str) -> list[Any]:
    if not isinstance(value, list | None):
        raise UserError(f"{where} are {str(value)[:60]!r}, not a list; export as JSON")
    return value or []


def _region(region: Mapping[str, Any], text: str, where: str, counts: Counter[str]) -> Span | None:
    value = region.get("value", region) if isinstance(region, Mapping) else None
    labels = value.get("labels") if isinstance(value, Mapping) else None
    # A choice or a comment beside the entities; a relation between two of them may have labels, but has no place.
    if not labels or region.get("type") == "relation":
        counts["other_regions"] += 1
        return None
    if not isinstance(labels, list) or not isinstance(labels[0], str):
        raise UserError(f"{where}: labels are {str(labels)[:60]!r}, not a list of names; export as JSON")
    if len(labels) > 1:  # an entity has one type
        counts["further_labels"] += len(labels) - 1
    try:
        start, stop = int(value["start"]), int(value["end"])
    except (KeyError, TypeError, ValueError):
        raise UserError(f"{where} has no start and end; export as JSON") from None
    told = value.get("text")
    if isinstance(told, str) and text[start:stop] != told:
        units = text.encode("utf-16-le", "surrogatepass")
        before, inside = units[:2 * start], units[2 * start:2 * stop]
        if inside.decode("utf-16-le", "replace") != told:
            raise UserError(f"{where}: characters {start}..{stop} of the text are {text[start:stop]!r}, the region "
                            f"says {told!r}; text and regions do not belong together")
        counts["utf16"] += 1
        start = len(before.decode("utf-16-le", "replace"))
        stop = start + len(told)
    return Span(start, stop, word_type(labels[0], where))
