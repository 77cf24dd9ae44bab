"""Files of sources, plain and gzip: what is read, and what is told of a damaged one."""

import gzip

import pytest

from jaxmodels.errors import UserError
from train.data.tables import json_lines, one, table, text_of

TEXT = '\ufeffid\tname\nA\t5" wide\nB\tnaïve\n'


@pytest.mark.parametrize("packed", [lambda raw: raw, gzip.compress])
def test_plain_and_gzip_are_told_by_their_bytes(packed, tmp_path):
    path = tmp_path / "table"
    path.write_bytes(packed(TEXT.encode()))
    assert text_of(path) == TEXT[1:]
    assert list(table(path, ("id",))) == [{"id": "A", "name": '5" wide'}, {"id": "B", "name": "naïve"}]
    path.write_bytes(packed(b'id,name\n"A, B",2\n'))
    assert list(table(path, ("name",), ",")) == [{"id": "A, B", "name": "2"}]
    path.write_bytes(packed(b'{"a": 1}\n{"a": 2}\n'))
    assert [line["a"] for line in json_lines(path)] == [1, 2]


@pytest.mark.parametrize("content, told", [
    (gzip.compress(b"id\tname\n" * 99, mtime=0)[:-9], "is damaged"), (b"id\xff\tname\n", "is damaged"),
    (b"id\tname\nA\n", "line 2 is cut short"), (b"id\n", "has no column 'name'; it has id"),
    (b"", "has no column 'id'; it has none"),
])
def test_damaged_tables(content, told, tmp_path):
    (tmp_path / "table").write_bytes(content)
    with pytest.raises(UserError, match=told) as error:
        list(table(tmp_path / "table", ("id", "name")))
    assert "\n" not in str(error.value)


def test_other_damage(tmp_path):
    (tmp_path / "lines").write_text('{"a": 1}\n{"a":\n')
    with pytest.raises(UserError, match="line 2 is not JSON"):
        list(json_lines(tmp_path / "lines"))
    with pytest.raises(UserError, match="source: .*none.tsv is missing; put none.tsv there"):
        one(tmp_path, "none.tsv", "source")
    assert one(tmp_path, "lines", "source") == one(tmp_path / "lines", "other.tsv", "source") == tmp_path / "lines"
